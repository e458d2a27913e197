//! Falcon H1 (Technology Innovation Institute 2025): a state space and attention side by side in each layer. Its multipliers (muP) are factors
//! of the published weights.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Defaults, Source},
    state_spaces::{ScanBias, StateSpaceSizes, kernels},
};
use crate::{
    config::{Config, ConfigError},
    published::{Published, PublishedError, SymbolicTensor, Tensors},
    spec::{FeedForward, GatedNorm, HeadSpec, LayerSpec, LogitsSpec, Mixer, ModelSpec, StateSpaceInputs, StateSpaceSpec},
};
use std::collections::BTreeMap;

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "falcon_h1", group: Group::StateSpace, special: "state space and attention side by side", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    let config = source.config;
    let eps = config.maybe_f32("rms_norm_eps", 0.0, 1.0)?.unwrap_or(1e-5);
    let decoder = Decoder::read_with_defaults(source, &Defaults { head_dim: Some(64), norm_eps: Some(eps), ..Defaults::default() })?;
    let multipliers = Multipliers::read(&config)?;
    let flag = |key: &str| config.bool_or(key, false);
    let (attention_bias, mlp_bias) = (AttentionBias::all(flag("attention_bias")?), flag("mlp_bias")?);
    let intermediate_size = decoder.intermediate_size()?;
    let layers = decoder.layers(|_, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), attention_bias);
        attention.rope = Some(decoder.rope(Some(1e11))?);
        let state_space = state_space(&decoder, &format!("{path}.mamba"))?;
        let mixers = vec![Mixer::StateSpace(Box::new(state_space)), Mixer::Attention(Box::new(attention))];
        let mlp = FeedForward::Mlp(decoder.mlp(&format!("{path}.feed_forward"), intermediate_size, mlp_bias));
        let norm = |name: &str| decoder.norm(format!("{path}.{name}"), decoder.hidden_size);
        Ok(LayerSpec::pre_norm(norm("input_layernorm"), Mixer::Parallel(mixers), norm("pre_ff_layernorm"), mlp))
    })?;
    let mut model = decoder.model(layers, true)?;
    model.final_norm.path = decoder.path("model.final_layernorm");
    if model.head == HeadSpec::Tied {
        // The table carries the factor of the embedding.
        model.logits = LogitsSpec { scale: multipliers.head / multipliers.embedding, ..LogitsSpec::PLAIN };
    }
    model.published = Published::with_multipliers(published, multipliers.by_linear());
    Ok(model)
}

fn state_space(decoder: &Decoder, path: &str) -> Result<StateSpaceSpec, ConfigError> {
    let config = decoder.config;
    let keys = ["mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv"];
    let sizes = StateSpaceSizes::read(&config, decoder.hidden_size, keys)?;
    let inner = config.maybe_u32("mamba_d_ssm", 1, 1 << 22)?;
    if inner.is_some_and(|inner| inner != sizes.inner()) {
        let message = format!("mamba_d_ssm {} is not mamba_n_heads times mamba_d_head, {}", inner.unwrap_or(0), sizes.inner());
        return Err(ConfigError::Contradiction { message });
    }
    let flag = |key: &str, default| config.bool_or(key, default);
    let bias = ScanBias {
        input: flag("mamba_proj_bias", false)?,
        convolution: flag("mamba_conv_bias", true)?,
        output: flag("projectors_bias", false)?,
    };
    // Over the whole width, as in mlx-lm, whatever the number of groups.
    let norm = sizes.norm(path, decoder.norm_eps);
    let gated_norm = match (flag("mamba_rms_norm", false)?, flag("mamba_norm_before_gate", false)?) {
        (false, _) => GatedNorm::None,
        (true, true) => GatedNorm::NormThenGate { norm },
        (true, false) => GatedNorm::GateThenNorm { norm, groups: 1 },
    };
    Ok(sizes.mixer(path, bias, (0.0, f32::INFINITY), gated_norm))
}

/// Factors on activations, which linears take in; those that a config leaves out are the ones of mlx-lm.
struct Multipliers {
    embedding: f32,
    head: f32,
    attention_in: f32,
    attention_out: f32,
    key: f32,
    /// On the gate and on what comes out.
    mlp: [f32; 2],
    scan_in: f32,
    scan_out: f32,
    /// On the gate, x, B, C and the time steps.
    scan: [f32; 5],
}

impl Multipliers {
    fn read(config: &Config) -> Result<Self, ConfigError> {
        let factor = |key: &str, default: f32| Ok(config.maybe_f32(key, 1e-12, 1e12)?.unwrap_or(default));
        Ok(Self {
            embedding: factor("embedding_multiplier", 5.656_854)?,
            head: factor("lm_head_multiplier", 0.039_062_5)?,
            attention_in: factor("attention_in_multiplier", 1.0)?,
            attention_out: factor("attention_out_multiplier", 0.937_5)?,
            key: factor("key_multiplier", 0.390_625)?,
            mlp: factors(config, "mlp_multipliers", [0.883_883_5, 0.585_937_5])?,
            scan_in: factor("ssm_in_multiplier", 1.25)?,
            scan_out: factor("ssm_out_multiplier", 0.235_702_26)?,
            scan: factors(config, "ssm_multipliers", [0.353_553_4, 0.25, 0.353_553_4, 0.5, 0.353_553_4])?,
        })
    }

    /// By the linear's name, where it is not 1. Keys and values have theirs as transformers computes them: mlx-lm leaves out that of the key (its name does not
    /// match) and of the value, which is 1 in published models.
    fn by_linear(&self) -> BTreeMap<&'static str, Vec<f32>> {
        let one = |name, factor: f32| (name, vec![factor]);
        let factors = [
            one("embed_tokens", self.embedding),
            one("lm_head", self.head),
            one("q_proj", self.attention_in),
            one("k_proj", self.attention_in * self.key),
            one("v_proj", self.attention_in),
            one("o_proj", self.attention_out),
            one("gate_proj", self.mlp[0]),
            one("down_proj", self.mlp[1]),
            ("in_proj", self.scan.map(|factor| self.scan_in * factor).to_vec()),
            one("out_proj", self.scan_out),
        ];
        factors.into_iter().filter(|(_, factors)| factors.iter().any(|factor| *factor != 1.0)).collect()
    }
}

fn factors<const N: usize>(config: &Config, key: &str, default: [f32; N]) -> Result<[f32; N], ConfigError> {
    let Some(found) = config.f32s(key, 1e-12, 1e12)? else { return Ok(default) };
    let invalid = |found: Vec<f32>| ConfigError::Invalid { key: key.into(), wanted: format!("{N} numbers"), found: format!("{found:?}") };
    <[f32; N]>::try_from(found).map_err(invalid)
}

/// Folds the multipliers into the weights. Those that mlx-lm saved have them, and only their kernels tell: they have the channels last.
fn published(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    let is_kernel = |name: &str| name.ends_with("conv1d.weight");
    let has_channels_first = |tensor: &SymbolicTensor| tensor.dim(1) == 1 && tensor.dim(2) != 1;
    let kernels_found: Vec<_> = tensors.names().filter(|name| is_kernel(name)).map(str::to_owned).collect();
    if !kernels_found.iter().filter_map(|name| tensors.get(name)).any(has_channels_first) {
        return Ok(());
    }
    kernels(spec, tensors)?;
    let rows = input_rows(spec);
    let names: Vec<_> = tensors.names().map(str::to_owned).collect();
    for name in names {
        let Some(linear) = name.strip_suffix(".weight").and_then(|path| path.rsplit('.').next()) else { continue };
        let scaled = match (linear, spec.published.multipliers(linear)) {
            (_, []) => continue,
            (_, [factor]) => tensors.take(&name).map(|tensor| tensor.scale(*factor)),
            (_, factors) => {
                let runs: Vec<_> = rows.iter().copied().zip(factors.iter().copied()).collect();
                tensors.take(&name).map(|tensor| tensor.scale_rows(&runs))
            }
        };
        if let Some(scaled) = scaled.transpose()? {
            tensors.put(name, scaled)?;
        }
    }
    Ok(())
}

/// How many rows of a state space's input linear give the gate, x, B, C and the time steps.
fn input_rows(spec: &ModelSpec) -> Vec<u64> {
    let mixers = spec.layers.iter().filter_map(|layer| match &layer.mixer {
        Mixer::Parallel(mixers) => Some(mixers),
        _ => None,
    });
    let sizes = mixers.flatten().find_map(|mixer| match mixer {
        Mixer::StateSpace(mixer) if matches!(mixer.inputs, StateSpaceInputs::Joint(_)) => Some(mixer),
        _ => None,
    });
    sizes.map_or_else(Vec::new, |sizes| {
        let (inner, width) = (sizes.n_heads * sizes.head_dim, sizes.n_groups * sizes.state_dim);
        [inner, inner, width, width, sizes.n_heads].map(u64::from).to_vec()
    })
}
