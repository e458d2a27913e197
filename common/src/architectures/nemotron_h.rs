//! Nemotron H and Nemotron 3 (NVIDIA 2025): each layer is one thing, by a pattern: a state space, attention without positions, an MLP with
//! squared ReLU, or routed experts, which may work in a smaller space.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Defaults, Source},
    mixtures::{RouterDefaults, corrected_router},
    state_spaces::{ScanBias, StateSpaceSizes, backbone, kernels, time_step_limit},
};
use crate::{
    config::{Config, ConfigError},
    published::{Published, PublishedError, Tensors},
    spec::{
        Activation, ExpertInputs, ExpertMlpSpec, ExpertsSpec, FeedForward, GatedNorm, LayerSpec, LinearSpec, Mixer, MlpInputs, MlpSpec,
        ModelSpec, MoeSpec, SharedExpertSpec, StateSpaceSpec,
    },
};

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "nemotron_h",
    group: Group::StateSpace,
    special: "one of state space, attention, MLP and experts a layer",
    read,
}];

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    StateSpace,
    Attention,
    Mlp,
    Experts,
}

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let config = source.config;
    source.only("mlp_hidden_act", &["relu2"])?;
    source.only("mamba_hidden_act", &["silu"])?;
    let kinds = kinds(&source)?;
    let n_layers = kinds.len() as u32;
    let eps = config.f32("layer_norm_epsilon", 0.0, 1.0)?;
    let defaults = Defaults { n_layers: Some(n_layers), norm_eps: Some(eps), ..Defaults::default() };
    let decoder = Decoder { n_layers, ..Decoder::read_with_defaults(source, &defaults)? };
    let bias = AttentionBias::all(config.bool_or("attention_bias", false)?);
    let layers = decoder.layers_under("backbone.layers", |i, path| {
        let norm = decoder.norm(format!("{path}.norm"), decoder.hidden_size);
        let path = format!("{path}.mixer");
        Ok(match kinds[i as usize] {
            Kind::StateSpace => LayerSpec::mixer_only(norm, Mixer::StateSpace(Box::new(state_space(&decoder, &path)?))),
            Kind::Attention => LayerSpec::mixer_only(norm, Mixer::Attention(Box::new(decoder.attention(&path, bias)))),
            Kind::Mlp => LayerSpec::feed_forward_only(norm, FeedForward::Mlp(mlp(&decoder, &path, decoder.intermediate_size()?)?)),
            Kind::Experts => LayerSpec::feed_forward_only(norm, FeedForward::Experts(Box::new(moe(&decoder, &path)?))),
        })
    })?;
    Ok(ModelSpec { published: Published::new(published), ..backbone(&decoder, layers, false)? })
}

/// `hybrid_override_pattern`, a letter a layer, or the list of names that newer configs have.
fn kinds(source: &Source) -> Result<Vec<Kind>, ConfigError> {
    let config = source.config;
    let unknown = |found: &str| source.unsupported(format!("a layer of type `{found}`"));
    let by_letter = |letter: &str| match letter {
        "M" => Ok(Kind::StateSpace),
        "*" => Ok(Kind::Attention),
        "-" => Ok(Kind::Mlp),
        "E" => Ok(Kind::Experts),
        other => Err(unknown(other)),
    };
    let by_name = |name: &str| match name {
        "linear_attention" | "mamba" | "conv" => Ok(Kind::StateSpace),
        "full_attention" | "attention" => Ok(Kind::Attention),
        "mlp" => Ok(Kind::Mlp),
        "moe" => Ok(Kind::Experts),
        other => Err(unknown(other)),
    };
    let pattern = "hybrid_override_pattern";
    let kinds: Vec<Kind> = match config.get(pattern) {
        Some(value) if value.is_string() => {
            let letters = config.text(pattern)?.unwrap_or_default();
            letters.chars().map(|letter| by_letter(letter.encode_utf8(&mut [0; 4]))).collect::<Result<_, _>>()?
        }
        Some(_) => config.texts(pattern)?.unwrap_or_default().into_iter().map(by_letter).collect::<Result<_, _>>()?,
        None => {
            let names = config.texts("layers_block_type")?.map_or_else(|| config.texts("layer_types"), |names| Ok(Some(names)))?;
            let names = names.ok_or_else(|| ConfigError::Missing { key: pattern.into() })?;
            names.into_iter().map(by_name).collect::<Result<_, _>>()?
        }
    };
    check_count(&config, kinds.len())?;
    Ok(kinds)
}

fn check_count(config: &Config, n: usize) -> Result<(), ConfigError> {
    match config.maybe_u32("num_hidden_layers", 1, 4096)? {
        Some(n_layers) if n_layers as usize != n => {
            Err(ConfigError::Contradiction { message: format!("the pattern of layers has {n} entries for num_hidden_layers {n_layers}") })
        }
        _ if n == 0 || n > 4096 => Err(ConfigError::Contradiction { message: format!("the pattern of layers has {n} entries") }),
        _ => Ok(()),
    }
}

fn state_space(decoder: &Decoder, path: &str) -> Result<StateSpaceSpec, ConfigError> {
    let config = decoder.config;
    let keys = ["mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"];
    let sizes = StateSpaceSizes::read(&config, decoder.hidden_size, keys)?;
    let bias = config.bool_or("mamba_proj_bias", false)?;
    let bias = ScanBias { input: bias, convolution: config.bool_or("use_conv_bias", true)?, output: bias };
    let gated_norm = GatedNorm::GateThenNorm { norm: sizes.norm(path, decoder.norm_eps), groups: sizes.n_groups };
    Ok(sizes.mixer(path, bias, time_step_limit(&config, Some((0.0, f32::INFINITY)))?, gated_norm))
}

fn mlp(decoder: &Decoder, path: &str, intermediate_size: u32) -> Result<MlpSpec, ConfigError> {
    let bias = decoder.config.bool_or("mlp_bias", false)?;
    let linear = |name: &str, input, output| LinearSpec::new(format!("{path}.{name}"), input, output, bias);
    Ok(MlpSpec {
        inputs: MlpInputs::Plain(linear("up_proj", decoder.hidden_size, intermediate_size)),
        activation: Activation::ReluSquared,
        down: linear("down_proj", intermediate_size, decoder.hidden_size),
    })
}

fn moe(decoder: &Decoder, path: &str) -> Result<MoeSpec, ConfigError> {
    let (config, hidden_size) = (decoder.config, decoder.hidden_size);
    let n_experts = config.u32("n_routed_experts", 1, 1 << 16)?;
    let linear = LinearSpec::new(format!("{path}.gate"), hidden_size, n_experts, false);
    let bias = format!("{path}.gate.e_score_correction_bias");
    let router = corrected_router(decoder, linear, bias, 1e-20, &RouterDefaults::default())?;
    let latent_size = config.maybe_u32("moe_latent_size", 1, 1 << 20)?;
    let (outer, inner) = (latent_size.unwrap_or(hidden_size), config.u32("moe_intermediate_size", 1, 1 << 22)?);
    let experts = |name: &str, input_dims, output_dims| ExpertsSpec {
        path: format!("{path}.switch_mlp.{name}"),
        n_experts,
        input_dims,
        output_dims,
        bias: false,
    };
    let mlp_bias = config.bool_or("mlp_bias", false)?;
    let between = |name: &str, input, output| LinearSpec::new(format!("{path}.{name}"), input, output, mlp_bias);
    let shared_size = match config.maybe_u32("n_shared_experts", 0, 1 << 16)? {
        Some(_) => Some(config.u32("moe_shared_expert_intermediate_size", 1, 1 << 22)?),
        None => None,
    };
    let shared = shared_size.map(|size| mlp(decoder, &format!("{path}.shared_experts"), size)).transpose()?;
    Ok(MoeSpec {
        router,
        experts: ExpertMlpSpec {
            inputs: ExpertInputs::Plain(experts("fc1", outer, inner)),
            activation: Activation::ReluSquared,
            down: experts("fc2", inner, outer),
        },
        shared: shared.map(|mlp| SharedExpertSpec { mlp, gate: None }),
        latent: latent_size.map(|size| (between("fc1_latent_proj", hidden_size, size), between("fc2_latent_proj", size, hidden_size))),
    })
}

/// Experts one by one, and layers besides that only predict further tokens.
fn published(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    tensors.drop_prefix("mtp.");
    kernels(spec, tensors)?;
    tensors.stack_experts("mixer.experts", "mixer.switch_mlp", &[("up_proj", "fc1"), ("down_proj", "fc2")])
}
