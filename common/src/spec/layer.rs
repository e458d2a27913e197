//! A layer: a mixer and a feed-forward on a residual stream, and how they join it.

use super::{
    AttentionSpec, EmbeddingSpec, FeedForward, GatedDeltaSpec, LatentAttentionSpec, LinearSpec, NormSpec, SelectiveScanSpec,
    ShortConvolutionSpec, StateSpaceSpec, TensorSpec, Weight,
};

/// A norm that is None is left out, so pre-norm, output-norm and sandwich layers differ in data only.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    pub before_mixer: Option<NormSpec>,
    pub mixer: Mixer,
    pub after_mixer: Option<NormSpec>,
    pub before_feed_forward: Option<NormSpec>,
    pub feed_forward: FeedForward,
    pub after_feed_forward: Option<NormSpec>,
    pub residual: Residual,
    /// What this layer takes from the per-layer inputs, after its feed-forward.
    pub layer_input: Option<LayerInputSpec>,
    /// A factor on the layer's output: `[1]` (Gemma 4).
    pub output_scale: Option<TensorSpec>,
}

/// What mixes the tokens of a sequence.
#[derive(Debug, Clone, PartialEq)]
pub enum Mixer {
    None,
    Attention(Box<AttentionSpec>),
    Latent(Box<LatentAttentionSpec>),
    GatedDelta(Box<GatedDeltaSpec>),
    StateSpace(Box<StateSpaceSpec>),
    SelectiveScan(Box<SelectiveScanSpec>),
    ShortConvolution(Box<ShortConvolutionSpec>),
    /// Several on the same input, their outputs added (Falcon-H1).
    Parallel(Vec<Mixer>),
}

/// How the outputs of mixer and feed-forward join the stream `x`.
#[derive(Debug, Clone, PartialEq)]
pub enum Residual {
    /// `h = x + m · mixer(x)`, then `h + m · feed_forward(h)`.
    Serial { multiplier: f32 },
    /// The same, cut to what f16 can hold when the stream is f16 (Gemma 3).
    SerialClipped,
    /// `x + mixer(norm(x)) + feed_forward(norm(x))` with one norm.
    Parallel,
    /// Several streams, one of which is active (Gemma 3n).
    AlternatingUpdates(Box<AlternatingUpdatesSpec>),
}

/// AltUp (Baykal et al. 2023) and LAuReL (Menghani et al. 2024) as Gemma 3n joins them.
#[derive(Debug, Clone, PartialEq)]
pub struct AlternatingUpdatesSpec {
    pub n_streams: u32,
    pub active: u32,
    /// Bound on the coefficients, which are linear in the modalities.
    pub coefficient_clip: Option<f32>,
    pub router_norm: NormSpec,
    /// Stream to modalities: `[n_streams, hidden_size]`.
    pub modality_router: LinearSpec,
    pub prediction: LinearSpec,
    pub correction: LinearSpec,
    /// `[hidden_size]`; None when the config does without.
    pub correct_output_scale: Option<TensorSpec>,
    pub laurel_left: LinearSpec,
    pub laurel_right: LinearSpec,
    pub laurel_norm: NormSpec,
}

/// `h + norm(projection(gelu_tanh(gate(h)) · layer_input))` (Gemma 3n and 4).
#[derive(Debug, Clone, PartialEq)]
pub struct LayerInputSpec {
    pub gate: LinearSpec,
    pub projection: LinearSpec,
    pub norm: NormSpec,
}

/// Vectors a token and layer, made once from token and embedding:
/// `(norm(projection(h) · projection_scale) + embedding(id) · embedding_scale) · scale`, `dims` for each layer side by side.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerInputsSpec {
    pub dims: u32,
    pub embedding: EmbeddingSpec,
    pub embedding_scale: f32,
    pub projection: LinearSpec,
    pub projection_scale: f32,
    pub norm: NormSpec,
    pub scale: f32,
}

/// Several residual streams instead of one (Gemma 3n): the first is the embedding, the others are made from it and are put together again
/// before the final norm.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamsSpec {
    pub n: u32,
    /// One linear for each stream but the first, into it.
    pub split: Vec<LinearSpec>,
    /// And back.
    pub join: Vec<LinearSpec>,
}

impl LayerSpec {
    /// A pre-norm layer whose outputs are just added.
    pub fn pre_norm(before_mixer: NormSpec, mixer: Mixer, before_feed_forward: NormSpec, feed_forward: FeedForward) -> Self {
        Self {
            before_mixer: Some(before_mixer),
            mixer,
            after_mixer: None,
            before_feed_forward: Some(before_feed_forward),
            feed_forward,
            after_feed_forward: None,
            residual: Residual::PLAIN,
            layer_input: None,
            output_scale: None,
        }
    }

    /// A pre-norm layer that only mixes tokens.
    pub fn mixer_only(norm: NormSpec, mixer: Mixer) -> Self {
        Self { before_mixer: Some(norm), mixer, ..Self::EMPTY }
    }

    /// A pre-norm layer that only treats each token alone.
    pub fn feed_forward_only(norm: NormSpec, feed_forward: FeedForward) -> Self {
        Self { before_feed_forward: Some(norm), feed_forward, ..Self::EMPTY }
    }

    const EMPTY: LayerSpec = LayerSpec {
        before_mixer: None,
        mixer: Mixer::None,
        after_mixer: None,
        before_feed_forward: None,
        feed_forward: FeedForward::None,
        after_feed_forward: None,
        residual: Residual::PLAIN,
        layer_input: None,
        output_scale: None,
    };

    pub(super) fn weights(&self) -> Vec<Weight<'_>> {
        let norms = [&self.before_mixer, &self.after_mixer, &self.before_feed_forward, &self.after_feed_forward];
        let mut weights: Vec<_> = norms.into_iter().flatten().map(Weight::Norm).collect();
        self.mixer.weights(&mut weights);
        self.feed_forward.weights(&mut weights);
        if let Residual::AlternatingUpdates(spec) = &self.residual {
            spec.weights(&mut weights);
        }
        if let Some(input) = &self.layer_input {
            weights.extend([Weight::Linear(&input.gate), Weight::Linear(&input.projection), Weight::Norm(&input.norm)]);
        }
        weights.extend(self.output_scale.iter().map(Weight::Tensor));
        weights
    }
}

impl Residual {
    pub const PLAIN: Residual = Residual::Serial { multiplier: 1.0 };
}

impl Mixer {
    fn weights<'a>(&'a self, out: &mut Vec<Weight<'a>>) {
        match self {
            Mixer::None => {}
            Mixer::Attention(spec) => spec.weights(out),
            Mixer::Latent(spec) => spec.weights(out),
            Mixer::GatedDelta(spec) => spec.weights(out),
            Mixer::StateSpace(spec) => spec.weights(out),
            Mixer::SelectiveScan(spec) => spec.weights(out),
            Mixer::ShortConvolution(spec) => spec.weights(out),
            Mixer::Parallel(mixers) => mixers.iter().for_each(|mixer| mixer.weights(out)),
        }
    }

    /// The layer whose cache this one reads instead of having its own.
    pub fn source_layer(&self) -> Option<u32> {
        match self {
            Mixer::Attention(spec) => spec.source_layer(),
            _ => None,
        }
    }

    /// Elements that the cache takes for each token of a sequence, up to the window where there is one.
    pub fn cache_elements_per_token(&self) -> u64 {
        match self {
            Mixer::Attention(spec) if spec.source_layer().is_some() => 0,
            Mixer::Attention(spec) => u64::from(spec.n_kv_heads) * spec.cached_dims().map(u64::from).iter().sum::<u64>(),
            Mixer::Latent(spec) => spec.cache_elements_per_token(),
            Mixer::Parallel(mixers) => mixers.iter().map(Mixer::cache_elements_per_token).sum(),
            _ => 0,
        }
    }

    /// Elements of a sequence's state, however long the sequence is.
    pub fn state_elements(&self) -> u64 {
        match self {
            Mixer::GatedDelta(spec) => spec.state_elements(),
            Mixer::StateSpace(spec) => spec.state_elements(),
            Mixer::SelectiveScan(spec) => spec.state_elements(),
            Mixer::ShortConvolution(spec) => spec.state_elements(),
            Mixer::Parallel(mixers) => mixers.iter().map(Mixer::state_elements).sum(),
            Mixer::None | Mixer::Attention(_) | Mixer::Latent(_) => 0,
        }
    }

    /// Whether what it computes differs in the last bits with where a prompt is cut.
    pub(super) fn minds_cuts(&self) -> bool {
        match self {
            Mixer::Latent(_) | Mixer::GatedDelta(_) | Mixer::StateSpace(_) | Mixer::SelectiveScan(_) | Mixer::ShortConvolution(_) => true,
            Mixer::None | Mixer::Attention(_) => false,
            Mixer::Parallel(mixers) => mixers.iter().any(Mixer::minds_cuts),
        }
    }

    /// The longest stretch of tokens that the cache keeps; None when it keeps all.
    pub fn window(&self) -> Option<u32> {
        match self {
            Mixer::Attention(spec) => spec.window,
            _ => None,
        }
    }
}

impl AlternatingUpdatesSpec {
    fn weights<'a>(&'a self, out: &mut Vec<Weight<'a>>) {
        let linears = [&self.modality_router, &self.prediction, &self.correction, &self.laurel_left, &self.laurel_right];
        out.extend(linears.map(Weight::Linear));
        out.extend([&self.router_norm, &self.laurel_norm].map(Weight::Norm));
        out.extend(self.correct_output_scale.iter().map(Weight::Tensor));
    }
}

impl LayerInputsSpec {
    pub(super) fn weights(&self) -> [Weight<'_>; 3] {
        [Weight::Embedding(&self.embedding), Weight::Linear(&self.projection), Weight::Norm(&self.norm)]
    }
}
