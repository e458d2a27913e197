//! Who fetches which tensor from the hub: a pure function of the model and the plan, so that all workers of a plan agree without talking.

use std::collections::BTreeSet;

/// Tensors that several workers need are dealt out in runs of about this size, so that neighbours come with one request.
const RUN_BYTES: u64 = 4 << 20;

/// A tensor as its owner is chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    /// Where it lies: the number of its file, and the offset in it.
    pub(super) place: (usize, u64),
    pub(super) bytes: u64,
    /// The workers that need it.
    pub(super) wanted_by: BTreeSet<usize>,
}

/// For each tensor one of the workers that need it and are not `away`; None where there is none.
///
/// Each tensor goes to whom it is needed by alone, or to the one who has least to fetch so far.
pub(super) fn owners(tensors: &[Candidate], away: &BTreeSet<usize>) -> Vec<Option<usize>> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|index| tensors[*index].place);
    let n_workers = tensors.iter().filter_map(|tensor| tensor.wanted_by.last()).max().map_or(0, |last| last + 1);
    let mut load = vec![0u64; n_workers];
    let mut owners = vec![None; tensors.len()];
    let mut run: Option<(usize, &BTreeSet<usize>, u64)> = None;
    for index in order {
        let tensor = &tensors[index];
        let continued = run.filter(|(_, wanted_by, bytes)| *wanted_by == &tensor.wanted_by && *bytes < RUN_BYTES);
        let least = || tensor.wanted_by.iter().copied().filter(|worker| !away.contains(worker)).min_by_key(|worker| load[*worker]);
        let Some(owner) = continued.map(|(owner, ..)| owner).or_else(least) else {
            run = None;
            continue;
        };
        run = Some((owner, &tensor.wanted_by, continued.map_or(0, |(.., bytes)| bytes) + tensor.bytes));
        load[owner] += tensor.bytes;
        owners[index] = Some(owner);
    }
    owners
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(wanted: &[(&[usize], u64)]) -> Vec<Candidate> {
        let tensor = |(index, (by, bytes)): (usize, &(&[usize], u64))| Candidate {
            place: (0, index as u64),
            bytes: *bytes,
            wanted_by: by.iter().copied().collect(),
        };
        wanted.iter().enumerate().map(tensor).collect()
    }

    #[test]
    fn each_tensor_has_one_owner_among_those_who_need_it() {
        let tensors = tensors(&[(&[0, 2], 10), (&[0], 20), (&[1], 5), (&[2], 7), (&[], 3)]);
        assert_eq!(owners(&tensors, &BTreeSet::new()), [Some(0), Some(0), Some(1), Some(2), None]);
        assert_eq!(owners(&tensors, &BTreeSet::from([0])), [Some(2), None, Some(1), Some(2), None]);
    }

    #[test]
    fn what_all_ranks_need_is_dealt_out_evenly_and_in_runs() {
        let tensors = tensors(&[(&[0usize, 1, 2] as &[usize], 1 << 20); 60]);
        let owners = owners(&tensors, &BTreeSet::new());
        for rank in 0..3 {
            assert_eq!(owners.iter().filter(|owner| **owner == Some(rank)).count(), 20);
        }
        let changes = owners.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert_eq!(changes, 14);
    }

    #[test]
    fn whoever_takes_over_does_not_depend_on_the_order_of_names() {
        let mut all = tensors(&[(&[0, 1, 2], 9), (&[0, 1, 2], 8 << 20), (&[1, 2], 3), (&[0, 2], 8)]);
        let away = BTreeSet::from([1]);
        let forwards = owners(&all, &away);
        all.reverse();
        let mut backwards = owners(&all, &away);
        backwards.reverse();
        assert_eq!(forwards, backwards);
        assert!(forwards.iter().all(|owner| owner.is_some_and(|owner| owner != 1)));
    }
}
