//! Goes through a model block by block and notes what of each weight a rank has.

use super::{
    Cut, Split, TensorPlace, WideNorm, attention,
    shares::{self, Heads},
};
use crate::{
    spec::{
        ConvolutionSpec, EmbeddingSpec, ExpertsSpec, FeedForward, HeadLinearSpec, HeadSpec, LayerSpec, LinearSpec, Mixer, ModelSpec,
        NormSpec, TensorSpec,
    },
    weights::WeightMap,
};
use std::{collections::BTreeSet, ops::Range};

/// What blocks are split with. Each block's file says how it falls apart; nothing is noted for a block that cannot be split so, which is
/// then whole on every rank.
pub(super) struct Splitter<'a> {
    whole: &'a ModelSpec,
    quantised: BTreeSet<&'a str>,
    place: &'a TensorPlace,
    pub(super) split: Split,
}

impl<'a> Splitter<'a> {
    pub(super) fn new(whole: &'a ModelSpec, weights: &'a WeightMap, place: &'a TensorPlace) -> Self {
        let names = weights.parts.values().flatten().map(|parameter| parameter.name.as_str());
        let quantised = names.filter_map(|name| name.strip_suffix(".scales")).collect();
        Self { whole, quantised, place, split: Split::default() }
    }

    /// The rank's own spec.
    pub(super) fn split(&mut self) -> ModelSpec {
        let mut spec = self.whole.clone();
        self.split_ends(&spec);
        let heads = attention::heads_of_layers(self);
        for (layer, heads) in spec.layers.iter_mut().zip(heads) {
            self.split_layer(layer, heads);
        }
        spec
    }

    /// Tables go by rows, which are tokens.
    fn split_ends(&mut self, spec: &ModelSpec) {
        let inputs = spec.layer_inputs.iter().map(|inputs| &inputs.embedding);
        for EmbeddingSpec { path, vocab_size, .. } in inputs.chain([&spec.embedding]) {
            if let Some(parts) = shares::divide(*vocab_size, &self.place.shares) {
                self.cut(path, Cut::Output(vec![self.own(&parts)]));
                self.split.vocabularies.insert(path.clone(), parts);
            }
        }
        if let HeadSpec::Linear(linear) | HeadSpec::LinearOrTied(linear) = &spec.head
            && let Some(parts) = shares::divide(linear.output_dims, &self.place.shares)
        {
            self.cut(&linear.path, Cut::Output(vec![self.own(&parts)]));
            self.split.vocabularies.insert(linear.path.clone(), parts);
        }
    }

    fn split_layer(&mut self, layer: &mut LayerSpec, heads: Option<Vec<Heads>>) {
        self.split_mixer(&mut layer.mixer, heads);
        match &mut layer.feed_forward {
            FeedForward::None => {}
            FeedForward::Mlp(mlp) => self.split_mlp(mlp),
            FeedForward::Experts(moe) => self.split_experts(moe),
            FeedForward::MlpAndExperts { mlp, moe, .. } => {
                self.split_mlp(mlp);
                self.split_experts(moe);
            }
        }
    }

    fn split_mixer(&mut self, mixer: &mut Mixer, heads: Option<Vec<Heads>>) {
        match mixer {
            Mixer::None => {}
            Mixer::Attention(spec) => self.split_attention(spec, heads),
            Mixer::Latent(spec) => self.split_latent(spec),
            Mixer::GatedDelta(spec) => self.split_gated_delta(spec),
            Mixer::StateSpace(spec) => self.split_state_space(spec),
            Mixer::SelectiveScan(spec) => self.split_selective_scan(spec),
            Mixer::ShortConvolution(spec) => self.split_short_convolution(spec),
            Mixer::Parallel(mixers) => {
                for mixer in mixers {
                    let heads = match mixer {
                        Mixer::Attention(spec) => attention::heads(self, spec),
                        _ => None,
                    };
                    self.split_mixer(mixer, heads);
                }
            }
        }
    }

    pub(super) fn whole(&self) -> &'a ModelSpec {
        self.whole
    }

    pub(super) fn shares(&self) -> &'a [u32] {
        &self.place.shares
    }

    pub(super) fn rank(&self) -> usize {
        self.place.rank as usize
    }

    pub(super) fn own<T: Clone>(&self, of_ranks: &[T]) -> T {
        of_ranks[self.rank()].clone()
    }

    /// The columns that a cut through a matrix's input has to keep together: those of a quantisation group.
    pub(super) fn input_unit(&self, path: &str) -> u32 {
        let scheme = self.whole.quantization.scheme(path).filter(|_| self.quantised.contains(path));
        scheme.map_or(1, |scheme| scheme.group_size)
    }

    /// Units of `width` columns that a cut through a matrix's input has to keep together.
    pub(super) fn units_of(&self, path: &str, width: u32) -> u32 {
        let unit = self.input_unit(path);
        unit / shares::gcd(unit, width).max(1)
    }

    pub(super) fn cut(&mut self, path: &str, cut: Cut) {
        self.split.cuts.insert(path.to_owned(), cut);
    }

    pub(super) fn rows(&mut self, linear: &mut LinearSpec, ranges: Vec<Range<u32>>) {
        linear.output_dims = length(&ranges);
        self.cut(&linear.path, Cut::Output(ranges));
    }

    /// The ranks' products are added up, and then the bias to the sum.
    pub(super) fn columns(&mut self, linear: &mut LinearSpec, ranges: Vec<Range<u32>>) {
        linear.input_dims = length(&ranges);
        self.split.sums.insert(linear.path.clone());
        self.cut(&linear.path, Cut::Input(ranges));
    }

    pub(super) fn expert_rows(&mut self, experts: &mut ExpertsSpec, ranges: Vec<Range<u32>>) {
        experts.output_dims = length(&ranges);
        self.cut(&experts.path, Cut::Output(ranges));
    }

    pub(super) fn expert_columns(&mut self, experts: &mut ExpertsSpec, ranges: Vec<Range<u32>>) {
        experts.input_dims = length(&ranges);
        self.split.sums.insert(experts.path.clone());
        self.cut(&experts.path, Cut::Input(ranges));
    }

    pub(super) fn some_experts(&mut self, experts: &mut ExpertsSpec, range: Range<u32>) {
        experts.n_experts = range.end - range.start;
        self.cut(&experts.path, Cut::Member(range));
    }

    /// Experts of other ranks add nothing here, so what the last linear gives is to be added up.
    pub(super) fn some_last_experts(&mut self, experts: &mut ExpertsSpec, range: Range<u32>) {
        self.split.sums.insert(experts.path.clone());
        self.some_experts(experts, range);
    }

    pub(super) fn some_heads(&mut self, linear: &mut HeadLinearSpec, range: Range<u32>) {
        linear.n_heads = range.end - range.start;
        self.cut(&linear.path, Cut::Member(range));
    }

    pub(super) fn channels(&mut self, convolution: &mut ConvolutionSpec, ranges: Vec<Range<u32>>) {
        convolution.channels = length(&ranges);
        self.cut(&convolution.path, Cut::Output(ranges));
    }

    pub(super) fn tensor_rows(&mut self, tensor: &mut TensorSpec, ranges: Vec<Range<u32>>) {
        if let Some(first) = tensor.shape.first_mut() {
            *first = length(&ranges);
        }
        self.cut(&tensor.name, Cut::Output(ranges));
    }

    /// A norm over more than a rank has: its mean goes over all ranks. `counted` are the entries, of the rank's own, that no rank before it
    /// counts.
    pub(super) fn wide_norm(&mut self, norm: &mut NormSpec, ranges: Vec<Range<u32>>, counted: Vec<Range<u32>>) {
        self.split.wide_norms.insert(norm.path.clone(), WideNorm { dims: norm.dims, own: length(&ranges), counted });
        norm.dims = length(&ranges);
        self.cut(&norm.path, Cut::Output(ranges));
    }
}

pub(super) fn length(ranges: &[Range<u32>]) -> u32 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// `range` in units of `width` entries, which begin at `offset`.
pub(super) fn scaled(range: &Range<u32>, width: u32, offset: u32) -> Range<u32> {
    offset + range.start * width..offset + range.end * width
}
