//! LFM 2, dense or with experts: layers with a short convolution between layers with attention; the wrapper of the models that see.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts},
    vision,
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{
        Activation, AttentionSpec, ConvolutionSpec, FeedForward, HeadNorms, HeadSpec, LayerSpec, LinearSpec, Mixer, MlpInputs, MlpSpec,
        ModelSpec, MoeSpec, Ranking, RopeSpec, RouterPrecision, RouterSpec, ShortConvolutionSpec, TensorSpec,
    },
};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "lfm2", group: Group::StateSpace, special: "short convolutions beside attention", read },
    Architecture { model_type: "lfm2-vl", group: Group::StateSpace, special: "text of LFM2-VL: as lfm2", read: read_text },
    Architecture {
        model_type: "lfm2_vl",
        group: Group::StateSpace,
        special: "lfm2-vl by the name that transformers gives it",
        read: read_text,
    },
    Architecture { model_type: "lfm2_moe", group: Group::StateSpace, special: "short convolutions, sigmoid router", read: read_moe },
];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = decoder(source)?;
    let dims = mlp_dims(&decoder)?;
    let spec = model(&decoder, |_, path| Ok(FeedForward::Mlp(mlp(&decoder, path, dims))))?;
    Ok(ModelSpec { published: Published::new(published), ..spec })
}

fn read_text(source: Source) -> Result<ModelSpec, ConfigError> {
    vision::language_model(source, read)
}

fn read_moe(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = decoder(source)?;
    let n_dense_layers = decoder.config.u32("num_dense_layers", 0, 4096)?;
    let spec = model(&decoder, |i, path| {
        Ok(match i < n_dense_layers {
            true => FeedForward::Mlp(decoder.mlp(path, decoder.intermediate_size()?, false)),
            false => FeedForward::Experts(Box::new(moe(&decoder, path)?)),
        })
    })?;
    Ok(ModelSpec { published: Published::new(published_moe), ..spec })
}

fn decoder(source: Source) -> Result<Decoder, ConfigError> {
    let decoder = Decoder::read_with_eps(source, source.config.f32("norm_eps", 0.0, 1.0)?)?;
    if !decoder.config.bool_or("tie_embedding", true)? {
        return Err(source.unsupported("a head apart from the embedding"));
    }
    Ok(decoder)
}

fn model<'a>(
    decoder: &Decoder<'a>,
    feed_forward: impl Fn(u32, &str) -> Result<FeedForward, ConfigError>,
) -> Result<ModelSpec, ConfigError> {
    let attending = attending_layers(decoder)?;
    let layers = decoder.layers(|i, path| {
        let mixer = match attending.contains(&i) {
            true => Mixer::Attention(Box::new(attention(decoder, &format!("{path}.self_attn"))?)),
            false => Mixer::ShortConvolution(Box::new(short_convolution(decoder, &format!("{path}.conv"))?)),
        };
        let norm = |name: &str| decoder.norm(format!("{path}.{name}"), decoder.hidden_size);
        let feed_forward = feed_forward(i, &format!("{path}.feed_forward"))?;
        Ok(LayerSpec::pre_norm(norm("operator_norm"), mixer, norm("ffn_norm"), feed_forward))
    })?;
    let final_norm = decoder.norm(decoder.path("model.embedding_norm"), decoder.hidden_size);
    Ok(ModelSpec { head: HeadSpec::Tied, final_norm, ..decoder.model(layers, true)? })
}

/// `full_attn_idxs`, or what `layer_types` says.
fn attending_layers(decoder: &Decoder) -> Result<Vec<u32>, ConfigError> {
    if let Some(listed) = decoder.config.u32s("full_attn_idxs")? {
        return Ok(listed);
    }
    let types = decoder.config.texts("layer_types")?.ok_or_else(|| ConfigError::Missing { key: "layer_types".into() })?;
    if types.len() != decoder.n_layers as usize {
        let message = format!("layer_types has {} entries for num_hidden_layers {}", types.len(), decoder.n_layers);
        return Err(ConfigError::Contradiction { message });
    }
    if let Some(other) = types.iter().find(|kind| !["full_attention", "conv"].contains(kind)) {
        return Err(decoder.source.unsupported(format!("layers of type `{other}`")));
    }
    Ok((0..).zip(types).filter(|(_, kind)| *kind == "full_attention").map(|(i, _)| i).collect())
}

fn attention(decoder: &Decoder, path: &str) -> Result<AttentionSpec, ConfigError> {
    let mut attention = decoder.attention(path, AttentionBias::NONE);
    attention.output.path = format!("{path}.out_proj");
    let norm = |name: &str| decoder.norm(format!("{path}.{name}"), decoder.head_dim);
    attention.head_norms = HeadNorms::PerHead { query: norm("q_layernorm"), key: norm("k_layernorm") };
    let model_type = decoder.source.model_type;
    attention.rope = Some(RopeSpec::unscaled(&decoder.config, model_type, decoder.head_dim, Some(1_000_000.0), false)?);
    Ok(attention)
}

fn short_convolution(decoder: &Decoder, path: &str) -> Result<ShortConvolutionSpec, ConfigError> {
    let (config, channels) = (decoder.config, decoder.hidden_size);
    let bias = config.bool_or("conv_bias", false)?;
    let kernel = config.u32("conv_L_cache", 1, 1 << 10)?;
    Ok(ShortConvolutionSpec {
        input: LinearSpec::new(format!("{path}.in_proj"), channels, 3 * channels, bias),
        convolution: ConvolutionSpec { path: format!("{path}.conv"), channels, kernel, bias },
        output: LinearSpec::new(format!("{path}.out_proj"), channels, channels, bias),
    })
}

/// Width inside the MLPs: two thirds of what the config says, times a factor, rounded up, where it wants that.
fn mlp_dims(decoder: &Decoder) -> Result<u32, ConfigError> {
    let config = decoder.config;
    let block_dim = config.maybe_u32("block_dim", 1, 1 << 20)?.unwrap_or(decoder.hidden_size);
    if block_dim != decoder.hidden_size {
        let message = format!("block_dim {block_dim} is not hidden_size {}", decoder.hidden_size);
        return Err(ConfigError::Contradiction { message });
    }
    let dims = config.maybe_u32("block_ff_dim", 1, 1 << 22)?.map_or_else(|| decoder.intermediate_size(), Ok)?;
    if !config.bool_or("block_auto_adjust_ff_dim", true)? {
        return Ok(dims);
    }
    let factor = config.maybe_f64("block_ffn_dim_multiplier", 1e-3, 1e3)?.unwrap_or(1.0);
    let adjusted = (factor * f64::from(2 * dims / 3)) as u32;
    let multiple = config.maybe_u32("block_multiple_of", 1, 1 << 20)?.unwrap_or(256);
    Ok(adjusted.div_ceil(multiple) * multiple)
}

/// With the names of the first Llama.
fn mlp(decoder: &Decoder, path: &str, dims: u32) -> MlpSpec {
    let linear = |name: &str, input, output| LinearSpec::new(format!("{path}.{name}"), input, output, false);
    let (gate, up) = (linear("w1", decoder.hidden_size, dims), linear("w3", decoder.hidden_size, dims));
    MlpSpec { inputs: MlpInputs::Gated { gate, up }, activation: Activation::Silu, down: linear("w2", dims, decoder.hidden_size) }
}

fn moe(decoder: &Decoder, path: &str) -> Result<MoeSpec, ConfigError> {
    let (config, hidden_size) = (decoder.config, decoder.hidden_size);
    let n_experts = config.u32("num_experts", 1, 1 << 16)?;
    let top_k = config.u32("num_experts_per_tok", 1, n_experts)?;
    let gate = LinearSpec::new(format!("{path}.gate"), hidden_size, n_experts, false);
    let bias = config.bool_or("use_expert_bias", true)?.then(|| TensorSpec::new(format!("{path}.expert_bias"), &[n_experts]));
    Ok(MoeSpec {
        router: RouterSpec {
            ranking: Ranking::BestLast,
            precision: RouterPrecision::STREAM,
            renormalise: config.bool_or("norm_topk_prob", true)?.then_some(1e-6),
            scale: config.maybe_f32("routed_scaling_factor", 0.0, 1e6)?.unwrap_or(1.0),
            ..RouterSpec::sigmoid(gate, top_k, bias)
        },
        experts: experts(&format!("{path}.switch_mlp"), n_experts, hidden_size, config.u32("moe_intermediate_size", 1, 1 << 22)?),
        shared: None,
        latent: None,
    })
}

fn published(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    tensors.channels_last(".conv.conv.weight")
}

fn published_moe(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    published(spec, tensors)?;
    for (theirs, ours) in [(".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj.")] {
        tensors.replace_in_names(theirs, ours)?;
    }
    let projections = ["gate_proj", "up_proj", "down_proj"].map(|name| (name, name));
    tensors.stack_experts("feed_forward.experts", "feed_forward.switch_mlp", &projections)
}

#[cfg(test)]
mod tests {
    use crate::{
        architectures::{read_spec, tiny},
        spec::{FeedForward, Mixer},
    };
    use serde_json::{Value, json};

    #[test]
    fn mlps_are_as_wide_as_the_config_makes_them() {
        let width = |changes: Value| {
            let mut config = tiny("lfm2");
            config.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
            match &read_spec(&config).expect("valid").layers[0].feed_forward {
                FeedForward::Mlp(mlp) => mlp.inner_dims(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(width(json!({"block_ff_dim": 6656})), 4608);
        assert_eq!(width(json!({"block_ff_dim": 200, "block_ffn_dim_multiplier": 1.3, "block_multiple_of": 32})), 192);
        assert_eq!(width(json!({"block_auto_adjust_ff_dim": false})), 96);
    }

    #[test]
    fn layers_attend_as_listed() {
        let attends = |listed: Value| {
            let mut config = tiny("lfm2");
            config["full_attn_idxs"] = Value::Null;
            config.as_object_mut().expect("an object").extend(listed.as_object().expect("an object").clone());
            let spec = read_spec(&config).map_err(|error| error.to_string())?;
            Ok::<_, String>(spec.layers.iter().map(|layer| matches!(layer.mixer, Mixer::Attention(_))).collect::<Vec<_>>())
        };
        assert_eq!(attends(json!({"full_attn_idxs": [0, 2]})), Ok(vec![true, false, true]));
        assert_eq!(attends(json!({"layer_types": ["conv", "full_attention", "conv"]})), Ok(vec![false, true, false]));
        assert!(attends(json!({"layer_types": ["conv", "mamba", "conv"]})).expect_err("unknown").contains("mamba"));
        assert!(attends(json!({})).expect_err("none").contains("layer_types"));
    }
}
