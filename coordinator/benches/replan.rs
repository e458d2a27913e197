//! How long a plan takes: eight unequal nodes with unequal links, 80 layers. Prints milliseconds, and fails above the promised 50.
//!
//! A plain program, since it measures one number: `cargo bench -p mlx-cluster-coordinator`.

use mlx_cluster_common::{
    architectures::read_spec,
    dtype::DType,
    engine::NodeFacts,
    ids::NodeId,
    links::{LinkFacts, Medium},
    plan::Optimize,
    spec::{ModelSpec, Weight},
    units::Bytes,
    weights::{TensorEntry, WeightIndex, WeightMap},
};
use mlx_cluster_coordinator::core::placement::{PlanOptions, Reckoned, plan_again};
use std::time::{Duration, Instant};

const RUNS: usize = 20;
const PROMISED: Duration = Duration::from_millis(50);

fn main() {
    let (spec, map) = model();
    let nodes: Vec<NodeFacts> = (0..8).map(node).collect();
    let links: Vec<LinkFacts> = (0..8u32).flat_map(|a| (0..8u32).filter(move |b| *b != a).map(move |b| link(a, b))).collect();
    let mut failed = false;
    for optimize in [Optimize::Latency, Optimize::Throughput] {
        let options = PlanOptions { model: "bench".into(), optimize, ..PlanOptions::default() };
        let reckoned = Reckoned::default();
        let planned = || timed(|| plan_again(&reckoned, &spec, &map, &nodes, &links, &options).map(|plan| plan.stages.len()));
        let first = planned();
        let mut again: Vec<Duration> = (0..RUNS).map(|_| planned()).collect();
        again.sort();
        let median = again.get(RUNS / 2).copied().unwrap_or_default();
        println!("{optimize:?}: first plan {first:?}, re-plan median {median:?}, slowest {:?}", again.last());
        failed |= median > PROMISED;
    }
    if failed {
        println!("more than {PROMISED:?}");
        std::process::exit(1);
    }
}

fn timed<E: std::fmt::Debug>(plan: impl Fn() -> Result<usize, E>) -> Duration {
    let start = Instant::now();
    let plan = plan();
    let took = start.elapsed();
    assert!(plan.is_ok(), "{plan:?}");
    took
}

/// A llama of 80 layers and 70 billion parameters in 16 bits.
fn model() -> (ModelSpec, WeightMap) {
    let config = serde_json::json!({"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28_672,
        "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "vocab_size": 128_256, "tie_word_embeddings": false,
        "max_position_embeddings": 131_072});
    let spec = read_spec(&config).expect("a valid config");
    let mut index = WeightIndex::default();
    for weight in spec.parts().into_iter().flat_map(|part| spec.weights(part)) {
        let shape = match weight {
            Weight::Norm(norm) => vec![u64::from(norm.dims)],
            Weight::Linear(linear) => vec![linear.output_dims.into(), linear.input_dims.into()],
            Weight::Embedding(table) => vec![table.vocab_size.into(), table.dims.into()],
            _ => continue,
        };
        let bytes = shape.iter().product::<u64>() * 2;
        let entry = TensorEntry { file: "model.safetensors".into(), dtype: DType::BF16, shape, offset: 0, bytes };
        index.tensors.insert(format!("{}.weight", weight.path()), entry);
    }
    let map = WeightMap::assign(&spec, &index).expect("complete");
    (spec, map)
}

fn node(i: u32) -> NodeFacts {
    let memory = Bytes(u64::from(24 + 12 * i) * 1_000_000_000);
    NodeFacts {
        id: NodeId(format!("node-{i}")),
        name: format!("node-{i}"),
        version: String::new(),
        os: "macos".into(),
        chip: format!("chip-{i}"),
        usable_memory: memory,
        total_memory: memory,
        memory_bandwidth: f64::from(100 + 70 * (i * 5 % 8)) * 1e9,
        matmul_rate: f64::from(3 + i) * 1e12,
        addresses: Vec::new(),
    }
}

fn link(a: u32, b: u32) -> LinkFacts {
    LinkFacts {
        from: NodeId(format!("node-{a}")),
        to: NodeId(format!("node-{b}")),
        interface: String::new(),
        medium: Medium::Thunderbolt,
        address: format!("10.0.{a}.{b}"),
        round_trip_seconds: f64::from(20 + 15 * ((a + b) % 5)) * 1e-6,
        bytes_per_second: f64::from(1 + (a * b) % 7) * 1e9,
    }
}
