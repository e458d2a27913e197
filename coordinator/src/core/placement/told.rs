//! Layouts that the user wrote: how many layers for each worker, or which workers hold what.

use super::{Candidate, WhyNot, layout::Layout, layout::LayoutStage};
use mlx_cluster_common::{
    plan::{Strategy, ToldStage},
    spec::ModelSpec,
};

/// Whether a `--split` can be right for a model, before any worker is known.
pub fn check_split(n_layers: u32, split: Option<&[u32]>) -> Result<(), WhyNot> {
    let Some(split) = split else { return Ok(()) };
    let text = || split.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    if split.is_empty() || split.contains(&0) {
        return Err(WhyNot::EmptyStage { split: text() });
    }
    match split.iter().map(|n| u64::from(*n)).sum::<u64>() {
        sum if sum == u64::from(n_layers) => Ok(()),
        sum => Err(WhyNot::SplitSum { split: text(), sum, layers: n_layers }),
    }
}

/// Whether `--stages` can be right for a model, before any worker is known. A strategy besides them has to be what they are.
pub fn check_stages(spec: &ModelSpec, stages: Option<&[ToldStage]>, strategy: Strategy) -> Result<(), WhyNot> {
    let Some(stages) = stages else { return Ok(()) };
    let text = || stages.iter().map(ToldStage::to_string).collect::<Vec<_>>().join(",");
    let is_so = match strategy {
        // A stage of a pipeline may be a group.
        Strategy::Auto | Strategy::Pipeline => true,
        Strategy::Tensor => stages.iter().any(|stage| stage.ranks.len() > 1),
    };
    if !is_so {
        return Err(WhyNot::OtherStrategy { stages: text(), strategy });
    }
    let mut next = 0;
    for stage in stages {
        if stage.layers.start != next || stage.layers.is_empty() {
            return Err(WhyNot::StagesGap { stages: text(), next, layers: spec.n_layers() });
        }
        next = stage.layers.end;
    }
    if next != spec.n_layers() {
        return Err(WhyNot::StagesGap { stages: text(), next, layers: spec.n_layers() });
    }
    let mut names: Vec<&String> = stages.iter().flat_map(|stage| &stage.ranks).map(|(name, _)| name).collect();
    names.sort_unstable();
    if let Some([name, _]) = names.windows(2).find(|pair| pair.first() == pair.last()) {
        return Err(WhyNot::NamedTwice { name: (*name).clone() });
    }
    let groups: Vec<_> = stages.iter().map(|stage| (stage.layers.clone(), stage.ranks.len())).collect();
    check_cuts(spec, &groups)
}

/// Keys and values that later layers share are split over a group's ranks, so such a cut may not touch a group.
pub(super) fn check_cuts(spec: &ModelSpec, stages: &[(std::ops::Range<u32>, usize)]) -> Result<(), WhyNot> {
    for pair in stages.windows(2) {
        let [(_, before), (layers, after)] = pair else { continue };
        if (*before > 1 || *after > 1) && !cut_is_free(spec, layers.start) {
            return Err(WhyNot::SharedCut { cut: layers.start });
        }
    }
    Ok(())
}

/// Whether a stage with several ranks may end or begin at this cut.
pub(super) fn cut_is_free(spec: &ModelSpec, cut: u32) -> bool {
    spec.shared_across(cut).is_empty()
}

/// The stages that were told, over workers found by name or id.
pub(super) fn layout(stages: &[ToldStage], nodes: &[Candidate<'_>]) -> Result<Layout, WhyNot> {
    let find = |name: &String| {
        let named = |place: &usize| nodes.get(*place).is_some_and(|candidate| candidate.node.name == *name || candidate.node.id.0 == *name);
        let found: Vec<usize> = (0..nodes.len()).filter(named).collect();
        match found.as_slice() {
            [place] => Ok(*place),
            [] => Err(WhyNot::UnknownWorker {
                name: name.clone(),
                known: nodes.iter().map(|candidate| candidate.node.name.clone()).collect(),
            }),
            _ => Err(WhyNot::AmbiguousWorker {
                name: name.clone(),
                ids: found.iter().filter_map(|place| nodes.get(*place)).map(|candidate| candidate.node.id.0.clone()).collect(),
            }),
        }
    };
    let stage = |told: &ToldStage| {
        Ok(LayoutStage {
            layers: told.layers.clone(),
            nodes: told.ranks.iter().map(|(name, _)| find(name)).collect::<Result<_, WhyNot>>()?,
            shares: reduced(told.ranks.iter().map(|(_, share)| *share).collect()),
        })
    };
    Ok(Layout { stages: stages.iter().map(stage).collect::<Result<_, WhyNot>>()? })
}

/// Shares without a common divisor.
pub(super) fn reduced(mut shares: Vec<u32>) -> Vec<u32> {
    let divisor = shares.iter().copied().fold(0, greatest_common_divisor).max(1);
    shares.iter_mut().for_each(|share| *share /= divisor);
    shares
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}
