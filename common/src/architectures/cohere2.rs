//! Command R7B and A: Command R with three layers that see a window and have RoPE to one that sees all and has no positions.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Source, check_layer_types, windows_by_period},
    cohere,
};
use crate::{
    config::ConfigError,
    spec::{ModelSpec, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "cohere2",
    group: Group::Other,
    special: "attention and MLP in parallel, layer norms, windows with RoPE and full attention without",
    read,
}];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    let decoder = cohere::decoder(source)?;
    let config = decoder.config;
    let bias = AttentionBias::all(config.bool_or("attention_bias", false)?);
    let intermediate_size = decoder.intermediate_size()?;
    let rope = RopeSpec::unscaled(&config, source.model_type, decoder.head_dim, Some(50_000.0), true)?;
    let window = config.maybe_u32("sliding_window", 1, u32::MAX)?.unwrap_or(4096);
    let period = config.maybe_u32("sliding_window_pattern", 1, 4096)?.unwrap_or(4);
    let windows = windows_by_period(decoder.n_layers, period, window);
    check_layer_types(&config, &windows)?;
    let layers = decoder.layers(|i, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), bias);
        attention.window = windows[i as usize];
        attention.widens_f16 = true;
        attention.rope = attention.window.map(|_| rope.clone());
        Ok(cohere::parallel_layer(&decoder, path, attention, decoder.mlp(&format!("{path}.mlp"), intermediate_size, false)))
    })?;
    cohere::model(&decoder, layers)
}
