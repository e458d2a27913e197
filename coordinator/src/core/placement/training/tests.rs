//! The promises of plans for training, on made-up models and machines.

use super::{
    super::tests::{GB, model, model_of, node},
    *,
};
use mlx_cluster_common::{
    ids::NodeId,
    links::Medium,
    training::{FineTune, LoraParameters, Optimizer, Parallel, Schedule},
};
use proptest::{
    prelude::{Just, ProptestConfig, prop, prop_oneof},
    prop_assert, prop_assert_eq, proptest,
};
use serde_json::json;

fn lora(rank: u32) -> FineTune {
    FineTune::Lora(LoraParameters { rank, scale: 20.0, dropout: 0.0, keys: None })
}

fn options(strategy: TrainStrategy) -> TrainingOptions {
    TrainingOptions {
        model: "test".into(),
        role: TrainingRole {
            fine_tune: lora(8),
            num_layers: None,
            optimizer: Optimizer::Adam { betas: [0.9, 0.999], eps: 1e-8, bias_correction: false },
            schedule: Schedule::constant(1e-5),
            seed: 0,
            grad_checkpoint: false,
            clear_cache_threshold: Bytes(0),
            parallel: Parallel::Data,
        },
        strategy,
        batch_size: 4,
        max_seq_length: 512,
        tokens_per_row_max: None,
        accumulation: 1,
        min_workers: 1,
        split: None,
    }
}

fn mac(name: &str, gigabytes: u64, bandwidth: f64, teraflops: f64) -> NodeFacts {
    NodeFacts { matmul_rate: teraflops * 1e12, ..node(name, gigabytes * GB, bandwidth * 1e9) }
}

fn link(from: &str, to: &str, gigabits: f64) -> LinkFacts {
    LinkFacts {
        from: NodeId(format!("id-{from}")),
        to: NodeId(format!("id-{to}")),
        interface: "en0".into(),
        medium: Medium::Ethernet,
        address: to.into(),
        round_trip_seconds: 0.3e-3,
        bytes_per_second: gigabits * 1e9 / 8.0,
    }
}

fn llama_1b() -> (ModelSpec, WeightMap) {
    model_of(&json!({"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "vocab_size": 128_256, "tie_word_embeddings": true,
        "max_position_embeddings": 8192}))
}

fn ranges_of(plan: &Plan) -> Vec<Range<u32>> {
    plan.stages.iter().map(|stage| stage.layers.clone()).collect()
}

fn training(plan: &Plan) -> &TrainingPlan {
    plan.training.as_ref().expect("a plan for training")
}

#[test]
fn two_unequal_macs_take_rows_by_their_speed() {
    let (spec, map) = llama_1b();
    let nodes = [mac("studio", 48, 400.0, 12.0), mac("mini", 24, 200.0, 8.0)];
    let links = [link("studio", "mini", 10.0)];
    let asked = |strategy| TrainingOptions { max_seq_length: 1024, batch_size: 10, ..options(strategy) };
    let with = |strategy| plan_training(&spec, &map, &nodes, &links, &asked(strategy)).expect("fits").to_string();
    for (strategy, wanted) in [(TrainStrategy::Auto, AUTO), (TrainStrategy::Pipeline, PIPELINE), (TrainStrategy::Tensor, TENSOR)] {
        assert_eq!(with(strategy), wanted.trim(), "{strategy}");
    }
}

const AUTO: &str = "
plan to train test: 1 stage, strategy auto
  worker     layers    weights   training    working   together     usable
  studio       0-15     4.9 GB   112.7 MB    10.3 GB    15.4 GB    48.0 GB
  mini            +     4.9 GB   112.7 MB    10.3 GB    15.4 GB    24.0 GB
  replicas over 2 workers: predicted to be fastest
  training: 2 replicas by rows 3:2, which add up 22.5 MB of gradients; lora of 5.636M parameters, batches of 10 rows of up to 1024 tokens, at most 1 at once on a worker
  predicted: 2.70 s a batch of full rows, 3787 tokens/s
  not one worker studio:0-15: 5.35 s a batch, 98 % more
  not a pipeline studio:0-11,mini:12-15: 3.24 s a batch, 20 % more
  not a tensor group studio+mini:0-15: 7.90 s a batch, 192 % more
";

const PIPELINE: &str = "
plan to train test: 2 stages, strategy pipeline
  worker     layers    weights   training    working   together     usable
  studio       0-11     4.0 GB    84.5 MB    34.2 GB    38.2 GB    48.0 GB
  mini        12-15     2.0 GB    28.2 MB     9.9 GB    12.0 GB    24.0 GB
  a pipeline over 2 workers, as asked; layers balanced by predicted time, as far as memory allows
  training: all rows through 2 stages; lora of 5.636M parameters, batches of 10 rows of up to 1024 tokens, at most 2 at once on a worker
  predicted: 3.24 s a batch of full rows, 3158 tokens/s
";

const TENSOR: &str = "
plan to train test: 1 stage, strategy tensor
  worker     layers    weights   training    working   together     usable
  studio       0-15     2.5 GB   112.7 MB    14.4 GB    17.0 GB    48.0 GB
  mini            +     2.5 GB   112.7 MB    14.4 GB    17.0 GB    24.0 GB
  a tensor group over 2 workers, as asked
  training: every matrix in 2 parts 1:1; lora of 5.636M parameters, batches of 10 rows of up to 1024 tokens, at most 2 at once on a worker
  predicted: 7.90 s a batch of full rows, 1297 tokens/s
";

#[test]
fn four_small_macs_are_replicas_of_a_pipeline() {
    let (spec, map) = llama_1b();
    let nodes = [mac("a", 8, 100.0, 4.0), mac("b", 8, 100.0, 4.0), mac("c", 6, 100.0, 4.0), mac("d", 6, 100.0, 2.0)];
    let data = plan_training(&spec, &map, &nodes, &[], &options(TrainStrategy::Data)).expect("fits");
    assert_eq!(data.to_string(), PIPELINES.trim());
}

const PIPELINES: &str = "
plan to train test: 2 stages, strategy data
  worker     layers    weights   training    working   together     usable
  a             0-8     3.2 GB    63.4 MB     3.9 GB     7.2 GB     8.0 GB
  b               +     3.2 GB    63.4 MB     3.9 GB     7.2 GB     8.0 GB
  c            9-15     2.8 GB    49.3 MB     2.9 GB     5.7 GB     6.0 GB
  d               +     2.8 GB    49.3 MB     2.9 GB     5.7 GB     6.0 GB
  replicas of a pipeline over 4 workers, as asked; layers balanced by predicted time, as far as memory allows; links that were not measured count as 1 Gb/s and 0.5 ms there and back
  training: 2 replicas by rows 1:1, which add up 12.7 MB of gradients; lora of 5.636M parameters, batches of 4 rows of up to 512 tokens, at most 1 at once on a worker
  predicted: 1.43 s a batch of full rows, 1437 tokens/s
";

#[test]
fn a_stage_before_everything_that_is_trained_only_goes_forward() {
    let (spec, map) = model(12, 512, false);
    let nodes = [mac("a", 16, 100.0, 4.0), mac("b", 15, 100.0, 4.0)];
    let with = |num_layers| {
        let mut options = options(TrainStrategy::Pipeline);
        options.role.num_layers = num_layers;
        plan_training(&spec, &map, &nodes, &[], &options).expect("fits")
    };
    let (all, last) = (with(None), with(Some(4)));
    assert!(ranges_of(&last)[0].end > ranges_of(&all)[0].end, "{all}\n{last}");
    assert_eq!(last.stages[0].ranks[0].cache, Bytes(0), "nothing is trained there");
    assert!(last.stages[0].ranks[0].working < all.stages[0].ranks[0].working, "{all}\n{last}");
    assert_eq!(training(&last).trainable * 3, training(&all).trainable);
}

#[test]
fn checkpoints_of_gradients_take_less_memory_and_more_time() {
    let (spec, map) = model(12, 512, false);
    let nodes = [mac("a", 16, 100.0, 4.0)];
    let with = |grad_checkpoint| {
        let mut options = options(TrainStrategy::Auto);
        options.role.grad_checkpoint = grad_checkpoint;
        plan_training(&spec, &map, &nodes, &[], &options).expect("fits")
    };
    let (plain, spare) = (with(false), with(true));
    assert!(spare.stages[0].ranks[0].working.0 * 2 < plain.stages[0].ranks[0].working.0, "{plain}\n{spare}");
    assert!(training(&spare).step_seconds > training(&plain).step_seconds);
}

#[test]
fn what_is_trained_is_counted_with_gradients_and_optimizer() {
    let (spec, map) = model(4, 64, false);
    let with = |fine_tune, optimizer: Optimizer| {
        let mut options = options(TrainStrategy::Auto);
        (options.role.fine_tune, options.role.optimizer) = (fine_tune, optimizer);
        plan_training(&spec, &map, &[mac("a", 16, 100.0, 4.0)], &[], &options).expect("fits")
    };
    let adam = Optimizer::Adam { betas: [0.9, 0.999], eps: 1e-8, bias_correction: false };
    let sgd = Optimizer::Sgd { momentum: 0.0, weight_decay: 0.0, dampening: 0.0, nesterov: false };
    let of = |plan: &Plan| (plan.stages[0].ranks[0].cache.0, training(plan).trainable);
    let (bytes, numbers) = of(&with(lora(8), adam.clone()));
    assert_eq!(bytes, numbers * 4 * (1 + 2 + 2), "adapters, two gradients, two moments");
    let (bytes, numbers) = of(&with(FineTune::Full, adam));
    assert_eq!(bytes, numbers * 4 * (2 + 2), "the parameters are weights");
    let (bytes, of_lora) = of(&with(lora(8), sgd));
    assert_eq!(bytes, of_lora * 4 * (1 + 2));
    assert!(numbers > of_lora);
}

#[test]
fn a_split_is_honoured_or_refused_with_numbers() {
    let (spec, map) = model(8, 512, false);
    let nodes = [mac("a", 8, 100.0, 4.0), mac("b", 7, 100.0, 4.0)];
    let with = |strategy, split: &[u32], nodes: &[NodeFacts]| {
        plan_training(&spec, &map, nodes, &[], &TrainingOptions { split: Some(split.to_vec()), ..options(strategy) })
    };
    let told = with(TrainStrategy::Pipeline, &[7, 1], &nodes).expect("fits");
    assert_eq!(ranges_of(&told), vec![0..7, 7..8]);
    assert!(told.why.contains("as told"), "{told}");
    assert_eq!(with(TrainStrategy::Pipeline, &[7, 2], &nodes), Err(WhyNot::SplitSum { split: "7,2".into(), sum: 9, layers: 8 }));
    let refused = with(TrainStrategy::Data, &[4, 4], &nodes).expect_err("replicas have all layers");
    assert!(refused.is_usage() && refused.to_string().contains("--strategy data"), "{refused}");
    let small = [mac("a", 8, 100.0, 4.0), node("mini", 200_000_000, 100e9)];
    let message = with(TrainStrategy::Auto, &[1, 7], &small).expect_err("too much for mini").to_string();
    assert!(message.contains("mini cannot train its 7 layers") && message.contains("200.0 MB"), "{message}");
}

#[test]
fn what_cannot_be_is_said_with_numbers() {
    let (spec, map) = model(8, 512, false);
    let nodes = [node("a", 200_000_000, 100e9), node("b", 150_000_000, 100e9)];
    for strategy in [TrainStrategy::Auto, TrainStrategy::Data, TrainStrategy::Pipeline, TrainStrategy::Tensor] {
        let message = plan_training(&spec, &map, &nodes, &[], &options(strategy)).expect_err("too small").to_string();
        assert!(message.contains("a has 200.0 MB usable") && message.contains("--grad-checkpoint"), "{message}");
    }
    let roomy = [mac("a", 8, 100.0, 4.0), mac("b", 8, 100.0, 4.0), mac("c", 8, 100.0, 4.0)];
    let with = |options: &TrainingOptions| plan_training(&spec, &map, &roomy, &[], options);
    let few = TrainingOptions { batch_size: 2, min_workers: 3, ..options(TrainStrategy::Data) };
    assert_eq!(with(&few), Err(WhyNot::TooFewRows { batch_size: 2, replicas: 3 }));
    assert_eq!(with(&TrainingOptions { min_workers: 4, ..few }), Err(WhyNot::TooFewNodes { found: 3, wanted: 4 }));
    let empty = TrainingOptions { tokens_per_row_max: Some(0), ..options(TrainStrategy::Auto) };
    assert_eq!(with(&empty), Err(WhyNot::EmptyBatch { batch_size: 4, tokens: 0, accumulation: 1 }));
    let mut nothing = options(TrainStrategy::Auto);
    nothing.role.num_layers = Some(0);
    assert_eq!(with(&nothing), Err(WhyNot::NothingTrained));
}

#[test]
fn a_rank_has_its_part_of_what_is_trained_unless_updates_need_the_whole() {
    let (spec, map) = model(8, 512, false);
    let nodes = [mac("a", 8, 100.0, 4.0), mac("b", 8, 100.0, 4.0)];
    let needed = |strategy, min_workers, optimizer| {
        let mut options = TrainingOptions { min_workers, ..options(strategy) };
        options.role.fine_tune = FineTune::Full;
        options.role.optimizer = optimizer;
        let plan = plan_training(&spec, &map, &nodes[..min_workers], &[], &options).expect("fits");
        plan.stages[0].ranks[0].needed().0 as f64
    };
    let adam = || Optimizer::Adam { betas: [0.9, 0.999], eps: 1e-8, bias_correction: false };
    let muon = || Optimizer::Muon { momentum: 0.95, weight_decay: 0.0, nesterov: true, ns_steps: 5 };
    let alone = needed(TrainStrategy::Tensor, 1, adam());
    assert!(needed(TrainStrategy::Tensor, 2, adam()) < 0.7 * alone);
    assert!(needed(TrainStrategy::Tensor, 2, muon()) > 0.7 * needed(TrainStrategy::Tensor, 1, muon()));
}

#[test]
fn small_batches_are_not_cut() {
    let (spec, map) = model(8, 512, false);
    let nodes = [mac("a", 8, 100.0, 4.0), mac("b", 8, 100.0, 4.0)];
    let rows = |strategy, batch_size, tokens| {
        let options = TrainingOptions { min_workers: 2, batch_size, tokens_per_row_max: Some(tokens), ..options(strategy) };
        training(&plan_training(&spec, &map, &nodes, &[], &options).expect("fits")).micro_batch_rows
    };
    for strategy in [TrainStrategy::Data, TrainStrategy::Pipeline] {
        assert_eq!(rows(strategy, 4, 100), 4, "{strategy}: 400 tokens");
    }
    assert_eq!(rows(TrainStrategy::Data, 16, 128), 8, "as many as are dealt to a replica");
    assert_eq!((rows(TrainStrategy::Pipeline, 16, 128), rows(TrainStrategy::Pipeline, 16, 48)), (2, 6), "256 tokens at least");
}

#[test]
fn factors_of_an_embedding_that_is_the_head_too_stay_on_one_stage() {
    let nodes = [mac("a", 8, 100.0, 4.0), mac("b", 8, 100.0, 4.0)];
    let with = |tied, strategy, split: Option<Vec<u32>>| {
        let (spec, map) = model(8, 512, tied);
        let keys = Some(["self_attn.q_proj".to_owned(), spec.embedding.path.clone()].into());
        let mut options = TrainingOptions { min_workers: 2, split, ..options(strategy) };
        options.role.fine_tune = FineTune::Lora(LoraParameters { rank: 8, scale: 20.0, dropout: 0.0, keys });
        plan_training(&spec, &map, &nodes, &[], &options)
    };
    let refused = Err(WhyNot::SharedEmbedding { path: "model.embed_tokens".into() });
    assert_eq!(with(true, TrainStrategy::Pipeline, None), refused);
    assert_eq!(with(true, TrainStrategy::Auto, Some(vec![4, 4])), refused);
    let auto = with(true, TrainStrategy::Auto, None).expect("replicas or a group");
    assert!(auto.stages.len() == 1 && auto.to_string().contains("not a pipeline: factors of the embedding are the head's too"), "{auto}");
    assert_eq!(with(false, TrainStrategy::Pipeline, None).expect("a head of its own").stages.len(), 2);
}

#[test]
fn unmeasured_workers_are_as_few_as_hold_it() {
    let (spec, map) = model(8, 1024, false);
    let with = |gigabytes: f64| {
        let nodes = ["a", "b", "c"].map(|name| node(name, (gigabytes * 1e9) as u64, 0.0));
        plan_training(&spec, &map, &nodes, &[], &options(TrainStrategy::Auto)).expect("fits")
    };
    let (roomy, tight) = (with(16.0), with(0.9));
    assert_eq!((roomy.ranks().count(), training(&roomy).step_seconds), (1, None));
    assert!(tight.stages.len() > 1 && tight.why.contains("not all speeds were measured"), "{tight}");
}

#[test]
fn shorter_rows_take_less() {
    let (spec, map) = model(8, 512, false);
    let with = |tokens_per_row_max| {
        let options = TrainingOptions { tokens_per_row_max, ..options(TrainStrategy::Auto) };
        plan_training(&spec, &map, &[mac("a", 16, 100.0, 4.0)], &[], &options).expect("fits")
    };
    let (cut, short, long) = (with(None), with(Some(64)), with(Some(100_000)));
    assert!(short.stages[0].ranks[0].working < cut.stages[0].ranks[0].working);
    assert_eq!((training(&short).tokens_per_row, &long), (64, &cut));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn plans_hold_every_layer_once_and_fit_and_repeat(
        n_layers in 1u32..10,
        tied: bool,
        machines in prop::collection::vec((110u64..900, 0u32..3), 1..6),
        strategy in prop_oneof![
            Just(TrainStrategy::Auto), Just(TrainStrategy::Data), Just(TrainStrategy::Pipeline), Just(TrainStrategy::Tensor)
        ],
        batch_size in prop_oneof![1u32..9, Just(0), Just(u32::MAX)],
        max_seq_length in prop_oneof![1u32..300, Just(u32::MAX)],
        num_layers in prop::option::of(0u32..12),
        full: bool,
        rank in prop_oneof![0u32..9, Just(u32::MAX)],
        min_workers in 0usize..4,
    ) {
        let (spec, map) = model(n_layers, 128, tied);
        let nodes: Vec<_> = machines.iter().enumerate()
            .map(|(i, (megabytes, speed))| NodeFacts {
                matmul_rate: f64::from(*speed) * 1e12,
                ..node(&format!("n{i}"), megabytes * 1_000_000, f64::from(*speed) * 50e9)
            }).collect();
        let mut options = TrainingOptions { batch_size, max_seq_length, min_workers, ..options(strategy) };
        options.role.num_layers = num_layers;
        options.role.fine_tune = if full { FineTune::Full } else { lora(rank) };
        let first = plan_training(&spec, &map, &nodes, &[], &options);
        let mut reversed = nodes.clone();
        reversed.reverse();
        prop_assert_eq!(&first, &plan_training(&spec, &map, &reversed, &[], &options));
        if let Ok(plan) = first {
            let own = training(&plan);
            prop_assert_eq!(plan.stages[0].layers.start, 0);
            prop_assert_eq!(plan.stages.last().map(|stage| stage.layers.end), Some(n_layers));
            prop_assert!(plan.stages.windows(2).all(|pair| pair[0].layers.end == pair[1].layers.start));
            prop_assert!(plan.ranks().all(|rank| rank.needed() <= rank.usable), "{}", plan);
            prop_assert!(plan.ranks().count() >= min_workers, "{}", plan);
            prop_assert!((1..=batch_size).contains(&own.micro_batch_rows), "{}", plan);
            prop_assert!(plan.stages.iter().all(|stage| stage.shares() == plan.stages[0].shares()), "{}", plan);
            if own.parallel == Parallel::Data {
                let rows = TrainingPlan::deal(batch_size, &plan.stages[0].shares());
                prop_assert!(rows.iter().all(|rows| *rows > 0), "{}", plan);
            }
        }
    }
}
