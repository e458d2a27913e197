//! Predictions against published measurements: the table of docs/planner.md. `cargo test published -- --nocapture` prints it.

use super::{PlanOptions, plan};
use crate::cluster_file::read_cluster_file;
use mlx_cluster_common::{
    architectures::read_spec,
    dtype::DType,
    plan::ToldStage,
    spec::{ModelSpec, NormKind, Weight},
    weights::{TensorEntry, WeightIndex, WeightMap},
};
use serde_json::{Value, json};

/// A measurement that somebody published.
struct Published {
    model: &'static str,
    chip: &'static str,
    memory_gb: u32,
    nodes: u32,
    tokens_per_second: f64,
}

const ULTRA: &str = "M3 Ultra";
const MEASURED: [Published; 9] = [
    Published { model: "Qwen3-235B-A22B 8-bit", chip: ULTRA, memory_gb: 512, nodes: 1, tokens_per_second: 19.5 },
    Published { model: "Qwen3-235B-A22B 8-bit", chip: ULTRA, memory_gb: 512, nodes: 2, tokens_per_second: 26.2 },
    Published { model: "Qwen3-235B-A22B 8-bit", chip: ULTRA, memory_gb: 512, nodes: 4, tokens_per_second: 31.9 },
    Published { model: "DeepSeek-V3.1 4-bit", chip: ULTRA, memory_gb: 512, nodes: 1, tokens_per_second: 21.1 },
    Published { model: "DeepSeek-V3.1 4-bit", chip: ULTRA, memory_gb: 512, nodes: 2, tokens_per_second: 27.8 },
    Published { model: "DeepSeek-V3.1 4-bit", chip: ULTRA, memory_gb: 512, nodes: 4, tokens_per_second: 32.5 },
    Published { model: "Kimi-K2 4-bit", chip: ULTRA, memory_gb: 512, nodes: 2, tokens_per_second: 21.6 },
    Published { model: "Kimi-K2 4-bit", chip: ULTRA, memory_gb: 512, nodes: 4, tokens_per_second: 28.3 },
    Published { model: "Qwen3-30B-A3B 4-bit", chip: "M4 Max", memory_gb: 64, nodes: 1, tokens_per_second: 113.0 },
];

fn qwen3_moe(hidden: u32, layers: u32, heads: u32, expert: u32, bits: u32) -> Value {
    json!({"model_type": "qwen3_moe", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 3 * hidden,
        "num_attention_heads": heads, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": expert, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": true, "vocab_size": 151_936,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": false, "max_position_embeddings": 40_960,
        "quantization": {"group_size": 64, "bits": bits}})
}

fn deepseek_v3(heads: u32, experts: u32, dense: u32, vocab: u32) -> Value {
    json!({"model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "intermediate_size": 18_432, "num_attention_heads": heads,
        "num_key_value_heads": heads, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "n_routed_experts": experts, "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048,
        "first_k_dense_replace": dense, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": true,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "vocab_size": vocab, "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0, "max_position_embeddings": 131_072, "tie_word_embeddings": false,
        "quantization": {"group_size": 64, "bits": 4}})
}

fn config(model: &str) -> Value {
    match model {
        "Qwen3-235B-A22B 8-bit" => qwen3_moe(4096, 94, 64, 1536, 8),
        "Qwen3-30B-A3B 4-bit" => qwen3_moe(2048, 48, 32, 768, 4),
        "DeepSeek-V3.1 4-bit" => deepseek_v3(128, 256, 3, 129_280),
        _ => deepseek_v3(64, 384, 1, 163_840),
    }
}

/// A spec with the headers that its published weights would have: linears, experts and tables quantised, routers and the rest in bf16.
pub(super) fn quantised(config: &Value) -> (ModelSpec, WeightMap) {
    let spec = read_spec(config).expect("a valid config");
    let mut index = WeightIndex::default();
    for weight in spec.parts().into_iter().flat_map(|part| spec.weights(part)) {
        match weight {
            Weight::Norm(norm) if norm.kind == NormKind::RmsUnweighted => {}
            Weight::Norm(norm) => add(&mut index, format!("{}.weight", norm.path), DType::BF16, vec![norm.dims]),
            Weight::Tensor(tensor) => add(&mut index, tensor.name.clone(), DType::F32, tensor.shape.clone()),
            Weight::Embedding(table) => matrix(&spec, &mut index, &table.path, vec![table.vocab_size, table.dims]),
            Weight::Linear(linear) => matrix(&spec, &mut index, &linear.path, vec![linear.output_dims, linear.input_dims]),
            Weight::Experts(linear) => {
                matrix(&spec, &mut index, &linear.path, vec![linear.n_experts, linear.output_dims, linear.input_dims])
            }
            Weight::HeadLinear(linear) => {
                matrix(&spec, &mut index, &linear.path, vec![linear.n_heads, linear.output_dims, linear.input_dims])
            }
            Weight::Convolution(_) => unreachable!("these models have none"),
        }
    }
    let map = WeightMap::assign(&spec, &index).expect("complete");
    (spec, map)
}

fn matrix(spec: &ModelSpec, index: &mut WeightIndex, path: &str, shape: Vec<u32>) {
    let columns = *shape.last().expect("a matrix");
    let is_router = path.ends_with(".gate");
    let Some(scheme) = spec.quantization.scheme(path).filter(|_| !is_router) else {
        return add(index, format!("{path}.weight"), DType::BF16, shape);
    };
    let with = |columns: Option<u64>| {
        let mut shape = shape.clone();
        *shape.last_mut().expect("a matrix") = columns.expect("divides") as u32;
        shape
    };
    add(index, format!("{path}.weight"), DType::U32, with(scheme.packed_columns(columns)));
    add(index, format!("{path}.scales"), DType::BF16, with(scheme.groups(columns)));
    add(index, format!("{path}.biases"), DType::BF16, with(scheme.groups(columns)));
}

fn add(index: &mut WeightIndex, name: String, dtype: DType, shape: Vec<u32>) {
    let shape: Vec<u64> = shape.into_iter().map(u64::from).collect();
    let bytes = shape.iter().product::<u64>() * dtype.size();
    index.tensors.insert(name, TensorEntry { file: "model.safetensors".into(), dtype, shape, offset: 0, bytes });
}

/// A line of the table.
fn row(published: &Published) -> (String, f64) {
    let Published { model, chip, memory_gb, nodes, tokens_per_second } = published;
    let (spec, map) = quantised(&config(model));
    let link = if *nodes > 1 { "link_kind = \"rdma\"\n" } else { "" };
    let text = format!("{link}[[node]]\nname = \"n\"\ncount = {nodes}\nchip = \"{chip}\"\nmemory_gb = {memory_gb}\n");
    let facts = read_cluster_file(&text).expect("a cluster");
    let ranks = facts.nodes.iter().map(|node| (node.name.clone(), 1)).collect();
    let stages = Some(vec![ToldStage { ranks, layers: 0..spec.n_layers() }]);
    let options = PlanOptions { model: (*model).into(), stages, context_tokens: Some(4096), ..PlanOptions::default() };
    let plan = plan(&spec, &map, &facts.nodes, &facts.links, &options).expect("fits");
    let predicted = plan.prediction.expect("bandwidths are known").decode_tokens_per_second;
    let error = 100.0 * (predicted / tokens_per_second - 1.0);
    (format!("| {model} | {nodes} x {chip} | {tokens_per_second:.1} | {predicted:.1} | {error:+.0} % |"), error)
}

#[test]
fn predictions_and_published_measurements_are_as_the_documents_say() {
    let document = include_str!("../../../../docs/planner.md");
    let rows: Vec<_> = MEASURED.iter().map(row).collect();
    rows.iter().for_each(|(row, _)| println!("{row}"));
    for (row, error) in rows {
        assert!(document.contains(&row), "docs/planner.md does not have: {row}");
        assert!(error.abs() < 35.0, "{row}");
    }
}
