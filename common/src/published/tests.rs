//! Shapes of every verb, rules applied twice, and what is refused.

use super::*;
use crate::{
    architectures::{read_spec, tiny},
    spec::PublishedQuantization,
    weights::{TensorEntry, WeightIndex},
};

fn tensor(name: &str, dtype: DType, shape: &[u64]) -> SymbolicTensor {
    SymbolicTensor::of_checkpoint(name, dtype, shape.to_vec())
}

fn float(shape: &[u64]) -> SymbolicTensor {
    tensor("x", DType::BF16, shape)
}

fn tensors(list: &[(&str, DType, &[u64])]) -> Tensors {
    let entry = |(name, dtype, shape): &(&str, DType, &[u64])| {
        let entry = TensorEntry { file: "model.safetensors".into(), dtype: *dtype, shape: shape.to_vec(), offset: 0, bytes: 0 };
        (name.to_string(), entry)
    };
    Tensors::new(&WeightIndex { tensors: list.iter().map(entry).collect(), ..WeightIndex::default() })
}

/// Names with types and shapes.
fn listed(tensors: &Tensors) -> Vec<String> {
    let line = |name| tensors.get(name).map(|tensor| format!("{name} {} {:?}", tensor.dtype, tensor.shape)).expect("listed");
    tensors.names().map(line).collect()
}

fn message<T: fmt::Debug>(result: Result<T, PublishedError>) -> String {
    result.expect_err("refused").to_string()
}

#[test]
fn shapes_follow_the_operations() {
    let shape = |result: Result<SymbolicTensor, PublishedError>| result.expect("valid").shape;
    assert_eq!(shape(SymbolicTensor::stack(vec![float(&[2, 3]); 4])), [4, 2, 3]);
    assert_eq!(shape(SymbolicTensor::concatenate(vec![float(&[2, 3]), float(&[5, 3])], -2)), [7, 3]);
    assert_eq!(shape(float(&[6, 4]).slice(-2, 1, 4)), [3, 4]);
    assert_eq!(shape(float(&[2, 7, 4]).every(1, 0, 2)), [2, 4, 4]);
    assert_eq!(shape(float(&[2, 7, 4]).every(1, 1, 2)), [2, 3, 4]);
    assert_eq!(shape(float(&[6, 4]).reshape(&[2, 3, 4])), [2, 3, 4]);
    assert_eq!(shape(float(&[2, 3, 4]).transpose(&[2, 0, 1])), [4, 2, 3]);
    assert_eq!(shape(float(&[2, 3, 4]).swap_last_axes()), [2, 4, 3]);
    assert_eq!(shape(tensor("x", DType::U8, &[2, 16]).view(DType::U32)), [2, 4]);
    assert_eq!(shape(float(&[3, 4]).scale_rows(&[(1, 2.0), (2, 0.5)])), [3, 4]);
    assert_eq!(shape(float(&[3, 4]).normalise_columns(1e-7)), [3, 4]);
    let pieces = float(&[10, 4]).split(0, &[6, 2, 2]).expect("valid");
    assert_eq!(pieces.iter().map(|piece| piece.shape[0]).collect::<Vec<_>>(), [6, 2, 2]);
    let fp8 = tensor("w", DType::U8, &[130, 256]).dequantise_fp8(tensor("s", DType::F32, &[2, 2]), Some([128, 128])).expect("blocks");
    assert_eq!((fp8.dtype, fp8.shape), (DType::BF16, vec![130, 256]));
    assert!(tensor("w", DType::U8, &[3, 4, 4]).dequantise_fp8(tensor("s", DType::F32, &[3, 1, 1]), None).is_ok());
    let quantised = float(&[2, 8, 64]).quantise(Affine { group_size: 32, bits: 3 }).expect("groups");
    assert_eq!((quantised.weight.shape.clone(), quantised.scales.shape.clone()), (vec![2, 8, 6], vec![2, 8, 2]));
    assert_eq!(quantised.affine(64), Ok(Affine { group_size: 32, bits: 3 }));
    assert_eq!(shape(quantised.dequantise(64)), [2, 8, 64]);
}

#[test]
fn what_mlx_would_refuse_is_refused_by_name() {
    assert!(message(SymbolicTensor::stack(vec![float(&[2, 3]), tensor("odd", DType::BF16, &[2, 4])])).contains("`odd`"));
    assert!(message(SymbolicTensor::stack(vec![float(&[2]), tensor("odd", DType::F32, &[2])])).contains("F32"));
    assert!(SymbolicTensor::stack(Vec::new()).is_err());
    assert!(SymbolicTensor::concatenate(vec![float(&[2, 3]), float(&[2, 4])], 0).is_err());
    assert!(message(float(&[6, 4]).slice(0, 4, 7)).contains("`x` of shape [6, 4] cannot be sliced 4..7"));
    assert!(float(&[6, 4]).slice(2, 0, 1).is_err());
    assert!(float(&[6, 4]).split(0, &[3, 2]).is_err());
    assert!(float(&[6, 4]).reshape(&[5, 5]).is_err());
    assert!(float(&[6, 4]).transpose(&[0, 0]).is_err());
    assert!(tensor("x", DType::U8, &[2, 15]).view(DType::U32).is_err());
    assert!(tensor("x", DType::U32, &[2]).plus(1.0).is_err());
    assert!(float(&[3, 4]).scale_rows(&[(2, 2.0)]).is_err());
    assert!(float(&[3, 4]).dequantise_fp8(float(&[1]), None).is_err());
    assert!(tensor("w", DType::U8, &[130, 256]).dequantise_fp8(tensor("s", DType::F32, &[1, 2]), Some([128, 128])).is_err());
    assert!(float(&[3, 48]).quantise(Affine { group_size: 32, bits: 4 }).is_err());
}

#[test]
fn what_is_held_while_a_tensor_is_made() {
    assert_eq!(float(&[6, 4]).transient_bytes, 0);
    // What lies in the file is read to its place; what is computed is there beside it.
    assert_eq!(float(&[6, 4]).slice(0, 0, 3).expect("valid").transient_bytes, 0);
    let stack = SymbolicTensor::stack(vec![float(&[6, 4]); 3]).expect("valid");
    assert_eq!((stack.bytes(), stack.transient_bytes), (144, 0));
    assert_eq!(stack.reshape(&[18, 4]).expect("valid").transient_bytes, 0);
    let scaled = float(&[6, 4]).scale(2.0).expect("valid");
    assert_eq!(scaled.transient_bytes, 48);
    assert_eq!(SymbolicTensor::stack(vec![scaled; 3]).expect("valid").transient_bytes, 96);
}

#[test]
fn names_are_changed_once() {
    let mut found = tensors(&[
        ("model.language_model.layers.0.moe.up_proj.weight", DType::F32, &[2, 2]),
        ("model.visual.patch.weight", DType::F32, &[2, 2]),
        ("lm_head.weight", DType::F32, &[2, 2]),
        ("mtp.layers.0.weight", DType::F32, &[2, 2]),
        ("model.language_model.layers.9.eh_proj.weight", DType::F32, &[2, 2]),
    ]);
    let rules = |tensors: &mut Tensors| {
        tensors.drop_prefix("model.visual.");
        tensors.drop_containing("mtp.");
        tensors.drop_layers_from(9);
        tensors.rename_prefix("model.language_model.", "language_model.model.")?;
        tensors.rename_prefix("lm_head.", "language_model.lm_head.")?;
        tensors.replace_in_names(".moe.", ".mlp.moe.")?;
        tensors.rename_suffix("head.weight", "head.head.weight")
    };
    rules(&mut found).expect("valid");
    let names = ["language_model.lm_head.head.weight", "language_model.model.layers.0.mlp.moe.up_proj.weight"];
    assert_eq!(found.names().collect::<Vec<_>>(), names);
    assert!(found.is_dropped("model.visual.patch.weight") && found.is_dropped("model.language_model.layers.9.eh_proj.weight"));
    let before = found.clone();
    rules(&mut found).expect("valid");
    assert_eq!(found, before);
    let mut twice = tensors(&[("a.weight", DType::F32, &[1]), ("b.weight", DType::F32, &[1])]);
    assert!(message(twice.rename("a.weight", "b.weight")).contains("`b.weight` twice"));
}

#[test]
fn a_name_in_another_file_counts_for_the_whole_model() {
    let index = WeightIndex { elsewhere: ["model.layers.5.moe.gate.weight".into()].into(), ..WeightIndex::default() };
    let found = Tensors::new(&index);
    assert!(found.model_has(|name| name.contains(".moe.gate.")) && !found.has("model.layers.5.moe.gate.weight"));
}

#[test]
fn experts_are_stacked_with_whatever_they_have() {
    let name = |e: usize, rest: &str| format!("model.layers.1.mlp.experts.{e}.{rest}");
    let names: Vec<_> = (0..11).flat_map(|e| ["w1.weight", "w1.scales", "w1.bias"].map(|rest| name(e, rest))).collect();
    let list: Vec<_> = names.iter().map(|name| (name.as_str(), DType::F32, &[4u64, 2][..])).collect();
    let mut found = tensors(&list);
    let rules = |tensors: &mut Tensors| tensors.stack_experts("mlp.experts", "mlp.experts", &[("w1", "gate_proj")]);
    rules(&mut found).expect("valid");
    let stacked = |suffix: &str| format!("model.layers.1.mlp.experts.gate_proj.{suffix} F32 [11, 4, 2]");
    assert_eq!(listed(&found), ["bias", "scales", "weight"].map(stacked));
    let weight = found.get("model.layers.1.mlp.experts.gate_proj.weight").expect("stacked");
    assert_eq!(weight.recipe.sources()[10], name(10, "w1.weight"));
    let before = found.clone();
    rules(&mut found).expect("valid");
    assert_eq!(found, before);

    let gap: Vec<_> = list.into_iter().filter(|(listed, _, _)| *listed != name(3, "w1.weight")).collect();
    let mut found = tensors(&gap);
    rules(&mut found).expect("a part of a checkpoint");
    assert_eq!(found.lacking("model.layers.1.mlp.experts.gate_proj.weight"), Some(name(3, "w1.weight").as_str()));
}

#[test]
fn fused_linears_are_taken_apart_by_outputs() {
    let mut found = tensors(&[
        ("a.attn.qkv_proj.weight", DType::U32, &[10, 8]),
        ("a.attn.qkv_proj.scales", DType::BF16, &[10, 2]),
        ("a.attn.qkv_proj.bias", DType::BF16, &[10]),
        ("a.mlp.experts.gate_up_proj", DType::BF16, &[3, 8, 4]),
        ("b.mlp.gate_up_proj.bias", DType::BF16, &[3, 7]),
    ]);
    found.split_outputs("attn.qkv_proj", &[("attn.q_proj", 6), ("attn.k_proj", 2), ("attn.v_proj", 2)]).expect("valid");
    found.rename_suffix(".experts.gate_up_proj", ".experts.gate_up_proj.weight").expect("valid");
    found.split_halves("experts.gate_up_proj", ["switch_mlp.gate_proj", "switch_mlp.up_proj"]).expect("valid");
    found.split_interleaved("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]).expect("valid");
    let wanted = [
        "a.attn.k_proj.bias BF16 [2]",
        "a.attn.k_proj.scales BF16 [2, 2]",
        "a.attn.k_proj.weight U32 [2, 8]",
        "a.attn.q_proj.bias BF16 [6]",
        "a.attn.q_proj.scales BF16 [6, 2]",
        "a.attn.q_proj.weight U32 [6, 8]",
        "a.attn.v_proj.bias BF16 [2]",
        "a.attn.v_proj.scales BF16 [2, 2]",
        "a.attn.v_proj.weight U32 [2, 8]",
        "a.mlp.switch_mlp.gate_proj.weight BF16 [3, 4, 4]",
        "a.mlp.switch_mlp.up_proj.weight BF16 [3, 4, 4]",
        "b.mlp.gate_proj.bias BF16 [3, 4]",
        "b.mlp.up_proj.bias BF16 [3, 3]",
    ];
    assert_eq!(listed(&found), wanted);
    let mut odd = tensors(&[("b.mlp.gate_up_proj.weight", DType::BF16, &[7, 4])]);
    assert!(odd.split_halves("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]).is_err());
}

#[test]
fn convolutions_have_their_channels_last_once() {
    let mut found = tensors(&[("a.conv1d.weight", DType::F32, &[6, 1, 4]), ("b.conv1d.weight", DType::F32, &[6, 4, 1])]);
    found.channels_last("conv1d.weight").expect("valid");
    found.channels_last("conv1d.weight").expect("valid");
    assert_eq!(listed(&found), ["a.conv1d.weight F32 [6, 4, 1]", "b.conv1d.weight F32 [6, 4, 1]"]);
}

#[test]
fn a_latent_up_projection_becomes_a_matrix_a_head() {
    let sizes = LatentUpProjection { n_heads: 2, key_dims: 32, value_dims: 64, rank: 128 };
    let mut found = tensors(&[("a.kv_b_proj.weight", DType::BF16, &[192, 128])]);
    found.split_latent_up_projection(&sizes).expect("valid");
    assert_eq!(listed(&found), ["a.embed_q.weight BF16 [2, 128, 32]", "a.unembed_out.weight BF16 [2, 64, 128]"]);
    let quantised: [(&str, DType, &[u64]); 3] = [
        ("a.kv_b_proj.weight", DType::U32, &[192, 16]),
        ("a.kv_b_proj.scales", DType::BF16, &[192, 4]),
        ("a.kv_b_proj.biases", DType::BF16, &[192, 4]),
    ];
    let mut found = tensors(&quantised);
    found.split_latent_up_projection(&sizes).expect("valid");
    let wanted = [
        "a.embed_q.biases BF16 [2, 128, 1]",
        "a.embed_q.scales BF16 [2, 128, 1]",
        "a.embed_q.weight U32 [2, 128, 4]",
        "a.unembed_out.biases BF16 [2, 64, 4]",
        "a.unembed_out.scales BF16 [2, 64, 4]",
        "a.unembed_out.weight U32 [2, 64, 16]",
    ];
    assert_eq!(listed(&found), wanted);
    assert!(message(tensors(&quantised[..2]).split_latent_up_projection(&sizes)).contains("kv_b_proj.biases"));
}

#[test]
fn foreign_quantisation_becomes_what_mlx_has() {
    let mut fp8 = tensors(&[
        ("a.weight", DType::U8, &[256, 128]),
        ("a.weight_scale_inv", DType::F32, &[2, 1]),
        ("a.activation_scale", DType::F32, &[]),
        ("b.experts.down_proj", DType::U8, &[3, 4, 4]),
        ("b.experts.down_proj_scale_inv", DType::F32, &[3, 1, 1]),
        ("c.weight_scale_inv", DType::F32, &[2, 1]),
    ]);
    fp8.convert_quantisation(PublishedQuantization::Fp8Blocks { block: [128, 128] }).expect("valid");
    assert_eq!(listed(&fp8), ["a.weight BF16 [256, 128]", "b.experts.down_proj BF16 [3, 4, 4]", "c.weight_scale_inv F32 [2, 1]"]);
    let mut fp4 = tensors(&[("a.up_proj_blocks", DType::U8, &[3, 8, 2, 16]), ("a.up_proj_scales", DType::U8, &[3, 8, 2])]);
    fp4.convert_quantisation(PublishedQuantization::Mxfp4Blocks).expect("valid");
    assert_eq!(listed(&fp4), ["a.up_proj.scales U8 [3, 8, 2]", "a.up_proj.weight U32 [3, 8, 8]"]);
    let mut int4 = tensors(&[
        ("a.weight_packed", DType::I32, &[4, 8]),
        ("a.weight_scale", DType::BF16, &[4, 2]),
        ("a.weight_shape", DType::I64, &[2]),
        ("b.weight_packed", DType::I32, &[4, 8]),
    ]);
    int4.convert_quantisation(PublishedQuantization::PackedInt4 { group_size: 32 }).expect("valid");
    assert_eq!(listed(&int4), ["a.biases BF16 [4, 2]", "a.scales BF16 [4, 2]", "a.weight U32 [4, 8]", "b.weight_packed I32 [4, 8]"]);
    assert_eq!(int4.lacking("b.weight"), Some("b.weight_scale"));
}

#[test]
fn every_architecture_leaves_canonical_names_alone() {
    for model_type in crate::architectures::supported_model_types() {
        let spec = read_spec(&tiny(model_type)).expect(model_type);
        let mut index = WeightIndex::default();
        for weight in spec.parts().into_iter().flat_map(|part| spec.weights(part)) {
            let entry = TensorEntry { file: "model.safetensors".into(), dtype: DType::BF16, shape: vec![4, 4], offset: 0, bytes: 32 };
            index.tensors.insert(format!("{}.weight", weight.path()), entry);
        }
        let mut found = Tensors::new(&index);
        spec.published.apply(&spec, &mut found).expect(model_type);
        assert_eq!(found, Tensors::new(&index), "{model_type}");
    }
}
