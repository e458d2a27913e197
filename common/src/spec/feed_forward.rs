//! What each token goes through alone: gated and plain MLPs, mixtures of experts and their routers.

use super::{ExpertsSpec, LinearSpec, NormSpec, TensorSpec, Weight};

#[derive(Debug, Clone, PartialEq)]
pub enum FeedForward {
    None,
    Mlp(MlpSpec),
    Experts(Box<MoeSpec>),
    /// `dense_norm(mlp(x)) + routed_norm(experts(before_routed(h)))`: `x` is the normed stream, `h` the stream itself, which the router sees
    /// (Gemma 4).
    MlpAndExperts {
        mlp: MlpSpec,
        moe: Box<MoeSpec>,
        dense_norm: NormSpec,
        before_routed: NormSpec,
        routed_norm: NormSpec,
    },
}

/// `down(activation(gate(x)) · up(x))` (Shazeer 2020), or `down(activation(up(x)))`.
#[derive(Debug, Clone, PartialEq)]
pub struct MlpSpec {
    pub inputs: MlpInputs,
    pub activation: Activation,
    pub down: LinearSpec,
}

#[derive(Debug, Clone, PartialEq)]
pub enum MlpInputs {
    Gated {
        gate: LinearSpec,
        up: LinearSpec,
    },
    /// One linear gives the gate and then `up`.
    GatedFused(LinearSpec),
    Plain(LinearSpec),
}

/// The nonlinearity of an MLP. The last three need both the gate and `up`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    Silu,
    /// With the error function.
    Gelu,
    /// With the tanh approximation (Hendrycks and Gimpel 2016).
    GeluTanh,
    Relu,
    /// `max(x, 0)²` (So et al. 2021).
    ReluSquared,
    /// GELU (tanh) of what exceeds `mean + std_multiplier · std` of the row (Gemma 3n).
    SparseGeluTanh {
        std_multiplier: f32,
    },
    /// `(up + 1) · g · sigmoid(alpha · g)` with the gate cut from above at `limit` and `up` cut on both sides (gpt-oss).
    ClippedSwiGlu {
        alpha: f32,
        limit: f32,
    },
    /// `min(silu(gate), limit) · clip(up, -limit, limit)` (Step-3.5).
    ClampedSwiGlu {
        limit: f32,
    },
}

/// Each token goes through the `top_k` experts that its router likes best.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeSpec {
    pub router: RouterSpec,
    pub experts: ExpertMlpSpec,
    pub shared: Option<SharedExpertSpec>,
    /// Experts work in a smaller space: into it, and back (Nemotron 3).
    pub latent: Option<(LinearSpec, LinearSpec)>,
}

/// The experts' linears, stacked.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertMlpSpec {
    pub inputs: ExpertInputs,
    pub activation: Activation,
    pub down: ExpertsSpec,
}

#[derive(Debug, Clone, PartialEq)]
pub enum ExpertInputs {
    Gated { gate: ExpertsSpec, up: ExpertsSpec },
    Plain(ExpertsSpec),
}

/// An MLP that every token goes through besides, times `sigmoid(gate(x))` where there is a gate.
#[derive(Debug, Clone, PartialEq)]
pub struct SharedExpertSpec {
    pub mlp: MlpSpec,
    pub gate: Option<LinearSpec>,
}

/// Picks experts and weighs them.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterSpec {
    pub linear: LinearSpec,
    /// The matrix is a linear in mlx-lm too; where it is a bare tensor there, adapters leave it out.
    pub is_module: bool,
    /// `x` is normed without weights and multiplied by this and by `hidden_size^(-1/2)` before it is scored: `[hidden_size]` (Gemma 4).
    pub input_scale: Option<(TensorSpec, f32)>,
    pub top_k: u32,
    pub ranking: Ranking,
    pub scores: RouterScores,
    pub precision: RouterPrecision,
    /// Added to the scores when experts are picked, not when they are weighed: `[n_experts]` (Wang et al. 2024).
    pub correction_bias: Option<TensorSpec>,
    pub groups: Option<RouterGroups>,
    /// Weights are divided by their sum plus this; None leaves them as they are.
    pub renormalise: Option<f32>,
    /// Factor on the weights.
    pub scale: f32,
    /// A factor an expert on the weights: `[n_experts]`.
    pub expert_scale: Option<TensorSpec>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouterScores {
    /// Softmax over all experts.
    Softmax,
    /// Softmax over those that were picked by their logits.
    SoftmaxOfPicked,
    /// Sigmoid, each for itself.
    Sigmoid,
}

/// From which end of the sorted scores the best are taken: it decides between equal scores, which are frequent in bf16, and in which order
/// the experts' outcomes are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ranking {
    /// The first of the negated scores.
    BestFirst,
    /// The last of the scores.
    BestLast,
}

/// What a router reckons in f32 where the stream is in half precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouterPrecision {
    /// The linear's input, so its logits too.
    pub logits: bool,
    pub scores: bool,
    /// Weights stay what scores are, and only the weighted sum is rounded; else they are rounded first.
    pub weights: bool,
}

/// Only experts of the `kept` best of `count` equal groups can be picked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouterGroups {
    pub count: u32,
    pub kept: u32,
    pub by: GroupScore,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    Best,
    SumOfBestTwo,
}

impl FeedForward {
    pub(super) fn weights<'a>(&'a self, out: &mut Vec<Weight<'a>>) {
        match self {
            FeedForward::None => {}
            FeedForward::Mlp(mlp) => mlp.weights(out),
            FeedForward::Experts(moe) => moe.weights(out),
            FeedForward::MlpAndExperts { mlp, moe, dense_norm, before_routed, routed_norm } => {
                mlp.weights(out);
                moe.weights(out);
                out.extend([dense_norm, before_routed, routed_norm].map(Weight::Norm));
            }
        }
    }

    /// Whether the matrix at `path` is that of a router that is a bare tensor in mlx-lm.
    pub fn router_is_tensor(&self, path: &str) -> bool {
        self.experts().is_some_and(|moe| !moe.router.is_module && moe.router.linear.path == path)
    }

    /// The experts, where there are some.
    pub fn experts(&self) -> Option<&MoeSpec> {
        match self {
            FeedForward::Experts(moe) | FeedForward::MlpAndExperts { moe, .. } => Some(moe),
            FeedForward::None | FeedForward::Mlp(_) => None,
        }
    }
}

impl MlpSpec {
    fn weights<'a>(&'a self, out: &mut Vec<Weight<'a>>) {
        match &self.inputs {
            MlpInputs::Gated { gate, up } => out.extend([gate, up].map(Weight::Linear)),
            MlpInputs::GatedFused(linear) | MlpInputs::Plain(linear) => out.push(Weight::Linear(linear)),
        }
        out.push(Weight::Linear(&self.down));
    }

    /// Width between the input and `down`.
    pub fn inner_dims(&self) -> u32 {
        self.down.input_dims
    }
}

impl MoeSpec {
    fn weights<'a>(&'a self, out: &mut Vec<Weight<'a>>) {
        let router = &self.router;
        out.push(Weight::Linear(&router.linear));
        out.extend(router.input_scale.iter().map(|(tensor, _)| Weight::Tensor(tensor)));
        out.extend([&router.correction_bias, &router.expert_scale].into_iter().flatten().map(Weight::Tensor));
        match &self.experts.inputs {
            ExpertInputs::Gated { gate, up } => out.extend([gate, up].map(Weight::Experts)),
            ExpertInputs::Plain(up) => out.push(Weight::Experts(up)),
        }
        out.push(Weight::Experts(&self.experts.down));
        if let Some(shared) = &self.shared {
            shared.mlp.weights(out);
            out.extend(shared.gate.iter().map(Weight::Linear));
        }
        if let Some((down, up)) = &self.latent {
            out.extend([down, up].map(Weight::Linear));
        }
    }

    pub fn n_experts(&self) -> u32 {
        self.experts.down.n_experts
    }
}

impl RouterPrecision {
    /// Nothing but what softmax does inside.
    pub const STREAM: RouterPrecision = RouterPrecision { logits: false, scores: false, weights: false };
    /// All from the logits on.
    pub const SCORES: RouterPrecision = RouterPrecision { logits: false, scores: true, weights: true };
}

impl RouterSpec {
    /// A linear, softmax over all experts, the best `top_k`.
    pub fn softmax(linear: LinearSpec, top_k: u32, renormalise: bool) -> Self {
        Self {
            linear,
            is_module: true,
            input_scale: None,
            top_k,
            ranking: Ranking::BestLast,
            scores: RouterScores::Softmax,
            precision: RouterPrecision::STREAM,
            correction_bias: None,
            groups: None,
            renormalise: renormalise.then_some(0.0),
            scale: 1.0,
            expert_scale: None,
        }
    }

    /// A linear, the best `top_k`, softmax over these.
    pub fn softmax_of_picked(linear: LinearSpec, top_k: u32) -> Self {
        Self { scores: RouterScores::SoftmaxOfPicked, ..Self::softmax(linear, top_k, false) }
    }

    /// Sigmoids in f32, of which the best `top_k` with the bias are picked, and weighed without it (DeepSeek-AI 2024, arXiv 2412.19437,
    /// section 2.1.2).
    pub fn sigmoid(linear: LinearSpec, top_k: u32, correction_bias: Option<TensorSpec>) -> Self {
        Self {
            ranking: Ranking::BestFirst,
            scores: RouterScores::Sigmoid,
            precision: RouterPrecision::SCORES,
            correction_bias,
            ..Self::softmax(linear, top_k, false)
        }
    }
}
