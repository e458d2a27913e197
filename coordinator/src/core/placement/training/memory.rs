//! Bytes that training takes on one rank: what is trained, and what is kept for the way back.

use super::super::costs::{Costs, ENGINE_BYTES, Work, activation_dtype, activation_elements, between, load_peak};
use mlx_cluster_common::{
    cache::CacheOptions,
    spec::{CHUNK_TOKENS, Mixer, ModelSpec, Part, Weight},
    training::{FineTune, Trained, TrainingRole},
    weights::WeightMap,
};
use std::ops::Range;

/// Of what is in f32 whatever the model's type is: inputs of factors, scores, states, the loss.
const F32_BYTES: u64 = 4;
/// Of one layer on the way back: values and cotangents.
const PASSING: u64 = 2;
/// Scores, probabilities and cotangents of the layer that is on the way back.
const PASSING_SCORES: u64 = 3;
/// Gradients that were added up so far, and those of one micro-batch that are added.
const GRADIENTS: u64 = 2;

/// A model, or what a rank has of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Model<'a> {
    pub(super) spec: &'a ModelSpec,
    pub(super) map: &'a WeightMap,
}

/// What is trained of a part, in bytes.
#[derive(Debug, Clone, Copy, Default)]
struct State {
    all: u64,
    gradients: u64,
}

/// What one layer keeps, in bytes.
#[derive(Debug, Clone, Copy, Default)]
struct Kept {
    /// For each token: the layer's input.
    input: u64,
    /// For each token: everything.
    inner: u64,
    /// For each pair of tokens of a row.
    pairs: u64,
    /// For each row and chunk of tokens.
    chunks: u64,
    /// Numbers of queries, keys and values of all heads, for operations.
    attended: u64,
}

/// A rank's part of a model, in whose bytes and seconds all stages are reckoned.
pub(super) struct RankCosts {
    serving: Costs,
    /// Of the layers before each layer.
    states: Vec<u64>,
    gradients: Vec<u64>,
    /// Of the embedding, further inputs of the first stage, and the last stage's norm and head.
    embedding: State,
    inputs: State,
    head: State,
    is_tied: bool,
    kept: Vec<Kept>,
    pub(super) first_trained: u32,
    grad_checkpoint: bool,
    is_full: bool,
    n_layers: u32,
    load_peak: u64,
    /// Of the logits of a token: in f32, in the model's type, and the gradient of each.
    logits: u64,
}

/// What micro-batches of some rows take, in bytes.
pub(super) struct Micro {
    /// Kept for the way back by the layers before each layer.
    kept: Vec<u64>,
    /// Of one layer, the most that is there besides while it is passed on the way back.
    passing: u64,
    /// What comes in from the stage before, or goes back to it.
    input: u64,
    logits: u64,
}

impl RankCosts {
    /// `own` is what a rank has of `whole`; or the same.
    pub(super) fn new(own: Model<'_>, whole: Model<'_>, role: &TrainingRole) -> Self {
        let Model { spec, map } = own;
        let state = |part: Part| state(&role.trained(spec, map, part), &role.trained(whole.spec, whole.map, part), role);
        let (mut states, mut gradients) = (vec![0u64], vec![0u64]);
        for layer in 0..spec.n_layers() {
            let own = state(Part::Layer(layer));
            states.push(states.last().copied().unwrap_or(0).saturating_add(own.all));
            gradients.push(gradients.last().copied().unwrap_or(0).saturating_add(own.gradients));
        }
        Self {
            serving: Costs::new(spec, map, &CacheOptions::default()),
            states,
            gradients,
            embedding: state(Part::Embedding),
            inputs: state(Part::LayerInputs),
            head: state(Part::FinalNorm).and(state(Part::Head)),
            is_tied: spec.head.may_be_tied(),
            kept: (0..spec.n_layers()).map(|layer| kept(spec, map, role, layer)).collect(),
            first_trained: role.first_trained_layer(spec, map),
            grad_checkpoint: role.grad_checkpoint,
            is_full: role.fine_tune == FineTune::Full,
            n_layers: spec.n_layers(),
            load_peak: load_peak(map),
            logits: u64::from(spec.vocab_size).saturating_mul(2 * (F32_BYTES + activation_dtype(map).size())),
        }
    }

    pub(super) fn micro(&self, rows: u32, tokens_per_row: u32) -> Micro {
        let (rows, length) = (u64::from(rows), u64::from(tokens_per_row));
        let tokens = rows.saturating_mul(length);
        let pairs = tokens.saturating_mul(length);
        let chunks = rows.saturating_mul(length.div_ceil(u64::from(CHUNK_TOKENS)));
        let all = |layer: &Kept, passes: u64, of_pairs: u64| {
            let inner = layer.inner.saturating_mul(tokens).saturating_mul(passes);
            let pairs = layer.pairs.saturating_mul(pairs).saturating_mul(of_pairs);
            inner.saturating_add(pairs).saturating_add(layer.chunks.saturating_mul(chunks).saturating_mul(passes))
        };
        let mut kept = vec![0u64];
        for (number, layer) in (0u32..).zip(&self.kept) {
            let own = match number < self.first_trained {
                true => 0,
                false if self.grad_checkpoint => layer.input.saturating_mul(tokens),
                false => all(layer, 1, 1),
            };
            kept.push(kept.last().copied().unwrap_or(0).saturating_add(own));
        }
        // What was not kept is there again for the layer that is on the way back.
        let again = u64::from(self.grad_checkpoint);
        let passing = self.kept.iter().map(|layer| all(layer, PASSING + again, PASSING_SCORES + again)).max().unwrap_or(0);
        let input = self.kept.iter().map(|layer| layer.input.saturating_mul(tokens)).max().unwrap_or(0);
        Micro { kept, passing, input, logits: self.logits.saturating_mul(tokens) }
    }

    pub(super) fn weights(&self, layers: &Range<u32>) -> u64 {
        self.serving.weights(layers)
    }

    /// Adapters, gradients and what the optimizer keeps.
    pub(super) fn state(&self, layers: &Range<u32>) -> u64 {
        between(&self.states, layers).saturating_add(self.ends(layers, |state| state.all))
    }

    /// What replicas add up.
    pub(super) fn gradients(&self, layers: &Range<u32>) -> u64 {
        between(&self.gradients, layers).saturating_add(self.ends(layers, |state| state.gradients))
    }

    fn ends(&self, layers: &Range<u32>, of: impl Fn(State) -> u64) -> u64 {
        let (first, last) = (layers.start == 0, layers.end == self.n_layers);
        let embedding = if first || (last && self.is_tied) { of(self.embedding) } else { 0 };
        let inputs = if first { of(self.inputs) } else { 0 };
        let head = if last { of(self.head) } else { 0 };
        embedding.saturating_add(inputs).saturating_add(head)
    }

    /// Activations with so many micro-batches on their way through the stages; or what loading takes, where that is more.
    pub(super) fn working(&self, layers: &Range<u32>, micro: &Micro, in_flight: u64) -> u64 {
        let input = if layers.start == 0 { 0 } else { micro.input };
        let kept = between(&micro.kept, layers).saturating_add(input).saturating_mul(in_flight);
        let logits = if layers.end == self.n_layers { micro.logits } else { 0 };
        let training = kept.saturating_add(micro.passing).saturating_add(input).saturating_add(logits);
        ENGINE_BYTES.saturating_add(training.max(self.load_peak))
    }

    pub(super) fn needed(&self, layers: &Range<u32>, micro: &Micro, in_flight: u64) -> u64 {
        self.weights(layers).saturating_add(self.state(layers)).saturating_add(self.working(layers, micro, in_flight))
    }

    /// How often a layer's matrices are gone through: forward, back to its input, back to its parameters where they are trained themselves,
    /// and forward again where nothing was kept.
    pub(super) fn passes(&self, layer: u32) -> f64 {
        match layer < self.first_trained {
            true => 1.0,
            false => 2.0 + f64::from(u8::from(self.is_full)) + f64::from(u8::from(self.grad_checkpoint)),
        }
    }

    /// Of the head, which is frozen: back to the first layer that is trained, where one is.
    pub(super) fn head_passes(&self) -> f64 {
        if self.first_trained < self.n_layers { 2.0 } else { 1.0 }
    }

    /// Of each layer, with the products of queries, keys and values in rows of so many tokens.
    pub(super) fn work(&self, tokens_per_row: f64) -> impl Iterator<Item = Work> {
        let attending = move |kept: &Kept| 2.0 * kept.attended as f64 * tokens_per_row;
        let layers = self.serving.layer_work().iter().zip(&self.kept);
        layers.map(move |(work, kept)| Work { operations: work.operations + attending(kept), ..*work })
    }

    pub(super) fn head_work(&self) -> Work {
        self.serving.head_work()
    }
}

impl State {
    fn and(self, other: State) -> State {
        State { all: self.all.saturating_add(other.all), gradients: self.gradients.saturating_add(other.gradients) }
    }
}

/// Both are the same arrays, as a rank has them and whole.
fn state(own: &[Trained], whole: &[Trained], role: &TrainingRole) -> State {
    let optimizer = |array: &Trained| role.optimizer.state_numbers(&array.shape).saturating_mul(array.dtype.size());
    let adapter = |array: &Trained| {
        let bytes = array.bytes();
        State { all: bytes.saturating_mul(1 + GRADIENTS).saturating_add(optimizer(array)), gradients: bytes }
    };
    // Parameters of the model are counted as weights.
    let parameter = |(own, whole): (&Trained, &Trained)| {
        let bytes = own.bytes();
        let updated = match role.optimizer.is_by_number() || own.shape == whole.shape {
            true => optimizer(own),
            // The whole matrix and its gradient are put together for the update.
            false => optimizer(whole).saturating_add(whole.bytes().saturating_mul(2)),
        };
        State { all: bytes.saturating_mul(GRADIENTS).saturating_add(updated), gradients: bytes }
    };
    match role.fine_tune.lora() {
        // Factors are whole on every rank.
        Some(_) => whole.iter().map(adapter).fold(State::default(), State::and),
        None => own.iter().zip(whole).map(parameter).fold(State::default(), State::and),
    }
}

fn kept(spec: &ModelSpec, map: &WeightMap, role: &TrainingRole, layer: u32) -> Kept {
    let Some(own) = spec.layers.get(layer as usize) else { return Kept::default() };
    let number = activation_dtype(map).size();
    let stream = u64::from(spec.hidden_size).saturating_mul(spec.n_streams().into());
    let further = spec.layer_inputs.as_ref().map_or(0, |inputs| u64::from(inputs.dims).saturating_mul(spec.n_layers().into()));
    let mut kept = Kept { input: (stream + further) * number, ..Kept::default() };
    add_mixer(&own.mixer, &mut kept);
    // The input, what norms make of it, and the sum behind the mixer.
    kept.inner = (activation_elements(spec, layer) + 4 * stream) * number + factor_inputs(spec, map, role, layer) * F32_BYTES;
    kept
}

fn add_mixer(mixer: &Mixer, kept: &mut Kept) {
    kept.chunks += if matches!(mixer, Mixer::Parallel(_)) { 0 } else { mixer.state_elements() * F32_BYTES };
    match mixer {
        Mixer::Attention(spec) => {
            kept.pairs += u64::from(spec.n_heads) * F32_BYTES;
            kept.attended += u64::from(spec.n_heads) * u64::from(spec.head_dim) * 2;
        }
        Mixer::Latent(spec) => {
            let width = u64::from(spec.nope_dim) + u64::from(spec.rope_dim) + u64::from(spec.value_dim);
            kept.pairs += u64::from(spec.n_heads) * F32_BYTES;
            kept.attended += u64::from(spec.n_heads) * width;
        }
        Mixer::Parallel(mixers) => mixers.iter().for_each(|mixer| add_mixer(mixer, kept)),
        Mixer::None | Mixer::GatedDelta(_) | Mixer::StateSpace(_) | Mixer::SelectiveScan(_) | Mixer::ShortConvolution(_) => {}
    }
}

/// Numbers for each token: the inputs of factors, which each has in f32 for itself, and once more where dropout makes others of them.
fn factor_inputs(spec: &ModelSpec, map: &WeightMap, role: &TrainingRole, layer: u32) -> u64 {
    let Some(lora) = role.fine_tune.lora() else { return 0 };
    let trained = role.trained(spec, map, Part::Layer(layer));
    let has_factors = |path: &str| trained.iter().any(|array| array.name.strip_suffix(".lora_a") == Some(path));
    let experts = spec.layers_of(layer..layer + 1).iter().find_map(|layer| layer.feed_forward.experts());
    let top_k = u64::from(experts.map_or(0, |moe| moe.router.top_k));
    let inputs = spec.weights(Part::Layer(layer)).into_iter().filter(|weight| has_factors(weight.path())).map(|weight| match weight {
        Weight::Linear(linear) => u64::from(linear.input_dims) + u64::from(lora.rank),
        Weight::Experts(experts) => (u64::from(experts.input_dims) + u64::from(lora.rank)) * top_k,
        _ => 0,
    });
    inputs.sum::<u64>() * if lora.dropout > 0.0 { 2 } else { 1 }
}
