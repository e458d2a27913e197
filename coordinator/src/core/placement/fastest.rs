//! The layouts with the shortest time of a token, for each number of workers: Bellman's recursion over sets of nodes, the node that the last
//! stage ends on, and layers.

use super::{
    layout::Layout,
    search::{Piece, Search, by_mask, subsets},
};
use std::collections::{BTreeMap, VecDeque};

/// Where the best way to a state came from.
/// Small, since there are many.
#[derive(Debug, Clone, Copy)]
struct Trace {
    piece: u16,
    start: u16,
    /// Set of nodes before; none for the first stage.
    mask: u16,
    /// The last lead before.
    last: u16,
}

const NO_TRACE: Trace = Trace { piece: 0, start: 0, mask: 0, last: 0 };

struct Table<'a> {
    search: &'a Search<'a>,
    pieces: &'a [Piece],
    numbers: Vec<Option<usize>>,
    places: &'a [usize],
    width: usize,
    seconds: Vec<f64>,
    traces: Vec<Trace>,
    /// States that take longer than this cannot become the layout that is taken.
    bound: f64,
}

/// By number of workers; those that take `slack` times as long as the best may be left out.
pub(super) fn fastest(search: &Search<'_>, pieces: &[Piece], places: &[usize], slack: f64) -> BTreeMap<usize, (f64, Layout)> {
    let mut found: BTreeMap<usize, (f64, Layout)> = BTreeMap::new();
    // The way back to the lead depends on the first stage, so there is a table for each node that may be the lead.
    let mut table = Table::new(search, pieces, places);
    let whole = pieces.iter().filter(|piece| piece.earliest(search.n_layers) == 0).map(|piece| piece.seconds(&(0..search.n_layers)));
    table.bound = whole.fold(f64::INFINITY, f64::min) * slack;
    for lead in 0..places.len() {
        table.fill(lead);
        for mask in (1..1usize << places.len()).filter(|mask| mask >> lead & 1 == 1) {
            let Some((seconds, last)) = table.best(mask, lead) else { continue };
            table.bound = table.bound.min(seconds * slack);
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
        Self {
            search,
            pieces,
            numbers: by_mask(pieces, places.len()),
            places,
            width,
            seconds: vec![f64::INFINITY; states],
            traces: vec![NO_TRACE; states],
            bound: f64::INFINITY,
        }
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
            (*known, *known_trace) = (seconds, trace);
        }
    }

    fn may_cut(&self, piece: &Piece, layer: u32) -> bool {
        !piece.is_group() || layer == self.search.n_layers || self.search.free.get(layer as usize).copied().unwrap_or(false)
    }

    fn fill(&mut self, lead: usize) {
        let (pieces, n_layers) = (self.pieces, self.search.n_layers);
        self.seconds.fill(f64::INFINITY);
        for (number, piece) in pieces.iter().enumerate().filter(|(_, piece)| piece.lead() == lead) {
            for end in 1..=n_layers {
                if piece.earliest(end) > 0 || !self.may_cut(piece, end) {
                    continue;
                }
                self.set(piece.mask, lead, end, piece.seconds(&(0..end)), Trace { piece: number as u16, ..NO_TRACE });
            }
        }
        for mask in (1..1usize << self.places.len()).filter(|mask| mask >> lead & 1 == 1) {
            for next in (0..self.places.len()).filter(|next| mask >> next & 1 == 0) {
                let Some(arrivals) = self.arrivals(mask, next) else { continue };
                // The lead of a piece is its first member.
                let own = 1 << next;
                for others in subsets(!mask & ((1 << self.places.len()) - 2 * own)) {
                    let number = self.numbers.get(others | own).copied().flatten();
                    if let Some((number, piece)) = number.and_then(|number| Some((number, pieces.get(number)?))) {
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
                if so_far < self.bound {
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
        let mut window: VecDeque<(f64, u32, usize)> = VecDeque::with_capacity(self.width);
        for end in 2..=n_layers {
            let start = end - 1;
            if let Some((arrival, last)) = arrivals.get(start as usize).filter(|(arrival, _)| *arrival < self.bound)
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
            let trace = Trace { piece: number as u16, start: start as u16, mask: mask as u16, last: last as u16 };
            self.set(mask | piece.mask, piece.lead(), end, key + sum(end) + tail, trace);
        }
    }

    /// With the way back.
    fn best(&self, mask: usize, lead: usize) -> Option<(f64, usize)> {
        let mut best: Option<(f64, usize)> = None;
        for last in 0..self.places.len() {
            let at = self.at(mask, last, self.search.n_layers);
            let (so_far, trace) = (*self.seconds.get(at)?, self.traces.get(at)?);
            if so_far.is_infinite() {
                continue;
            }
            let (from, to) = (self.places.get(last)?, self.places.get(lead)?);
            let seconds = so_far + if trace.mask == 0 { 0.0 } else { self.search.predictor.back_seconds(*from, *to) };
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
            let trace = *self.traces.get(self.at(mask, last, end))?;
            let start = u32::from(trace.start);
            stages.push(self.pieces.get(usize::from(trace.piece))?.stage(start..end));
            state = (trace.mask > 0).then_some((usize::from(trace.mask), usize::from(trace.last)));
            end = start;
        }
        stages.reverse();
        Some(Layout { stages })
    }
}
