//! The planner's promises, on made-up models and machines.

use super::{costs::Costs, *};
use mlx_cluster_common::{
    architectures::read_spec,
    cache::KvQuantization,
    dtype::DType,
    ids::NodeId,
    spec::{NormKind, Weight},
    units::Bytes,
    weights::{TensorEntry, WeightIndex},
};
use proptest::{
    prelude::{ProptestConfig, prop},
    prop_assert, prop_assert_eq, proptest,
};
use serde_json::json;

/// A llama with `n_layers` layers, in f32, and its weights.
pub(crate) fn model(n_layers: u32, hidden: u32, tied: bool) -> (ModelSpec, WeightMap) {
    model_of(&json!({"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": n_layers, "intermediate_size": 2 * hidden,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 1024, "tie_word_embeddings": tied,
        "max_position_embeddings": 8192}))
}

/// The model of a config, and its weights in f32.
pub(super) fn model_of(config: &serde_json::Value) -> (ModelSpec, WeightMap) {
    let spec = read_spec(config).expect("a valid config");
    let mut index = WeightIndex::default();
    let mut add = |name: String, shape: Vec<u64>| {
        let bytes = shape.iter().product::<u64>() * 4;
        index.tensors.insert(name, TensorEntry { file: "model.safetensors".into(), dtype: DType::F32, shape, offset: 0, bytes });
    };
    for weight in spec.parts().into_iter().flat_map(|part| spec.weights(part)) {
        let name = format!("{}.weight", weight.path());
        match weight {
            Weight::Norm(norm) if norm.kind == NormKind::RmsUnweighted => {}
            Weight::Norm(norm) => add(name, vec![norm.dims.into()]),
            Weight::Tensor(tensor) => add(tensor.name.clone(), tensor.shape.iter().map(|dim| u64::from(*dim)).collect()),
            Weight::Embedding(embedding) => add(name, vec![embedding.vocab_size.into(), embedding.dims.into()]),
            Weight::Linear(linear) => add(name, vec![linear.output_dims.into(), linear.input_dims.into()]),
            _ => unreachable!("these models have no others"),
        }
    }
    let map = WeightMap::assign(&spec, &index).expect("complete");
    (spec, map)
}

pub(crate) fn node(name: &str, usable: u64, bandwidth: f64) -> NodeFacts {
    NodeFacts {
        id: NodeId(format!("id-{name}")),
        name: name.into(),
        version: "0".into(),
        os: "test".into(),
        chip: format!("chip-{usable}"),
        usable_memory: Bytes(usable),
        total_memory: Bytes(usable),
        memory_bandwidth: bandwidth,
        matmul_rate: 0.0,
        addresses: Vec::new(),
    }
}

pub(super) fn options(strategy: Strategy) -> PlanOptions {
    PlanOptions { model: "test".into(), strategy, min_workers: 1, ..Default::default() }
}

fn ranges(plan: &Plan) -> Vec<Range<u32>> {
    plan.stages.iter().map(|stage| stage.layers.clone()).collect()
}

pub(super) const GB: u64 = 1_000_000_000;

#[test]
fn auto_takes_one_node_when_that_is_enough_and_more_when_not() {
    let (spec, map) = model(8, 1024, false);
    let plan_for = |usable| plan(&spec, &map, &[node("b", usable, 0.0), node("a", usable, 0.0)], &[], &options(Strategy::Auto));
    let roomy = plan_for(8 * GB).expect("fits");
    assert_eq!((roomy.stages.len(), roomy.stages[0].layers.clone(), roomy.stages[0].ranks[0].node_name.as_str()), (1, 0..8, "a"));
    assert!(roomy.why.contains("a holds the whole model") && roomy.why.contains("not used: b"), "{}", roomy.why);
    assert_eq!((roomy.context_tokens, roomy.cache_tokens), (8192, 16 * 8192));
    let tight = plan_for(500_000_000).expect("fits on two");
    assert_eq!(ranges(&tight), vec![0..4, 4..8]);
    assert!(tight.why.contains("2 stages"), "{}", tight.why);
}

#[test]
fn a_pipeline_uses_all_nodes_but_no_more_than_layers() {
    let (spec, map) = model(3, 64, true);
    let nodes: Vec<_> = ["d", "c", "b", "a"].iter().map(|name| node(name, 4 * GB, 50e9)).collect();
    let plan = plan(&spec, &map, &nodes, &[], &options(Strategy::Pipeline)).expect("fits");
    assert_eq!(ranges(&plan), vec![0..1, 1..2, 2..3]);
    assert_eq!(plan.stages.iter().map(|stage| stage.ranks[0].node_name.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
    let embedding = map.part_bytes(Part::Embedding);
    assert!(
        plan.stages[0].ranks[0].weights.0 > embedding && plan.stages[2].ranks[0].weights.0 > embedding,
        "a tied head needs the embedding at both ends"
    );
    assert!(plan.stages[1].ranks[0].weights.0 < embedding);
}

#[test]
fn speed_decides_when_memory_is_plentiful_and_memory_when_not() {
    let (spec, map) = model(12, 1024, true);
    let nodes = |fast: u64, slow: u64| [node("fast", fast, 30e9), node("slow", slow, 10e9)];
    let by_speed = plan(&spec, &map, &nodes(64 * GB, 63 * GB), &[], &options(Strategy::Pipeline)).expect("fits");
    assert_eq!(ranges(&by_speed)[0], 0..9, "{}", by_speed.why);
    assert!(by_speed.why.contains("bandwidth"));
    let by_memory = plan(&spec, &map, &nodes(450_000_000, 440_000_000), &[], &options(Strategy::Pipeline)).expect("fits");
    assert_eq!(ranges(&by_memory)[0], 0..6, "{}", by_memory.why);
    assert!(by_memory.why.contains("usable memory"));
}

#[test]
fn noise_between_equal_machines_does_not_split_unevenly() {
    let (spec, map) = model(8, 1024, true);
    let nodes = [node("a", 4 * GB, 80e9), node("b", 4 * GB, 31e9)];
    assert_eq!(ranges(&plan(&spec, &map, &nodes, &[], &options(Strategy::Pipeline)).expect("fits"))[0].len(), 4);
}

#[test]
fn a_split_is_honoured_or_refused_with_numbers() {
    let (spec, map) = model(8, 1024, false);
    let nodes = [node("a", 4 * GB, 0.0), node("b", 3 * GB, 0.0)];
    let with = |split: &[u32], nodes: &[NodeFacts]| {
        plan(&spec, &map, nodes, &[], &PlanOptions { split: Some(split.to_vec()), ..options(Strategy::Pipeline) })
    };
    assert_eq!(ranges(&with(&[5, 3], &nodes).expect("fits")), vec![0..5, 5..8]);
    assert_eq!(with(&[5, 4], &nodes), Err(WhyNot::SplitSum { split: "5,4".into(), sum: 9, layers: 8 }));
    assert_eq!(with(&[8, 0], &nodes), Err(WhyNot::EmptyStage { split: "8,0".into() }));
    assert_eq!(with(&[2, 2, 4], &nodes), Err(WhyNot::TooFewNodes { found: 2, wanted: 3 }));
    let small = [node("a", 4 * GB, 0.0), node("mini", 200_000_000, 0.0)];
    let message = with(&[1, 7], &small).expect_err("too much for mini").to_string();
    assert!(message.contains("mini") && message.contains("200.0 MB") && message.contains("7 layers"), "{message}");
}

#[test]
fn the_context_is_lowered_to_fit_unless_told() {
    let (spec, map) = model(8, 1024, false);
    let nodes = [node("a", 500_000_000, 0.0)];
    let lowered = plan(&spec, &map, &nodes, &[], &options(Strategy::Auto)).expect("fits with less");
    assert!(lowered.context_tokens < 8192 && lowered.context_tokens >= 512 && lowered.context_tokens.is_multiple_of(256), "{lowered}");
    assert!(lowered.why.contains("lowered from 8192"), "{}", lowered.why);
    let told = PlanOptions { context_tokens: Some(8192), ..options(Strategy::Auto) };
    let message = plan(&spec, &map, &nodes, &[], &told).expect_err("too long").to_string();
    assert!(message.contains("a has 500.0 MB usable") && message.contains("8192 tokens"), "{message}");
    let longer = PlanOptions { context_tokens: Some(9000), ..options(Strategy::Auto) };
    assert_eq!(plan(&spec, &map, &nodes, &[], &longer), Err(WhyNot::ContextTooLong { asked: 9000, max: 8192 }));
}

#[test]
fn caches_are_counted_as_they_will_be_kept() {
    let (spec, map) = model(8, 1024, false);
    let nodes = [node("a", 540_000_000, 0.0)];
    let with = |caches| plan(&spec, &map, &nodes, &[], &PlanOptions { caches, ..options(Strategy::Auto) }).expect("fits");
    let plain = with(CacheOptions::default());
    let quantization = |start| KvQuantization::new(4, None, Some(start)).expect("allowed");
    let quantised = with(CacheOptions { quantization: Some(quantization(0)), max_kv_size: None });
    // 256 numbers a head in f32 take 1024 bytes, in 4 bits with a scale and a bias for each 64 of them 160.
    assert_eq!(quantised.context_tokens, 8192, "{quantised}");
    assert!(plain.cache_tokens * 6 < quantised.cache_tokens, "{plain} {quantised}");
    assert!(
        quantised.why.contains("in 4 bits and groups of 64: a token takes 5.1 kB in the caches instead of 32.8 kB"),
        "{}",
        quantised.why
    );
    let late = with(CacheOptions { quantization: Some(quantization(100_000)), max_kv_size: None });
    assert!(late.context_tokens.abs_diff(plain.context_tokens) <= 256, "all of it comes before the start: {late}");
    let limited = with(CacheOptions { quantization: None, max_kv_size: Some(1000) });
    assert_eq!(limited.context_tokens, 8192, "{limited}");
    assert!(
        limited.cache_tokens >= 1000 && limited.stages.iter().all(|stage| stage.ranks[0].needed() <= stage.ranks[0].usable),
        "{limited}"
    );
}

#[test]
fn caches_that_cannot_be_are_refused_before_anything_is_planned() {
    let (spec, map) = model(8, 320, false);
    let caches = CacheOptions { quantization: Some(KvQuantization::new(8, None, None).expect("allowed")), max_kv_size: None };
    let why = plan(&spec, &map, &[], &[], &PlanOptions { caches, ..options(Strategy::Auto) }).expect_err("groups of 64 in heads of 80");
    assert!(why.is_usage() && why.to_string().contains("80 numbers a head"), "{why}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn plans_tile_fit_and_repeat(
        n_layers in 1u32..14,
        hidden in 1u32..8,
        tied: bool,
        pipeline: bool,
        memories in prop::collection::vec((110u64..600, 0u32..3), 1..6),
        context in prop::option::of(1u32..9000),
    ) {
        let (spec, map) = model(n_layers, hidden * 64, tied);
        let nodes: Vec<_> = memories.iter().enumerate()
            .map(|(i, (megabytes, speed))| node(&format!("n{i}"), megabytes * 1_000_000, f64::from(*speed) * 50e9)).collect();
        let strategy = if pipeline { Strategy::Pipeline } else { Strategy::Auto };
        let options = PlanOptions { context_tokens: context, ..options(strategy) };
        let first = plan(&spec, &map, &nodes, &[], &options);
        let mut reversed = nodes.clone();
        reversed.reverse();
        prop_assert_eq!(&first, &plan(&spec, &map, &reversed, &[], &options));
        if let Ok(plan) = first {
            prop_assert_eq!(plan.stages[0].layers.start, 0);
            prop_assert_eq!(plan.stages.last().map(|stage| stage.layers.end), Some(n_layers));
            prop_assert!(plan.stages.windows(2).all(|pair| pair[0].layers.end == pair[1].layers.start));
            prop_assert!(plan.stages.iter().all(|stage| !stage.layers.is_empty() && stage.ranks[0].needed() <= stage.ranks[0].usable), "{}", plan);
            prop_assert!(plan.cache_tokens >= u64::from(plan.context_tokens));
            prop_assert!(context.is_none_or(|context| context == plan.context_tokens));
        }
    }
}

#[test]
fn a_stage_pays_for_copies_of_caches_that_it_reads() {
    let (spec, map) = model_of(&json!({"model_type": "gemma4_text", "hidden_size": 64, "num_hidden_layers": 6, "intermediate_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "global_head_dim": 64, "num_kv_shared_layers": 3,
        "sliding_window_pattern": 3, "hidden_size_per_layer_input": 32, "vocab_size": 128, "vocab_size_per_layer_input": 128}));
    let costs = Costs::new(&spec, &map, &CacheOptions::default());
    // Keys and values in f32 of a local layer, and of a global one.
    let (local, global) = (2 * 32 * 4, 2 * 64 * 4);
    let per_token = |layers: Range<u32>| costs.cache_per_token(&layers);
    assert_eq!(per_token(0..6), 2 * local + global);
    assert_eq!((per_token(0..2), per_token(2..6)), (2 * local, global + local));
    assert_eq!((per_token(3..5), per_token(5..6)), (local, global));
}

#[test]
fn tensor_is_one_group_over_all_workers() {
    let (spec, map) = model(8, 1024, false);
    let nodes = [node("b", 4 * GB, 0.0), node("c", 4 * GB, 0.0), node("a", 4 * GB, 0.0)];
    let group = plan(&spec, &map, &nodes, &[], &PlanOptions { min_workers: 3, ..options(Strategy::Tensor) }).expect("fits");
    assert_eq!((ranges(&group), group.stages[0].shares()), (std::iter::once(0..8).collect(), vec![1, 1, 1]));
    assert_eq!(group.ranks().map(|rank| rank.node_name.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert!(group.why.contains("3 workers in equal parts"), "{}", group.why);
    let few = plan(&spec, &map, &nodes, &[], &PlanOptions { min_workers: 4, ..options(Strategy::Tensor) });
    assert_eq!(few, Err(WhyNot::TooFewNodes { found: 3, wanted: 4 }));
    let (one_layer, map) = model(1, 64, true);
    let many =
        plan(&one_layer, &map, &nodes, &[], &PlanOptions { min_workers: 3, ..options(Strategy::Tensor) }).expect("more ranks than layers");
    assert_eq!(many.stages[0].ranks.len(), 3);
}

#[test]
fn stages_are_told_by_name() {
    let (spec, map) = model(8, 1024, false);
    let nodes = [node("a", 4 * GB, 0.0), node("b", 3 * GB, 0.0), node("c", 2 * GB, 0.0)];
    let with = |stages: &str| {
        let stages = stages.split(',').map(|stage| stage.parse().expect("a stage")).collect();
        plan(&spec, &map, &nodes, &[], &PlanOptions { stages: Some(stages), ..options(Strategy::Auto) })
    };
    let hybrid = with("c*4+a*2:0-4,id-b:5-7").expect("fits");
    assert_eq!((ranges(&hybrid), hybrid.stages[0].shares(), hybrid.stages[1].shares()), (vec![0..5, 5..8], vec![2, 1], vec![1]));
    assert_eq!(hybrid.ranks().map(|rank| rank.node_name.as_str()).collect::<Vec<_>>(), ["c", "a", "b"]);
    assert!(hybrid.why.contains("as told") && !hybrid.why.contains("not used"), "{}", hybrid.why);
    assert!(matches!(with("a:0-3,b:5-7"), Err(WhyNot::StagesGap { next: 4, layers: 8, .. })));
    assert!(matches!(with("a:0-3"), Err(WhyNot::StagesGap { next: 4, layers: 8, .. })));
    assert_eq!(with("a:0-3,a:4-7"), Err(WhyNot::NamedTwice { name: "a".into() }));
    let unknown = with("a:0-3,x:4-7").expect_err("no such worker");
    assert!(!unknown.is_usage() && unknown.to_string().contains("connected are: a, b, c"), "{unknown}");
    let twins = [node("a", GB, 0.0), NodeFacts { id: NodeId("other".into()), ..node("a", GB, 0.0) }];
    let stages = Some(vec!["a:0-7".parse().expect("a stage")]);
    assert!(matches!(
        plan(&spec, &map, &twins, &[], &PlanOptions { stages, ..options(Strategy::Auto) }),
        Err(WhyNot::AmbiguousWorker { .. })
    ));
}

#[test]
fn a_group_touches_no_cut_that_keys_and_values_cross() {
    let (spec, map) = model_of(&json!({"model_type": "gemma4_text", "hidden_size": 64, "num_hidden_layers": 6, "intermediate_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "global_head_dim": 64, "num_kv_shared_layers": 3,
        "sliding_window_pattern": 3, "hidden_size_per_layer_input": 32, "vocab_size": 128, "vocab_size_per_layer_input": 128}));
    let nodes = [node("a", 4 * GB, 0.0), node("b", 3 * GB, 0.0), node("c", 2 * GB, 0.0)];
    let with = |stages: &str| {
        let stages = stages.split(',').map(|stage| stage.parse().expect("a stage")).collect();
        plan(&spec, &map, &nodes, &[], &PlanOptions { stages: Some(stages), ..options(Strategy::Auto) })
    };
    assert_eq!(with("a+b:0-2,c:3-5"), Err(WhyNot::SharedCut { cut: 3 }));
    assert!(with("a+b:0-0,c:1-5").is_ok() && with("a:0-2,c:3-5").is_ok());
}
