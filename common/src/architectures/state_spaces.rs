//! Spec pieces of Mamba 1 and 2 that several architectures share, with the names that the first models gave them.

use super::blocks::Decoder;
use crate::{
    config::{Config, ConfigError},
    published::{PublishedError, Tensors},
    spec::{
        ConvolutionSpec, GatedNorm, LayerSpec, LinearSpec, ModelSpec, NormSpec, SelectiveScanSpec, StateSpaceInputs, StateSpaceSpec,
        TensorSpec,
    },
};

/// What mlx-lm's RMS norms have where the config says nothing.
pub(super) const DEFAULT_EPS: f32 = 1e-5;

/// The sizes of a Mamba 2 mixer.
#[derive(Clone, Copy)]
pub(super) struct StateSpaceSizes {
    pub(super) hidden_size: u32,
    pub(super) n_heads: u32,
    pub(super) head_dim: u32,
    pub(super) state_dim: u32,
    pub(super) n_groups: u32,
    /// Tokens that the convolution sees.
    pub(super) kernel: u32,
}

/// Which parts of a mixer carry a bias.
#[derive(Clone, Copy)]
pub(super) struct ScanBias {
    pub(super) input: bool,
    pub(super) convolution: bool,
    pub(super) output: bool,
}

impl StateSpaceSizes {
    /// Reads them under the keys of heads, their size, the state, groups and the convolution's kernel, in this order.
    pub(super) fn read(config: &Config, hidden_size: u32, keys: [&str; 5]) -> Result<Self, ConfigError> {
        let [n_heads, head_dim, state_dim, n_groups, kernel] = keys;
        let sizes = Self {
            hidden_size,
            n_heads: config.u32(n_heads, 1, 1 << 14)?,
            head_dim: config.u32(head_dim, 1, 1 << 14)?,
            state_dim: config.u32(state_dim, 1, 1 << 14)?,
            n_groups: config.u32(n_groups, 1, 1 << 14)?,
            kernel: config.u32(kernel, 2, 64)?,
        };
        match sizes.n_heads.is_multiple_of(sizes.n_groups) {
            true => Ok(sizes),
            false => Err(ConfigError::Contradiction {
                message: format!("{n_heads} {} is no multiple of {n_groups} {}", sizes.n_heads, sizes.n_groups),
            }),
        }
    }

    /// Width of x and of the gate.
    pub(super) fn inner(&self) -> u32 {
        self.n_heads * self.head_dim
    }

    /// A norm of the output under `path`.
    pub(super) fn norm(&self, path: &str, eps: f32) -> NormSpec {
        NormSpec::rms(format!("{path}.norm"), self.inner(), eps)
    }

    /// The mixer under `path`, with one linear for all its inputs.
    pub(super) fn mixer(&self, path: &str, bias: ScanBias, time_step_limit: (f32, f32), gated_norm: GatedNorm) -> StateSpaceSpec {
        let convolved = self.inner() + 2 * self.n_groups * self.state_dim;
        let linear = |name: &str, input, output, bias| LinearSpec::new(format!("{path}.{name}"), input, output, bias);
        let by_head = |name: &str| TensorSpec::new(format!("{path}.{name}"), &[self.n_heads]);
        StateSpaceSpec {
            n_heads: self.n_heads,
            head_dim: self.head_dim,
            state_dim: self.state_dim,
            n_groups: self.n_groups,
            inputs: StateSpaceInputs::Joint(linear("in_proj", self.hidden_size, self.inner() + convolved + self.n_heads, bias.input)),
            convolution: convolution(path, convolved, self.kernel, bias.convolution),
            dt_bias: by_head("dt_bias"),
            a_log: by_head("A_log"),
            d: by_head("D"),
            time_step_limit,
            gated_norm,
            output: linear("out_proj", self.inner(), self.hidden_size, bias.output),
        }
    }
}

/// `conv1d` under `path`.
pub(super) fn convolution(path: &str, channels: u32, kernel: u32, bias: bool) -> ConvolutionSpec {
    ConvolutionSpec { path: format!("{path}.conv1d"), channels, kernel, bias }
}

/// The bounds of time steps.
pub(super) fn time_step_limit(config: &Config, default: Option<(f32, f32)>) -> Result<(f32, f32), ConfigError> {
    match (config.f32s("time_step_limit", 0.0, f32::INFINITY)?.as_deref(), default) {
        (Some(&[least, most]), _) if least <= most => Ok((least, most)),
        (None, Some(default)) => Ok(default),
        (None, None) => Err(ConfigError::Missing { key: "time_step_limit".into() }),
        (Some(found), _) => Err(ConfigError::Invalid {
            key: "time_step_limit".into(),
            wanted: "the least and the greatest time step".into(),
            found: format!("{found:?}"),
        }),
    }
}

/// The sizes of a Mamba 1 mixer.
#[derive(Clone, Copy)]
pub(super) struct SelectiveScanSizes {
    pub(super) hidden_size: u32,
    pub(super) inner: u32,
    pub(super) state_dim: u32,
    pub(super) dt_rank: u32,
    pub(super) kernel: u32,
}

impl SelectiveScanSizes {
    /// The mixer under `path`; `norms` are those of the time step's low rank, of B and of C.
    pub(super) fn mixer(&self, path: &str, bias: ScanBias, norms: Option<[NormSpec; 3]>) -> SelectiveScanSpec {
        let Self { hidden_size, inner, state_dim, dt_rank, kernel } = *self;
        let linear = |name: &str, input, output, bias| LinearSpec::new(format!("{path}.{name}"), input, output, bias);
        SelectiveScanSpec {
            inner_dim: inner,
            state_dim,
            dt_rank,
            input: linear("in_proj", hidden_size, 2 * inner, bias.input),
            convolution: convolution(path, inner, kernel, bias.convolution),
            dt_b_c: linear("x_proj", inner, dt_rank + 2 * state_dim, false),
            dt: linear("dt_proj", dt_rank, inner, true),
            a_log: TensorSpec::new(format!("{path}.A_log"), &[inner, state_dim]),
            d: TensorSpec::new(format!("{path}.D"), &[inner]),
            norms,
            output: linear("out_proj", inner, hidden_size, bias.output),
        }
    }
}

/// A number, or `"auto"` for a sixteenth of the hidden size, rounded up.
pub(super) fn dt_rank(config: &Config, key: &str, hidden_size: u32) -> Result<u32, ConfigError> {
    match config.get(key).and_then(|value| value.as_str()) {
        Some("auto") => Ok(hidden_size.div_ceil(16)),
        _ => config.u32(key, 1, 1 << 16),
    }
}

/// A model whose parts are called `backbone.embeddings`, `backbone.layers`, `backbone.norm_f` and `lm_head`.
pub(super) fn backbone(decoder: &Decoder, layers: Vec<LayerSpec>, tied_by_default: bool) -> Result<ModelSpec, ConfigError> {
    let mut model = decoder.model(layers, tied_by_default)?;
    model.embedding.path = decoder.path("backbone.embeddings");
    model.final_norm.path = decoder.path("backbone.norm_f");
    Ok(model)
}

/// Published kernels have their channels first.
pub(super) fn kernels(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    tensors.channels_last("conv1d.weight")
}
