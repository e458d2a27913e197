//! Mixtures of experts as several architectures' configs and checkpoints say them.

use super::blocks::Decoder;
use crate::{
    config::{Config, ConfigError},
    published::{PublishedError, Tensors},
    spec::{
        ExpertMlpSpec, FeedForward, GroupScore, LinearSpec, MlpSpec, ModelSpec, MoeSpec, RouterGroups, RouterSpec, SharedExpertSpec,
        TensorSpec,
    },
};

/// Routed experts, and an MLP that every token goes through besides.
pub(super) fn mixture(router: RouterSpec, experts: ExpertMlpSpec, shared: Option<MlpSpec>) -> FeedForward {
    let shared = shared.map(|mlp| SharedExpertSpec { mlp, gate: None });
    FeedForward::Experts(Box::new(MoeSpec { router, experts, shared, latent: None }))
}

/// What a router's config may leave out.
#[derive(Default)]
pub(super) struct RouterDefaults {
    pub(super) norm_topk_prob: Option<bool>,
    pub(super) routed_scaling_factor: Option<f32>,
}

/// DeepSeek-V3's router, with the keys that its followers kept: sigmoids, the tensor `bias` that only picks, groups. Weights of more than one
/// expert are divided by their sum plus `eps` when `norm_topk_prob` is true.
pub(super) fn corrected_router(
    decoder: &Decoder,
    linear: LinearSpec,
    bias: String,
    eps: f32,
    defaults: &RouterDefaults,
) -> Result<RouterSpec, ConfigError> {
    let config = decoder.config;
    decoder.source.only("topk_method", &["noaux_tc"])?;
    let n_experts = linear.output_dims;
    let top_k = config.u32("num_experts_per_tok", 1, n_experts)?;
    let missing = |key: &str| ConfigError::Missing { key: key.into() };
    let key = "norm_topk_prob";
    let normalised = match (config.get(key), defaults.norm_topk_prob) {
        (None, None) => return Err(missing(key)),
        (_, default) => config.bool_or(key, default.unwrap_or_default())?,
    };
    let key = "routed_scaling_factor";
    let scale = config.maybe_f32(key, -1e6, 1e6)?.or(defaults.routed_scaling_factor).ok_or_else(|| missing(key))?;
    Ok(RouterSpec {
        groups: groups(&config, n_experts)?,
        renormalise: (top_k > 1 && normalised).then_some(eps),
        scale,
        is_module: false,
        ..RouterSpec::sigmoid(linear, top_k, Some(TensorSpec::new(bias, &[n_experts])))
    })
}

/// `n_group` equal groups of which the `topk_group` best are kept; None where there is one group.
pub(super) fn groups(config: &Config, n_experts: u32) -> Result<Option<RouterGroups>, ConfigError> {
    let count = config.maybe_u32("n_group", 1, n_experts)?.unwrap_or(1);
    if count == 1 {
        return Ok(None);
    }
    let kept = config.u32("topk_group", 1, count)?;
    match n_experts.is_multiple_of(count) && n_experts / count >= 2 {
        true => Ok(Some(RouterGroups { count, kept, by: GroupScore::SumOfBestTwo })),
        false => Err(ConfigError::Contradiction {
            message: format!("n_group {count} does not divide {n_experts} experts into equal groups of two or more"),
        }),
    }
}

/// How projections of an MLP are called, in checkpoints and here.
pub(super) const PROJECTIONS: [(&str, &str); 3] = [("gate_proj", "gate_proj"), ("up_proj", "up_proj"), ("down_proj", "down_proj")];
/// The same where a checkpoint numbers them.
pub(super) const NUMBERED_PROJECTIONS: [(&str, &str); 3] = [("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")];

/// Checkpoints with experts one by one.
pub(super) fn published(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    tensors.stack_experts("mlp.experts", "mlp.switch_mlp", &PROJECTIONS)
}

/// The same with layers after the last one, which only predict further tokens.
pub(super) fn published_with_prediction(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    tensors.drop_layers_from(spec.n_layers());
    published(spec, tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architectures::{read_spec, tiny};
    use serde_json::json;

    #[test]
    fn groups_must_be_equal_and_not_single() {
        let read = |config: serde_json::Value| groups(&Config::new(&config)?, 8);
        assert_eq!(read(json!({"topk_group": 4})), Ok(None));
        let groups = RouterGroups { count: 4, kept: 2, by: GroupScore::SumOfBestTwo };
        assert_eq!(read(json!({"n_group": 4, "topk_group": 2})), Ok(Some(groups)));
        for bad in [json!({"n_group": 3, "topk_group": 1}), json!({"n_group": 8, "topk_group": 1}), json!({"n_group": 2, "topk_group": 3})]
        {
            assert!(read(bad).is_err());
        }
    }

    #[test]
    fn what_has_no_default_must_be_there() {
        for key in ["norm_topk_prob", "routed_scaling_factor"] {
            let mut config = tiny("glm4_moe");
            config[key] = json!(null);
            assert_eq!(read_spec(&config), Err(ConfigError::Missing { key: key.into() }));
            config["model_type"] = json!("exaone_moe");
            config["layer_types"] = json!(["full_attention", "full_attention", "full_attention"]);
            read_spec(&config).expect("has defaults");
        }
    }
}
