//! What a model is, as data: read from `config.json` by an architecture, built into blocks by an engine, counted by the planner.

mod attention;
mod feed_forward;
mod layer;
mod parameters;
mod quantization;
mod recurrent;
mod rope;

pub use attention::{
    AttentionGate, AttentionSpec, HeadNorms, IndexerSpec, LatentAttentionSpec, LatentQuery, LatentUp, Projections, TemperatureSpec,
};
pub use feed_forward::{
    Activation, ExpertInputs, ExpertMlpSpec, FeedForward, GroupScore, MlpInputs, MlpSpec, MoeSpec, Ranking, RouterGroups, RouterPrecision,
    RouterScores, RouterSpec, SharedExpertSpec,
};
pub use layer::{AlternatingUpdatesSpec, LayerInputSpec, LayerInputsSpec, LayerSpec, Mixer, Residual, StreamsSpec};
pub use parameters::{ConvolutionSpec, EmbeddingSpec, ExpertsSpec, HeadLinearSpec, LinearSpec, NormKind, NormSpec, TensorSpec, Weight};
pub use quantization::{PublishedQuantization, Quantization, QuantizationMode, QuantizationScheme};
pub use recurrent::{
    AfterConvolutionSpec, CHUNK_TOKENS, GatedDeltaProjections, GatedDeltaSpec, GatedNorm, SelectiveScanSpec, ShortConvolutionSpec,
    StateSpaceInputs, StateSpaceSpec,
};
pub use rope::{RopeKind, RopeSpec, rotary_dims, yarn_attention_factor};

use crate::{dtype::DType, published::Published};
use std::{collections::BTreeSet, ops::Range};

/// A decoder: embedding, layers, final norm, head.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden_size: u32,
    pub vocab_size: u32,
    pub embedding: EmbeddingSpec,
    /// Factor on the embedding.
    pub embedding_scale: f32,
    pub layer_inputs: Option<LayerInputsSpec>,
    pub streams: Option<StreamsSpec>,
    pub layers: Vec<LayerSpec>,
    pub final_norm: NormSpec,
    pub head: HeadSpec,
    pub logits: LogitsSpec,
    pub quantization: Quantization,
    /// Longest sequence that the model was made for, where the config says.
    pub max_position_embeddings: Option<u32>,
    pub eos_token_ids: Vec<u32>,
    /// How the names and layouts of published checkpoints become those of this spec.
    pub published: Published,
}

/// What turns the last hidden state into logits.
#[derive(Debug, Clone, PartialEq)]
pub enum HeadSpec {
    /// The embedding's table, transposed.
    Tied,
    Linear(LinearSpec),
    /// This linear where the checkpoint has it, else as if tied: the config does not say (Gemma 3).
    LinearOrTied(LinearSpec),
}

/// `softcap(head(hidden / hidden_divisor) · scale / divisor)`. Divisors are not factors: in 16 bits `x / 9` is not `x · (1 / 9)`.
#[derive(Debug, Clone, PartialEq)]
pub struct LogitsSpec {
    pub hidden_divisor: f32,
    pub scale: f32,
    pub divisor: f32,
    /// Logits become `softcap · tanh(logit / softcap)`.
    pub softcap: Option<f32>,
}

/// A piece of a model's parameters: stages own whole parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    Embedding,
    /// What only the first stage makes besides the embedding: per-layer inputs and further residual streams.
    LayerInputs,
    Layer(u32),
    FinalNorm,
    Head,
}

/// What crosses a cut besides the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CutTensor {
    /// The residual stream, all streams side by side.
    Hidden,
    /// The per-layer inputs of the layers after the cut.
    LayerInputs,
    /// What this layer puts into its cache for the step's tokens; layers after the cut read it too.
    Keys(u32),
    Values(u32),
}

impl ModelSpec {
    pub fn n_layers(&self) -> u32 {
        self.layers.len() as u32
    }

    /// Every part, in the order of the computation.
    pub fn parts(&self) -> Vec<Part> {
        self.parts_of(0..self.n_layers())
    }

    /// The parts that a stage with these layers holds. A head that may be tied is the embedding, so the last stage holds that too.
    pub fn parts_of(&self, layers: Range<u32>) -> Vec<Part> {
        let (first, last) = (layers.start == 0, layers.end == self.n_layers());
        let may_be_tied = self.head.may_be_tied();
        let mut parts = Vec::new();
        if first || (last && may_be_tied) {
            parts.push(Part::Embedding);
        }
        if first && (self.layer_inputs.is_some() || self.streams.is_some()) {
            parts.push(Part::LayerInputs);
        }
        parts.extend(layers.map(Part::Layer));
        if last {
            parts.push(Part::FinalNorm);
            if self.head != HeadSpec::Tied {
                parts.push(Part::Head);
            }
        }
        parts
    }

    /// The parameter groups of a part.
    pub fn weights(&self, part: Part) -> Vec<Weight<'_>> {
        match part {
            Part::Embedding => vec![Weight::Embedding(&self.embedding)],
            Part::LayerInputs => {
                let inputs = self.layer_inputs.iter().flat_map(LayerInputsSpec::weights);
                inputs.chain(self.streams.iter().flat_map(|streams| &streams.split).map(Weight::Linear)).collect()
            }
            Part::Layer(layer) => self.layers.get(layer as usize).map(LayerSpec::weights).unwrap_or_default(),
            Part::FinalNorm => {
                let join = self.streams.iter().flat_map(|streams| &streams.join).map(Weight::Linear);
                join.chain([Weight::Norm(&self.final_norm)]).collect()
            }
            Part::Head => match &self.head {
                HeadSpec::Tied => Vec::new(),
                HeadSpec::Linear(linear) | HeadSpec::LinearOrTied(linear) => vec![Weight::Linear(linear)],
            },
        }
    }

    /// Bytes that a sequence takes in these layers however long it is. Recurrent states are kept in f32.
    pub fn state_bytes(&self, layers: Range<u32>) -> u64 {
        self.layers_of(layers).iter().map(|layer| layer.mixer.state_elements() * DType::F32.size()).sum()
    }

    /// Key-value heads of a layer with attention of its own.
    pub fn kv_heads(&self, layer: u32) -> Option<u32> {
        match &self.layers.get(layer as usize)?.mixer {
            Mixer::Attention(spec) => Some(spec.n_kv_heads),
            _ => None,
        }
    }

    /// These layers; those that do not exist are left out.
    pub fn layers_of(&self, layers: Range<u32>) -> &[LayerSpec] {
        self.layers.get(layers.start as usize..layers.end as usize).unwrap_or_default()
    }

    /// Layers before `cut` whose keys and values layers from `cut` on read.
    pub fn shared_across(&self, cut: u32) -> BTreeSet<u32> {
        let after = self.layers.iter().skip(cut as usize);
        after.filter_map(|layer| layer.mixer.source_layer()).filter(|source| *source < cut).collect()
    }

    /// What crosses the cut before layer `cut`, as widths of `[tokens, width]` tensors in the model's type.
    pub fn cut_tensors(&self, cut: u32) -> Vec<(CutTensor, u32)> {
        let mut tensors = vec![(CutTensor::Hidden, self.hidden_size * self.n_streams())];
        if let Some(inputs) = &self.layer_inputs {
            tensors.push((CutTensor::LayerInputs, inputs.dims * (self.n_layers() - cut)));
        }
        for source in self.shared_across(cut) {
            if let Some(Mixer::Attention(spec)) = self.layers.get(source as usize).map(|layer| &layer.mixer) {
                let width = spec.n_kv_heads * spec.head_dim;
                tensors.extend([(CutTensor::Keys(source), width), (CutTensor::Values(source), width)]);
            }
        }
        tensors
    }

    /// Prompts have to be cut at multiples of this for the same answer to the last bit: mixers with a state work through a prompt in chunks, and
    /// convolutions and latent attention compute a single token in another form.
    pub fn part_multiple(&self) -> u32 {
        if self.layers.iter().any(|layer| layer.mixer.minds_cuts()) { CHUNK_TOKENS } else { 1 }
    }

    pub fn n_streams(&self) -> u32 {
        self.streams.as_ref().map_or(1, |streams| streams.n)
    }
}

impl HeadSpec {
    /// Whether the last stage needs the embedding's table.
    pub fn may_be_tied(&self) -> bool {
        !matches!(self, HeadSpec::Linear(_))
    }
}

impl LogitsSpec {
    pub const PLAIN: LogitsSpec = LogitsSpec { hidden_divisor: 1.0, scale: 1.0, divisor: 1.0, softcap: None };
}

impl CutTensor {
    /// Its name on the wire.
    pub fn name(self) -> String {
        match self {
            CutTensor::Hidden => "hidden".into(),
            CutTensor::LayerInputs => "layer_inputs".into(),
            CutTensor::Keys(layer) => format!("keys.{layer}"),
            CutTensor::Values(layer) => format!("values.{layer}"),
        }
    }

    pub fn from_name(name: &str) -> Option<CutTensor> {
        let layer = |prefix: &str| name.strip_prefix(prefix).and_then(|number| number.parse().ok());
        match name {
            "hidden" => Some(CutTensor::Hidden),
            "layer_inputs" => Some(CutTensor::LayerInputs),
            _ => layer("keys.").map(CutTensor::Keys).or_else(|| layer("values.").map(CutTensor::Values)),
        }
    }
}
