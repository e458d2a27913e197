//! Jamba (Lieber et al. 2024): selective scans with an attention layer now and then, routed experts in some layers.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts},
    mixtures::{PROJECTIONS, mixture},
    state_spaces::{ScanBias, SelectiveScanSizes, dt_rank, kernels},
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{FeedForward, LayerSpec, LinearSpec, Mixer, ModelSpec, NormSpec, Ranking, RouterSpec, SelectiveScanSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "jamba",
    group: Group::StateSpace,
    special: "selective scans and attention without positions, routed experts",
    read,
}];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    if source.config.get("sliding_window").is_some() {
        return Err(source.unsupported("`sliding_window`"));
    }
    let decoder = Decoder::read(source)?;
    let types = layer_types(&decoder)?;
    let layers = decoder.layers(|i, path| {
        let mixer = match types[i as usize] {
            "attention" => Mixer::Attention(Box::new(decoder.attention(&format!("{path}.self_attn"), AttentionBias::NONE))),
            "mamba" => Mixer::SelectiveScan(Box::new(selective_scan(&decoder, &format!("{path}.mamba"))?)),
            other => return Err(source.unsupported(format!("a layer of type `{other}`"))),
        };
        let norm = |name: &str| decoder.norm(format!("{path}.{name}"), decoder.hidden_size);
        let feed_forward = feed_forward(&decoder, i, &format!("{path}.feed_forward"))?;
        Ok(LayerSpec::pre_norm(norm("input_layernorm"), mixer, norm("pre_ff_layernorm"), feed_forward))
    })?;
    let mut model = decoder.model(layers, true)?;
    model.final_norm.path = decoder.path("model.final_layernorm");
    Ok(ModelSpec { published: Published::new(published), ..model })
}

/// `layers_block_type`, or one attention layer in each period.
fn layer_types<'a>(decoder: &Decoder<'a>) -> Result<Vec<&'a str>, ConfigError> {
    let (config, n_layers) = (decoder.config, decoder.n_layers);
    match config.texts("layers_block_type")? {
        Some(types) if types.len() == n_layers as usize => Ok(types),
        Some(types) => Err(ConfigError::Contradiction {
            message: format!("layers_block_type has {} entries for num_hidden_layers {n_layers}", types.len()),
        }),
        None => {
            let period = config.u32("attn_layer_period", 1, 4096)?;
            let offset = config.u32("attn_layer_offset", 0, 4096)?;
            Ok((0..n_layers).map(|i| if i % period == offset { "attention" } else { "mamba" }).collect())
        }
    }
}

fn selective_scan(decoder: &Decoder, path: &str) -> Result<SelectiveScanSpec, ConfigError> {
    let (config, hidden_size) = (decoder.config, decoder.hidden_size);
    let rank_key = "mamba_dt_rank";
    let sizes = SelectiveScanSizes {
        hidden_size,
        inner: config.u32("mamba_expand", 1, 64)? * hidden_size,
        state_dim: config.u32("mamba_d_state", 1, 1 << 14)?,
        dt_rank: if config.get(rank_key).is_some() { dt_rank(&config, rank_key, hidden_size)? } else { hidden_size.div_ceil(16) },
        kernel: config.u32("mamba_d_conv", 2, 64)?,
    };
    let bias = config.bool_or("mamba_proj_bias", false)?;
    let bias = ScanBias { input: bias, convolution: config.bool_or("mamba_conv_bias", true)?, output: bias };
    let norm = |name: &str, dims| NormSpec::rms(format!("{path}.{name}"), dims, decoder.norm_eps);
    let norms = [norm("dt_layernorm", sizes.dt_rank), norm("b_layernorm", sizes.state_dim), norm("c_layernorm", sizes.state_dim)];
    Ok(sizes.mixer(path, bias, Some(norms)))
}

fn feed_forward(decoder: &Decoder, layer: u32, path: &str) -> Result<FeedForward, ConfigError> {
    let (config, hidden_size) = (decoder.config, decoder.hidden_size);
    let n_experts = config.u32("num_experts", 1, 1 << 16)?;
    let intermediate_size = decoder.intermediate_size()?;
    // As mlx-lm counts; Jamba's own layers, whose period is 2 and offset 1, come out the same as by the remainder.
    let routed = (layer + config.u32("expert_layer_offset", 0, 4096)?).is_multiple_of(config.u32("expert_layer_period", 1, 4096)?);
    if n_experts == 1 || !routed {
        return Ok(FeedForward::Mlp(decoder.mlp(path, intermediate_size, false)));
    }
    let router = LinearSpec::new(format!("{path}.router"), hidden_size, n_experts, false);
    let router = RouterSpec::softmax_of_picked(router, config.u32("num_experts_per_tok", 1, n_experts)?);
    let experts = experts(&format!("{path}.switch_mlp"), n_experts, hidden_size, intermediate_size);
    Ok(mixture(RouterSpec { ranking: Ranking::BestFirst, ..router }, experts, None))
}

fn published(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    kernels(spec, tensors)?;
    tensors.stack_experts("feed_forward.experts", "feed_forward.switch_mlp", &PROJECTIONS)
}
