//! The promises of the search: nothing better by hand, nothing that depends on the order of the nodes, no panic whatever it is given.

use super::{
    tests::{GB, model, node, options},
    *,
};
use mlx_cluster_common::{ids::NodeId, links::Medium, units::Bytes};
use proptest::{
    prelude::{ProptestConfig, prop},
    prop_assert, prop_assert_eq, proptest,
};

fn link(from: &str, to: &str, round_trip_us: f64, gigabytes: f64, medium: Medium) -> LinkFacts {
    LinkFacts {
        from: NodeId(format!("id-{from}")),
        to: NodeId(format!("id-{to}")),
        interface: String::new(),
        medium,
        address: format!("{to}-{medium}"),
        round_trip_seconds: round_trip_us / 1e6,
        bytes_per_second: gigabytes * 1e9,
    }
}

fn mesh(names: &[&str], round_trip_us: f64, gigabytes: f64, medium: Medium) -> Vec<LinkFacts> {
    let pairs = names.iter().flat_map(|from| names.iter().map(move |to| (*from, *to)));
    pairs.filter(|(from, to)| from != to).map(|(from, to)| link(from, to, round_trip_us, gigabytes, medium)).collect()
}

fn names(plan: &Plan) -> Vec<&str> {
    plan.ranks().map(|rank| rank.node_name.as_str()).collect()
}

fn fast(plan: &Plan) -> f64 {
    plan.prediction.as_ref().expect("bandwidths are known").decode_tokens_per_second
}

#[test]
fn a_group_is_taken_where_links_are_fast_and_one_worker_where_not() {
    let (spec, map) = model(32, 4096, false);
    let nodes = [node("a", 64 * GB, 50e9), node("b", 64 * GB, 50e9)];
    let planned = |links: &[LinkFacts]| plan(&spec, &map, &nodes, links, &options(Strategy::Auto)).expect("fits");
    let rdma = planned(&mesh(&["a", "b"], 20.0, 5.0, Medium::Thunderbolt));
    assert_eq!((rdma.stages.len(), rdma.stages[0].ranks.len()), (1, 2), "{rdma}");
    let single = rdma.alternatives.iter().find(|other| other.layout == "a:0-31").expect("one worker lost");
    assert!(single.reason.contains("slower"), "{rdma}");
    let slow = planned(&mesh(&["a", "b"], 20_000.0, 0.01, Medium::WiFi));
    assert_eq!((slow.stages.len(), slow.stages[0].ranks.len()), (1, 1), "{slow}");
    assert!(slow.alternatives.iter().any(|other| other.layout.contains("a+b") && other.reason.contains("on links")), "{slow}");
    let one_machine = planned(&mesh(&["a", "b"], 20.0, 5.0, Medium::Loopback));
    assert_eq!(one_machine.stages[0].ranks.len(), 1, "two workers of one machine share its memory: {one_machine}");
}

#[test]
fn a_cable_goes_before_wifi_and_the_way_is_shown() {
    let (spec, map) = model(8, 1024, false);
    let nodes = [node("a", 4 * GB, 50e9), node("b", 4 * GB, 50e9)];
    let mut links = mesh(&["a", "b"], 1000.0, 1.0, Medium::WiFi);
    links.extend(mesh(&["a", "b"], 800.0, 0.1, Medium::Ethernet));
    let stages = Some(vec!["a:0-3".parse().expect("a stage"), "b:4-7".parse().expect("a stage")]);
    let planned = plan(&spec, &map, &nodes, &links, &PlanOptions { stages: stages.clone(), ..options(Strategy::Auto) }).expect("fits");
    let ways = &planned.prediction.as_ref().expect("predicted").ways;
    assert_eq!(ways.iter().map(|way| way.address.as_deref()).collect::<Vec<_>>(), [Some("b-Ethernet"), Some("a-Ethernet")]);
    // 4 kB of f32 at 0.1 GB/s, half a round trip, and what the engines take.
    assert!((ways[0].seconds - (400e-6 + 41e-6 + 120e-6)).abs() < 1e-6, "{ways:?}");
    let unmeasured = plan(&spec, &map, &nodes, &[], &PlanOptions { stages, ..options(Strategy::Auto) }).expect("fits");
    assert!(unmeasured.to_string().contains("not measured, 1 Gb/s and 0.5 ms there and back assumed"), "{unmeasured}");
}

#[test]
fn throughput_takes_more_workers_than_latency() {
    let (spec, map) = model(32, 2048, false);
    let machines = ["a", "b", "c"];
    let nodes: Vec<_> = machines.iter().map(|name| NodeFacts { matmul_rate: 1e12, ..node(name, 64 * GB, 50e9) }).collect();
    let links = mesh(&machines, 1000.0, 1.0, Medium::Ethernet);
    let planned = |optimize| plan(&spec, &map, &nodes, &links, &PlanOptions { optimize, ..options(Strategy::Auto) }).expect("fits");
    let (latency, throughput) = (planned(Optimize::Latency), planned(Optimize::Throughput));
    assert_eq!(names(&latency), ["a"], "{latency}");
    assert_eq!((throughput.stages.len(), names(&throughput).len()), (3, 3), "{throughput}");
    let many = |plan: &Plan| plan.prediction.as_ref().expect("predicted").decode_tokens_per_second_of_many;
    assert!(many(&throughput) > 1.3 * many(&latency), "{throughput} {latency}");
}

#[test]
fn what_no_worker_holds_alone_goes_over_the_best_linked_ones() {
    let (spec, map) = model(16, 2048, false);
    let size = map.bytes(&spec.parts());
    let machines = ["a", "b", "c", "d"];
    let nodes: Vec<_> = machines.iter().map(|name| node(name, size * 7 / 10 + 600_000_000, 100e9)).collect();
    let mut links = mesh(&machines, 2000.0, 0.1, Medium::Ethernet);
    links.extend(mesh(&["b", "d"], 200.0, 2.0, Medium::Thunderbolt));
    let planned = plan(&spec, &map, &nodes, &links, &PlanOptions { context_tokens: Some(512), ..options(Strategy::Auto) }).expect("fits");
    assert_eq!(names(&planned), ["b", "d"], "{planned}");
}

#[test]
fn a_search_over_many_nodes_is_found_too() {
    let (spec, map) = model(40, 1024, true);
    let size = map.bytes(&spec.parts());
    let nodes: Vec<_> = (0..40).map(|i| node(&format!("n{i:02}"), 220_000_000 + size / 12, 100e9)).collect();
    let planned =
        plan(&spec, &map, &nodes, &[], &PlanOptions { context_tokens: Some(512), ..options(Strategy::Auto) }).expect("fits on many");
    assert!(planned.stages.len() > 8, "{planned}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn the_search_is_exact_stable_and_total(
        n_layers in 1u32..9,
        hidden in 1u32..5,
        tied: bool,
        throughput: bool,
        machines in prop::collection::vec((120u64..500, 1u32..5, 0u32..3), 1..5),
        ways in prop::collection::vec((0usize..5, 0usize..5, 1u32..3000, 1u32..40), 0..12),
    ) {
        let (spec, map) = model(n_layers, hidden * 64, tied);
        let nodes: Vec<_> = machines.iter().enumerate().map(|(i, (megabytes, speed, rate))| NodeFacts {
            matmul_rate: f64::from(*rate) * 1e11, ..node(&format!("n{i}"), megabytes * 1_000_000, f64::from(*speed) * 1e9)
        }).collect();
        let links: Vec<_> = ways.iter().map(|(a, b, us, gigabits)| {
            link(&format!("n{a}"), &format!("n{b}"), f64::from(*us), f64::from(*gigabits) / 8.0, Medium::Ethernet)
        }).collect();
        let optimize = if throughput { Optimize::Throughput } else { Optimize::Latency };
        let options = PlanOptions { optimize, context_tokens: Some(512), ..options(Strategy::Auto) };
        let planned = plan(&spec, &map, &nodes, &links, &options);
        let (mut reversed, mut relinked) = (nodes.clone(), links.clone());
        reversed.reverse();
        relinked.reverse();
        prop_assert_eq!(&planned, &plan(&spec, &map, &reversed, &relinked, &options));
        let Ok(planned) = planned else { return Ok(()) };
        prop_assert!(planned.ranks().all(|rank| rank.needed() <= rank.usable), "{}", planned);
        // No pipeline of two that somebody may write is better by more than what another worker has to bring.
        for (first, second) in nodes.iter().flat_map(|a| nodes.iter().map(move |b| (a, b))).filter(|(a, b)| a.id != b.id) {
            for cut in 1..n_layers {
                let stages = Some(vec![
                    mlx_cluster_common::plan::ToldStage { ranks: vec![(first.name.clone(), 1)], layers: 0..cut },
                    mlx_cluster_common::plan::ToldStage { ranks: vec![(second.name.clone(), 1)], layers: cut..n_layers },
                ]);
                let told = plan(&spec, &map, &nodes, &links, &PlanOptions { stages, ..options.clone() });
                if let (Ok(told), Optimize::Latency) = (told, optimize) {
                    prop_assert!(fast(&told) <= fast(&planned) * 1.06, "{} better than {}", told, planned);
                }
            }
        }
    }

    #[test]
    fn groups_of_any_shares_are_whole_or_refused(
        n_layers in 1u32..4,
        tied: bool,
        shares in prop::collection::vec(1u32..5, 1..6),
        usable in 100u64..900,
    ) {
        let (spec, map) = model(n_layers, 128, tied);
        let nodes: Vec<_> = (0..shares.len()).map(|i| node(&format!("n{i}"), usable * 1_000_000, 1e9)).collect();
        let ranks = shares.iter().enumerate().map(|(i, share)| (format!("n{i}"), *share)).collect();
        let stages = Some(vec![mlx_cluster_common::plan::ToldStage { ranks, layers: 0..n_layers }]);
        match plan(&spec, &map, &nodes, &[], &PlanOptions { stages, ..options(Strategy::Auto) }) {
            Ok(planned) => {
                let held: Bytes = planned.ranks().map(|rank| rank.weights).sum();
                prop_assert!(held >= Bytes(map.bytes(&spec.parts())), "{}", planned);
            }
            Err(why) => prop_assert!(matches!(why, WhyNot::ShareDoesNotFit { .. } | WhyNot::DoesNotFit { .. }), "{}", why),
        }
    }
}
