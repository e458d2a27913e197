//! Step 3.5: a sigmoid gate on each head, other heads and another RoPE in layers with a window, clamped SwiGLU, corrected sigmoid router.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts, window_of_type},
    mixtures::mixture,
};
use crate::{
    config::{Config, ConfigError},
    published::{Published, PublishedError, Tensors},
    spec::{
        Activation, AttentionGate, AttentionSpec, ExpertMlpSpec, FeedForward, LinearSpec, Mixer, MlpSpec, ModelSpec, RopeSpec, RouterSpec,
        TensorSpec, rotary_dims,
    },
};
use serde_json::Value;

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "step3p5",
    group: Group::Experts,
    special: "a gate on each head, sliding windows with heads of their own, clamped SwiGLU",
    read,
}];

/// Beside the sum that weights are divided by.
const EPS: f32 = 1e-20;
const SLIDING: &str = "sliding_attention";
const FULL: &str = "full_attention";

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let config = source.config;
    source.refuse_flags(&["tie_word_embeddings", "sink"])?;
    source.only("moe_router_activation", &["sigmoid"])?;
    let eps = config.maybe_f32("rms_norm_eps", 0.0, 1.0)?.unwrap_or(1e-5);
    let decoder = with_heads(Decoder::read_with_eps(source, eps)?, &config)?;
    let routed_layers = routed_layers(&config, decoder.n_layers)?;
    let types = layer_types(&decoder)?;
    let layers = decoder.layers(|i, path| {
        let attention = attention(&decoder, i, types.as_deref(), &format!("{path}.self_attn"))?;
        let path_of_mlp = format!("{path}.mlp");
        let feed_forward = match routed_layers.contains(&i) {
            true => routed(&decoder, i, &path_of_mlp)?,
            false => {
                let mlp = decoder.mlp(&path_of_mlp, decoder.intermediate_size()?, false);
                FeedForward::Mlp(MlpSpec { activation: activation(&config, "swiglu_limits_shared", i)?, ..mlp })
            }
        };
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), feed_forward))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, false)? })
}

/// The decoder with the numbers of heads that `section` has.
fn with_heads<'a>(decoder: Decoder<'a>, section: &Config) -> Result<Decoder<'a>, ConfigError> {
    let n_heads = section.u32("num_attention_heads", 1, 1 << 14)?;
    let n_kv_heads = section.u32("num_attention_groups", 1, 1 << 14)?;
    match n_heads % n_kv_heads == 0 {
        true => Ok(Decoder { n_heads, n_kv_heads, ..decoder }),
        false => Err(ConfigError::Contradiction {
            message: format!("num_attention_heads {n_heads} is no multiple of num_attention_groups {n_kv_heads}"),
        }),
    }
}

/// At least one a layer, where there is a list; the rest is of layers that predict further tokens.
fn layer_types<'a>(decoder: &Decoder<'a>) -> Result<Option<Vec<&'a str>>, ConfigError> {
    let types = decoder.config.texts("layer_types")?.filter(|types| !types.is_empty());
    match types {
        Some(types) if types.len() < decoder.n_layers as usize => Err(ConfigError::Contradiction {
            message: format!("layer_types has {} entries for num_hidden_layers {}", types.len(), decoder.n_layers),
        }),
        types => Ok(types),
    }
}

fn routed_layers(config: &Config, n_layers: u32) -> Result<Vec<u32>, ConfigError> {
    let key = "moe_layers_enum";
    let Some(list) = config.text(key)?.filter(|list| !list.is_empty()) else {
        return Ok((1..n_layers).collect());
    };
    let layers = list.split(',').map(|layer| layer.trim().parse()).collect::<Result<_, _>>();
    layers.map_err(|_| ConfigError::Invalid { key: key.into(), wanted: "numbers of layers with commas between".into(), found: list.into() })
}

fn attention(decoder: &Decoder, i: u32, types: Option<&[&str]>, path: &str) -> Result<AttentionSpec, ConfigError> {
    let config = decoder.config;
    // Without a list every second layer has a window, and yet RoPE is that of full attention everywhere.
    let window_type = types.map_or(if i.is_multiple_of(2) { SLIDING } else { FULL }, |types| types[i as usize]);
    let rope_type = types.map_or(FULL, |types| types[i as usize]);
    let window = window_of_type(window_type, || Ok(config.maybe_u32("sliding_window", 1, u32::MAX)?.unwrap_or(512)))?;
    let decoder = match config.object("attention_other_setting", "attention_other_setting.")?.filter(|_| window.is_some()) {
        Some(other) if other.maybe_u32("head_dim", 1, 1 << 14)?.is_some_and(|dim| dim != decoder.head_dim) => {
            return Err(decoder.source.unsupported("another head_dim in layers with a window"));
        }
        Some(other) => with_heads(*decoder, &other)?,
        None => *decoder,
    };
    let has_gate = config.bool_or("use_head_wise_attn_gate", true)?;
    let gate = LinearSpec::new(format!("{path}.g_proj"), decoder.hidden_size, decoder.n_heads, false);
    Ok(AttentionSpec {
        head_norms: decoder.head_norms(path),
        rope: Some(rope(&decoder, i, rope_type)?),
        window,
        gate: has_gate.then_some(AttentionGate::PerHead(gate)),
        ..decoder.attention(path, AttentionBias::NONE)
    })
}

fn rope(decoder: &Decoder, i: u32, layer_type: &str) -> Result<RopeSpec, ConfigError> {
    let config = decoder.config;
    let theta = match config.get("rope_theta").is_some_and(Value::is_array) {
        true => {
            let thetas = config.f32s("rope_theta", 1.0, 1e12)?.unwrap_or_default();
            let short = || ConfigError::Contradiction { message: format!("rope_theta has {} entries, none for layer {i}", thetas.len()) };
            *thetas.get(i as usize).ok_or_else(short)?
        }
        false => config.maybe_f32("rope_theta", 1.0, 1e12)?.unwrap_or(10_000.0),
    };
    let factors = config.f64s("partial_rotary_factors", 0.0, 1.0)?.unwrap_or_default();
    let dims = rotary_dims(decoder.head_dim, factors.get(i as usize).copied().unwrap_or(1.0))?;
    let scaled_types = config.texts("yarn_only_types")?.unwrap_or_default();
    let is_scaled = scaled_types.is_empty() || scaled_types.contains(&layer_type);
    let scaling = config.object("rope_scaling", "rope_scaling.")?.filter(|_| is_scaled);
    let max_position_embeddings = config.maybe_u32("max_position_embeddings", 1, u32::MAX)?.unwrap_or(262_144);
    RopeSpec::initialize(dims, theta, false, scaling.as_ref(), Some(max_position_embeddings), decoder.source.model_type)
}

/// SwiGLU, cut at the limit that the list has for a layer.
fn activation(config: &Config, key: &str, i: u32) -> Result<Activation, ConfigError> {
    let limits = config.f32s(key, 0.0, 1e6)?.unwrap_or_default();
    match limits.get(i as usize) {
        Some(limit) if *limit > 0.0 => Ok(Activation::ClampedSwiGlu { limit: *limit }),
        _ => Ok(Activation::Silu),
    }
}

fn routed(decoder: &Decoder, i: u32, path: &str) -> Result<FeedForward, ConfigError> {
    let config = decoder.config;
    let or = |key: &str, default| Ok::<u32, ConfigError>(config.maybe_u32(key, 1, 1 << 22)?.unwrap_or(default));
    let n_experts = or("moe_num_experts", 288)?;
    let top_k = config.maybe_u32("moe_top_k", 1, n_experts)?.unwrap_or(8.min(n_experts));
    let gate = LinearSpec::new(format!("{path}.gate.gate"), decoder.hidden_size, n_experts, false);
    let bias = TensorSpec::new(format!("{path}.gate.router_bias"), &[n_experts]);
    let router = RouterSpec {
        renormalise: config.bool_or("norm_expert_weight", true)?.then_some(EPS),
        scale: config.maybe_f32("moe_router_scaling_factor", -1e6, 1e6)?.unwrap_or(3.0),
        ..RouterSpec::sigmoid(gate, top_k, Some(bias))
    };
    let experts = ExpertMlpSpec {
        activation: activation(&config, "swiglu_limits", i)?,
        ..experts(&format!("{path}.switch_mlp"), n_experts, decoder.hidden_size, or("moe_intermediate_size", 1280)?)
    };
    let shared = MlpSpec {
        activation: activation(&config, "swiglu_limits_shared", i)?,
        ..decoder.mlp(&format!("{path}.share_expert"), or("share_expert_dim", 1280)?, false)
    };
    Ok(mixture(router, experts, Some(shared)))
}

const RENAMED: [(&str, &str); 6] = [
    (".moe.gate_proj.", ".mlp.switch_mlp.gate_proj."),
    (".moe.up_proj.", ".mlp.switch_mlp.up_proj."),
    (".moe.down_proj.", ".mlp.switch_mlp.down_proj."),
    (".moe.gate.", ".mlp.gate.gate."),
    (".moe.router_bias", ".mlp.gate.router_bias"),
    (".share_expert.", ".mlp.share_expert."),
];

/// A checkpoint with the names of its first release has the weights of its norms less one.
fn published(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    let is_first = tensors.model_has(|name| RENAMED.iter().any(|(from, to)| name.contains(from) && !name.contains(to)));
    tensors.drop_containing(".mtp");
    tensors.drop_layers_from(spec.n_layers());
    for (from, to) in RENAMED {
        tensors.replace_in_names(from, to)?;
    }
    match is_first {
        true => tensors.change(|name| name.contains("norm") && name.ends_with(".weight"), |weight| weight.plus(1.0)),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architectures::{read_spec, tiny};
    use serde_json::json;

    /// Heads, window, rotated dimensions, base, and whether RoPE is scaled.
    type Row = (u32, Option<u32>, u32, f32, bool);

    fn rows(changes: Value) -> Vec<Row> {
        let mut config = tiny("step3p5");
        config.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
        let row = |layer: &crate::spec::LayerSpec| {
            let Mixer::Attention(attention) = &layer.mixer else { panic!("attention") };
            let rope = attention.rope.clone().expect("rope");
            (attention.n_heads, attention.window, rope.dims, rope.theta, rope.kind != crate::spec::RopeKind::Default)
        };
        read_spec(&config).expect("valid").layers.iter().map(row).collect()
    }

    #[test]
    fn lists_tell_layers_apart() {
        let scaling = json!({"rope_type": "linear", "factor": 4.0});
        let plain = rows(json!({"rope_scaling": scaling}));
        let sliding = (4, Some(16), 16, 1e4, true);
        assert_eq!(plain, [sliding, (4, None, 16, 1e4, true), sliding], "every second layer has a window, RoPE is the same");
        let told = rows(json!({"rope_scaling": scaling, "layer_types": [FULL, SLIDING, FULL, SLIDING], "yarn_only_types": [FULL],
            "rope_theta": [1e6, 1e4, 1e5], "partial_rotary_factors": [0.5, 1.0],
            "attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 2}}));
        assert_eq!(told, [(4, None, 8, 1e6, true), (6, Some(16), 16, 1e4, false), (4, None, 16, 1e5, true)]);
    }

    #[test]
    fn limits_are_of_single_layers() {
        let mut config = tiny("step3p5");
        config["moe_layers_enum"] = json!("1, 2");
        config["swiglu_limits"] = json!([9.0, 0.0, 7.0]);
        config["swiglu_limits_shared"] = json!([5.0, 3.0]);
        let spec = read_spec(&config).expect("valid");
        let clamped = |limit| Activation::ClampedSwiGlu { limit };
        let FeedForward::Mlp(dense) = &spec.layers[0].feed_forward else { panic!("dense") };
        assert_eq!(dense.activation, clamped(5.0));
        let routed = |i: usize| {
            let moe = spec.layers[i].feed_forward.experts().expect("experts");
            (moe.experts.activation, moe.shared.as_ref().expect("shared").mlp.activation)
        };
        assert_eq!([routed(1), routed(2)], [(Activation::Silu, clamped(3.0)), (clamped(7.0), Activation::Silu)]);
        config["moe_layers_enum"] = json!("1;2");
        assert!(read_spec(&config).expect_err("no list").to_string().contains("moe_layers_enum"));
    }
}
