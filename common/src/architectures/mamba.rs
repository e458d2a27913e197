//! Mamba (Gu and Dao 2023) and Falcon Mamba: a selective scan in each layer and nothing else.

use super::{
    Architecture, Group,
    blocks::{Decoder, Source},
    state_spaces::{DEFAULT_EPS, ScanBias, SelectiveScanSizes, backbone, dt_rank, kernels},
};
use crate::{
    config::ConfigError,
    published::Published,
    spec::{LayerSpec, Mixer, ModelSpec, NormSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "mamba", group: Group::StateSpace, special: "selective scans alone", read: |source| read(source, false) },
    Architecture {
        model_type: "falcon_mamba",
        group: Group::StateSpace,
        special: "as mamba, with normed time steps, B and C",
        read: |source| read(source, true),
    },
];

fn read(source: Source, always_normed: bool) -> Result<ModelSpec, ConfigError> {
    let config = source.config;
    source.only_silu()?;
    // The norms' epsilon is fixed: mlx-lm does not read `layer_norm_epsilon`.
    let decoder = Decoder::without_attention(source, config.u32("num_hidden_layers", 1, 4096)?, DEFAULT_EPS)?;
    let hidden_size = decoder.hidden_size;
    let sizes = SelectiveScanSizes {
        hidden_size,
        inner: decoder.intermediate_size()?,
        state_dim: config.u32("state_size", 1, 1 << 14)?,
        dt_rank: dt_rank(&config, "time_step_rank", hidden_size)?,
        kernel: config.u32("conv_kernel", 2, 64)?,
    };
    let bias = config.bool_or("use_bias", false)?;
    let bias = ScanBias { input: bias, convolution: config.bool_or("use_conv_bias", true)?, output: bias };
    let eps = config.maybe_f32("mixer_rms_eps", 0.0, 1.0)?.unwrap_or(1e-6);
    let normed = always_normed || config.bool_or("use_bcdt_rms", false)?;
    let norms = normed.then(|| [sizes.dt_rank, sizes.state_dim, sizes.state_dim].map(|dims| NormSpec::rms_unweighted(dims, eps)));
    let layers = decoder.layers_under("backbone.layers", |_, path| {
        let mixer = sizes.mixer(&format!("{path}.mixer"), bias, norms.clone());
        let norm = decoder.norm(format!("{path}.norm"), hidden_size);
        Ok(LayerSpec::mixer_only(norm, Mixer::SelectiveScan(Box::new(mixer))))
    })?;
    Ok(ModelSpec { published: Published::new(kernels), ..backbone(&decoder, layers, true)? })
}
