//! Mamba 2 (Dao and Gu 2024): a state space in each layer and nothing else.

use super::{
    Architecture, Group,
    blocks::{Decoder, Source},
    state_spaces::{DEFAULT_EPS, ScanBias, StateSpaceSizes, backbone, kernels, time_step_limit},
};
use crate::{
    config::ConfigError,
    published::Published,
    spec::{GatedNorm, LayerSpec, Mixer, ModelSpec, NormSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "mamba2", group: Group::StateSpace, special: "state spaces alone", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let config = source.config;
    source.only_silu()?;
    if !config.bool_or("rms_norm", true)? {
        return Err(source.unsupported("a mixer without its norm (`rms_norm`)"));
    }
    let eps = config.f32("layer_norm_epsilon", 0.0, 1.0)?;
    let decoder = Decoder::without_attention(source, config.u32("num_hidden_layers", 1, 4096)?, eps)?;
    let state_size = if config.get("ssm_state_size").is_some() { "ssm_state_size" } else { "state_size" };
    let keys = ["num_heads", "head_dim", state_size, "n_groups", "conv_kernel"];
    let sizes = StateSpaceSizes::read(&config, decoder.hidden_size, keys)?;
    let bias = config.bool_or("use_bias", false)?;
    let bias = ScanBias { input: bias, convolution: config.bool_or("use_conv_bias", true)?, output: bias };
    let limit = time_step_limit(&config, Some((0.0, f32::INFINITY)))?;
    let layers = decoder.layers_under("backbone.layers", |_, path| {
        let path_of_mixer = format!("{path}.mixer");
        let gated_norm = GatedNorm::GateThenNorm { norm: sizes.norm(&path_of_mixer, eps), groups: 1 };
        let mixer = sizes.mixer(&path_of_mixer, bias, limit, gated_norm);
        // The layers' norms do not have the epsilon of the others in mlx-lm.
        let norm = NormSpec::rms(format!("{path}.norm"), decoder.hidden_size, DEFAULT_EPS);
        Ok(LayerSpec::mixer_only(norm, Mixer::StateSpace(Box::new(mixer))))
    })?;
    Ok(ModelSpec { published: Published::new(kernels), ..backbone(&decoder, layers, true)? })
}
