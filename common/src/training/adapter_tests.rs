//! Configs as mlx-lm writes them, broken ones, and adapters of other models.

use super::*;
use crate::{
    architectures::read_spec,
    training::fuse::{FuseError, FusePlan},
};
use serde_json::json;

/// A spec, and the checkpoint that it asks for under canonical names, quantised where the config says so.
pub(crate) fn base(config: Value) -> (ModelSpec, WeightMap) {
    let spec = read_spec(&config).expect("a valid config");
    let mut index = WeightIndex::default();
    let mut add = |name: String, dtype, shape: &[u32]| {
        index.tensors.insert(name, entry(dtype, &shape.iter().map(|dim| u64::from(*dim)).collect::<Vec<_>>()));
    };
    use crate::spec::Weight;
    for weight in spec.parts().into_iter().flat_map(|part| spec.weights(part)) {
        let (path, mut shape) = match weight {
            Weight::Linear(linear) => (&linear.path, vec![linear.output_dims, linear.input_dims]),
            Weight::Embedding(embedding) => (&embedding.path, vec![embedding.vocab_size, embedding.dims]),
            Weight::Experts(experts) => (&experts.path, vec![experts.n_experts, experts.output_dims, experts.input_dims]),
            Weight::Norm(norm) => {
                add(format!("{}.weight", norm.path), DType::BF16, &[norm.dims]);
                continue;
            }
            _ => unreachable!("none in these models"),
        };
        let Some(scheme) = spec.quantization.scheme(path) else {
            add(format!("{path}.weight"), DType::BF16, &shape);
            continue;
        };
        let columns = shape.pop().expect("a matrix");
        let with = |columns: u32| [&shape[..], &[columns]].concat();
        add(format!("{path}.weight"), DType::U32, &with(columns * scheme.bits / 32));
        for suffix in ["scales", "biases"] {
            add(format!("{path}.{suffix}"), DType::BF16, &with(columns / scheme.group_size));
        }
    }
    let map = WeightMap::assign(&spec, &index).expect("complete");
    (spec, map)
}

pub(crate) fn llama(quantised: bool) -> Value {
    let mut config = json!({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 128, "tie_word_embeddings": true});
    if quantised {
        config["quantization"] = json!({"group_size": 32, "bits": 4});
    }
    config
}

fn entry(dtype: DType, shape: &[u64]) -> TensorEntry {
    let bytes = shape.iter().product::<u64>() * dtype.size();
    TensorEntry { file: "adapters.safetensors".into(), dtype, shape: shape.to_vec(), offset: 0, bytes }
}

pub(crate) fn tensors(list: &[(&str, &[u64])]) -> WeightIndex {
    let tensors = list.iter().map(|(name, shape)| (name.to_string(), entry(DType::F32, shape))).collect();
    WeightIndex { tensors, ..WeightIndex::default() }
}

pub(crate) fn adapter(kind: &str, list: &[(&str, &[u64])]) -> Result<Adapter, AdapterError> {
    let config = json!({"fine_tune_type": kind, "num_layers": 2, "model": "org/trained-on", "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}});
    Adapter::new(AdapterConfig::from_json(&config)?, tensors(list))
}

const QUERY: &str = "model.layers.1.self_attn.q_proj";

fn query(kind: &str) -> Adapter {
    let names = ["lora_a", "lora_b", "m"].map(|ending| format!("{QUERY}.{ending}"));
    let all: [(&str, &[u64]); 3] = [(&names[0], &[64, 8]), (&names[1], &[8, 64]), (&names[2], &[64])];
    adapter(kind, if kind == "dora" { &all } else { &all[..2] }).expect("whole")
}

#[test]
fn a_config_of_mlx_lm_is_read() {
    let config = json!({"model": "a/b", "num_layers": -1, "seed": 0, "lora_parameters":
        {"rank": 8, "scale": 20, "dropout": 0.1, "keys": ["self_attn.q_proj"]}});
    let read = AdapterConfig::from_json(&config).expect("valid");
    let FineTune::Lora(lora) = &read.fine_tune else { panic!("{read:?}") };
    assert_eq!((lora.rank, lora.scale, lora.dropout, read.num_layers, read.model.as_deref()), (8, 20.0, 0.1, None, Some("a/b")));
    assert_eq!(lora.keys.as_ref().map(BTreeSet::len), Some(1));
    assert_eq!(AdapterConfig::from_json(&json!({"fine_tune_type": "full", "num_layers": 4})).expect("valid").num_layers, Some(4));
}

#[test]
fn what_a_config_cannot_say_is_named() {
    let message = |config: Value| AdapterConfig::from_json(&config).expect_err("refused").to_string();
    let lora = |parameters: Value| message(json!({"lora_parameters": parameters}));
    assert!(message(json!([])).contains("an object"));
    assert!(message(json!({})).contains("no `lora_parameters`"));
    assert!(message(json!({"fine_tune_type": "ia3"})).contains("`fine_tune_type` must be lora, dora or full, not \"ia3\""));
    assert!(lora(json!({"scale": 1})).contains("no `lora_parameters.rank`"));
    for rank in [json!(0), json!(-1), json!(1_000_000), json!(2.5), json!("8")] {
        assert!(lora(json!({"rank": rank, "scale": 1})).contains("`lora_parameters.rank` must be a whole number from 1 to 4096"), "{rank}");
    }
    assert!(lora(json!({"rank": 8, "alpha": 16})).contains("alpha / rank"));
    assert!(lora(json!({"rank": 8, "scale": {"__float__": "NaN"}})).contains("`lora_parameters.scale` must be a finite number"));
    assert!(lora(json!({"rank": 8, "scale": 1e300})).contains("a finite number"));
    assert!(lora(json!({"rank": 8, "scale": 1, "dropout": 1.0})).contains("from 0 to below 1"));
    assert!(lora(json!({"rank": 8, "scale": 1, "keys": "q_proj"})).contains("a list of paths"));
}

#[test]
fn tensors_that_do_not_make_an_adapter_are_named() {
    let message = |kind: &str, list: &[(&str, &[u64])]| adapter(kind, list).expect_err("refused").to_string();
    assert!(message("lora", &[]).contains("no tensors"));
    assert!(message("lora", &[("x.lora_a", &[4, 8])]).contains("`x` has `lora_a` in adapters.safetensors, but no `lora_b`"));
    assert!(message("dora", &[("x.lora_a", &[4, 8]), ("x.lora_b", &[8, 4])]).contains("no `m`"));
    assert!(message("lora", &[("x.weight", &[4, 8])]).contains("`x.weight` is no tensor of a lora adapter"));
    assert!(message("lora", &[("x.m", &[4])]).contains("fine_tune_type"));
    let mut wrong = tensors(&[("x.weight", &[4])]);
    wrong.tensors.insert("y".into(), entry(DType::U32, &[4]));
    let config = AdapterConfig::from_json(&json!({"fine_tune_type": "full"})).expect("valid");
    assert!(Adapter::new(config, wrong).expect_err("refused").to_string().contains("`y` has type U32"));
}

#[test]
fn an_adapter_of_another_model_names_both_and_the_first_misfit() {
    let (spec, map) = base(llama(true));
    assert_eq!(query("lora").check_against(&spec, &map, "org/base"), Ok(()));
    assert_eq!(query("dora").check_against(&spec, &map, "org/base"), Ok(()));
    let message = |kind: &str, list: &[(&str, &[u64])]| {
        adapter(kind, list).expect("whole").check_against(&spec, &map, "org/base").expect_err("a misfit").to_string()
    };
    let wide = message("lora", &[("model.layers.0.mlp.up_proj.lora_a", &[128, 8]), ("model.layers.0.mlp.up_proj.lora_b", &[8, 96])]);
    assert!(wide.contains("made for `org/trained-on` and does not fit `org/base`: 1 of its 2 tensors"), "{wide}");
    assert!(wide.contains("first `model.layers.0.mlp.up_proj.lora_a` of shape [128, 8], wanted is [64, 8]"), "{wide}");
    let rank = message("lora", &[("model.embed_tokens.lora_a", &[128, 4]), ("model.embed_tokens.lora_b", &[4, 64])]);
    assert!(rank.contains("2 of its 2 tensors") && rank.contains("wanted is [128, 8]"), "{rank}");
    let unknown = message("lora", &[("model.layers.7.mlp.up_proj.lora_a", &[64, 8]), ("model.layers.7.mlp.up_proj.lora_b", &[8, 96])]);
    assert!(unknown.contains("`model.layers.7.mlp.up_proj` is no linear"), "{unknown}");
    assert!(message("full", &[("model.layers.0.mlp.up_proj.weight", &[96, 64])]).contains("quantised there"));
    assert!(message("full", &[("model.norm.weight", &[65])]).contains("wanted is [64]"));
    assert!(message("full", &[("nothing", &[65])]).contains("no parameter"));
}

#[test]
fn changes_of_what_the_model_does_not_use_are_left_out() {
    let (_, map) = base(llama(false));
    let extra = "model.layers.9.self_attn.k_proj";
    let index = tensors(&[(&format!("{extra}.weight"), &[32, 64]), ("model.layers.9.norm.weight", &[64])]);
    let names = ["lora_a", "lora_b"].map(|ending| [QUERY, extra].map(|path| format!("{path}.{ending}")));
    let all: Vec<(&str, &[u64])> =
        names.iter().flatten().map(|name| (name.as_str(), if name.ends_with("_a") { &[64, 8][..] } else { &[8, 32] })).collect();
    let lora = adapter("lora", &all).expect("whole").without_unused(&map, &index);
    assert_eq!((lora.changes().len(), lora.tensors.tensors.len()), (1, 2));
    assert!(lora.changes().contains_key(QUERY));
    let whole = adapter("full", &[("model.norm.weight", &[64]), ("model.layers.9.norm.weight", &[64])]).expect("whole");
    let whole = whole.without_unused(&map, &index);
    assert_eq!((whole.changes().len(), whole.tensors.tensors.len()), (1, 1));
}

#[test]
fn experts_have_factors_of_their_own_and_no_dora() {
    let (spec, map) = base(json!({"model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 128, "head_dim": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": true,
        "rope_theta": 10000.0, "tie_word_embeddings": false, "max_position_embeddings": 512}));
    let path = "model.layers.0.mlp.switch_mlp.down_proj";
    let names = ["lora_a", "lora_b", "m"].map(|ending| format!("{path}.{ending}"));
    let all: [(&str, &[u64]); 3] = [(&names[0], &[4, 8, 32]), (&names[1], &[4, 64, 8]), (&names[2], &[4, 64])];
    assert_eq!(adapter("lora", &all[..2]).expect("whole").check_against(&spec, &map, "b"), Ok(()));
    let dora = adapter("dora", &all).expect("whole").check_against(&spec, &map, "b").expect_err("refused").to_string();
    assert!(dora.contains("a stack of experts, for which there is no DoRA"), "{dora}");
}

#[test]
fn a_plan_rewrites_what_an_adapter_changes() {
    let (spec, map) = base(llama(true));
    let lora = query("lora");
    let FusePlan::AsPublished(rewrites) = FusePlan::new(&spec, &map, &lora, false).expect("possible") else { panic!("canonical") };
    let names: Vec<_> =
        rewrites.iter().flat_map(|rewrite| &rewrite.parameters).map(|rewritten| rewritten.parameter.name.as_str()).collect();
    assert_eq!(names, ["weight", "scales", "biases"].map(|suffix| format!("{QUERY}.{suffix}")));
    let FusePlan::Canonical(tensors) = FusePlan::new(&spec, &map, &lora, true).expect("possible") else { panic!("as published") };
    assert!(tensors.iter().all(|tensor| tensor.dtype == DType::BF16), "{tensors:?}");
    assert_eq!(tensors.iter().find(|tensor| tensor.name == format!("{QUERY}.weight")).expect("written").shape, [64, 64]);
    assert!(!tensors.iter().any(|tensor| tensor.name.ends_with("scales")));
    let (spec, map) = base(llama(false));
    assert!(matches!(FusePlan::new(&spec, &map, &lora, true), Ok(FusePlan::AsPublished(_))));
}

#[test]
fn what_has_no_way_back_asks_for_floats() {
    let (spec, mut map) = base(llama(false));
    let lora = query("lora");
    let parameter = map.parts.values_mut().flatten().find(|parameter| parameter.name == format!("{QUERY}.weight")).expect("there");
    let whole = parameter.recipe.clone();
    parameter.recipe = crate::published::Recipe::NormaliseColumns { of: Box::new(whole.clone()), eps: 1e-6 };
    let error = FusePlan::new(&spec, &map, &lora, false).expect_err("refused");
    assert!(error.to_string().contains("is normalised on loading, which has no way back: add --dequantize"), "{error}");
    assert!(matches!(FusePlan::new(&spec, &map, &lora, true), Ok(FusePlan::Canonical(_))));
    // A tensor that makes another parameter too.
    let (spec, mut map) = base(llama(false));
    let key = map.parts.values_mut().flatten().find(|parameter| parameter.name == "model.layers.0.self_attn.q_proj.weight").expect("there");
    key.recipe = whole;
    let error = FusePlan::new(&spec, &map, &lora, false).expect_err("refused");
    assert!(matches!(&error, FuseError::Shared { other, .. } if other.contains("layers.0")), "{error}");
}
