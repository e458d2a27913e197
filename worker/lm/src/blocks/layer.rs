//! A decoder layer, in the pieces that its cache divides it into.

use super::{
    attention::{Attend, Heads, Merge, Project},
    feed_forward::FeedForwardBlock,
    norm::Norm,
};
use crate::{
    cache::KvCache,
    error::LmError,
    linear::Parameters,
    packing::{Packing, Span},
    weights::Weights,
};
use mlx_cluster_common::spec::{LayerSpec, Mixer, Quantization};
use mlx_rs::{Array, ops};
use std::fmt::Write;

#[derive(Debug, Clone)]
pub struct Layer {
    pub before: Before,
    pub attend: Attend,
    pub after: After,
}

/// From the residual stream to the cache: norm, projections, RoPE.
#[derive(Debug, Clone)]
pub struct Before {
    norm: Option<Norm>,
    project: Project,
}

/// From the cache back to the residual stream: output projection, residual, feed-forward.
#[derive(Debug, Clone)]
pub struct After {
    merge: Merge,
    mixer_norm: Option<Norm>,
    feed_forward_norm: Option<Norm>,
    feed_forward: FeedForwardBlock,
    output_norm: Option<Norm>,
}

impl Layer {
    pub fn load(weights: &mut Weights, spec: &LayerSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let Mixer::Attention(attention) = &spec.mixer;
        Ok(Self {
            before: Before {
                norm: Norm::load_optional(weights, &spec.before_mixer)?,
                project: Project::load(weights, attention, quantization)?,
            },
            attend: Attend::new(attention),
            after: After {
                merge: Merge::load(weights, attention, quantization)?,
                mixer_norm: Norm::load_optional(weights, &spec.after_mixer)?,
                feed_forward_norm: Norm::load_optional(weights, &spec.before_feed_forward)?,
                feed_forward: FeedForwardBlock::load(weights, &spec.feed_forward, quantization)?,
                output_norm: Norm::load_optional(weights, &spec.after_feed_forward)?,
            },
        })
    }

    /// Attention of every segment of a step over its own cache: `[B, heads, L, head_dim]`. `caches` are those of the packing's spans.
    pub fn attend(&self, heads: &Heads, packing: &Packing, caches: &mut [&mut KvCache]) -> Result<Array, LmError> {
        if let [cache] = caches {
            return self.attend.forward(heads, cache);
        }
        let mut attended = Vec::with_capacity(caches.len());
        for (span, cache) in packing.spans.iter().zip(caches) {
            let own = Heads {
                queries: own_rows(&heads.queries, span)?,
                keys: own_rows(&heads.keys, span)?,
                values: own_rows(&heads.values, span)?,
            };
            let y = self.attend.forward(&own, cache)?;
            attended.push(if span.length == 1 { y } else { y.transpose_axes(&[2, 1, 0, 3])? });
        }
        Ok(ops::concatenate(&attended, 0)?)
    }

    /// The same, but only for the last token of those segments that `wanted` says, whose `queries` are `[wanted, heads, 1, head_dim]`.
    /// None when nothing is wanted: then only the caches take in the keys and values.
    pub fn attend_ends(
        &self,
        heads: &Heads,
        queries: Option<&Array>,
        wanted: &[bool],
        packing: &Packing,
        caches: &mut [&mut KvCache],
    ) -> Result<Option<Array>, LmError> {
        let mut attended = Vec::new();
        for ((span, cache), wanted) in packing.spans.iter().zip(caches).zip(wanted) {
            let single = packing.spans.len() == 1;
            let rows = |y: &Array| if single { Ok(y.clone()) } else { own_rows(y, span) };
            let (keys, values) = (rows(&heads.keys)?, rows(&heads.values)?);
            match queries.filter(|_| *wanted) {
                Some(queries) => {
                    let row = attended.len() as i32;
                    let own = crate::ffi::slice(queries, &[row, 0, 0, 0], &[row + 1, queries.dim(1), 1, queries.dim(3)])?;
                    attended.push(self.attend.forward(&Heads { queries: own, keys, values }, cache)?);
                }
                None => drop(cache.append(&keys, &values, None)?),
            }
        }
        if attended.is_empty() {
            return Ok(None);
        }
        Ok(Some(ops::concatenate(&attended, 0)?))
    }
}

/// A segment's rows of `[tokens, heads, 1, head_dim]` as `[1, heads, length, head_dim]`.
fn own_rows(y: &Array, span: &Span) -> Result<Array, LmError> {
    let rows = crate::ffi::slice(y, &[span.row, 0, 0, 0], &[span.row + span.length, y.dim(1), 1, y.dim(3)])?;
    Ok(if span.length == 1 { rows } else { rows.transpose_axes(&[2, 1, 0, 3])? })
}

impl Before {
    /// `x` `[B, L, D]`, whose row `b` starts at position `offsets[b]`.
    pub fn forward(&self, x: &Array, offsets: &Array) -> Result<Heads, LmError> {
        match &self.norm {
            Some(norm) => self.project.forward(&norm.forward(x)?, offsets),
            None => self.project.forward(x, offsets),
        }
    }

    /// Two pieces of the same signature compute the same function of their arrays.
    pub fn signature(&self) -> String {
        let mut text = format!("before {:?} {}", self.norm.as_ref().map(|norm| norm.eps), self.project.signature());
        self.each(&mut |array| describe(&mut text, array));
        text
    }
}

impl After {
    /// `x` `[B, L, D]` is the residual stream before the layer.
    pub fn forward(&self, attended: &Array, x: &Array) -> Result<Array, LmError> {
        let normed = |norm: &Option<Norm>, y: Array| norm.as_ref().map_or(Ok(y.clone()), |norm| norm.forward(&y));
        let h = ops::add(x, normed(&self.mixer_norm, self.merge.forward(attended)?)?)?;
        let y = self.feed_forward.forward(&normed(&self.feed_forward_norm, h.clone())?)?;
        Ok(ops::add(&h, normed(&self.output_norm, y)?)?)
    }

    pub fn signature(&self) -> String {
        let norms = [&self.mixer_norm, &self.feed_forward_norm, &self.output_norm];
        let eps = norms.map(|norm| norm.as_ref().map(|norm| norm.eps));
        let mut text = format!("after {eps:?} {}", self.feed_forward.signature());
        self.each(&mut |array| describe(&mut text, array));
        text
    }
}

fn describe(text: &mut String, array: &Array) {
    // Writing to a String cannot fail.
    write!(text, " {:?}{:?}", array.dtype(), array.shape()).expect("a String takes all");
}

impl Parameters for Before {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        self.norm.each(visit);
        self.project.each(visit);
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        self.norm.each_mut(visit);
        self.project.each_mut(visit);
    }
}

impl Parameters for After {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        self.merge.each(visit);
        [&self.mixer_norm, &self.feed_forward_norm].into_iter().for_each(|norm| norm.each(visit));
        self.feed_forward.each(visit);
        self.output_norm.each(visit);
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        self.merge.each_mut(visit);
        [&mut self.mixer_norm, &mut self.feed_forward_norm].into_iter().for_each(|norm| norm.each_mut(visit));
        self.feed_forward.each_mut(visit);
        self.output_norm.each_mut(visit);
    }
}
