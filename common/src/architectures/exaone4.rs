//! EXAONE 4: norms of outputs and of each head of queries and keys; where layers see a window, those that see all have no positions.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, check_layer_types},
};
use crate::{
    config::{Config, ConfigError},
    spec::{FeedForward, Mixer, ModelSpec, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "exaone4",
    group: Group::Base,
    special: "norms of outputs, windows with RoPE and full attention without",
    read,
}];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    source.refuse_flags(&["attention_bias"])?;
    let decoder = Decoder::read(source)?;
    let intermediate_size = decoder.intermediate_size()?;
    let rope = RopeSpec::read(&decoder.config, source.model_type, decoder.head_dim, None, false)?;
    let windows = windows(&decoder.config, decoder.n_layers)?;
    let layers = decoder.layers(|i, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, AttentionBias::NONE);
        attention.head_norms = decoder.head_norms(&attention_path);
        attention.window = windows.as_ref().and_then(|windows| windows[i as usize]);
        attention.rope = (windows.is_none() || attention.window.is_some()).then(|| rope.clone());
        let mlp = decoder.mlp(&format!("{path}.mlp"), intermediate_size, false);
        Ok(decoder.output_norm_layer(path, Mixer::Attention(Box::new(attention)), FeedForward::Mlp(mlp)))
    })?;
    decoder.model(layers, false)
}

/// `sliding_window_pattern` is repeated over the layers: `L` for a local one, `G` for a global one. None where no layer is local.
fn windows(config: &Config, n_layers: u32) -> Result<Option<Vec<Option<u32>>>, ConfigError> {
    let Some(window) = config.maybe_u32("sliding_window", 1, u32::MAX)? else { return Ok(None) };
    let pattern = config.text("sliding_window_pattern")?.unwrap_or_default();
    if pattern.is_empty() {
        return Ok(None);
    }
    let windows = pattern.chars().cycle().take(n_layers as usize).map(|kind| match kind {
        'L' => Ok(Some(window)),
        'G' => Ok(None),
        _ => Err(ConfigError::Invalid {
            key: "sliding_window_pattern".into(),
            wanted: "a text of L and G".into(),
            found: pattern.chars().take(80).collect(),
        }),
    });
    let windows = windows.collect::<Result<Vec<_>, _>>()?;
    check_layer_types(config, &windows)?;
    Ok(Some(windows))
}

#[cfg(test)]
mod tests {
    use crate::{
        architectures::{read_spec, tiny},
        spec::{Mixer, ModelSpec},
    };
    use serde_json::{Value, json};

    /// Window and whether there is RoPE, of each layer.
    fn attentions(spec: &ModelSpec) -> Vec<(Option<u32>, bool)> {
        let attention = |mixer: &Mixer| match mixer {
            Mixer::Attention(attention) => (attention.window, attention.rope.is_some()),
            other => panic!("{other:?}"),
        };
        spec.layers.iter().map(|layer| attention(&layer.mixer)).collect()
    }

    #[test]
    fn layers_without_a_window_have_positions_only_where_no_layer_has_one() {
        let mut config = tiny("exaone4");
        config["sliding_window_pattern"] = json!("LG");
        let spec = read_spec(&config).expect("valid");
        assert_eq!(attentions(&spec), [(Some(16), true), (None, false), (Some(16), true)]);
        config["layer_types"] = json!(["full_attention", "full_attention", "full_attention"]);
        assert!(read_spec(&config).expect_err("a contradiction").to_string().contains("layer_types"));
        config["sliding_window"] = Value::Null;
        assert_eq!(attentions(&read_spec(&config).expect("valid")), [(None, true); 3]);
    }
}
