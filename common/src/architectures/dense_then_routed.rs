//! Feed-forwards of decoders whose first layers are dense and whose others have routed experts, with DeepSeek's keys and names.

use super::{
    blocks::{Decoder, experts},
    mixtures::{RouterDefaults, corrected_router, mixture},
};
use crate::{
    config::ConfigError,
    spec::{FeedForward, LinearSpec, RouterSpec},
};

pub(super) struct DenseThenRouted<'a> {
    decoder: &'a Decoder<'a>,
    /// None where all layers are dense.
    n_experts: Option<u32>,
    /// The first layer with experts, if it is a multiple of `every`.
    first: u32,
    every: u32,
}

impl<'a> DenseThenRouted<'a> {
    pub(super) fn read(decoder: &'a Decoder<'a>, default_first: u32) -> Result<Self, ConfigError> {
        let config = decoder.config;
        Ok(Self {
            decoder,
            n_experts: config.maybe_u32("n_routed_experts", 1, 1 << 16)?,
            first: config.maybe_u32("first_k_dense_replace", 0, 4096)?.unwrap_or(default_first),
            every: config.maybe_u32("moe_layer_freq", 1, 4096)?.unwrap_or(1),
        })
    }

    /// That of a layer, under `path`; `router` makes a router of its linear.
    pub(super) fn feed_forward(
        &self,
        layer: u32,
        path: &str,
        router: impl FnOnce(LinearSpec) -> Result<RouterSpec, ConfigError>,
    ) -> Result<FeedForward, ConfigError> {
        let decoder = self.decoder;
        let Some(n_experts) = self.n_experts.filter(|_| layer >= self.first && layer.is_multiple_of(self.every)) else {
            return Ok(FeedForward::Mlp(decoder.mlp(path, decoder.intermediate_size()?, false)));
        };
        let intermediate_size = decoder.config.u32("moe_intermediate_size", 1, 1 << 22)?;
        let router = router(LinearSpec::new(format!("{path}.gate"), decoder.hidden_size, n_experts, false))?;
        let experts = experts(&format!("{path}.switch_mlp"), n_experts, decoder.hidden_size, intermediate_size);
        let n_shared = decoder.config.maybe_u32("n_shared_experts", 0, 1 << 10)?.filter(|n| *n > 0);
        let shared = n_shared.map(|n| decoder.mlp(&format!("{path}.shared_experts"), n * intermediate_size, false));
        Ok(mixture(router, experts, shared))
    }

    /// The same with DeepSeek-V3's router, in which weights are divided by their sum plus `eps`.
    pub(super) fn corrected(&self, layer: u32, path: &str, eps: f32) -> Result<FeedForward, ConfigError> {
        let decoder = self.decoder;
        self.feed_forward(layer, path, |linear| {
            decoder.source.only("scoring_func", &["sigmoid"])?;
            let bias = format!("{}.e_score_correction_bias", linear.path);
            let defaults = RouterDefaults { norm_topk_prob: Some(true), routed_scaling_factor: Some(1.0) };
            corrected_router(decoder, linear, bias, eps, &defaults)
        })
    }
}
