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
/// Steps are measured together until they took this long: the end of a single one is seen late when the device is fed ahead, and then
/// its time is counted for its neighbour.
const WINDOW: Duration = Duration::from_millis(400);

/// Steps come to the device one after the other, so a step's time is that from the later of its start and the end of the step before.
/// Decode steps in between count as time, so the parts are rather too small than too large.
#[derive(Debug)]
pub(super) struct Pace {
    tokens_per_s: Option<f64>,
    last_end: Option<Instant>,
    window_tokens: usize,
    window_time: Duration,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { tokens_per_s: None, last_end: None, window_tokens: 0, window_time: Duration::ZERO }
    }

    /// A step that read `prompt_tokens` (0 for a decode step) was started and has ended.
    pub(super) fn step_ended(&mut self, prompt_tokens: usize, started: Instant, now: Instant) {
        let begin = self.last_end.map_or(started, |end| end.max(started));
        self.last_end = Some(now);
        self.window_tokens += prompt_tokens;
        self.window_time += now.duration_since(begin);
        if self.window_time < WINDOW {
            return;
        }
        let newest = self.window_tokens as f64 / self.window_time.as_secs_f64();
        // A window of decode steps alone, or with a crumb of a prompt, says nothing of reading prompts.
        if self.window_tokens >= TOKENS_MIN as usize {
            self.tokens_per_s = Some(self.tokens_per_s.map_or(newest, |before| before * (1.0 - NEWEST) + newest * NEWEST));
        }
        (self.window_tokens, self.window_time) = (0, Duration::ZERO);
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
            // A machine that reads 4,000 tokens a second needs some steps to fill a window.
            let (mut pace, mut now) = (Pace::new(), Instant::now());
            assert_eq!(pace.tokens(), TOKENS_FIRST);
            for _ in 0..200 {
                // Started while the step before it still ran, as the lead does with one stage.
                let started = now;
                now += Duration::from_secs_f64(64.0 / tokens_per_s);
                pace.step_ended(64, started - Duration::from_millis(1), now);
            }
            assert!(pace.tokens().abs_diff(wanted) <= wanted / 20, "{tokens_per_s}: {}", pace.tokens());
        }
    }

    #[test]
    fn decode_steps_say_nothing() {
        let (mut pace, now) = (Pace::new(), Instant::now());
        pace.step_ended(0, now, now + Duration::from_secs(1));
        assert_eq!(pace.tokens(), TOKENS_FIRST);
    }

    #[test]
    fn a_step_whose_end_is_seen_late_does_not_make_the_machine_look_fast() {
        let (mut pace, mut now) = (Pace::new(), Instant::now());
        for _ in 0..50 {
            // 32 tokens take a second, but half of it is counted for the decode step that follows.
            for (prompt_tokens, milliseconds) in [(32, 50), (0, 950)] {
                let started = now;
                now += Duration::from_millis(milliseconds);
                pace.step_ended(prompt_tokens, started, now);
            }
        }
        assert_eq!(pace.tokens(), TOKENS_MIN);
    }
}
