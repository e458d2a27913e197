//! Steps that read no logits but those after the last token of some segments: what nobody reads is not computed.
//!
//! Of every token the caches need keys and values. What a layer makes besides is needed by the caches of later layers alone: so the last
//! layer with a cache of its own fills that for all tokens and goes on with the few that are read, and layers after it, which read the
//! caches of others, see only those.

use super::{output_length, output_rows};
use crate::{
    blocks::{Flow, Layer, Mix, own_rows},
    cache::Cache,
    error::LmError,
    packing::{Packing, Span},
    served::rows,
    stack::{Run, Stack},
};
use mlx_cluster_common::{
    spec::Mixer,
    step::{Segment, Step},
};
use mlx_rs::{Array, ops};

/// The tokens of a step that are read: rows of their own, one a segment.
struct Ends {
    /// Their rows among all tokens.
    rows: Array,
    /// Which segments they are of.
    wanted: Vec<bool>,
    packing: Packing,
}

/// Whether no segment needs more than the logits after its last token.
pub(super) fn ends_only(step: &Step) -> bool {
    step.segments.iter().all(|segment| output_length(segment) <= 1 && !segment.output.prompt_logprobs)
}

impl Stack {
    /// All layers for such a step: `[ends, 1, D]`, or None when no token is read.
    pub(super) fn forward_to_ends(
        &self,
        input: &Array,
        layer_inputs: Option<Array>,
        step: &Step,
        run: &mut Run,
    ) -> Result<Option<Array>, LmError> {
        let layers = self.spec.layers_of(self.range.clone());
        let own_caches = layers.iter().rposition(|layer| layer.mixer != Mixer::None && layer.mixer.source_layer().is_none());
        let after_caches = own_caches.map_or(0, |last| last + 1);
        let early = own_caches.filter(|last| matches!(self.layers[*last].mix, Some(Mix::Attention(_) | Mix::Latent(_))));
        let (x, layer_inputs) = self.forward_layers(input, layer_inputs, run, early.unwrap_or(after_caches))?;
        let ends = Ends::of(step, run.packing);
        let read = ends.as_ref().map(|ends| ends.rows_of(&x)).transpose()?;
        let layer_inputs = match (&ends, layer_inputs) {
            (Some(ends), Some(inputs)) => Some(ends.rows_of(&inputs)?),
            _ => None,
        };
        let mut read = match early {
            Some(last) => self.end_early(last, &x, ends.as_ref().zip(read), layer_inputs.as_ref(), run)?,
            None => read,
        };
        if let (Some(ends), Some(x)) = (&ends, &mut read) {
            rows::with_picked(&ends.rows, || self.go_on(after_caches, ends, x, layer_inputs.as_ref(), run))?;
        }
        Ok(read)
    }

    /// The layers from `first` on, for the tokens that are read.
    fn go_on(&self, first: usize, ends: &Ends, x: &mut Array, layer_inputs: Option<&Array>, run: &mut Run) -> Result<(), LmError> {
        for (i, layer) in self.layers.iter().enumerate().skip(first) {
            let flow = layer.before.forward(x, &ends.packing.offsets)?;
            let mut caches = ends.wanted_of(run.caches.of_layer(&self.slots, i));
            let mixed = layer.mix(&flow, &ends.packing, &mut caches)?;
            *x = layer.after.forward(&mixed, &flow.beside, x, layer_inputs)?;
        }
        Ok(())
    }

    /// A layer with attention that fills its caches by all tokens `x`, and makes something of those that are read alone. What is not read
    /// stays lazy, so it is never computed.
    fn end_early(
        &self,
        layer: usize,
        x: &Array,
        read: Option<(&Ends, Array)>,
        layer_inputs: Option<&Array>,
        run: &mut Run,
    ) -> Result<Option<Array>, LmError> {
        let mut caches = run.caches.of_layer(&self.slots, layer);
        let layer = &self.layers[layer];
        fill(layer, &layer.before.forward(x, &run.packing.offsets)?, run.packing, &mut caches)?;
        let Some((ends, read)) = read else {
            return Ok(None);
        };
        let after = rows::with_picked(&ends.rows, || {
            let flow = layer.before.forward(&read, &ends.packing.offsets)?;
            let attended = attend(layer, &flow, ends, caches)?;
            layer.after.forward(&[attended], &flow.beside, &read, layer_inputs)
        });
        Ok(Some(after?))
    }
}

impl Ends {
    /// None when the step reads nothing.
    fn of(step: &Step, packing: &Packing) -> Option<Self> {
        let rows = output_rows(step, packing);
        let wanted: Vec<bool> = step.segments.iter().map(|segment| output_length(segment) > 0).collect();
        let read = || step.segments.iter().zip(&wanted).filter_map(|(segment, wanted)| wanted.then_some(segment));
        let span = |(row, segment): (i32, &Segment)| Span { sequence: segment.sequence, row, length: 1 };
        let offsets: Vec<i32> = read().map(|segment| segment.start as i32 + segment.tokens.len() as i32 - 1).collect();
        let n = rows.len() as i32;
        let packing =
            Packing { spans: (0..).zip(read()).map(span).collect(), batch: n, length: 1, offsets: Array::from_slice(&offsets, &[n]) };
        (n > 0).then(|| Self { rows: Array::from_slice(&rows, &[n]), wanted, packing })
    }

    /// `[B, L, ..] -> [ends, 1, ..]`
    fn rows_of(&self, x: &Array) -> Result<Array, LmError> {
        let shape = [&[x.dim(0) * x.dim(1)], &x.shape()[2..]].concat();
        Ok(x.reshape(&shape)?.take_axis(&self.rows, 0)?.expand_dims(1)?)
    }

    fn wanted_of<'a>(&self, caches: Vec<&'a mut Cache>) -> Vec<&'a mut Cache> {
        caches.into_iter().zip(&self.wanted).filter_map(|(cache, wanted)| wanted.then_some(cache)).collect()
    }
}

/// Puts all tokens into the caches of their segments.
fn fill(layer: &Layer, flow: &Flow, packing: &Packing, caches: &mut [&mut Cache]) -> Result<(), LmError> {
    for (span, cache) in packing.spans.iter().zip(caches) {
        let rows = if packing.spans.len() == 1 { flow.mixed.clone() } else { rows_of_span(&flow.mixed, span)? };
        let cache = attention_of(cache)?;
        match (&layer.mix, rows.as_slice()) {
            (Some(Mix::Attention(_)), [_, keys, values]) => cache.extend(&[keys, values])?,
            (Some(Mix::Latent(attend)), rows) => attend.fill(rows, cache)?,
            _ => return Err(LmError::Mlx("attention without keys and values".into())),
        }
    }
    Ok(())
}

fn rows_of_span(mixed: &[Array], span: &Span) -> Result<Vec<Array>, LmError> {
    mixed.iter().map(|y| own_rows(y, span)).collect()
}

/// Attention of the tokens that are read over caches that hold them already: `[ends, heads, 1, head_dim]`.
fn attend(layer: &Layer, flow: &Flow, ends: &Ends, caches: Vec<&mut Cache>) -> Result<Array, LmError> {
    let mixed = match &layer.mix {
        Some(Mix::Latent(attend)) => attend.embed_queries(&flow.mixed)?,
        _ => flow.mixed.clone(),
    };
    let mut attended = Vec::new();
    for (span, cache) in ends.packing.spans.iter().zip(ends.wanted_of(caches)) {
        let (rows, cache) = (rows_of_span(&mixed, span)?, attention_of(cache)?);
        attended.push(match &layer.mix {
            Some(Mix::Attention(attend)) => attend.forward(rows.get(..1).unwrap_or_default(), cache)?,
            Some(Mix::Latent(attend)) => attend.over_latents(&rows, cache)?,
            _ => return Err(LmError::Mlx("only attention can end early".into())),
        });
    }
    let attended = ops::concatenate(&attended, 0)?;
    match &layer.mix {
        Some(Mix::Latent(attend)) => attend.unembed_outputs(&attended),
        _ => Ok(attended),
    }
}

fn attention_of(cache: &mut Cache) -> Result<&mut crate::cache::KvCache, LmError> {
    match cache {
        Cache::Attention(cache) => Ok(cache),
        _ => Err(LmError::Mlx("attention met a cache of another kind".into())),
    }
}
