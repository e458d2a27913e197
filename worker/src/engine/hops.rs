//! How long the way between engines takes: measured on the steps themselves, without clocks that agree.

use mlx_cluster_common::request::EngineLoad;
use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

/// A median is over this many steps.
const SAMPLES: usize = 101;

/// What a step carries from engine to engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    /// One token for each sequence.
    Decode,
    /// Activations of a part of a prompt.
    Prompt { bytes: u64 },
}

/// Round trips of steps that had the pipeline to themselves, less the time that the stages computed.
#[derive(Debug)]
pub(super) struct Hops {
    n_hops: u32,
    sent: BTreeMap<u64, (Instant, Load)>,
    decodes: VecDeque<u64>,
    /// Of prompts, those with the most bytes so far.
    prompt_bytes: u64,
    prompts: VecDeque<u64>,
}

impl Hops {
    /// For a pipeline of `n_stages`: a step makes as many hops, counting the one back to the lead.
    pub(super) fn new(n_stages: u32) -> Self {
        Self { n_hops: n_stages.max(1), sent: BTreeMap::new(), decodes: VecDeque::new(), prompt_bytes: 0, prompts: VecDeque::new() }
    }

    /// The engines are linked anew, perhaps over another way.
    pub(super) fn forget(&mut self) {
        *self = Self::new(self.n_hops);
    }

    /// A step leaves the lead's thread. Steps that share the pipeline are not measured: they wait for each other.
    pub(super) fn leaves(&mut self, number: u64, load: Load, is_alone: bool, now: Instant) {
        match is_alone {
            true => drop(self.sent.insert(number, (now, load))),
            false => self.sent.clear(),
        }
    }

    /// A result reached the lead's thread; `busy_ns` is what the other stages computed.
    pub(super) fn returns(&mut self, number: u64, busy_ns: u64, now: Instant) {
        let Some((sent, load)) = self.sent.remove(&number) else { return };
        let away = (now.duration_since(sent).as_nanos() as u64).saturating_sub(busy_ns);
        match load {
            Load::Decode => push(&mut self.decodes, away),
            Load::Prompt { bytes } if bytes >= self.prompt_bytes => {
                if bytes > self.prompt_bytes {
                    self.prompts.clear();
                }
                self.prompt_bytes = bytes;
                push(&mut self.prompts, away);
            }
            Load::Prompt { .. } => {}
        }
    }

    /// Adds the medians of what was measured. Of the hops of a prompt, the one back to the lead is as short as at decode.
    pub(super) fn measured(&self, load: EngineLoad) -> EngineLoad {
        let hops = u64::from(self.n_hops);
        let hop_ns = median(&self.decodes) / hops;
        let prompt_hop_ns = median(&self.prompts).saturating_sub(hop_ns) / (hops - 1).max(1);
        EngineLoad { hop_ns, prompt_hop_ns, prompt_hop_bytes: self.prompt_bytes, ..load }
    }
}

fn push(samples: &mut VecDeque<u64>, sample: u64) {
    samples.push_back(sample);
    if samples.len() > SAMPLES {
        samples.pop_front();
    }
}

/// 0 while nothing was measured.
fn median(samples: &VecDeque<u64>) -> u64 {
    let mut sorted: Vec<u64> = samples.iter().copied().collect();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn measured(hops: &Hops) -> (u64, u64, u64) {
        let load = hops.measured(EngineLoad::default());
        (load.hop_ns, load.prompt_hop_ns, load.prompt_hop_bytes)
    }

    #[test]
    fn computing_is_not_counted_and_shared_steps_are_left_out() {
        let (mut hops, now) = (Hops::new(2), Instant::now());
        let at = |microseconds| now + Duration::from_micros(microseconds);
        assert_eq!(measured(&hops), (0, 0, 0));
        for (number, away) in [(1, 300), (2, 310), (3, 900)] {
            hops.leaves(number, Load::Decode, true, now);
            hops.returns(number, 200_000, at(away));
        }
        assert_eq!(measured(&hops), (55_000, 0, 0));
        hops.leaves(4, Load::Decode, true, now);
        hops.leaves(5, Load::Decode, false, now);
        hops.returns(4, 0, at(5));
        hops.returns(5, 0, at(5));
        assert_eq!(measured(&hops), (55_000, 0, 0));
    }

    #[test]
    fn the_largest_parts_of_prompts_are_measured_apart() {
        let (mut hops, now) = (Hops::new(3), Instant::now());
        let mut trip = |number, load, microseconds| {
            hops.leaves(number, load, true, now);
            hops.returns(number, 0, now + Duration::from_micros(microseconds));
        };
        trip(1, Load::Decode, 300);
        trip(2, Load::Prompt { bytes: 1000 }, 500);
        trip(3, Load::Prompt { bytes: 9000 }, 2100);
        trip(4, Load::Prompt { bytes: 1000 }, 500);
        assert_eq!(measured(&hops), (100_000, 1_000_000, 9000), "two hops there, one short one back");
        hops.forget();
        assert_eq!(measured(&hops), (0, 0, 0));
    }
}
