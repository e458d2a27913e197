//! Mistral 4: latent attention whose queries grow with the position, softmax over the best groups of experts.

use super::{
    Architecture, Group,
    blocks::{Decoder, Source},
    dense_then_routed::DenseThenRouted,
    latent::{self, LatentAttention},
    mixtures::groups,
};
use crate::{
    config::{Config, ConfigError},
    published::{Published, PublishedError, Tensors},
    spec::{LinearSpec, Mixer, ModelSpec, Ranking, RopeSpec, RouterPrecision, RouterSpec, TemperatureSpec, yarn_attention_factor},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "mistral4", group: Group::Latent, special: "a latent cache, queries that grow with the position", read }];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = latent::decoder(source, 1e-6)?;
    let parameters = decoder.config.object("rope_parameters", "rope_parameters.")?;
    let parameters = parameters.ok_or_else(|| ConfigError::Missing { key: "rope_parameters".into() })?;
    let attention = attention(&decoder, &parameters)?;
    let temperature = TemperatureSpec {
        beta: parameters.f32("llama_4_scaling_beta", 0.0, 1e6)?,
        original_context: parameters.u32("original_max_position_embeddings", 1, u32::MAX)?,
        position_offset: 0,
    };
    let feed_forwards = DenseThenRouted::read(&decoder, 0)?;
    let layers = decoder.layers(|i, path| {
        let mut latent = attention.absorbed(&format!("{path}.self_attn"), true);
        latent.temperature = Some(temperature.clone());
        let feed_forward = feed_forwards.feed_forward(i, &format!("{path}.mlp"), |linear| router(&decoder, linear))?;
        Ok(decoder.pre_norm_layer(path, Mixer::Latent(Box::new(latent)), feed_forward))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, false)? })
}

/// Position and scaling are those of `rope_parameters` alone.
fn attention(decoder: &Decoder, parameters: &Config) -> Result<LatentAttention, ConfigError> {
    let config = decoder.config;
    let theta = parameters.maybe_f32("rope_theta", 1.0, 1e12)?.unwrap_or(100_000.0);
    let interleaved = config.bool_or("rope_interleave", true)?;
    let max_position_embeddings = config.maybe_u32("max_position_embeddings", 1, u32::MAX)?;
    let (dims, model_type) = (latent::rope_dim(&config)?, decoder.source.model_type);
    let rope = RopeSpec::initialize(dims, theta, interleaved, Some(parameters), max_position_embeddings, model_type)?;
    let value_dim = config.u32("v_head_dim", 1, 1 << 14)?;
    LatentAttention::with_rope(decoder, None, value_dim, rope, yarn_attention_factor(Some(parameters))?)
}

/// Softmax in f32, of which those of the best groups are picked.
fn router(decoder: &Decoder, linear: LinearSpec) -> Result<RouterSpec, ConfigError> {
    let config = decoder.config;
    let top_k = config.u32("num_experts_per_tok", 1, linear.output_dims)?;
    Ok(RouterSpec {
        ranking: Ranking::BestFirst,
        precision: RouterPrecision::SCORES,
        groups: groups(&config, linear.output_dims)?,
        renormalise: config.bool_or("norm_topk_prob", true)?.then_some(1e-20),
        scale: config.maybe_f32("routed_scaling_factor", -1e6, 1e6)?.unwrap_or(1.0),
        ..RouterSpec::softmax(linear, top_k, false)
    })
}

fn published(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    // Stacked experts are plain parameters there, not linears.
    tensors.rename_suffix("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj.weight")?;
    tensors.split_halves("mlp.experts.gate_up_proj", ["mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj"])?;
    tensors.rename_suffix("mlp.experts.down_proj", "mlp.switch_mlp.down_proj.weight")?;
    latent::published(spec, tensors)
}
