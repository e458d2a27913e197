//! Granite 4: Mamba 2 with a few attention layers between, routed experts beside a shared one or a dense MLP, Granite's multipliers.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts},
    mixtures::mixture,
    state_spaces::{ScanBias, StateSpaceSizes, kernels, time_step_limit},
};
use crate::{
    config::{Config, ConfigError},
    published::{Published, PublishedError, Tensors},
    spec::{
        FeedForward, GatedNorm, LayerSpec, LinearSpec, LogitsSpec, Mixer, MlpInputs, MlpSpec, ModelSpec, Residual, RopeSpec, RouterSpec,
        StateSpaceSpec,
    },
};

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "granitemoehybrid",
    group: Group::StateSpace,
    special: "state spaces and attention, routed experts or dense",
    read,
}];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    source.only("normalization_function", &["rmsnorm"])?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let factor = |key: &str| config.f32(key, 1e-6, 1e6);
    let (attention_multiplier, multiplier) = (factor("attention_multiplier")?, factor("residual_multiplier")?);
    let bias = AttentionBias::all(config.bool_or("attention_bias", false)?);
    let types = layer_types(&decoder)?;
    let layers = decoder.layers(|i, path| {
        let mixer = match types[i as usize] {
            "mamba" => Mixer::StateSpace(Box::new(state_space(&decoder, &format!("{path}.mamba"))?)),
            "attention" => {
                let mut attention = decoder.attention(&format!("{path}.self_attn"), bias);
                attention.scale = attention_multiplier;
                attention.rope = rope(&decoder)?;
                Mixer::Attention(Box::new(attention))
            }
            other => return Err(source.unsupported(format!("a layer of type `{other}`"))),
        };
        let layer = decoder.pre_norm_layer(path, mixer, feed_forward(&decoder, path)?);
        Ok(LayerSpec { residual: Residual::Serial { multiplier }, ..layer })
    })?;
    Ok(ModelSpec {
        embedding_scale: factor("embedding_multiplier")?,
        logits: LogitsSpec { divisor: factor("logits_scaling")?, ..LogitsSpec::PLAIN },
        published: Published::new(published),
        ..decoder.model(layers, true)?
    })
}

fn layer_types<'a>(decoder: &Decoder<'a>) -> Result<Vec<&'a str>, ConfigError> {
    let types = decoder.config.texts("layer_types")?.ok_or_else(|| ConfigError::Missing { key: "layer_types".into() })?;
    match types.len() == decoder.n_layers as usize {
        true => Ok(types),
        false => Err(ConfigError::Contradiction {
            message: format!("layer_types has {} entries for num_hidden_layers {}", types.len(), decoder.n_layers),
        }),
    }
}

fn state_space(decoder: &Decoder, path: &str) -> Result<StateSpaceSpec, ConfigError> {
    let config = decoder.config;
    let keys = ["mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv"];
    let sizes = StateSpaceSizes::read(&config, decoder.hidden_size, keys)?;
    let bias = config.bool_or("mamba_proj_bias", false)?;
    let bias = ScanBias { input: bias, convolution: config.bool_or("mamba_conv_bias", true)?, output: bias };
    let gated_norm = GatedNorm::GateThenNorm { norm: sizes.norm(path, decoder.norm_eps), groups: 1 };
    Ok(sizes.mixer(path, bias, time_step_limit(&config, Some((0.001, 100.0)))?, gated_norm))
}

/// None when `position_embedding_type` says so. `rope_theta` in `rope_parameters` wins over the one outside.
fn rope(decoder: &Decoder) -> Result<Option<RopeSpec>, ConfigError> {
    let (config, source) = (decoder.config, decoder.source);
    source.only("position_embedding_type", &["rope", "nope"])?;
    if config.text("position_embedding_type")? == Some("nope") {
        return Ok(None);
    }
    let parameters = config.object("rope_parameters", "rope_parameters.")?;
    for scaling in [&config.object("rope_scaling", "rope_scaling.")?, &parameters].into_iter().flatten() {
        refuse_scaling(&source, scaling)?;
    }
    let theta = |config: &Config| config.maybe_f32("rope_theta", 1.0, 1e12);
    let nested = parameters.as_ref().map_or(Ok(None), theta)?;
    let theta = nested.or(theta(&config)?).unwrap_or(10_000.0);
    RopeSpec::plain(decoder.head_dim, theta, false).map(Some)
}

fn refuse_scaling(source: &Source, scaling: &Config) -> Result<(), ConfigError> {
    let kind = scaling.text("rope_type")?.or(scaling.text("type")?);
    match kind.filter(|kind| *kind != "default") {
        Some(kind) => Err(source.unsupported(format!("RoPE scaling (`{kind}`)"))),
        None => Ok(()),
    }
}

/// Routed experts beside a shared MLP, or one dense MLP when there are no experts.
fn feed_forward(decoder: &Decoder, path: &str) -> Result<FeedForward, ConfigError> {
    let (config, hidden_size) = (decoder.config, decoder.hidden_size);
    let n_experts = config.maybe_u32("num_local_experts", 0, 1 << 16)?.unwrap_or(0);
    let intermediate_size = decoder.intermediate_size()?;
    if n_experts == 0 {
        return Ok(FeedForward::Mlp(decoder.mlp(&format!("{path}.mlp"), intermediate_size, config.bool_or("mlp_bias", false)?)));
    }
    let router = LinearSpec::new(format!("{path}.block_sparse_moe.router.layer"), hidden_size, n_experts, false);
    let router = RouterSpec::softmax_of_picked(router, config.u32("num_experts_per_tok", 1, n_experts)?);
    let experts = experts(&format!("{path}.block_sparse_moe.switch_mlp"), n_experts, hidden_size, intermediate_size);
    let shared_size = config.u32("shared_intermediate_size", 1, 1 << 22)?;
    let path = format!("{path}.shared_mlp");
    let input = LinearSpec::new(format!("{path}.input_linear"), hidden_size, 2 * shared_size, false);
    let shared = MlpSpec {
        inputs: MlpInputs::GatedFused(input),
        down: LinearSpec::new(format!("{path}.output_linear"), shared_size, hidden_size, false),
        ..decoder.mlp(&path, shared_size, false)
    };
    Ok(mixture(router, experts, Some(shared)))
}

/// Experts are stacked, gate and `up` one after the other; a dense MLP is called shared.
fn published(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    kernels(spec, tensors)?;
    let (from, to) = match spec.layers.iter().any(|layer| layer.feed_forward.experts().is_some()) {
        true => ("block_sparse_moe", "block_sparse_moe.switch_mlp"),
        false => ("shared_mlp", "mlp"),
    };
    tensors.replace_in_names(&format!(".{from}.output_linear."), &format!(".{to}.down_proj."))?;
    tensors.split_halves(&format!("{from}.input_linear"), [&format!("{to}.gate_proj"), &format!("{to}.up_proj")])
}
