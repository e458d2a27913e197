//! Whole, partial and broken checkpoints.

use super::*;
use crate::{architectures::read_spec, published::Published, spec::Weight};
use serde_json::json;

fn moe() -> ModelSpec {
    read_spec(&json!({"model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 3, "rms_norm_eps": 1e-5, "vocab_size": 128, "quantization": {"group_size": 32, "bits": 4}}))
    .expect("a valid config")
}

fn entry(dtype: DType, shape: Vec<u64>) -> TensorEntry {
    let bytes = shape.iter().product::<u64>() * dtype.size();
    TensorEntry { file: "model.safetensors".into(), dtype, shape, offset: 0, bytes }
}

/// The index of a checkpoint as Hugging Face has it: experts one by one; quantised where asked.
fn published(spec: &ModelSpec, quantised: bool) -> WeightIndex {
    let mut index = WeightIndex::default();
    let mut matrix = |path: &str, rows: u32, columns: u32, quantised: bool| {
        let (rows, columns) = (u64::from(rows), u64::from(columns));
        let pieces = match quantised {
            false => vec![("weight", DType::F32, columns)],
            true => vec![("weight", DType::U32, columns / 8), ("scales", DType::F32, columns / 32), ("biases", DType::F32, columns / 32)],
        };
        for (suffix, dtype, columns) in pieces {
            index.tensors.insert(format!("{path}.{suffix}"), entry(dtype, vec![rows, columns]));
        }
    };
    let mut norms = Vec::new();
    for weight in spec.parts().into_iter().flat_map(|part| spec.weights(part)) {
        match weight {
            Weight::Norm(norm) => norms.push((format!("{}.weight", norm.path), u64::from(norm.dims))),
            Weight::Embedding(embedding) => matrix(&embedding.path, embedding.vocab_size, embedding.dims, quantised),
            Weight::Linear(linear) => {
                matrix(&linear.path, linear.output_dims, linear.input_dims, quantised && !linear.path.ends_with("gate"));
            }
            Weight::Experts(experts) => {
                let (block, projection) = experts.path.split_once("switch_mlp.").expect("canonical");
                let name = ["gate_proj", "down_proj", "up_proj"].iter().position(|name| *name == projection).expect("known") + 1;
                for e in 0..experts.n_experts {
                    matrix(&format!("{block}experts.{e}.w{name}"), experts.output_dims, experts.input_dims, quantised);
                }
            }
            Weight::HeadLinear(_) | Weight::Convolution(_) | Weight::Tensor(_) => unreachable!("none in this model"),
        }
    }
    index.tensors.extend(norms.into_iter().map(|(name, dims)| (name, entry(DType::F32, vec![dims]))));
    index
}

fn message(spec: &ModelSpec, index: &WeightIndex) -> String {
    WeightMap::assign(spec, index).expect_err("wrong").to_string()
}

#[test]
fn every_tensor_is_used_once_and_experts_are_stacked() {
    let spec = moe();
    for quantised in [false, true] {
        let index = published(&spec, quantised);
        let map = WeightMap::assign(&spec, &index).expect("complete");
        let sources: Vec<_> = map.parts.values().flatten().flat_map(Parameter::sources).collect();
        assert_eq!(sources.len(), index.tensors.len());
        let total: u64 = index.tensors.values().map(|entry| entry.bytes).sum();
        assert_eq!(map.bytes(&spec.parts()), total);
        let name = "model.layers.1.block_sparse_moe.switch_mlp.gate_proj.weight";
        let gate = map.parts[&Part::Layer(1)].iter().find(|parameter| parameter.name == name).expect("stacked");
        assert_eq!((gate.sources().len(), gate.shape[0], gate.transient_bytes), (3, 3, 0));
        assert_eq!(map.bytes(&spec.parts_of(0..1)) + map.bytes(&spec.parts_of(1..2)), total);
    }
}

#[test]
fn canonical_names_make_the_same_parameters() {
    let spec = moe();
    let map = WeightMap::assign(&spec, &published(&spec, true)).expect("complete");
    let tensor = |parameter: &Parameter| (parameter.name.clone(), entry(parameter.dtype, parameter.shape.clone()));
    let index = WeightIndex { tensors: map.parts.values().flatten().map(tensor).collect(), ..WeightIndex::default() };
    let canonical = WeightMap::assign(&spec, &index).expect("complete");
    let listed = |map: &WeightMap| map.parts.values().flatten().map(|p| (p.name.clone(), p.dtype, p.shape.clone())).collect::<Vec<_>>();
    assert_eq!(listed(&map), listed(&canonical));
    assert!(
        canonical
            .parts
            .values()
            .flatten()
            .all(|parameter| matches!(&parameter.recipe, Recipe::Tensor(source) if source.name == parameter.name))
    );
}

#[test]
fn a_node_needs_only_its_own_tensors() {
    let spec = moe();
    let mut index = published(&spec, true);
    let parts = spec.parts_of(1..2);
    let whole = WeightMap::assign(&spec, &index).expect("complete");
    index.tensors.retain(|name, _| !name.starts_with("model.layers.0.") || name.contains("experts.0."));
    let partial = WeightMap::assign_parts(&spec, &index, &parts).expect("its parts are there");
    assert_eq!(partial.bytes(&parts), whole.bytes(&parts));
    assert_eq!(partial.activation_dtype, whole.activation_dtype);
    assert!(WeightMap::assign_parts(&spec, &index, &spec.parts_of(0..1)).is_err());
}

#[test]
fn a_missing_a_misshapen_and_a_left_over_tensor_are_named() {
    let spec = moe();
    let mut index = published(&spec, false);
    let norm = index.tensors.remove("model.norm.weight").expect("there");
    assert!(message(&spec, &index).contains("`model.norm.weight` is missing"));
    index.tensors.insert("model.norm.weight".into(), TensorEntry { shape: vec![65], ..norm.clone() });
    assert!(message(&spec, &index).contains("[65]"));
    index.tensors.insert("model.norm.weight".into(), TensorEntry { dtype: DType::I32, ..norm.clone() });
    assert!(message(&spec, &index).contains("I32"));
    index.tensors.insert("model.norm.weight".into(), norm.clone());
    index.tensors.insert("model.layers.7.extra".into(), norm);
    assert!(message(&spec, &index).contains("`model.layers.7.extra`"));
    index.tensors.remove("model.layers.7.extra");
    let last = index.tensors.remove("model.layers.0.block_sparse_moe.experts.2.w1.weight").expect("there");
    assert!(message(&spec, &index).contains("gate_proj.weight`, made of `model.layers.0.block_sparse_moe.experts.0.w1.weight`"));
    index.tensors.insert("model.layers.0.block_sparse_moe.experts.2.w1.weight".into(), last);
    index.tensors.remove("model.layers.0.block_sparse_moe.experts.1.w1.weight");
    assert!(message(&spec, &index).contains("made with `model.layers.0.block_sparse_moe.experts.1.w1.weight`"));
}

#[test]
fn what_rules_take_and_make_nothing_of_is_left_over_and_what_they_drop_is_not() {
    let spec = moe();
    let mut index = published(&spec, false);
    index.tensors.insert("vision.weight".into(), entry(DType::F32, vec![1]));
    index.tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), entry(DType::F32, vec![8]));
    assert!(message(&spec, &index).contains("1 tensors of the checkpoint have no place in this model, the first is `vision.weight`"));
    let dense = read_spec(&json!({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 128, "tie_word_embeddings": true}))
    .expect("a valid config");
    let mut index = published(&dense, false);
    index.tensors.insert("lm_head.weight".into(), entry(DType::F32, vec![128, 64]));
    index.tensors.insert("vision.weight".into(), entry(DType::F32, vec![1]));
    let forgetful = Published::new(|_, tensors| {
        tensors.take("vision.weight");
        Ok(())
    });
    assert!(message(&ModelSpec { published: forgetful, ..dense.clone() }, &index).contains("`vision.weight`"));
    let dropping = Published::new(|_, tensors| {
        tensors.drop_prefix("vision.");
        Ok(())
    });
    assert!(WeightMap::assign(&ModelSpec { published: dropping, ..dense }, &index).is_ok());
}

#[test]
fn a_piece_that_nobody_asks_for_is_left_over() {
    let spec = read_spec(&json!({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 128, "tie_word_embeddings": true}))
    .expect("a valid config");
    let mut index = published(&spec, false);
    let mlp = "model.layers.0.mlp";
    index.tensors.retain(|name, _| !name.ends_with("gate_proj.weight") && !name.ends_with("up_proj.weight"));
    index.tensors.insert(format!("{mlp}.gate_up_proj.weight"), entry(DType::F32, vec![192, 64]));
    let rules: crate::published::Rules = |_, tensors| tensors.split_halves("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]);
    let fused = ModelSpec { published: Published::new(rules), ..spec.clone() };
    let map = WeightMap::assign(&fused, &index).expect("one tensor, two parameters");
    let total: u64 = index.tensors.values().map(|entry| entry.bytes).sum();
    assert_eq!(map.bytes(&spec.parts()), total);
    index.tensors.insert(format!("{mlp}.gate_up_proj.bias"), entry(DType::F32, vec![192]));
    assert!(message(&fused, &index).contains("gate_up_proj.bias"));
}
