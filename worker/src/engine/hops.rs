//! How long the way between engines takes at decode: measured on the steps themselves, without clocks that agree.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

/// The median is over this many steps.
const SAMPLES: usize = 101;

/// Round trips of steps that had the pipeline to themselves, less the time that the stages computed.
#[derive(Debug)]
pub(super) struct Hops {
    n_hops: u32,
    sent: BTreeMap<u64, Instant>,
    samples: VecDeque<u64>,
}

impl Hops {
    /// For a pipeline of `n_stages`: a step makes as many hops, counting the one back to the lead.
    pub(super) fn new(n_stages: u32) -> Self {
        Self { n_hops: n_stages, sent: BTreeMap::new(), samples: VecDeque::new() }
    }

    /// A step leaves the lead's thread. Steps that share the pipeline are not measured: they wait for each other.
    pub(super) fn leaves(&mut self, number: u64, is_alone: bool, now: Instant) {
        match is_alone {
            true => drop(self.sent.insert(number, now)),
            false => self.sent.clear(),
        }
    }

    /// A result reached the lead's thread; `busy_ns` is what the other stages computed.
    pub(super) fn returns(&mut self, number: u64, busy_ns: u64, now: Instant) {
        let Some(sent) = self.sent.remove(&number) else { return };
        let away = now.duration_since(sent).as_nanos() as u64;
        self.samples.push_back(away.saturating_sub(busy_ns) / u64::from(self.n_hops.max(1)));
        if self.samples.len() > SAMPLES {
            self.samples.pop_front();
        }
    }

    /// 0 while nothing was measured.
    pub(super) fn median_ns(&self) -> u64 {
        let mut sorted: Vec<u64> = self.samples.iter().copied().collect();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn computing_is_not_counted_and_shared_steps_are_left_out() {
        let (mut hops, now) = (Hops::new(2), Instant::now());
        let at = |microseconds| now + Duration::from_micros(microseconds);
        assert_eq!(hops.median_ns(), 0);
        for (number, away) in [(1, 300), (2, 310), (3, 900)] {
            hops.leaves(number, true, now);
            hops.returns(number, 200_000, at(away));
        }
        assert_eq!(hops.median_ns(), 55_000);
        hops.leaves(4, true, now);
        hops.leaves(5, false, now);
        hops.returns(4, 0, at(5));
        hops.returns(5, 0, at(5));
        assert_eq!(hops.median_ns(), 55_000);
    }
}
