//! The layouts with the shortest time of a token, for each number of workers: Bellman's recursion over sets of nodes, the node that the last
//! stage ends on, and layers.

use super::{
    layout::Layout,
    search::{Piece, Search},
};
use std::collections::{BTreeMap, VecDeque};

/// Where the best way to a state came from.
#[derive(Debug, Clone, Copy)]
struct Trace {
    piece: usize,
    start: u32,
    /// Set of nodes and last lead before; None for the first stage.
    before: Option<(usize, usize)>,
}

struct Table<'a> {
    search: &'a Search<'a>,
    pieces: &'a [Piece],
    places: &'a [usize],
    width: usize,
    seconds: Vec<f64>,
    traces: Vec<Option<Trace>>,
}

/// By number of workers.
pub(super) fn fastest(search: &Search<'_>, pieces: &[Piece], places: &[usize]) -> BTreeMap<usize, (f64, Layout)> {
    let mut found: BTreeMap<usize, (f64, Layout)> = BTreeMap::new();
    // The way back to the lead depends on the first stage, so there is a table for each node that may be the lead.
    for lead in 0..places.len() {
        let mut table = Table::new(search, pieces, places);
        table.fill(lead);
        for mask in (1..1usize << places.len()).filter(|mask| mask >> lead & 1 == 1) {
            let Some((seconds, last)) = table.best(mask, lead) else { continue };
            let known = found.get(&(mask.count_ones() as usize));
            if known.is_none_or(|(known, _)| seconds < *known)
                && let Some(layout) = table.layout(mask, last)
            {
                found.insert(mask.count_ones() as usize, (seconds, layout));
            }
        }
    }
    found
}

impl<'a> Table<'a> {
    fn new(search: &'a Search<'a>, pieces: &'a [Piece], places: &'a [usize]) -> Self {
        let width = search.n_layers as usize + 1;
        let states = (1 << places.len()) * places.len() * width;
        Self { search, pieces, places, width, seconds: vec![f64::INFINITY; states], traces: vec![None; states] }
    }

    fn at(&self, mask: usize, last: usize, layer: u32) -> usize {
        (mask * self.places.len() + last) * self.width + layer as usize
    }

    fn get(&self, mask: usize, last: usize, layer: u32) -> f64 {
        self.seconds.get(self.at(mask, last, layer)).copied().unwrap_or(f64::INFINITY)
    }

    fn set(&mut self, mask: usize, last: usize, layer: u32, seconds: f64, trace: Trace) {
        let at = self.at(mask, last, layer);
        if let (Some(known), Some(known_trace)) = (self.seconds.get_mut(at), self.traces.get_mut(at))
            && seconds < *known
        {
            (*known, *known_trace) = (seconds, Some(trace));
        }
    }

    fn may_cut(&self, piece: &Piece, layer: u32) -> bool {
        !piece.is_group() || layer == self.search.n_layers || self.search.free.get(layer as usize).copied().unwrap_or(false)
    }

    fn fill(&mut self, lead: usize) {
        let (pieces, n_layers) = (self.pieces, self.search.n_layers);
        for (number, piece) in pieces.iter().enumerate().filter(|(_, piece)| piece.lead() == lead) {
            for end in 1..=n_layers {
                if piece.earliest(end) > 0 || !self.may_cut(piece, end) {
                    continue;
                }
                self.set(piece.mask, lead, end, piece.seconds(&(0..end)), Trace { piece: number, start: 0, before: None });
            }
        }
        for mask in (1..1usize << self.places.len()).filter(|mask| mask >> lead & 1 == 1) {
            for next in (0..self.places.len()).filter(|next| mask >> next & 1 == 0) {
                let Some(arrivals) = self.arrivals(mask, next) else { continue };
                for (number, piece) in pieces.iter().enumerate() {
                    if piece.lead() == next && piece.mask & mask == 0 {
                        self.extend(mask, number, piece, &arrivals);
                    }
                }
            }
        }
    }

    /// For each cut the shortest time until its activations are at `next`, and from where; None when no cut is reached.
    fn arrivals(&self, mask: usize, next: usize) -> Option<Vec<(f64, usize)>> {
        let to = *self.places.get(next)?;
        let mut arrivals = vec![(f64::INFINITY, 0); self.width];
        let mut any = false;
        for (last, from) in self.places.iter().enumerate().filter(|(last, _)| mask >> last & 1 == 1) {
            for (cut, arrival) in (0u32..).zip(arrivals.iter_mut()).take(self.search.n_layers as usize) {
                let so_far = self.get(mask, last, cut);
                if so_far.is_finite() {
                    let seconds = so_far + self.search.hop(*from, to, cut);
                    if seconds < arrival.0 {
                        (*arrival, any) = ((seconds, last), true);
                    }
                }
            }
        }
        any.then_some(arrivals)
    }

    /// Adds a stage behind all cuts at once. The best start for each end is the least of `arrival - layers before` in a window that moves on.
    fn extend(&mut self, mask: usize, number: usize, piece: &Piece, arrivals: &[(f64, usize)]) {
        let n_layers = self.search.n_layers;
        let sum = |layer: u32| piece.sums.get(layer as usize).copied().unwrap_or(0.0);
        let mut window: VecDeque<(f64, u32, usize)> = VecDeque::new();
        for end in 2..=n_layers {
            let start = end - 1;
            if let Some((arrival, last)) = arrivals.get(start as usize).filter(|(arrival, _)| arrival.is_finite())
                && self.may_cut(piece, start)
            {
                let key = arrival - sum(start);
                while window.back().is_some_and(|(other, ..)| *other > key) {
                    window.pop_back();
                }
                window.push_back((key, start, *last));
            }
            while window.front().is_some_and(|(_, start, _)| *start < piece.earliest(end)) {
                window.pop_front();
            }
            let Some((key, start, last)) = window.front().copied().filter(|_| self.may_cut(piece, end)) else { continue };
            let tail = if end == n_layers { piece.tail } else { 0.0 };
            let trace = Trace { piece: number, start, before: Some((mask, last)) };
            self.set(mask | piece.mask, piece.lead(), end, key + sum(end) + tail, trace);
        }
    }

    /// With the way back.
    fn best(&self, mask: usize, lead: usize) -> Option<(f64, usize)> {
        let mut best: Option<(f64, usize)> = None;
        for last in 0..self.places.len() {
            let at = self.at(mask, last, self.search.n_layers);
            let Some(trace) = self.traces.get(at).copied().flatten() else { continue };
            let (from, to) = (self.places.get(last)?, self.places.get(lead)?);
            let back = trace.before.map_or(0.0, |_| self.search.predictor.back_seconds(*from, *to));
            let seconds = self.seconds.get(at)? + back;
            if best.is_none_or(|(known, _)| seconds < known) {
                best = Some((seconds, last));
            }
        }
        best
    }

    fn layout(&self, mask: usize, last: usize) -> Option<Layout> {
        let mut stages = Vec::new();
        let mut state = Some((mask, last));
        let mut end = self.search.n_layers;
        while let Some((mask, last)) = state {
            let trace = self.traces.get(self.at(mask, last, end)).copied().flatten()?;
            stages.push(self.pieces.get(trace.piece)?.stage(trace.start..end));
            (state, end) = (trace.before, trace.start);
        }
        stages.reverse();
        Some(Layout { stages })
    }
}
