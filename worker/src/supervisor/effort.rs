//! Whether the engines of this worker compute, by the processor time that they use.

use super::plan::Time;
use std::time::Duration;

/// An engine that waits for requests uses a hundredth of a core.
const HIGH_PERCENT: u32 = 10;

#[derive(Debug, Default)]
pub(crate) struct Effort {
    computed: Duration,
    at: Time,
    pub(crate) is_high: bool,
}

impl Effort {
    /// `computed` is the processor time of all engines since each of them started.
    pub(crate) fn look(&mut self, computed: Duration, now: Time) {
        let (used, passed) = (computed.saturating_sub(self.computed), now.saturating_sub(self.at));
        self.is_high = used * 100 > passed * HIGH_PERCENT;
        (self.computed, self.at) = (computed, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effort_is_what_was_computed_since_the_last_look() {
        let mut effort = Effort::default();
        let look = |effort: &mut Effort, computed_ms, now_s| {
            effort.look(Duration::from_millis(computed_ms), Time::from_secs(now_s));
            effort.is_high
        };
        assert!(!look(&mut effort, 0, 3));
        assert!(look(&mut effort, 2000, 6));
        assert!(!look(&mut effort, 2050, 9), "it rests");
        assert!(!look(&mut effort, 10, 12), "an engine ended, and its time with it");
    }
}
