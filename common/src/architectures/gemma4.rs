//! Gemma 4: keys and values that later layers share, inputs for each layer, wider heads on global layers, experts beside the dense MLP.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Defaults, Source, experts},
    gemma::{
        GLOBAL, LOCAL, check, drop_unused_projections, embedding_scale, gelu_mlp, layer_types, sandwich_layer, soft_cap, source_layers,
    },
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{
        Activation, AttentionSpec, EmbeddingSpec, ExpertMlpSpec, FeedForward, LayerInputSpec, LayerInputsSpec, LayerSpec, LinearSpec,
        LogitsSpec, Mixer, MlpSpec, ModelSpec, MoeSpec, NormSpec, Projections, RopeKind, RopeSpec, RouterSpec, TensorSpec,
    },
};
use std::f32::consts::FRAC_1_SQRT_2;

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        model_type: "gemma4",
        group: Group::Gemma,
        special: "the text side of gemma4_text with images and sound",
        read: read_wrapper,
    },
    Architecture {
        model_type: "gemma4_text",
        group: Group::Gemma,
        special: "layers that share keys and values, inputs for each layer, experts beside an MLP",
        read,
    },
    Architecture { model_type: "gemma4_unified", group: Group::Gemma, special: "as gemma4", read: read_wrapper },
];

/// What the layers have in common.
struct Text<'a> {
    decoder: Decoder<'a>,
    layer_types: Vec<&'a str>,
    /// For each layer the one whose keys and values it reads.
    sources: Vec<Option<u32>>,
    /// Of global layers.
    global_head_dim: u32,
    global_kv_heads: u32,
    /// On global layers what is projected as key is the value too.
    key_is_value: bool,
    window: u32,
    intermediate_size: u32,
    /// Layers that share keys and values have MLPs of twice the size.
    is_double_wide: bool,
    /// Width of the inputs for each layer; 0 when there are none.
    layer_input_dims: u32,
}

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let spec = read_text(source)?;
    Ok(ModelSpec { published: Published::new(published), ..spec })
}

fn read_wrapper(source: Source) -> Result<ModelSpec, ConfigError> {
    let spec = read_text(source.text("language_model.")?)?;
    Ok(ModelSpec { published: Published::new(published_wrapper), ..spec })
}

fn read_text(source: Source) -> Result<ModelSpec, ConfigError> {
    let text = Text::read(source)?;
    let (decoder, config) = (&text.decoder, text.decoder.config);
    let layers = decoder.layers(|i, path| text.layer(i, path))?;
    let softcap = soft_cap(&config, "final_logit_softcapping", Some(30.0))?;
    Ok(ModelSpec {
        embedding_scale: embedding_scale(decoder.hidden_size),
        layer_inputs: text.layer_inputs("model.")?,
        logits: LogitsSpec { softcap, ..LogitsSpec::PLAIN },
        ..decoder.model(layers, true)?
    })
}

impl<'a> Text<'a> {
    fn read(source: Source<'a>) -> Result<Self, ConfigError> {
        check(&source)?;
        let config = source.config;
        let or = |key, min, max, default| Ok::<u32, ConfigError>(config.maybe_u32(key, min, max)?.unwrap_or(default));
        let defaults = Defaults {
            hidden_size: Some(1536),
            n_layers: Some(35),
            n_heads: Some(8),
            n_kv_heads: Some(1),
            head_dim: Some(256),
            vocab_size: Some(262_144),
            norm_eps: Some(config.maybe_f32("rms_norm_eps", 0.0, 1.0)?.unwrap_or(1e-6)),
        };
        let decoder = Decoder::read_with_defaults(source, &defaults)?;
        // A wrapper's own counts.
        let vocab_size = source.root.maybe_u32("vocab_size", 1, 1 << 24)?.unwrap_or(decoder.vocab_size);
        let pattern = or("sliding_window_pattern", 1, 4096, 5)?;
        let period: Vec<_> = (1..=pattern).map(|i| if i == pattern { GLOBAL } else { LOCAL }).collect();
        let layer_types = layer_types(&decoder, &period)?;
        let first_shared = decoder.n_layers - or("num_kv_shared_layers", 0, decoder.n_layers, decoder.n_layers.min(20))?;
        let key_is_value = config.bool_or("attention_k_eq_v", false)?;
        let global_kv_heads = config.maybe_u32("num_global_key_value_heads", 1, decoder.n_heads)?.filter(|_| key_is_value);
        Ok(Self {
            sources: source_layers(&layer_types, first_shared)?,
            layer_types,
            global_head_dim: Some(or("global_head_dim", 0, 1 << 14, 512)?).filter(|dim| *dim > 0).unwrap_or(decoder.head_dim),
            global_kv_heads: global_kv_heads.unwrap_or(decoder.n_kv_heads),
            key_is_value,
            window: or("sliding_window", 1, u32::MAX, 512)?,
            intermediate_size: or("intermediate_size", 1, 1 << 22, 6144)?,
            is_double_wide: config.bool_or("use_double_wide_mlp", true)?,
            layer_input_dims: or("hidden_size_per_layer_input", 0, 1 << 20, 256)?,
            decoder: Decoder { vocab_size, ..decoder },
        })
    }

    fn layer(&self, i: u32, path: &str) -> Result<LayerSpec, ConfigError> {
        let decoder = &self.decoder;
        let is_wide = self.is_double_wide && self.sources[i as usize].is_some();
        let intermediate_size = if is_wide { 2 * self.intermediate_size } else { self.intermediate_size };
        let mlp = gelu_mlp(decoder, &format!("{path}.mlp"), intermediate_size);
        let feed_forward = match decoder.config.bool_or("enable_moe_block", false)? {
            true => self.mlp_and_experts(path, mlp)?,
            false => FeedForward::Mlp(mlp),
        };
        let mixer = Mixer::Attention(Box::new(self.attention(i, &format!("{path}.self_attn"))?));
        Ok(LayerSpec {
            layer_input: (self.layer_input_dims > 0).then(|| layer_input(decoder, path, self.layer_input_dims)),
            output_scale: Some(TensorSpec::new(format!("{path}.layer_scalar"), &[1])),
            ..sandwich_layer(decoder, path, mixer, feed_forward)
        })
    }

    fn attention(&self, i: u32, path: &str) -> Result<AttentionSpec, ConfigError> {
        let is_local = self.layer_types[i as usize] == LOCAL;
        let (head_dim, n_kv_heads) = match is_local {
            true => (self.decoder.head_dim, self.decoder.n_kv_heads),
            false => (self.global_head_dim, self.global_kv_heads),
        };
        if !self.decoder.n_heads.is_multiple_of(n_kv_heads) {
            let message = format!("num_attention_heads {} is no multiple of num_global_key_value_heads {n_kv_heads}", self.decoder.n_heads);
            return Err(ConfigError::Contradiction { message });
        }
        // The sizes of this layer.
        let decoder = Decoder { head_dim, n_kv_heads, ..self.decoder };
        let mut attention = decoder.attention(path, AttentionBias::NONE);
        attention.projections = match (attention.projections, self.sources[i as usize]) {
            (Projections::Separate { query, .. }, Some(source_layer)) => Projections::Shared { query, source_layer },
            (Projections::Separate { query, key, .. }, None) if self.key_is_value && !is_local => Projections::KeyIsValue { query, key },
            (projections, _) => projections,
        };
        attention.scale = 1.0;
        attention.head_norms = decoder.head_norms(path);
        attention.value_norm = Some(NormSpec::rms_unweighted(head_dim, decoder.norm_eps));
        attention.window = is_local.then_some(self.window);
        attention.rope = Some(rope(&decoder, self.layer_types[i as usize])?);
        Ok(attention)
    }

    fn mlp_and_experts(&self, path: &str, mlp: MlpSpec) -> Result<FeedForward, ConfigError> {
        let (config, hidden_size) = (self.decoder.config, self.decoder.hidden_size);
        let n_experts = config.u32("num_experts", 1, 1 << 16)?;
        let router = LinearSpec::new(format!("{path}.router.proj"), hidden_size, n_experts, false);
        let input_scale = TensorSpec::new(format!("{path}.router.scale"), &[hidden_size]);
        let expert_scale = TensorSpec::new(format!("{path}.router.per_expert_scale"), &[n_experts]);
        let intermediate_size = config.u32("moe_intermediate_size", 1, 1 << 22)?;
        let experts = experts(&format!("{path}.experts.switch_glu"), n_experts, hidden_size, intermediate_size);
        let moe = MoeSpec {
            router: RouterSpec {
                input_scale: Some((input_scale, self.decoder.norm_eps)),
                expert_scale: Some(expert_scale),
                ..RouterSpec::softmax_of_picked(router, config.u32("top_k_experts", 1, n_experts)?)
            },
            experts: ExpertMlpSpec { activation: Activation::GeluTanh, ..experts },
            shared: None,
            latent: None,
        };
        let norm = |name: &str| self.decoder.norm(format!("{path}.{name}"), hidden_size);
        Ok(FeedForward::MlpAndExperts {
            mlp,
            moe: Box::new(moe),
            dense_norm: norm("post_feedforward_layernorm_1"),
            before_routed: norm("pre_feedforward_layernorm_2"),
            routed_norm: norm("post_feedforward_layernorm_2"),
        })
    }

    fn layer_inputs(&self, path: &str) -> Result<Option<LayerInputsSpec>, ConfigError> {
        if self.layer_input_dims == 0 {
            return Ok(None);
        }
        let vocab_size = self.decoder.config.maybe_u32("vocab_size_per_layer_input", 1, 1 << 24)?.unwrap_or(262_144);
        Ok(Some(layer_inputs(&self.decoder, path, self.layer_input_dims, vocab_size)))
    }
}

/// What a layer takes from its own input, `dims` wide.
pub(super) fn layer_input(decoder: &Decoder, path: &str, dims: u32) -> LayerInputSpec {
    let hidden_size = decoder.hidden_size;
    LayerInputSpec {
        gate: LinearSpec::new(format!("{path}.per_layer_input_gate"), hidden_size, dims, false),
        projection: LinearSpec::new(format!("{path}.per_layer_projection"), dims, hidden_size, false),
        norm: decoder.norm(format!("{path}.post_per_layer_input_norm"), hidden_size),
    }
}

/// What makes the inputs for each layer, under `path` with its dot.
pub(super) fn layer_inputs(decoder: &Decoder, path: &str, dims: u32, vocab_size: u32) -> LayerInputsSpec {
    let name = |name: &str| decoder.path(&format!("{path}{name}"));
    let all_dims = decoder.n_layers * dims;
    LayerInputsSpec {
        dims,
        embedding: EmbeddingSpec { path: name("embed_tokens_per_layer"), vocab_size, dims: all_dims },
        embedding_scale: embedding_scale(dims),
        projection: LinearSpec::new(name("per_layer_model_projection"), decoder.hidden_size, all_dims, false),
        projection_scale: f64::from(decoder.hidden_size).powf(-0.5) as f32,
        norm: decoder.norm(name("per_layer_projection_norm"), dims),
        scale: FRAC_1_SQRT_2,
    }
}

fn rope(decoder: &Decoder, layer_type: &str) -> Result<RopeSpec, ConfigError> {
    let (config, model_type, dims) = (decoder.config, decoder.source.model_type, decoder.head_dim);
    let interleaved = config.bool_or("rope_traditional", false)?;
    match RopeSpec::for_layer_type(&config, model_type, dims, layer_type, Some(10_000.0), interleaved)? {
        Some(rope) => Ok(rope),
        None if layer_type == LOCAL => RopeSpec::plain(dims, 10_000.0, interleaved),
        None => {
            let kind = RopeKind::Proportional { rotated_dims: dims / 4, factor: 1.0 };
            Ok(RopeSpec { kind, ..RopeSpec::plain(dims, 1_000_000.0, interleaved)? })
        }
    }
}

fn published(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    tensors.drop_where(|name| {
        ["input_max", "input_min", "output_max", "output_min", "self_attn.rotary_emb"].iter().any(|part| name.contains(part))
    });
    drop_unused_projections(spec, tensors);
    tensors.rename_suffix(".experts.gate_up_proj", ".experts.gate_up_proj.weight")?;
    tensors.split_halves("experts.gate_up_proj", ["experts.switch_glu.gate_proj", "experts.switch_glu.up_proj"])?;
    tensors.rename_suffix(".experts.down_proj", ".experts.switch_glu.down_proj.weight")
}

/// `model.language_model.` becomes `language_model.model.`, and what sees and hears is left out.
fn published_wrapper(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    let towers = ["vision_tower", "multi_modal_projector", "audio_tower", "embed_audio", "embed_vision", "vision_embedder"];
    tensors.drop_where(|name| {
        let name = name.strip_prefix("model.").unwrap_or(name);
        towers.iter().any(|tower| name.starts_with(tower))
    });
    tensors.rename_prefix("model.language_model.", "language_model.model.")?;
    published(spec, tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architectures::read_spec;
    use serde_json::json;

    fn attention(spec: &ModelSpec, layer: usize) -> &AttentionSpec {
        let Mixer::Attention(attention) = &spec.layers[layer].mixer else { panic!("attention") };
        attention
    }

    #[test]
    fn defaults_are_those_of_the_smallest_model() {
        let spec = read_spec(&json!({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text"}})).expect("defaults");
        let window = |layer: usize| spec.layers[layer].mixer.window();
        assert_eq!((spec.n_layers(), window(3), window(4), window(34)), (35, Some(512), None, None));
        let sources: Vec<_> = spec.layers.iter().map(|layer| layer.mixer.source_layer()).collect();
        assert_eq!((sources[14], sources[15], sources[19], sources[34]), (None, Some(13), Some(14), Some(14)));
        let (local, global) = (attention(&spec, 0), attention(&spec, 4));
        assert_eq!((local.head_dim, global.head_dim), (256, 512));
        let kind = RopeKind::Proportional { rotated_dims: 128, factor: 1.0 };
        assert_eq!(global.rope, Some(RopeSpec { dims: 512, interleaved: false, theta: 1e6, kind }));
        let FeedForward::Mlp(mlp) = &spec.layers[15].feed_forward else { panic!("an MLP") };
        assert_eq!(mlp.down.input_dims, 2 * 6144);
        assert_eq!(spec.layer_inputs.map(|inputs| inputs.embedding.dims), Some(35 * 256));
    }

    #[test]
    fn keys_are_values_on_global_layers_only() {
        let text = json!({"num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 1,
            "num_kv_shared_layers": 0, "attention_k_eq_v": true, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
            "sliding_window_pattern": 6, "use_bidirectional_attention": "vision", "final_logit_softcapping": null});
        let spec = read_spec(&json!({"model_type": "gemma4_unified", "text_config": text})).expect("valid");
        let (local, global) = (attention(&spec, 0), attention(&spec, 5));
        assert!(matches!(local.projections, Projections::Separate { .. }) && local.n_kv_heads == 8);
        assert!(matches!(global.projections, Projections::KeyIsValue { .. }) && global.n_kv_heads == 1);
        assert_eq!((spec.layer_inputs, spec.logits.softcap), (None, None));
    }

    #[test]
    fn a_layer_without_a_source_is_named() {
        let text = json!({"num_hidden_layers": 4, "num_kv_shared_layers": 3, "sliding_window_pattern": 4});
        let message = read_spec(&json!({"model_type": "gemma4", "text_config": text})).expect_err("no global one").to_string();
        assert!(message.contains("layer 3"), "{message}");
    }
}
