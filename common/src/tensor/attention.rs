//! Attention goes by heads: rows of what makes queries, keys and values, columns of what takes the heads' outputs.

use super::{
    shares::{self, Heads},
    splitter::{Splitter, length, scaled},
};
use crate::spec::{
    AttentionGate, AttentionSpec, HeadNorms, LatentAttentionSpec, LatentQuery, LatentUp, Mixer, NormKind, NormSpec, Projections,
};
use std::ops::Range;

/// How the heads of an attention are divided; None where they cannot be.
pub(super) fn heads(splitter: &Splitter<'_>, spec: &AttentionSpec) -> Option<Vec<Heads>> {
    if let HeadNorms::Whole { query, key } = &spec.head_norms
        && !(is_root_mean_square(query) && is_root_mean_square(key))
    {
        return None;
    }
    let unit = splitter.units_of(&spec.output.path, spec.head_dim);
    shares::divide_heads(spec.n_heads, spec.n_kv_heads, unit, splitter.shares())
}

/// The same for the attention of every layer. A layer that reads another's cache and the other have to be divided alike, or not at all.
pub(super) fn heads_of_layers(splitter: &Splitter<'_>) -> Vec<Option<Vec<Heads>>> {
    let layers = &splitter.whole().layers;
    let attention = |layer: usize| match layers.get(layer).map(|layer| &layer.mixer) {
        Some(Mixer::Attention(spec)) => Some(spec),
        _ => None,
    };
    let mut divided: Vec<_> = (0..layers.len()).map(|layer| heads(splitter, attention(layer)?)).collect();
    let source = |layer: usize| Some(attention(layer)?.source_layer()? as usize);
    let differs = |divided: &[Option<Vec<Heads>>], layer: usize| source(layer).filter(|source| divided.get(*source) != divided.get(layer));
    // One source has many readers: each that is given up gives up the source, and so the others.
    while let Some((layer, source)) = (0..layers.len()).find_map(|layer| Some((layer, differs(&divided, layer)?))) {
        divided[layer] = None;
        if let Some(source) = divided.get_mut(source) {
            *source = None;
        }
    }
    divided
}

impl Splitter<'_> {
    pub(super) fn split_attention(&mut self, spec: &mut AttentionSpec, divided: Option<Vec<Heads>>) {
        let Some(divided) = divided else { return };
        let Heads { queries, shared } = self.own(&divided);
        let AttentionSpec { n_heads, n_kv_heads, head_dim, .. } = *spec;
        let per_query = if spec.gate == Some(AttentionGate::InQuery) { 2 * head_dim } else { head_dim };
        let query_rows = |offset: u32| vec![scaled(&queries, per_query, offset)];
        let shared_rows = |offset: u32| shared.iter().map(|head| scaled(&(*head..head + 1), head_dim, offset)).collect::<Vec<_>>();
        match &mut spec.projections {
            Projections::Separate { query, key, value } => {
                self.rows(query, query_rows(0));
                self.rows(key, shared_rows(0));
                self.rows(value, shared_rows(0));
            }
            Projections::Fused(linear) => {
                let keys = n_heads * head_dim;
                let values = keys + n_kv_heads * head_dim;
                self.rows(linear, [query_rows(0), shared_rows(keys), shared_rows(values)].concat());
            }
            Projections::FusedByGroup(linear) => {
                let rows = rows_by_group(&queries, &shared, n_heads / n_kv_heads, head_dim);
                self.rows(linear, rows);
            }
            Projections::KeyIsValue { query, key } => {
                self.rows(query, query_rows(0));
                self.rows(key, shared_rows(0));
            }
            Projections::Shared { query, .. } => self.rows(query, query_rows(0)),
        }
        match &mut spec.head_norms {
            HeadNorms::None | HeadNorms::PerHead { .. } | HeadNorms::PerHeadAfterRope { .. } => {}
            HeadNorms::Whole { query, key } => self.wide_head_norms([query, key], &divided, head_dim),
            HeadNorms::PerHeadWeights { query, key, .. } => {
                self.tensor_rows(query, vec![queries.clone()]);
                self.tensor_rows(key, shared.iter().map(|head| *head..head + 1).collect());
            }
        }
        if let Some(sinks) = &mut spec.sinks {
            self.tensor_rows(sinks, vec![queries.clone()]);
        }
        if let Some(AttentionGate::PerHead(linear)) = &mut spec.gate {
            self.rows(linear, vec![queries.clone()]);
        }
        self.columns(&mut spec.output, vec![scaled(&queries, head_dim, 0)]);
        spec.n_heads = queries.end - queries.start;
        spec.n_kv_heads = shared.len() as u32;
    }

    fn wide_head_norms(&mut self, [query, key]: [&mut NormSpec; 2], divided: &[Heads], head_dim: u32) {
        let Heads { queries, shared } = self.own(divided);
        let rows = vec![scaled(&queries, head_dim, 0)];
        let all = 0..length(&rows);
        self.wide_norm(query, rows, vec![all]);
        let counted = first_held(divided, self.rank()).into_iter().map(|slot| scaled(&(slot..slot + 1), head_dim, 0)).collect();
        self.wide_norm(key, shared.iter().map(|head| scaled(&(*head..head + 1), head_dim, 0)).collect(), counted);
    }

    pub(super) fn split_latent(&mut self, spec: &mut LatentAttentionSpec) {
        let unit = self.units_of(&spec.output.path, spec.value_dim);
        let Some(divided) = shares::divide_by(spec.n_heads, unit, self.shares()) else { return };
        let heads = self.own(&divided);
        let LatentAttentionSpec { nope_dim, rope_dim, value_dim, .. } = *spec;
        let (LatentQuery::Direct(up) | LatentQuery::LowRank { up, .. }) = &mut spec.query;
        self.rows(up, vec![scaled(&heads, nope_dim + rope_dim, 0)]);
        match &mut spec.up {
            LatentUp::Expanded(up) => self.rows(up, vec![scaled(&heads, nope_dim + value_dim, 0)]),
            LatentUp::Absorbed { embed_query, unembed_output, .. } => {
                self.some_heads(embed_query, heads.clone());
                self.some_heads(unembed_output, heads.clone());
            }
        }
        self.columns(&mut spec.output, vec![scaled(&heads, value_dim, 0)]);
        spec.n_heads = heads.end - heads.start;
    }
}

/// Norms that can go over several ranks.
pub(super) fn is_root_mean_square(norm: &NormSpec) -> bool {
    matches!(norm.kind, NormKind::Rms { .. })
}

/// For each key-value head its queries, then its key, then its value.
fn rows_by_group(queries: &Range<u32>, shared: &[u32], per_group: u32, head_dim: u32) -> Vec<Range<u32>> {
    let serves = (queries.end - queries.start) / shared.len() as u32;
    let mut rows = Vec::new();
    for (slot, group) in (0..).zip(shared) {
        let start = group * (per_group + 2) * head_dim;
        let first = queries.start + slot * serves - group * per_group;
        rows.push(scaled(&(first..first + serves), head_dim, start));
        rows.push(scaled(&(per_group..per_group + 2), head_dim, start));
    }
    rows
}

/// The rank's slots whose head no rank before it and no slot before it holds.
fn first_held(divided: &[Heads], rank: usize) -> Vec<u32> {
    let before = |head: u32| divided.iter().take(rank).any(|heads| heads.shared.contains(&head));
    let own = &divided[rank].shared;
    let is_first = |slot: usize, head: u32| own.iter().position(|other| *other == head) == Some(slot) && !before(head);
    (0..own.len()).filter(|slot| is_first(*slot, own[*slot])).map(|slot| slot as u32).collect()
}
