//! Qwen 3.5 and 3.6, dense or with experts: Qwen3-Next with the projections of the delta rule apart, inside a model that also sees.

use super::{
    Architecture, Group,
    blocks::{Decoder, Source},
    qwen3_next::{DeltaSizes, attention, full_attention, moe, partial_rope, published_layout},
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{FeedForward, GatedDeltaProjections, LinearSpec, Mixer, ModelSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "qwen3_5", group: Group::QwenHybrid, special: "gated delta rule beside gated attention", read },
    Architecture { model_type: "qwen3_5_moe", group: Group::QwenHybrid, special: "the same with experts and a gated shared one", read },
];

const PREFIX: &str = "language_model.";

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let source = source.text_or_root(PREFIX)?;
    let eps = source.config.maybe_f32("rms_norm_eps", 0.0, 1.0)?.unwrap_or(1e-6);
    let decoder = Decoder::read_with_eps(source, eps)?;
    let config = decoder.config;
    config.u32("num_key_value_heads", 1, 1 << 14)?;
    let sizes = DeltaSizes::read(&decoder, &DeltaSizes { n_key_heads: 16, n_value_heads: 64, key_dim: 192, value_dim: 128, kernel: 4 })?;
    let full = full_attention(&decoder)?;
    let rope = partial_rope(&decoder, Some(100_000.0))?;
    let n_experts = config.maybe_u32("num_experts", 0, 1 << 16)?.unwrap_or(0);
    let layers = decoder.layers(|i, path| {
        let mixer = match full.contains(&i) {
            true => Mixer::Attention(Box::new(attention(&decoder, &format!("{path}.self_attn"), rope.clone())?)),
            false => Mixer::GatedDelta(Box::new(sizes.mixer(&decoder, &format!("{path}.linear_attn"), projections))),
        };
        let path_of_mlp = format!("{path}.mlp");
        let feed_forward = match n_experts {
            0 => FeedForward::Mlp(decoder.mlp(&path_of_mlp, decoder.intermediate_size()?, false)),
            _ => FeedForward::Experts(Box::new(moe(&decoder, &path_of_mlp, n_experts, true)?)),
        };
        Ok(decoder.pre_norm_layer(path, mixer, feed_forward))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, false)? })
}

fn projections(sizes: &DeltaSizes, decoder: &Decoder, path: &str) -> GatedDeltaProjections {
    let linear = |name: &str, outputs| LinearSpec::new(format!("{path}.{name}"), decoder.hidden_size, outputs, false);
    GatedDeltaProjections::Separate {
        qkv: linear("in_proj_qkv", 2 * sizes.keys() + sizes.values()),
        z: linear("in_proj_z", sizes.values()),
        b: linear("in_proj_b", sizes.n_value_heads),
        a: linear("in_proj_a", sizes.n_value_heads),
    }
}

/// As transformers publishes it no name begins with the prefix; what was converted before begins with it throughout.
fn published(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    let is_published = tensors.model_has(|name| name.starts_with("model."));
    tensors.drop_where(|name| name.starts_with("vision_tower") || name.starts_with("model.visual"));
    tensors.drop_containing("mtp.");
    if !is_published {
        return Ok(());
    }
    tensors.rename_each(|name| match name.strip_prefix("model.language_model.") {
        Some(rest) => Some(format!("{PREFIX}model.{rest}")),
        None => (!name.starts_with(PREFIX)).then(|| format!("{PREFIX}{name}")),
    })?;
    published_layout(tensors)?;
    let projections = ["gate_proj", "up_proj", "down_proj"].map(|name| (name, name));
    tensors.stack_experts("mlp.experts", "mlp.switch_mlp", &projections)?;
    tensors.rename_suffix("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj.weight")?;
    tensors.rename_suffix("mlp.experts.down_proj", "mlp.switch_mlp.down_proj.weight")?;
    tensors.split_halves("mlp.experts.gate_up_proj", ["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj"])
}

#[cfg(test)]
mod tests {
    use crate::{
        architectures::{read_spec, tiny},
        dtype::DType,
        published::{Recipe, Tensors},
        spec::Mixer,
        weights::{TensorEntry, WeightIndex},
    };
    use serde_json::{Value, json};

    #[test]
    fn layers_attend_as_listed_or_at_intervals() {
        let attends = |changes: Value| {
            let mut config = tiny("qwen3_5");
            config["text_config"].as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
            let spec = read_spec(&config).map_err(|error| error.to_string())?;
            Ok::<_, String>(spec.layers.iter().map(|layer| matches!(layer.mixer, Mixer::Attention(_))).collect::<Vec<_>>())
        };
        assert_eq!(attends(json!({})), Ok(vec![false, false, false]));
        assert_eq!(attends(json!({"full_attention_interval": 2})), Ok(vec![false, true, false]));
        let listed = json!({"layer_types": ["full_attention", "linear_attention", "linear_attention"], "full_attention_interval": 2});
        assert_eq!(attends(listed), Ok(vec![true, false, false]));
        assert!(attends(json!({"linear_num_value_heads": 3, "linear_num_key_heads": 2})).expect_err("heads").contains("linear_num"));
    }

    /// One is added to a norm's weight when the model is published, whichever of its files are here.
    #[test]
    fn norms_of_published_models_get_one_added() {
        let recipe = |name: &str, elsewhere: &str| {
            let entry = TensorEntry { file: "a.safetensors".into(), dtype: DType::BF16, shape: vec![64], offset: 0, bytes: 128 };
            let index = WeightIndex { tensors: [(name.into(), entry)].into(), elsewhere: [elsewhere.into()].into() };
            let mut tensors = Tensors::new(&index);
            super::published(&read_spec(&tiny("qwen3_5")).expect("valid"), &mut tensors).expect("applies");
            tensors.get("language_model.model.norm.weight").expect("the norm").recipe.clone()
        };
        let added = |recipe| matches!(recipe, Recipe::Add { addend: 1.0, .. });
        assert!(added(recipe("model.language_model.norm.weight", "model.language_model.embed_tokens.weight")));
        assert!(added(recipe("model.norm.weight", "lm_head.weight")));
        assert!(!added(recipe("language_model.model.norm.weight", "language_model.model.embed_tokens.weight")));
    }
}
