//! What a job reports, with mlx-lm's names and units, and the sentences in which it is told.

use serde::{Deserialize, Deserializer, Serialize};
use std::{collections::BTreeMap, fmt};

/// Means and totals since the report before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainReport {
    /// Batches done.
    pub iteration: u64,
    pub train_loss: f32,
    /// Of the last update, and before the first one of that.
    pub learning_rate: f32,
    pub iterations_per_second: f64,
    pub tokens_per_second: f64,
    /// Targets that counted, since the beginning of the job.
    pub trained_tokens: u64,
    /// The most of all workers, in GB (10^9 bytes).
    pub peak_memory: f64,
    /// By the worker's name, in GB.
    pub peak_memory_per_worker: BTreeMap<String, f64>,
    /// Of the time, how much the engines waited for each other: from 0 to 1.
    pub communication_share: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ValReport {
    /// Batches done before, as mlx-lm reports to callbacks; it prints one more.
    pub iteration: u64,
    #[serde(deserialize_with = "or_nan")]
    pub val_loss: f32,
    /// In seconds.
    pub val_time: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TestReport {
    #[serde(deserialize_with = "or_nan")]
    pub test_loss: f32,
    /// Perplexity: e to the loss.
    #[serde(deserialize_with = "or_infinity")]
    pub test_ppl: f64,
}

/// JSON has no number for what is none.
fn or_nan<'de, D: Deserializer<'de>>(number: D) -> Result<f32, D::Error> {
    Ok(Option::deserialize(number)?.unwrap_or(f32::NAN))
}

/// Of a loss beyond 709.
fn or_infinity<'de, D: Deserializer<'de>>(number: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(number)?.unwrap_or(f64::INFINITY))
}

/// As mlx-lm prints it, with the peak of each worker and the time share of communication.
impl fmt::Display for TrainReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Iter {}: Train loss {:.3}, Learning Rate {}, It/sec {:.3}, Tokens/sec {:.3}, Trained Tokens {}, Peak mem {:.3} GB{}, Communication {:.1} %",
            self.iteration,
            self.train_loss,
            exponential(self.learning_rate),
            self.iterations_per_second,
            self.tokens_per_second,
            self.trained_tokens,
            self.peak_memory,
            by_worker(&self.peak_memory_per_worker),
            self.communication_share * 100.0
        )
    }
}

impl fmt::Display for ValReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Iter {}: Val loss {:.3}, Val took {:.3}s", self.iteration + 1, self.val_loss, self.val_time)
    }
}

impl fmt::Display for TestReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Test loss {:.3}, Test ppl {:.3}.", self.test_loss, self.test_ppl)
    }
}

/// Nothing for one worker.
fn by_worker(peaks: &BTreeMap<String, f64>) -> String {
    let each: Vec<String> = peaks.iter().map(|(worker, peak)| format!("{worker} {peak:.3}")).collect();
    if each.len() > 1 { format!(" ({})", each.join(", ")) } else { String::new() }
}

/// Python's `%.3e`: its exponent has two digits and a sign.
fn exponential(number: f32) -> String {
    let text = format!("{number:.3e}");
    match text.split_once('e').and_then(|(digits, exponent)| Some((digits, exponent.parse::<i32>().ok()?))) {
        Some((digits, exponent)) => format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()),
        None => text,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::training) fn train(iteration: u64) -> TrainReport {
        TrainReport {
            iteration,
            train_loss: 2.3451,
            learning_rate: 1e-5,
            iterations_per_second: 1.2345,
            tokens_per_second: 456.75,
            trained_tokens: 1234,
            peak_memory: 0.1234,
            peak_memory_per_worker: BTreeMap::from([("mini".into(), 0.1), ("studio".into(), 0.1234)]),
            communication_share: 0.056,
        }
    }

    pub(in crate::training) fn val(iteration: u64) -> ValReport {
        ValReport { iteration, val_loss: 3.25, val_time: 0.5 }
    }

    #[test]
    fn reports_are_told_in_mlx_lms_words() {
        assert_eq!(
            train(10).to_string(),
            "Iter 10: Train loss 2.345, Learning Rate 1.000e-05, It/sec 1.234, Tokens/sec 456.750, Trained Tokens 1234, Peak mem 0.123 GB (mini 0.100, studio 0.123), \
             Communication 5.6 %"
        );
        assert_eq!(val(0).to_string(), "Iter 1: Val loss 3.250, Val took 0.500s");
        assert_eq!(TestReport { test_loss: 1.0, test_ppl: 2.7 }.to_string(), "Test loss 1.000, Test ppl 2.700.");
        let unlikely: TestReport = serde_json::from_str(r#"{"test_loss": null, "test_ppl": null}"#).unwrap();
        assert_eq!(unlikely.to_string(), "Test loss NaN, Test ppl inf.");
        assert_eq!([exponential(0.0), exponential(123456.0), exponential(f32::NAN)], ["0.000e+00", "1.235e+05", "NaN"]);
    }
}
