//! What configs of state space models say of their layers, and what becomes of published weights.

use super::{read_spec, tests::tiny};
use crate::{
    config::ConfigError,
    dtype::DType,
    published::{Recipe, Tensors},
    spec::{FeedForward, LayerSpec, Mixer, ModelSpec},
    weights::{TensorEntry, WeightIndex},
};
use serde_json::{Value, json};

fn read(model_type: &str, changes: &[(&str, Value)]) -> Result<ModelSpec, ConfigError> {
    let mut config = tiny(model_type);
    changes.iter().for_each(|(key, value)| config[*key] = value.clone());
    read_spec(&config)
}

/// A letter a layer, as Nemotron has them: `+` is a layer with a mixer and an MLP.
fn kinds(spec: &ModelSpec) -> String {
    let kind = |layer: &LayerSpec| match (&layer.mixer, &layer.feed_forward) {
        (Mixer::None, FeedForward::Mlp(_)) => '-',
        (Mixer::None, FeedForward::Experts(_)) => 'E',
        (Mixer::Attention(_), _) => '*',
        (Mixer::StateSpace(_) | Mixer::SelectiveScan(_), FeedForward::None) => 'M',
        (Mixer::StateSpace(_) | Mixer::SelectiveScan(_), _) => '+',
        _ => '?',
    };
    spec.layers.iter().map(kind).collect()
}

#[test]
fn a_pattern_says_what_each_layer_is() {
    let pattern = "hybrid_override_pattern";
    let read = |changes: &[(&str, Value)]| read("nemotron_h", changes).map(|spec| kinds(&spec));
    assert_eq!(read(&[(pattern, json!("M-*"))]), Ok("M-*".into()));
    assert_eq!(read(&[(pattern, json!(["E", "M", "-"]))]), Ok("EM-".into()));
    let names = json!(["mamba", "full_attention", "moe", "mlp"]);
    assert_eq!(read(&[(pattern, Value::Null), ("num_hidden_layers", Value::Null), ("layers_block_type", names)]), Ok("M*E-".into()));
    assert!(matches!(read(&[(pattern, json!("M-"))]), Err(ConfigError::Contradiction { .. })));
    assert!(matches!(read(&[(pattern, json!("M-x"))]), Err(ConfigError::Unsupported { .. })));
    assert_eq!(read(&[(pattern, Value::Null)]), Err(ConfigError::Missing { key: pattern.into() }));
}

#[test]
fn attention_comes_once_in_a_period() {
    let jamba = |period: u32, offset: u32| {
        let changes = [("attn_layer_period", json!(period)), ("attn_layer_offset", json!(offset))];
        read("jamba", &changes).map(|spec| kinds(&spec))
    };
    assert_eq!(jamba(3, 1), Ok("+*+".into()));
    assert_eq!(jamba(2, 0), Ok("*+*".into()));
    let plamo = |step: u32| read("plamo2", &[("mamba_step", json!(step))]).map(|spec| kinds(&spec));
    assert_eq!(plamo(2), Ok("+*+".into()));
    assert_eq!(plamo(6), Ok("++*".into()));
    assert!(plamo(1).is_err());
    assert_eq!(read("plamo2", &[("mamba_enabled", json!(false))]).map(|spec| kinds(&spec)), Ok("***".into()));
}

#[test]
fn windows_but_in_layers_that_see_all() {
    let changes = [("mamba_enabled", json!(false)), ("full_attention_idx", json!([1])), ("attention_window_size", json!(7))];
    let spec = read("plamo2", &changes).expect("reads");
    assert_eq!(spec.layers.iter().map(|layer| layer.mixer.window()).collect::<Vec<_>>(), [Some(7), None, Some(7)]);
}

#[test]
fn time_steps_have_two_bounds() {
    let limit = |value: Value| match &read("mamba2", &[("time_step_limit", value)])?.layers[0].mixer {
        Mixer::StateSpace(spec) => Ok::<_, ConfigError>(spec.time_step_limit),
        _ => panic!("a state space"),
    };
    assert_eq!(limit(json!([0.1, {"__float__": "Infinity"}])), Ok((0.1, f32::INFINITY)));
    assert_eq!(limit(Value::Null), Ok((0.0, f32::INFINITY)));
    for wrong in [json!([0.1]), json!([2, 1]), json!([-1, 1])] {
        assert!(limit(wrong).expect_err("refused").to_string().contains("time_step_limit"));
    }
}

/// What becomes of tensors of these names and shapes.
fn published(spec: &ModelSpec, tensors: &[(&str, &[u64])]) -> Tensors {
    let entry = |(name, shape): &(&str, &[u64])| {
        (name.to_string(), TensorEntry { file: "model.safetensors".into(), dtype: DType::BF16, shape: shape.to_vec(), offset: 0, bytes: 0 })
    };
    let mut tensors = Tensors::new(&WeightIndex { tensors: tensors.iter().map(entry).collect(), ..WeightIndex::default() });
    spec.published.apply(spec, &mut tensors).expect("applies");
    tensors
}

#[test]
fn multipliers_are_folded_into_weights_that_do_not_have_them() {
    let changes = [
        ("attention_in_multiplier", json!(3.0)),
        ("key_multiplier", json!(0.5)),
        ("ssm_in_multiplier", json!(2.0)),
        ("ssm_multipliers", json!([1, 2, 3, 4, 5])),
        ("lm_head_multiplier", json!(1.0)),
    ];
    let spec = read("falcon_h1", &changes).expect("reads");
    let linears: [(&str, &[u64]); 3] = [
        ("model.layers.0.self_attn.k_proj.weight", &[32, 64]),
        ("model.layers.0.mamba.in_proj.weight", &[328, 64]),
        ("lm_head.weight", &[512, 64]),
    ];
    let kernel = "model.layers.0.mamba.conv1d.weight";
    let recipe = |tensors: &Tensors, name: &str| tensors.get(name).expect("there").recipe.clone();

    let folded = published(&spec, &[&linears[..], &[(kernel, &[192, 1, 4])]].concat());
    assert_eq!(folded.get(kernel).map(|tensor| tensor.shape.clone()), Some(vec![192, 4, 1]));
    assert!(matches!(recipe(&folded, linears[0].0), Recipe::Scale { factor: 1.5, .. }));
    let Recipe::ScaleRows { runs, .. } = recipe(&folded, linears[1].0) else { panic!("scaled by rows") };
    assert_eq!(runs, [(128, 2.0), (128, 4.0), (32, 6.0), (32, 8.0), (8, 10.0)]);
    assert!(matches!(recipe(&folded, linears[2].0), Recipe::Tensor(_)), "a factor of 1");

    let saved = published(&spec, &[&linears[..], &[(kernel, &[192, 4, 1])]].concat());
    assert!(linears.iter().all(|(name, _)| matches!(recipe(&saved, name), Recipe::Tensor(_))));
}

#[test]
fn a_dense_mlp_is_published_as_the_shared_one() {
    let linears: [(&str, &[u64]); 2] =
        [("model.layers.0.shared_mlp.input_linear.weight", &[192, 64]), ("model.layers.0.shared_mlp.output_linear.weight", &[64, 96])];
    let dense = read("granitemoehybrid", &[("num_local_experts", json!(0))]).expect("reads");
    let names = ["model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"];
    assert!(published(&dense, &linears).names().eq(names));
    let routed = read("granitemoehybrid", &[]).expect("reads");
    assert!(published(&routed, &linears).names().eq(linears.map(|(name, _)| name)));
}
