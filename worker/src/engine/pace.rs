//! How many prompt tokens a step may carry while others wait for their turn: what this machine reads in half a second, as measured.

use std::time::{Duration, Instant};

/// A running answer pauses at most about this long for a part of somebody's prompt.
const STEP_TARGET: Duration = Duration::from_millis(500);
/// Parts are never smaller: a step has costs of its own.
const TOKENS_MIN: u32 = 16;
/// Before anything was measured.
const TOKENS_FIRST: u32 = 64;
/// Weight of the newest measurement.
const NEWEST: f64 = 0.3;

/// Steps come to the device one after the other, so a step's time is that from the later of its start and the end of the step before.
#[derive(Debug)]
pub(super) struct Pace {
    tokens_per_s: Option<f64>,
    last_end: Option<Instant>,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { tokens_per_s: None, last_end: None }
    }

    /// A step that read `prompt_tokens` (0 for a decode step) was started and has ended.
    pub(super) fn step_ended(&mut self, prompt_tokens: usize, started: Instant, now: Instant) {
        let begin = self.last_end.map_or(started, |end| end.max(started));
        self.last_end = Some(now);
        let seconds = now.duration_since(begin).as_secs_f64();
        if prompt_tokens < TOKENS_MIN as usize || seconds <= 0.0 {
            return;
        }
        let newest = prompt_tokens as f64 / seconds;
        self.tokens_per_s = Some(self.tokens_per_s.map_or(newest, |before| before * (1.0 - NEWEST) + newest * NEWEST));
    }

    /// Prompt tokens for the next step that others wait for.
    pub(super) fn tokens(&self) -> u32 {
        match self.tokens_per_s {
            None => TOKENS_FIRST,
            Some(rate) => ((rate * STEP_TARGET.as_secs_f64()) as u32).max(TOKENS_MIN),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_take_half_a_second_whatever_the_machine() {
        for (tokens_per_s, wanted) in [(10.0, TOKENS_MIN), (100.0, 50), (4000.0, 2000)] {
            let (mut pace, mut now) = (Pace::new(), Instant::now());
            assert_eq!(pace.tokens(), TOKENS_FIRST);
            for _ in 0..20 {
                // Started while the step before it still ran, as the lead does with one stage.
                let started = now;
                now += Duration::from_secs_f64(64.0 / tokens_per_s);
                pace.step_ended(64, started - Duration::from_millis(1), now);
            }
            assert!(pace.tokens().abs_diff(wanted) <= wanted / 20, "{tokens_per_s}: {}", pace.tokens());
        }
    }

    #[test]
    fn decode_steps_and_tiny_parts_say_nothing() {
        let (mut pace, now) = (Pace::new(), Instant::now());
        pace.step_ended(0, now, now + Duration::from_secs(1));
        pace.step_ended(3, now, now + Duration::from_secs(2));
        assert_eq!(pace.tokens(), TOKENS_FIRST);
    }
}
