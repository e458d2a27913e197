//! The choice among single worker, pipeline, tensor group and mixtures by what is predicted of them.

use super::{
    WhyNot,
    fastest::fastest,
    layout::{Kind, Layout},
    planner::{Balance, COMFORTABLE, Fit, Planner},
    predict::{Predictor, Step},
    search::{EXACT_NODES, Fill, Search},
    steadiest::steadiest,
};
use mlx_cluster_common::{
    plan::Optimize,
    prediction::{Alternative, Prediction},
    units::Bytes,
};
use std::collections::BTreeMap;

/// A layout over more workers has to be so much faster.
const WORTH_IT: f64 = 1.05;

struct Predicted {
    layout: Layout,
    prediction: Prediction,
}

impl Planner<'_> {
    /// The best layout by prediction. None where that cannot be said, since bandwidths are unknown, or where nothing fits.
    pub(super) fn predicted(&self) -> Result<Option<Fit>, WhyNot> {
        if self.nodes.iter().any(|node| node.bandwidth.is_none()) {
            return Ok(None);
        }
        let mut context_tokens = self.context.end;
        loop {
            let several = self.nodes.len() > 1;
            let comfortable = if several && context_tokens == self.context.end { COMFORTABLE } else { 1.0 };
            for alone in [comfortable, 1.0] {
                let candidates = self.candidates(context_tokens, alone)?;
                if let Some(fit) = self.choose(candidates, context_tokens)? {
                    return Ok(Some(fit));
                }
            }
            if context_tokens <= self.context.start {
                return Ok(None);
            }
            context_tokens = (context_tokens / 2).max(self.context.start);
        }
    }

    /// Layouts that hold a context, each as it is predicted.
    fn candidates(&self, context_tokens: u32, alone: f64) -> Result<Vec<Predicted>, WhyNot> {
        let predictor = self.predictor();
        let fill = Fill { cache_tokens: self.reservation.of(context_tokens), alone };
        let most = self.nodes.len().min(EXACT_NODES);
        let search = Search::new(&predictor, fill, most)?;
        let places: Vec<usize> = (0..most).collect();
        let mut found = exact(&search, &predictor, &places, self.options.optimize);
        found.retain(|(_, layout)| layout.n_nodes() >= self.min_workers);
        let (mut layouts, rest) = worth_a_look(found);
        if self.nodes.len() > EXACT_NODES {
            layouts.extend(search.chained(self.nodes.len()).into_iter().filter(|layout| layout.n_nodes() >= self.min_workers));
        }
        let candidates = self.as_they_are(&predictor, layouts, context_tokens);
        // What was interpolated may not fit as it is.
        Ok(if candidates.is_empty() { self.as_they_are(&predictor, rest, context_tokens) } else { candidates })
    }

    fn as_they_are(&self, predictor: &Predictor<'_>, layouts: Vec<Layout>, context_tokens: u32) -> Vec<Predicted> {
        let context = context_tokens..context_tokens;
        let mut candidates: Vec<Predicted> = Vec::new();
        for layout in layouts {
            let fits = || self.sizes.longest_context(&layout, &self.nodes, &self.reservation, &context);
            if !candidates.iter().any(|other| other.layout == layout) && matches!(fits(), Ok(Some(_))) {
                candidates.extend(predictor.predict(&layout).map(|prediction| Predicted { layout, prediction }));
            }
        }
        candidates
    }

    /// As few workers as get within a few per cent of the best.
    fn choose(&self, candidates: Vec<Predicted>, context_tokens: u32) -> Result<Option<Fit>, WhyNot> {
        let value = |candidate: &Predicted| self.value(&candidate.prediction);
        let best = candidates.iter().map(value).fold(0.0, f64::max);
        let good = (0..candidates.len()).filter(|i| candidates.get(*i).is_some_and(|candidate| value(candidate) * WORTH_IT >= best));
        let key = |i: &usize| candidates.get(*i).map_or((usize::MAX, 0.0), |candidate| (candidate.layout.n_nodes(), -value(candidate)));
        let Some(chosen) = good.min_by(|a, b| key(a).partial_cmp(&key(b)).unwrap_or(std::cmp::Ordering::Equal)) else { return Ok(None) };
        let alternatives = self.alternatives(&candidates, chosen);
        let Some(Predicted { layout, .. }) = candidates.into_iter().nth(chosen) else { return Ok(None) };
        // A lower context was tried in large steps: the layout may hold more.
        let range = context_tokens..self.context.end;
        let longest = self.sizes.longest_context(&layout, &self.nodes, &self.reservation, &range)?.unwrap_or(context_tokens);
        Ok(Some(Fit { context_tokens: longest, layout, balance: Balance::Prediction, alternatives }))
    }

    fn value(&self, prediction: &Prediction) -> f64 {
        match self.options.optimize {
            Optimize::Latency => prediction.decode_tokens_per_second,
            Optimize::Throughput => prediction.decode_tokens_per_second_of_many,
        }
    }

    /// The best of each kind but the chosen one's, and why it lost.
    fn alternatives(&self, candidates: &[Predicted], chosen: usize) -> Vec<Alternative> {
        let Some(taken) = candidates.get(chosen) else { return Vec::new() };
        let mut best: BTreeMap<Kind, &Predicted> = BTreeMap::new();
        for candidate in candidates.iter().filter(|candidate| candidate.layout.kind() != taken.layout.kind()) {
            let kind = candidate.layout.kind();
            if best.get(&kind).is_none_or(|known| self.value(&candidate.prediction) > self.value(&known.prediction)) {
                best.insert(kind, candidate);
            }
        }
        let mut alternatives = Vec::new();
        for kind in [Kind::Single, Kind::Pipeline, Kind::Tensor, Kind::Hybrid] {
            match best.get(&kind) {
                Some(candidate) => alternatives.push(self.lost(candidate, taken)),
                None if kind == taken.layout.kind() || !self.is_possible(kind) => {}
                None => alternatives.push(Alternative {
                    layout: kind.to_string(),
                    decode_tokens_per_second: None,
                    decode_tokens_per_second_of_many: None,
                    reason: self.why_none(kind),
                }),
            }
        }
        alternatives
    }

    fn lost(&self, candidate: &Predicted, taken: &Predicted) -> Alternative {
        let (theirs, ours) = (self.value(&candidate.prediction), self.value(&taken.prediction));
        let per_cent = 100.0 * (theirs / ours.max(1e-9) - 1.0);
        let reason = match theirs > ours {
            true => {
                format!("only {per_cent:.0} % faster, with {} workers instead of {}", candidate.layout.n_nodes(), taken.layout.n_nodes())
            }
            false => {
                let links = 100.0 * candidate.prediction.links_share;
                format!("{:.0} % slower, with {links:.0} % of a token's time on links", -per_cent)
            }
        };
        Alternative {
            layout: candidate.layout.text(&self.nodes),
            decode_tokens_per_second: Some(candidate.prediction.decode_tokens_per_second),
            decode_tokens_per_second_of_many: Some(candidate.prediction.decode_tokens_per_second_of_many),
            reason,
        }
    }

    fn is_possible(&self, kind: Kind) -> bool {
        match kind {
            Kind::Single => self.min_workers <= 1,
            Kind::Tensor => self.nodes.len() > 1,
            Kind::Pipeline => self.nodes.len() > 1 && self.n_layers > 1,
            Kind::Hybrid => false,
        }
    }

    fn why_none(&self, kind: Kind) -> String {
        let needed = self.whole_rank().map_or(0, |costs| costs.needed(&(0..self.n_layers), self.reservation.of(self.context.end)));
        let usable = self.nodes.iter().map(|node| node.node.usable_memory).max().unwrap_or_default();
        match kind {
            Kind::Single => {
                format!("the whole model with one full context takes {}, the largest worker has {usable} usable", Bytes(needed))
            }
            _ => "does not fit".into(),
        }
    }

    pub(super) fn why_predicted(&self, fit: &Fit) -> String {
        let n = fit.layout.n_nodes();
        let goal = match self.options.optimize {
            Optimize::Latency => "one request",
            Optimize::Throughput => "many requests",
        };
        let alone = fit.layout.stages.first().and_then(|stage| stage.nodes.first()).and_then(|place| self.nodes.get(*place));
        match alone.filter(|_| n == 1) {
            Some(node) => {
                let needed = self.whole_rank().map_or(0, |costs| costs.needed(&(0..self.n_layers), self.reservation.of(self.context.end)));
                let (name, usable) = (&node.node.name, node.node.usable_memory);
                format!("{name} holds the whole model: {} of {usable} usable with one full context", Bytes(needed))
            }
            None => format!(
                "{} over {n} of {} workers: fastest for {goal} by prediction, with as few workers as that takes",
                fit.layout.kind(),
                self.nodes.len()
            ),
        }
    }
}

/// Those that are the best of their kind, or faster than all with fewer workers; and the others.
fn worth_a_look(mut found: Vec<(f64, Layout)>) -> (Vec<Layout>, Vec<Layout>) {
    let key = |(seconds, layout): &(f64, Layout)| (layout.n_nodes(), *seconds);
    found.sort_by(|a, b| key(a).partial_cmp(&key(b)).unwrap_or(std::cmp::Ordering::Equal));
    let mut of_kind: BTreeMap<Kind, f64> = BTreeMap::new();
    for (seconds, layout) in &found {
        let best = of_kind.entry(layout.kind()).or_insert(*seconds);
        *best = best.min(*seconds);
    }
    let mut fastest = f64::INFINITY;
    let (good, rest): (Vec<_>, Vec<_>) = found.into_iter().partition(|(seconds, layout)| {
        let is_faster = *seconds < fastest;
        fastest = fastest.min(*seconds);
        is_faster || of_kind.get(&layout.kind()) == Some(seconds)
    });
    let layouts = |found: Vec<(f64, Layout)>| found.into_iter().map(|(_, layout)| layout).collect();
    (layouts(good), layouts(rest))
}

/// The best layouts over up to eight nodes, of every kind for each number of workers or stages, with the seconds of a token as interpolated.
fn exact(search: &Search<'_>, predictor: &Predictor<'_>, places: &[usize], optimize: Optimize) -> Vec<(f64, Layout)> {
    let mut layouts: Vec<(f64, Layout)> = Vec::new();
    let alone = |pieces: Vec<super::search::Piece>| pieces.into_iter().filter(|piece| !piece.is_group()).collect::<Vec<_>>();
    let pieces = search.pieces(places, Step::decode(1.0));
    let whole = 0..search.n_layers;
    for size in 1..=places.len() {
        let fitting = pieces.iter().filter(|piece| piece.nodes.len() == size && piece.earliest(whole.end) == 0);
        let best = fitting.min_by(|a, b| a.seconds(&whole).total_cmp(&b.seconds(&whole)));
        layouts.extend(best.map(|piece| (piece.seconds(&whole), Layout { stages: vec![piece.stage(whole.clone())] })));
    }
    match optimize {
        Optimize::Latency => {
            layouts.extend(fastest(search, &pieces, places, WORTH_IT).into_values());
            layouts.extend(fastest(search, &alone(pieces), places, f64::INFINITY).into_values());
        }
        Optimize::Throughput => {
            for n_stages in 1..=places.len().min(search.n_layers as usize) {
                let tokens = f64::from(predictor.requests).max(1.0) / n_stages as f64;
                let pieces = search.pieces(places, Step::decode(tokens.ceil()));
                let token = |(slowest, layout): (f64, Layout)| (slowest * n_stages as f64 / f64::from(predictor.requests.max(1)), layout);
                layouts.extend(steadiest(search, &pieces, places.len(), n_stages).map(token));
                layouts.extend(steadiest(search, &alone(pieces), places.len(), n_stages).map(token));
            }
        }
    }
    layouts
}
