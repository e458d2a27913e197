//! Mixers whose memory of a sequence has a fixed size: gated delta rule, state space models, short convolutions.

use super::{ConvolutionSpec, LinearSpec, NormSpec, TensorSpec, Weight};

/// Tokens that a state takes in at once when a prompt is read, counted from where a step's segment begins.
pub const CHUNK_TOKENS: u32 = 64;

/// Linear attention by the gated delta rule (Yang et al. 2024), behind a short convolution, with a gated norm before the output.
#[derive(Debug, Clone, PartialEq)]
pub struct GatedDeltaSpec {
    pub n_key_heads: u32,
    pub n_value_heads: u32,
    pub key_dim: u32,
    pub value_dim: u32,
    pub projections: GatedDeltaProjections,
    /// Over queries, keys and values side by side.
    pub convolution: ConvolutionSpec,
    /// `[n_value_heads]`.
    pub dt_bias: TensorSpec,
    /// `[n_value_heads]`.
    pub a_log: TensorSpec,
    /// Over each value head, then times `silu(z)`.
    pub norm: NormSpec,
    pub output: LinearSpec,
}

#[derive(Debug, Clone, PartialEq)]
pub enum GatedDeltaProjections {
    /// `qkvz` and `ba` give their parts for each key head side by side (Qwen3-Next).
    ByKeyHead {
        qkvz: LinearSpec,
        ba: LinearSpec,
    },
    Separate {
        qkv: LinearSpec,
        z: LinearSpec,
        b: LinearSpec,
        a: LinearSpec,
    },
}

/// State space duality (Dao and Gu 2024), Mamba 2.
#[derive(Debug, Clone, PartialEq)]
pub struct StateSpaceSpec {
    pub n_heads: u32,
    pub head_dim: u32,
    pub state_dim: u32,
    pub n_groups: u32,
    pub inputs: StateSpaceInputs,
    pub convolution: ConvolutionSpec,
    /// `[n_heads]`, as the next two.
    pub dt_bias: TensorSpec,
    pub a_log: TensorSpec,
    pub d: TensorSpec,
    /// Bounds of the time step after softplus.
    pub time_step_limit: (f32, f32),
    pub gated_norm: GatedNorm,
    pub output: LinearSpec,
}

#[derive(Debug, Clone, PartialEq)]
pub enum StateSpaceInputs {
    /// One linear gives the gate, what the convolution takes (x, B and C) and the time steps.
    Joint(LinearSpec),
    /// One linear gives the gate and x for each head side by side; the rest comes from x after the convolution (PLaMo 2).
    AfterConvolution { gate_and_x: LinearSpec, rest: Box<AfterConvolutionSpec> },
}

/// B, C and the time steps from x after the convolution, each through a norm: `dt_norm` is `[dt_rank]`, the other two `[state_dim]`.
#[derive(Debug, Clone, PartialEq)]
pub struct AfterConvolutionSpec {
    /// Gives B, C and the time step's low rank.
    pub bcdt: LinearSpec,
    pub dt: LinearSpec,
    pub dt_norm: TensorSpec,
    pub b_norm: TensorSpec,
    pub c_norm: TensorSpec,
    pub eps: f32,
}

/// How the gate `z` and a norm act on what comes out of a scan.
#[derive(Debug, Clone, PartialEq)]
pub enum GatedNorm {
    /// `y · silu(z)`
    None,
    /// `norm(y · silu(z))`, over each of `groups` equal parts.
    GateThenNorm { norm: NormSpec, groups: u32 },
    /// `norm(y) · silu(z)`
    NormThenGate { norm: NormSpec },
}

/// Selective scan (Gu and Dao 2023), Mamba 1.
#[derive(Debug, Clone, PartialEq)]
pub struct SelectiveScanSpec {
    pub inner_dim: u32,
    pub state_dim: u32,
    pub dt_rank: u32,
    /// Gives x and the gate.
    pub input: LinearSpec,
    pub convolution: ConvolutionSpec,
    /// Gives the time step's low rank, B and C.
    pub dt_b_c: LinearSpec,
    pub dt: LinearSpec,
    /// `[inner_dim, state_dim]`.
    pub a_log: TensorSpec,
    /// `[inner_dim]`.
    pub d: TensorSpec,
    /// Over the time step's low rank, B and C.
    pub norms: Option<[NormSpec; 3]>,
    pub output: LinearSpec,
}

/// `output(c · convolution(b · x))` (LFM 2).
#[derive(Debug, Clone, PartialEq)]
pub struct ShortConvolutionSpec {
    /// Gives b, c and x.
    pub input: LinearSpec,
    pub convolution: ConvolutionSpec,
    pub output: LinearSpec,
}

impl GatedDeltaSpec {
    pub(super) fn weights<'a>(&'a self, out: &mut Vec<Weight<'a>>) {
        match &self.projections {
            GatedDeltaProjections::ByKeyHead { qkvz, ba } => out.extend([qkvz, ba].map(Weight::Linear)),
            GatedDeltaProjections::Separate { qkv, z, b, a } => out.extend([qkv, z, b, a].map(Weight::Linear)),
        }
        out.push(Weight::Convolution(&self.convolution));
        out.extend([&self.dt_bias, &self.a_log].map(Weight::Tensor));
        out.extend([Weight::Norm(&self.norm), Weight::Linear(&self.output)]);
    }

    /// Elements of a sequence's state: the convolution's past and a matrix a value head.
    pub(super) fn state_elements(&self) -> u64 {
        self.convolution.state_elements() + [self.n_value_heads, self.value_dim, self.key_dim].map(u64::from).iter().product::<u64>()
    }
}

impl StateSpaceSpec {
    pub(super) fn weights<'a>(&'a self, out: &mut Vec<Weight<'a>>) {
        match &self.inputs {
            StateSpaceInputs::Joint(linear) => out.push(Weight::Linear(linear)),
            StateSpaceInputs::AfterConvolution { gate_and_x, rest } => {
                out.extend([gate_and_x, &rest.bcdt, &rest.dt].map(Weight::Linear));
                out.extend([&rest.dt_norm, &rest.b_norm, &rest.c_norm].map(Weight::Tensor));
            }
        }
        out.push(Weight::Convolution(&self.convolution));
        out.extend([&self.dt_bias, &self.a_log, &self.d].map(Weight::Tensor));
        match &self.gated_norm {
            GatedNorm::None => {}
            GatedNorm::GateThenNorm { norm, .. } | GatedNorm::NormThenGate { norm } => out.push(Weight::Norm(norm)),
        }
        out.push(Weight::Linear(&self.output));
    }

    pub(super) fn state_elements(&self) -> u64 {
        self.convolution.state_elements() + [self.n_heads, self.head_dim, self.state_dim].map(u64::from).iter().product::<u64>()
    }
}

impl SelectiveScanSpec {
    pub(super) fn weights<'a>(&'a self, out: &mut Vec<Weight<'a>>) {
        out.extend([&self.input, &self.dt_b_c, &self.dt, &self.output].map(Weight::Linear));
        out.push(Weight::Convolution(&self.convolution));
        out.extend([&self.a_log, &self.d].map(Weight::Tensor));
        out.extend(self.norms.iter().flatten().map(Weight::Norm));
    }

    pub(super) fn state_elements(&self) -> u64 {
        self.convolution.state_elements() + u64::from(self.inner_dim) * u64::from(self.state_dim)
    }
}

impl ShortConvolutionSpec {
    pub(super) fn weights<'a>(&'a self, out: &mut Vec<Weight<'a>>) {
        out.extend([Weight::Linear(&self.input), Weight::Convolution(&self.convolution), Weight::Linear(&self.output)]);
    }

    pub(super) fn state_elements(&self) -> u64 {
        self.convolution.state_elements()
    }
}

impl ConvolutionSpec {
    fn state_elements(&self) -> u64 {
        u64::from(self.kernel.saturating_sub(1)) * u64::from(self.channels)
    }
}
