//! A decoder layer, in the pieces that its cache divides it into.

use super::{
    activation,
    feed_forward::FeedForwardBlock,
    mixer::{self, Merge, Mix, Project},
    norm::Norm,
    residual::{Join, Split},
};
use crate::{
    cache::Cache,
    error::LmError,
    group::{after_collectives, collectives_wait_for},
    linear::Linear,
    packing::{Packing, Span},
    parameters::{Parameters, parameters},
    served::rows,
    weights::Weights,
};
use mlx_cluster_common::spec::{LayerInputSpec, LayerSpec, Quantization};
use mlx_rs::{Array, ops};
use std::fmt::Write;

#[derive(Debug, Clone)]
pub struct Layer {
    pub before: Before,
    /// None where the layer has no mixer: then it has no cache and no cut.
    pub mix: Option<Mix>,
    pub after: After,
}

/// From the residual stream to the cache.
#[derive(Debug, Clone)]
pub struct Before {
    split: Split,
    norm: Option<Norm>,
    project: Option<Project>,
    signature: String,
}
parameters!(Before: split, norm, project);

/// From the cache back to the residual stream.
#[derive(Debug, Clone)]
pub struct After {
    merge: Option<Merge>,
    /// Of the arrays beside, those that the mixer's `Merge` takes.
    merge_arity: usize,
    mixer_norm: Option<Norm>,
    feed_forward_norm: Option<Norm>,
    feed_forward: Option<FeedForwardBlock>,
    output_norm: Option<Norm>,
    join: Join,
    layer_input: Option<LayerInput>,
    output_scale: Option<Array>,
    signature: String,
}
parameters!(After: merge, mixer_norm, feed_forward_norm, feed_forward, output_norm, join, layer_input, output_scale);

/// What goes from `Before` to `Mix` and `After`.
#[derive(Debug, Clone, Default)]
pub struct Flow {
    /// For the cache.
    pub mixed: Vec<Array>,
    /// For `After`.
    pub beside: Vec<Array>,
}

impl Layer {
    /// `number` is the layer's in the model, `index` that among the layers of the stage.
    pub fn load(weights: &mut Weights, quantization: &Quantization, spec: &LayerSpec, number: u32, index: u32) -> Result<Self, LmError> {
        let (project, mix, merge) = match mixer::load(weights, &spec.mixer, quantization)? {
            Some((project, mix, merge)) => (Some(project), Some(mix), Some(merge)),
            None => (None, None, None),
        };
        let (split, join) = super::residual::load(weights, &spec.residual, quantization)?;
        let before = Before {
            split,
            norm: Norm::load_optional(weights, &spec.before_mixer)?,
            project,
            signature: signature(number, &(&spec.before_mixer, &spec.mixer, &spec.residual)),
        };
        let after = After {
            merge,
            merge_arity: before.project.as_ref().map_or(0, |project| project.arity().1),
            mixer_norm: Norm::load_optional(weights, &spec.after_mixer)?,
            feed_forward_norm: Norm::load_optional(weights, &spec.before_feed_forward)?,
            feed_forward: FeedForwardBlock::load(weights, &spec.feed_forward, quantization)?,
            output_norm: Norm::load_optional(weights, &spec.after_feed_forward)?,
            join,
            layer_input: spec.layer_input.as_ref().map(|input| LayerInput::load(weights, input, index, quantization)).transpose()?,
            output_scale: spec.output_scale.as_ref().map(|scale| weights.take(&scale.name)).transpose()?,
            signature: signature(number, spec),
        };
        Ok(Self { before, mix, after })
    }

    /// Mixes every segment of a step over its own cache. `caches` are those of the packing's spans.
    pub fn mix(&self, flow: &Flow, packing: &Packing, caches: &mut [&mut Cache]) -> Result<Vec<Array>, LmError> {
        match &self.mix {
            None => Ok(Vec::new()),
            // The matrices of its heads are read once for all sequences.
            Some(Mix::Latent(attend)) if packing.is_decode() => {
                let rows = attend.embed_queries(&flow.mixed)?;
                let attended = over_spans(&rows, packing, caches, |rows, cache| match cache {
                    Cache::Attention(cache) => {
                        attend.fill(rows, cache)?;
                        Ok(vec![attend.over_latents(rows, cache)?])
                    }
                    _ => Err(LmError::Mlx("latent attention met a cache of another kind".into())),
                })?;
                attended.iter().map(|attended| attend.unembed_outputs(attended)).collect()
            }
            Some(mix) => over_spans(&flow.mixed, packing, caches, |rows, cache| mix.forward(rows, cache)),
        }
    }
}

/// Runs `mix(rows, cache)` for every span of a step on its rows of `mixed`, and puts the outcomes side by side again.
pub fn over_spans(
    mixed: &[Array],
    packing: &Packing,
    caches: &mut [&mut Cache],
    mut mix: impl FnMut(&[Array], &mut Cache) -> Result<Vec<Array>, LmError>,
) -> Result<Vec<Array>, LmError> {
    if let [cache] = caches {
        return mix(mixed, cache);
    }
    let mut columns: Vec<Vec<Array>> = Vec::new();
    for (span, cache) in packing.spans.iter().zip(caches) {
        let mut own = mixed.iter().map(|array| own_rows(array, span)).collect::<Result<Vec<_>, _>>()?;
        // Some mixers have collectives inside.
        if let Some(first) = own.first_mut() {
            *first = after_collectives(first)?;
        }
        // Some have matrices inside.
        let outcomes = rows::with_span(span, || mix(&own, cache))?;
        outcomes.first().inspect(|y| collectives_wait_for(y));
        for (column, y) in outcomes.into_iter().enumerate() {
            if columns.len() <= column {
                columns.push(Vec::new());
            }
            columns[column].push(as_rows(y)?);
        }
    }
    columns.iter().map(|column| Ok(ops::concatenate(column, 0)?)).collect()
}

/// A segment's rows of an array of one token a row: `[tokens, heads, 1, dims]` as `[1, heads, length, dims]`, `[tokens, 1, dims]` as
/// `[1, length, dims]`.
pub fn own_rows(y: &Array, span: &Span) -> Result<Array, LmError> {
    let (start, stop) = (span.row, span.row + span.length);
    match *y.shape() {
        [_, heads, _, dims] => {
            let rows = crate::ffi::slice(y, &[start, 0, 0, 0], &[stop, heads, 1, dims])?;
            Ok(if span.length == 1 { rows } else { rows.transpose_axes(&[2, 1, 0, 3])? })
        }
        [_, _, dims] => Ok(crate::ffi::slice(y, &[start, 0, 0], &[stop, 1, dims])?.reshape(&[1, span.length, dims])?),
        _ => Err(LmError::Mlx(format!("a mixer's array has shape {:?}", y.shape()))),
    }
}

/// The other way round.
fn as_rows(y: Array) -> Result<Array, LmError> {
    Ok(match *y.shape() {
        [_, _, 1, _] | [_, 1, _] => y,
        [_, _, _, _] => y.transpose_axes(&[2, 1, 0, 3])?,
        [_, length, dims] => y.reshape(&[length, 1, dims])?,
        _ => return Err(LmError::Mlx(format!("a mixer gave shape {:?}", y.shape()))),
    })
}

impl Before {
    /// How many arrays go to the cache, and how many past it.
    pub fn arity(&self) -> (usize, usize) {
        let (mixed, beside) = self.project.as_ref().map_or((0, 0), Project::arity);
        (mixed, beside + self.split.arity())
    }

    /// `x` `[B, L, D]`, whose row `b` starts at position `offsets[b]`.
    pub fn forward(&self, x: &Array, offsets: &Array) -> Result<Flow, LmError> {
        let active = self.split.active(x)?;
        let normed = self.norm.as_ref().map_or(Ok(active.stream.clone()), |norm| norm.forward(&active.stream))?;
        let projected = self.project.as_ref().map(|project| project.forward(&normed, offsets)).transpose()?.unwrap_or_default();
        let mut beside = projected.beside;
        beside.extend(self.split.beside(active, &normed)?);
        Ok(Flow { mixed: projected.mixed, beside })
    }

    /// Two pieces of the same signature compute the same function of their arrays.
    pub fn signature(&self) -> String {
        with_arrays(&self.signature, self)
    }
}

impl After {
    /// `x` `[B, L, D]` is the residual stream before the layer; `layer_inputs` `[B, L, layers, dims]` are those of the stage's layers.
    pub fn forward(&self, mixed: &[Array], beside: &[Array], x: &Array, layer_inputs: Option<&Array>) -> Result<Array, LmError> {
        let (for_merge, for_join) = beside.split_at(self.merge_arity.min(beside.len()));
        let normed = |norm: &Option<Norm>, y: Array| norm.as_ref().map_or(Ok(y.clone()), |norm| norm.forward(&y));
        let mixed = self.merge.as_ref().map(|merge| normed(&self.mixer_norm, merge.forward(mixed, for_merge)?)).transpose()?;
        let h = self.join.mixed(x, mixed, for_join)?;
        let forwarded = match &self.feed_forward {
            Some(block) => {
                let input = self.join.feed_forward_input(&h, for_join, |h| normed(&self.feed_forward_norm, h))?;
                Some(normed(&self.output_norm, block.forward(&input, &h)?)?)
            }
            None => None,
        };
        let layer_input = |h: &Array| match (&self.layer_input, layer_inputs) {
            (Some(input), Some(inputs)) => input.forward(h, inputs).map(Some),
            _ => Ok(None),
        };
        let y = self.join.forwarded(x, h, forwarded, for_join, layer_input)?;
        match &self.output_scale {
            Some(scale) => Ok(ops::multiply(y, scale)?),
            None => Ok(y),
        }
    }

    pub fn signature(&self) -> String {
        with_arrays(&self.signature, self)
    }
}

/// `norm(projection(gelu_tanh(gate(h)) · layer_input))`
#[derive(Debug, Clone)]
struct LayerInput {
    gate: Linear,
    projection: Linear,
    norm: Norm,
    /// Which of the stage's per-layer inputs: an array, so that layers share a compiled function.
    index: Array,
}
parameters!(LayerInput: gate, projection, norm, index);

impl LayerInput {
    fn load(weights: &mut Weights, spec: &LayerInputSpec, index: u32, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self {
            gate: Linear::load(weights, &spec.gate, quantization)?,
            projection: Linear::load(weights, &spec.projection, quantization)?,
            norm: Norm::load(weights, &spec.norm)?,
            index: Array::from_slice(&[index as i32], &[1]),
        })
    }

    fn forward(&self, h: &Array, layer_inputs: &Array) -> Result<Array, LmError> {
        let own = layer_inputs.take_axis(&self.index, 2)?.squeeze_axes(&[2])?;
        let gated = ops::multiply(activation::gelu_tanh(&self.gate.forward(h)?)?, own)?;
        self.norm.forward(&self.projection.forward(&gated)?)
    }
}

/// The spec without the paths that tell layers apart.
fn signature(number: u32, spec: &impl std::fmt::Debug) -> String {
    format!("{spec:?}").replace(&format!(".{number}."), ".")
}

/// A signature with the types and shapes of a piece's arrays.
pub fn with_arrays(signature: &str, piece: &impl Parameters) -> String {
    let mut text = signature.to_owned();
    piece.each(&mut |array| {
        // Writing to a String cannot fail.
        write!(text, " {:?}{:?}", array.dtype(), array.shape()).expect("a String takes all");
    });
    text
}
