//! DeepSeek-V2 (DeepSeek-AI 2024): latent attention whose keys and values are cached in full, softmax over the best groups of experts.

use super::{
    Architecture, Group,
    blocks::{Decoder, Source},
    dense_then_routed::DenseThenRouted,
    latent::{self, LatentAttention},
    mixtures::groups,
};
use crate::{
    config::ConfigError,
    published::Published,
    spec::{GroupScore, LinearSpec, Mixer, ModelSpec, Ranking, RouterGroups, RouterSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "deepseek_v2",
    group: Group::Latent,
    special: "keys and values in full, softmax router with groups",
    read,
}];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = latent::decoder(source, 1e-6)?;
    source.only("scoring_func", &["softmax"])?;
    source.refuse_flags(&["norm_topk_prob"])?;
    let attention = LatentAttention::read(&decoder, Some(1536), Some(10_000.0))?;
    let feed_forwards = DenseThenRouted::read(&decoder, 0)?;
    let layers = decoder.layers(|i, path| {
        let mixer = Mixer::Latent(Box::new(attention.expanded(&format!("{path}.self_attn"))));
        let feed_forward = feed_forwards.feed_forward(i, &format!("{path}.mlp"), |linear| router(&decoder, linear))?;
        Ok(decoder.pre_norm_layer(path, mixer, feed_forward))
    })?;
    Ok(ModelSpec { published: Published::new(latent::published), ..decoder.model(layers, false)? })
}

fn router(decoder: &Decoder, linear: LinearSpec) -> Result<RouterSpec, ConfigError> {
    let config = decoder.config;
    // mlx-lm's default is misspelt, and so may be a config's.
    decoder.source.only("topk_method", &["greedy", "gready", "group_limited_greedy"])?;
    let groups = match config.text("topk_method")? {
        Some("group_limited_greedy") => groups(&config, linear.output_dims)?.map(|groups| RouterGroups { by: GroupScore::Best, ..groups }),
        _ => None,
    };
    let top_k = config.u32("num_experts_per_tok", 1, linear.output_dims)?;
    let scale = config.maybe_f32("routed_scaling_factor", -1e6, 1e6)?.unwrap_or(1.0);
    Ok(RouterSpec { is_module: false, ranking: Ranking::BestFirst, groups, scale, ..RouterSpec::softmax(linear, top_k, false) })
}
