//! The layouts with the least slowest stage, for each number of stages: how far each set of nodes gets through the layers when no stage may take
//! longer than a limit, and the least limit with which all layers are done.

use super::{
    layout::Layout,
    search::{Piece, Search, by_mask, subsets},
};

/// The limit is found to this part.
const PRECISION: f64 = 1e-3;

#[derive(Debug, Clone, Copy)]
struct Reach {
    end: u32,
    piece: usize,
    before: usize,
    start: u32,
}

/// With exactly `n_stages` stages; with as few workers as the limit allows. With the seconds of the slowest stage. None when it does not fit.
pub(super) fn steadiest(search: &Search<'_>, pieces: &[Piece], n_places: usize, n_stages: usize) -> Option<(f64, Layout)> {
    let mut best = reach(search, pieces, n_places, n_stages, f64::INFINITY)?;
    let (mut low, mut high) = (0.0f64, pieces.iter().map(|piece| piece.seconds(&(0..search.n_layers))).fold(0.0, f64::max));
    while high - low > high * PRECISION {
        let middle = (low + high) / 2.0;
        match reach(search, pieces, n_places, n_stages, middle) {
            Some(layout) => (best, high) = (layout, middle),
            None => low = middle,
        }
    }
    Some((high, best))
}

fn reach(search: &Search<'_>, pieces: &[Piece], n_places: usize, n_stages: usize, limit: f64) -> Option<Layout> {
    let n_masks = 1usize << n_places;
    let numbers = by_mask(pieces, n_places);
    let mut rows: Vec<Vec<Option<Reach>>> = vec![vec![None; n_masks]];
    for stage in 0..n_stages {
        let mut row: Vec<Option<Reach>> = vec![None; n_masks];
        // Each stage to come needs a layer.
        let most = search.n_layers.saturating_sub((n_stages - stage - 1) as u32);
        for mask in 0..n_masks {
            let start = match stage {
                0 if mask == 0 => 0,
                0 => continue,
                _ => match rows.last().and_then(|row| *row.get(mask)?) {
                    Some(reach) => reach.end,
                    None => continue,
                },
            };
            // Each stage to come needs a node too.
            let spare = n_places + 1 + stage - n_stages.min(n_places);
            for set in subsets(!mask & (n_masks - 1)).filter(|set| (mask | set).count_ones() as usize <= spare) {
                let Some((number, piece)) = numbers.get(set).copied().flatten().and_then(|number| Some((number, pieces.get(number)?)))
                else {
                    continue;
                };
                let Some(end) = furthest(search, piece, start, most, limit) else { continue };
                let Some(known) = row.get_mut(mask | piece.mask) else { continue };
                if known.is_none_or(|known| end > known.end) {
                    *known = Some(Reach { end, piece: number, before: mask, start });
                }
            }
        }
        rows.push(row);
    }
    let done = |mask: &usize| rows.last().and_then(|row| *row.get(*mask)?).is_some_and(|reach| reach.end == search.n_layers);
    let mut mask = (1..n_masks).filter(done).min_by_key(|mask| (mask.count_ones(), *mask))?;
    let mut stages = Vec::new();
    for row in rows.iter().skip(1).rev() {
        let Reach { end, piece, before, start } = (*row.get(mask)?)?;
        stages.push(pieces.get(piece)?.stage(start..end));
        mask = before;
    }
    stages.reverse();
    Some(Layout { stages })
}

/// The last layer that a stage may end before; None where not even one layer is possible.
fn furthest(search: &Search<'_>, piece: &Piece, start: u32, most: u32, limit: f64) -> Option<u32> {
    let n_layers = search.n_layers;
    let free = |cut: u32| !piece.is_group() || cut == n_layers || search.free.get(cut as usize).copied().unwrap_or(false);
    if start >= n_layers || !free(start) {
        return None;
    }
    let before = piece.sums.get(start as usize).copied().unwrap_or(0.0) - if start == 0 { piece.front } else { 0.0 };
    let in_time = piece.sums.partition_point(|sum| sum - before <= limit).saturating_sub(1) as u32;
    let in_memory = piece.earliest.partition_point(|earliest| *earliest <= start).saturating_sub(1) as u32;
    let mut end = in_time.min(in_memory).min(most);
    if end == n_layers && piece.seconds(&(start..end)) > limit {
        end -= 1;
    }
    while end > start && !free(end) {
        end -= 1;
    }
    (end > start).then_some(end)
}
