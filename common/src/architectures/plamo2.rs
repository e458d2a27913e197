//! PLaMo 2 (Preferred Networks 2025): Mamba 2 layers whose B, C and time steps come from x after the convolution, attention layers between,
//! norms around each sub-layer.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Defaults, Source},
    state_spaces::{convolution, kernels},
};
use crate::{
    config::ConfigError,
    published::Published,
    spec::{
        AfterConvolutionSpec, AttentionSpec, FeedForward, GatedNorm, HeadNorms, LayerSpec, LinearSpec, Mixer, ModelSpec, NormKind,
        NormSpec, Residual, RopeSpec, StateSpaceInputs, StateSpaceSpec, TensorSpec,
    },
};

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "plamo2",
    group: Group::StateSpace,
    special: "state spaces and attention in turn, norms on both sides",
    read,
}];

const DEFAULTS: Defaults = Defaults {
    hidden_size: Some(4096),
    n_layers: Some(32),
    n_heads: Some(32),
    n_kv_heads: Some(4),
    head_dim: None,
    vocab_size: Some(32_000),
    norm_eps: None,
};
/// Of queries and keys, whatever the config says.
const HEAD_NORM_EPS: f32 = 1e-6;

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let config = source.config;
    source.only("linear_type", &["normal"])?;
    let eps = config.maybe_f32("rms_norm_eps", 0.0, 1.0)?.unwrap_or(1e-6);
    let head_dim = config.maybe_u32("hidden_size_per_head", 1, 1 << 14)?.unwrap_or(128);
    let decoder = Decoder::read_with_defaults(source, &Defaults { head_dim: Some(head_dim), norm_eps: Some(eps), ..DEFAULTS })?;
    let decoder = Decoder { head_dim, norm_kind: NormKind::Rms { offset: 1.0 }, ..decoder };
    let intermediate_size = config.maybe_u32("intermediate_size", 1, 1 << 22)?.unwrap_or(13_312);
    let is_attention = attention_layers(&decoder)?;
    let layers = decoder.layers_under("model.layers.layers", |i, path| {
        let path_of_mixer = format!("{path}.mixer");
        let mixer = match is_attention[i as usize] {
            true => Mixer::Attention(Box::new(attention(&decoder, i, &path_of_mixer)?)),
            false => Mixer::StateSpace(Box::new(state_space(&decoder, &path_of_mixer)?)),
        };
        let norm = |name: &str, offset| {
            Some(NormSpec { kind: NormKind::Rms { offset }, ..decoder.norm(format!("{path}.{name}"), decoder.hidden_size) })
        };
        Ok(LayerSpec {
            before_mixer: norm("pre_mixer_norm", 1.0),
            mixer,
            after_mixer: norm("post_mixer_norm", 1.0 / 5.0),
            before_feed_forward: norm("pre_mlp_norm", 1.0),
            feed_forward: FeedForward::Mlp(decoder.fused_mlp(&format!("{path}.mlp"), intermediate_size, false)),
            after_feed_forward: norm("post_mlp_norm", 5.0f32.powf(-1.5)),
            residual: Residual::PLAIN,
            layer_input: None,
            output_scale: None,
        })
    })?;
    Ok(ModelSpec { published: Published::new(kernels), ..decoder.model(layers, true)? })
}

/// Which layers have attention: one in each `mamba_step`, or the last one of a model that is shorter than half of it.
fn attention_layers(decoder: &Decoder) -> Result<Vec<bool>, ConfigError> {
    let (config, n_layers) = (decoder.config, decoder.n_layers);
    if !config.bool_or("mamba_enabled", true)? {
        return Ok(vec![true; n_layers as usize]);
    }
    let step = config.maybe_u32("mamba_step", 2, 4096)?.unwrap_or(2);
    let is_attention = |i: u32| if n_layers <= step / 2 { i + 1 == n_layers } else { i % step == step / 2 };
    Ok((0..n_layers).map(is_attention).collect())
}

/// A token sees `attention_window_size` tokens, but in the layers of `full_attention_idx`; mlx-lm lets it see all.
fn attention(decoder: &Decoder, layer: u32, path: &str) -> Result<AttentionSpec, ConfigError> {
    let config = decoder.config;
    let weight = |name: &str, n_heads| TensorSpec::new(format!("{path}.{name}"), &[n_heads, decoder.head_dim]);
    let sees_all = config.u32s("full_attention_idx")?.unwrap_or_default().contains(&layer);
    let window = config.maybe_u32("attention_window_size", 1, u32::MAX)?.unwrap_or(2048);
    Ok(AttentionSpec {
        head_norms: HeadNorms::PerHeadWeights {
            norm: NormSpec::rms_unweighted(decoder.head_dim, HEAD_NORM_EPS),
            query: weight("q_weight", decoder.n_heads),
            key: weight("k_weight", decoder.n_kv_heads),
        },
        rope: Some(RopeSpec::unscaled(&config, decoder.source.model_type, decoder.head_dim, Some(10_000.0), false)?),
        window: (!sees_all).then_some(window),
        ..decoder.fused_attention(path, AttentionBias::NONE)
    })
}

fn state_space(decoder: &Decoder, path: &str) -> Result<StateSpaceSpec, ConfigError> {
    let (config, hidden_size, head_dim) = (decoder.config, decoder.hidden_size, decoder.head_dim);
    let size = |key: &str, min, default| Ok(config.maybe_u32(key, min, 1 << 14)?.unwrap_or(default));
    let (n_heads, state_dim) = (size("mamba_num_heads", 1, 64)?, size("mamba_d_state", 1, 64)?);
    let (inner, dt_rank) = (n_heads * head_dim, (hidden_size / 16).max(64));
    let linear = |name: &str, input, output| LinearSpec::new(format!("{path}.{name}"), input, output, false);
    let tensor = |name: &str, dims| TensorSpec::new(format!("{path}.{name}"), &[dims]);
    let rest = AfterConvolutionSpec {
        bcdt: linear("bcdt_proj", inner, dt_rank + 2 * state_dim),
        dt: linear("dt_proj", dt_rank, n_heads),
        dt_norm: tensor("dt_norm_weight", dt_rank),
        b_norm: tensor("B_norm_weight", state_dim),
        c_norm: tensor("C_norm_weight", state_dim),
        eps: decoder.norm_eps,
    };
    Ok(StateSpaceSpec {
        n_heads,
        head_dim,
        state_dim,
        n_groups: 1,
        inputs: StateSpaceInputs::AfterConvolution { gate_and_x: linear("in_proj", hidden_size, 2 * inner), rest: Box::new(rest) },
        convolution: convolution(path, inner, size("mamba_d_conv", 2, 4)?, false),
        dt_bias: tensor("dt_bias", n_heads),
        a_log: tensor("A_log", n_heads),
        d: tensor("D", n_heads),
        time_step_limit: (0.001, 100.0),
        gated_norm: GatedNorm::None,
        output: linear("out_proj", inner, hidden_size),
    })
}
