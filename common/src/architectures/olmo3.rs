//! OLMo 3: OLMo 2 with three layers that see a window to one that sees all; only the latter's RoPE is scaled.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, windows, windows_by_period},
};
use crate::{
    config::ConfigError,
    spec::{FeedForward, Mixer, ModelSpec, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "olmo3", group: Group::Base, special: "as olmo2, with sliding windows", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let bias = AttentionBias::all(config.bool_or("attention_bias", false)?);
    let intermediate_size = decoder.intermediate_size()?;
    let scaled = RopeSpec::read(&config, source.model_type, decoder.head_dim, None, false)?;
    let plain = RopeSpec::plain(decoder.head_dim, scaled.theta, false)?;
    let windows = match windows(&config, decoder.n_layers)? {
        Some(windows) => windows,
        None => windows_by_period(decoder.n_layers, 4, config.u32("sliding_window", 1, u32::MAX)?),
    };
    let layers = decoder.layers(|i, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, bias);
        attention.head_norms = decoder.whole_norms(&attention_path);
        attention.window = windows[i as usize];
        attention.rope = Some(if attention.window.is_some() { plain.clone() } else { scaled.clone() });
        let mlp = decoder.mlp(&format!("{path}.mlp"), intermediate_size, false);
        Ok(decoder.output_norm_layer(path, Mixer::Attention(Box::new(attention)), FeedForward::Mlp(mlp)))
    })?;
    decoder.model(layers, false)
}
