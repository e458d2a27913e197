//! In which order a stage takes micro-batches forward and backward.

/// One forward, one backward (PipeDream-Flush, Narayanan et al., arXiv 2006.09503, section 3.2): a stage runs ahead by as many micro-batches as there
/// are stages after it and one more, then takes one back for each that it takes on. So it keeps what few of them need, and none waits where none has
/// to; the one more is for micro-batches that differ, of which the next stage would wait for a large one while it has a small one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Forward(usize),
    Backward(usize),
}

/// The turns of a stage with so many stages after it, for `n` micro-batches. The last stage goes back as soon as it has been forward, in one turn.
pub(super) fn turns(n: usize, stages_after: usize) -> Vec<Turn> {
    if stages_after == 0 {
        return (0..n).map(Turn::Forward).collect();
    }
    let ahead = (stages_after + 1).min(n);
    let mut turns: Vec<Turn> = (0..ahead).map(Turn::Forward).collect();
    for i in ahead..n {
        turns.extend([Turn::Forward(i), Turn::Backward(i - ahead)]);
    }
    turns.extend((n - ahead..n).map(Turn::Backward));
    turns
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the planner reckons.
    fn kept_max(n: usize, after: usize) -> usize {
        if after == 0 { 1 } else { n.min(after + 2) }
    }

    #[test]
    fn a_stage_keeps_no_more_than_the_stages_from_it_on() {
        for (n, after) in [(1, 1), (1, 3), (2, 1), (5, 2), (8, 3), (3, 7)] {
            let (mut held, mut most) = (0i32, 0);
            let (mut forward, mut backward) = (0, 0);
            for turn in turns(n, after) {
                match turn {
                    Turn::Forward(i) => {
                        assert_eq!(i, forward);
                        (forward, held) = (forward + 1, held + 1);
                    }
                    Turn::Backward(i) => {
                        assert_eq!(i, backward);
                        (backward, held) = (backward + 1, held - 1);
                    }
                }
                most = most.max(held);
                assert!(backward <= forward);
            }
            assert_eq!((forward, backward), (n, n));
            assert!(most as usize <= kept_max(n, after), "{n} micro-batches, {after} stages after: {most} held");
        }
    }

    /// Stages that do their turns in order, each as soon as what it needs is there, all come to their end.
    #[test]
    fn stages_never_wait_for_each_other_in_a_circle() {
        for n in 1..9 {
            for stages in 1..6 {
                let plans: Vec<_> = (0..stages).map(|stage| turns(n, stages - 1 - stage)).collect();
                let (mut at, mut forward, mut back) = (vec![0; stages], vec![0; stages + 1], vec![0; stages + 1]);
                forward[0] = n;
                loop {
                    let mut moved = false;
                    for stage in 0..stages {
                        let Some(turn) = plans[stage].get(at[stage]) else { continue };
                        let is_last = stage + 1 == stages;
                        let ready = match turn {
                            Turn::Forward(i) => forward[stage] > *i,
                            Turn::Backward(i) => back[stage + 1] > *i,
                        };
                        if ready {
                            match turn {
                                Turn::Forward(_) if is_last => back[stage] += 1,
                                Turn::Forward(_) => forward[stage + 1] += 1,
                                Turn::Backward(_) => back[stage] += 1,
                            }
                            (at[stage], moved) = (at[stage] + 1, true);
                        }
                    }
                    if !moved {
                        break;
                    }
                }
                assert!(plans.iter().zip(&at).all(|(plan, at)| plan.len() == *at), "{n} micro-batches over {stages} stages");
            }
        }
    }
}
