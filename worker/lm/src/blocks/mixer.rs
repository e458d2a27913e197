//! What mixes the tokens of a sequence, cut in three at its cache: `Project` works on all rows of a step, `Mix` on the rows of one sequence
//! and its cache, `Merge` on all rows again.
//!
//! Between the pieces, arrays of four axes are `[B, heads, L, dims]`, arrays of three `[B, L, dims]`.

use super::{
    attention, latent,
    recurrence::{
        GatedDelta, GatedDeltaMerge, GatedDeltaProject, Recurrence, SelectiveScan, SelectiveScanMerge, SelectiveScanProject,
        ShortConvolution, ShortConvolutionMerge, ShortConvolutionProject, StateSpace, StateSpaceMerge, StateSpaceProject,
    },
};
use crate::{
    cache::{Cache, KvCache, RecurrentState},
    error::LmError,
    linear::Linear,
    parameters::Parameters,
    served::Adaptable,
    weights::Weights,
};
use mlx_cluster_common::{
    cache::CacheOptions,
    spec::{LatentUp, Mixer, Quantization},
};
use mlx_rs::{Array, ops};

/// What the projections give.
#[derive(Debug, Clone, Default)]
pub(super) struct Projected {
    /// For the cache.
    pub mixed: Vec<Array>,
    /// Past the cache, for `Merge`.
    pub beside: Vec<Array>,
}

/// Before the cache.
#[derive(Debug, Clone)]
pub(super) enum Project {
    Attention(Box<attention::Project>),
    Latent(Box<latent::Project>),
    GatedDelta(GatedDeltaProject),
    SelectiveScan(SelectiveScanProject),
    ShortConvolution(ShortConvolutionProject),
    StateSpace(StateSpaceProject),
    Parallel(Vec<Project>),
}

/// At the cache.
#[derive(Debug, Clone)]
pub enum Mix {
    Attention(attention::Attend),
    Latent(latent::Attend),
    Recurrent(Box<Recurrence>),
    /// Each takes this many of the arrays.
    Parallel(Vec<(usize, Mix)>),
}

/// After the cache.
#[derive(Debug, Clone)]
pub(super) enum Merge {
    Attention(attention::Merge),
    GatedDelta(GatedDeltaMerge),
    SelectiveScan(SelectiveScanMerge),
    ShortConvolution(ShortConvolutionMerge),
    StateSpace(StateSpaceMerge),
    /// Each takes one mixed array and this many of those beside.
    Parallel(Vec<(usize, Merge)>),
}

/// A mixer's pieces; None where a layer has no mixer.
pub(super) fn load(weights: &mut Weights, spec: &Mixer, quantization: &Quantization) -> Result<Option<(Project, Mix, Merge)>, LmError> {
    Ok(Some(match spec {
        Mixer::None => return Ok(None),
        Mixer::Attention(spec) => (
            Project::Attention(Box::new(attention::Project::load(weights, spec, quantization)?)),
            Mix::Attention(attention::Attend::load(weights, spec)?),
            Merge::Attention(attention::Merge::load(weights, spec, quantization)?),
        ),
        Mixer::Latent(spec) => {
            let project = latent::Project::load(weights, spec, quantization)?;
            let attend = latent::Attend::load(weights, spec, quantization)?;
            let output = Linear::load(weights, &spec.output, quantization)?;
            (
                Project::Latent(Box::new(project)),
                attend.map_or_else(|| Mix::Attention(attention::Attend::plain(spec.scale)), Mix::Latent),
                Merge::Attention(attention::Merge::plain(output)),
            )
        }
        Mixer::GatedDelta(spec) => (
            Project::GatedDelta(GatedDeltaProject::load(weights, spec, quantization)?),
            Mix::Recurrent(Box::new(Recurrence::GatedDelta(GatedDelta::load(weights, spec)?))),
            Merge::GatedDelta(GatedDeltaMerge::load(weights, spec, quantization)?),
        ),
        Mixer::ShortConvolution(spec) => (
            Project::ShortConvolution(ShortConvolutionProject::load(weights, spec, quantization)?),
            Mix::Recurrent(Box::new(Recurrence::ShortConvolution(ShortConvolution::load(weights, spec)?))),
            Merge::ShortConvolution(ShortConvolutionMerge::load(weights, spec, quantization)?),
        ),
        Mixer::SelectiveScan(spec) => (
            Project::SelectiveScan(SelectiveScanProject::load(weights, spec, quantization)?),
            Mix::Recurrent(Box::new(Recurrence::SelectiveScan(SelectiveScan::load(weights, spec, quantization)?))),
            Merge::SelectiveScan(SelectiveScanMerge::load(weights, spec, quantization)?),
        ),
        Mixer::StateSpace(spec) => (
            Project::StateSpace(StateSpaceProject::load(weights, spec, quantization)?),
            Mix::Recurrent(Box::new(Recurrence::StateSpace(StateSpace::load(weights, spec, quantization)?))),
            Merge::StateSpace(StateSpaceMerge::load(weights, spec, quantization)?),
        ),
        Mixer::Parallel(specs) => {
            let (mut projects, mut mixes, mut merges) = (Vec::new(), Vec::new(), Vec::new());
            for spec in specs {
                if let Some((project, mix, merge)) = load(weights, spec, quantization)? {
                    let (mixed, beside) = project.arity();
                    mixes.push((mixed, mix));
                    merges.push((beside, merge));
                    projects.push(project);
                }
            }
            (Project::Parallel(projects), Mix::Parallel(mixes), Merge::Parallel(merges))
        }
    }))
}

/// What a layer with this mixer begins every sequence with; attention that reads another layer's cache has none of its own.
pub fn empty_cache(spec: &Mixer, options: &CacheOptions) -> Option<Cache> {
    match spec {
        Mixer::None => None,
        Mixer::Attention(spec) if spec.source_layer().is_some() => None,
        Mixer::Attention(spec) => Some(Cache::Attention(KvCache::new(attention::window_of(spec), options))),
        Mixer::Latent(spec) if matches!(spec.up, LatentUp::Expanded(_)) => Some(Cache::Attention(KvCache::new(None, options))),
        // Latent vectors and the keys of an indexer are never quantised: all else follows from them.
        Mixer::Latent(_) => {
            let options = CacheOptions { quantization: None, ..*options };
            Some(Cache::Attention(KvCache::new(None, &options)))
        }
        Mixer::Parallel(specs) => Some(Cache::Several(specs.iter().filter_map(|spec| empty_cache(spec, options)).collect())),
        Mixer::GatedDelta(_) | Mixer::StateSpace(_) | Mixer::SelectiveScan(_) | Mixer::ShortConvolution(_) => {
            Some(Cache::Recurrent(RecurrentState::default()))
        }
    }
}

impl Project {
    /// How many arrays go to the cache, and how many past it.
    pub(super) fn arity(&self) -> (usize, usize) {
        match self {
            Self::Attention(project) => project.arity(),
            Self::Latent(project) => project.arity(),
            Self::GatedDelta(_) => GatedDeltaProject::ARITY,
            Self::SelectiveScan(_) => SelectiveScanProject::ARITY,
            Self::ShortConvolution(_) => ShortConvolutionProject::ARITY,
            Self::StateSpace(project) => project.arity(),
            Self::Parallel(projects) => projects.iter().map(Self::arity).fold((0, 0), |sum, arity| (sum.0 + arity.0, sum.1 + arity.1)),
        }
    }

    /// `x` `[B, L, D]`, whose row `b` starts at position `offsets[b]`.
    pub(super) fn forward(&self, x: &Array, offsets: &Array) -> Result<Projected, LmError> {
        match self {
            Self::Attention(project) => project.forward(x, offsets),
            Self::Latent(project) => project.forward(x, offsets),
            Self::GatedDelta(project) => project.forward(x),
            Self::SelectiveScan(project) => project.forward(x),
            Self::ShortConvolution(project) => project.forward(x),
            Self::StateSpace(project) => project.forward(x),
            Self::Parallel(projects) => {
                let mut all = Projected::default();
                for project in projects {
                    let projected = project.forward(x, offsets)?;
                    all.mixed.extend(projected.mixed);
                    all.beside.extend(projected.beside);
                }
                Ok(all)
            }
        }
    }
}

impl Mix {
    /// How many arrays `forward` gives.
    pub fn outputs(&self) -> usize {
        match self {
            Self::Attention(_) | Self::Latent(_) | Self::Recurrent(_) => 1,
            Self::Parallel(mixes) => mixes.iter().map(|(_, mix)| mix.outputs()).sum(),
        }
    }

    /// The new tokens of one sequence (`B` is 1) over its cache: one array for each mixer.
    pub fn forward(&self, rows: &[Array], cache: &mut Cache) -> Result<Vec<Array>, LmError> {
        match (self, cache) {
            (Self::Attention(attend), Cache::Attention(cache)) => Ok(vec![attend.forward(rows, cache)?]),
            (Self::Latent(attend), Cache::Attention(cache)) => Ok(vec![attend.forward(rows, cache)?]),
            (Self::Recurrent(recurrence), Cache::Recurrent(state)) => Ok(vec![recurrence.forward(rows, state)?]),
            (Self::Parallel(mixes), Cache::Several(caches)) => {
                let (mut mixed, mut rest) = (Vec::new(), rows);
                for ((n, mix), cache) in mixes.iter().zip(caches) {
                    let (own, others) = rest.split_at(*n);
                    mixed.extend(mix.forward(own, cache)?);
                    rest = others;
                }
                Ok(mixed)
            }
            _ => Err(LmError::Mlx("a mixer met a cache of another kind".into())),
        }
    }
}

impl Merge {
    /// `[B, L, D]`
    pub(super) fn forward(&self, mixed: &[Array], beside: &[Array]) -> Result<Array, LmError> {
        let first = mixed.first().ok_or_else(|| LmError::Mlx("a mixer gave nothing".into()))?;
        match self {
            Self::Attention(merge) => merge.forward(first, beside),
            Self::GatedDelta(merge) => merge.forward(first, beside),
            Self::SelectiveScan(merge) => merge.forward(first, beside),
            Self::ShortConvolution(merge) => merge.forward(first, beside),
            Self::StateSpace(merge) => merge.forward(first, beside),
            Self::Parallel(merges) => {
                let (mut sum, mut rest) = (None, beside);
                for ((n, merge), mixed) in merges.iter().zip(mixed) {
                    let (own, others) = rest.split_at(*n);
                    let y = merge.forward(std::slice::from_ref(mixed), own)?;
                    sum = Some(match sum {
                        Some(sum) => ops::add(&sum, &y)?,
                        None => y,
                    });
                    rest = others;
                }
                sum.ok_or_else(|| LmError::Mlx("no mixer stands in parallel".into()))
            }
        }
    }
}

/// Implements `Parameters` for an enum by its variants; the second list holds variants with a list of `(usize, Self)` or `Self`.
macro_rules! parameters_of_variants {
    ($type:ident: $($variant:ident),+; $parallel:pat => $each:expr) => {
        impl Parameters for $type {
            fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
                match self {
                    $(Self::$variant(inner) => inner.each(visit),)+
                    Self::Parallel(inner) => inner.iter().for_each(|$parallel| $each.each(visit)),
                }
            }

            fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
                match self {
                    $(Self::$variant(inner) => inner.each_mut(visit),)+
                    Self::Parallel(inner) => inner.iter_mut().for_each(|$parallel| $each.each_mut(visit)),
                }
            }

            fn each_matrix(&mut self, visit: &mut dyn FnMut(Adaptable<'_>)) {
                match self {
                    $(Self::$variant(inner) => inner.each_matrix(visit),)+
                    Self::Parallel(inner) => inner.iter_mut().for_each(|$parallel| $each.each_matrix(visit)),
                }
            }
        }
    };
}
parameters_of_variants!(Project: Attention, Latent, GatedDelta, SelectiveScan, ShortConvolution, StateSpace; inner => inner);
parameters_of_variants!(Mix: Attention, Latent, Recurrent; (_, inner) => inner);
parameters_of_variants!(Merge: Attention, GatedDelta, SelectiveScan, ShortConvolution, StateSpace; (_, inner) => inner);
