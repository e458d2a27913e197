//! `metrics.jsonl`: an object a line for each report of a run.

use crate::failure::{Exit, Failure};
use serde_json::{Map, Value};
use std::{collections::BTreeMap, fs, path::Path};

/// The reports of a run by their iteration. What was reported again, after a resumption, counts as reported last.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Metrics {
    pub(crate) train: BTreeMap<u64, TrainReport>,
    /// The loss on the validation set.
    pub(crate) val_loss: BTreeMap<u64, f64>,
}

/// Means and totals since the report before, as mlx-lm reports them.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct TrainReport {
    pub(crate) loss: f64,
    pub(crate) learning_rate: Option<f64>,
    pub(crate) iterations_per_second: Option<f64>,
    pub(crate) tokens_per_second: Option<f64>,
    /// Since the beginning of the run.
    pub(crate) trained_tokens: Option<u64>,
    /// In GB (10^9 bytes).
    pub(crate) peak_memory: Option<f64>,
}

impl Metrics {
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        let bad = |message: String| Failure::new(Exit::BadFile, message);
        let text = fs::read_to_string(path)
            .map_err(|error| bad(format!("cannot read {}: {error}; --run is the folder of a job or of its adapter", path.display())))?;
        let metrics = Self::parse(&text).map_err(|error| bad(format!("{}{error}", path.display())))?;
        if metrics.train.is_empty() && metrics.val_loss.is_empty() {
            return Err(bad(format!("{} has no reports of losses yet", path.display())));
        }
        Ok(metrics)
    }

    /// Errors continue the name of the file.
    fn parse(text: &str) -> Result<Self, String> {
        let mut metrics = Self::default();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let is_last = i + 1 == text.lines().count();
            match serde_json::from_str::<Map<String, Value>>(line) {
                Ok(report) => metrics.take(&report).map_err(|error| format!(":{}: {error}", i + 1))?,
                // It is being written.
                Err(_) if is_last && !text.ends_with('\n') => break,
                Err(error) => return Err(format!(":{}:{}: this is not the JSON object of a report: {error}", i + 1, error.column())),
            }
        }
        Ok(metrics)
    }

    /// The last reports in one line; what was not reported is left out.
    pub(crate) fn summary(&self) -> String {
        let mut parts = Vec::new();
        if let Some((iteration, last)) = self.train.last_key_value() {
            parts.push(format!("iteration {iteration}: training loss {:.3}", last.loss));
            let figures = [
                last.iterations_per_second.map(|rate| format!("{rate:.2} it/s")),
                last.tokens_per_second.map(|rate| format!("{rate:.0} tokens/s")),
                last.trained_tokens.map(|tokens| format!("{tokens} tokens in all")),
                last.peak_memory.map(|memory| format!("peak memory {memory:.2} GB")),
            ];
            parts.extend(figures.into_iter().flatten());
        }
        if let Some((iteration, loss)) = self.val_loss.last_key_value() {
            parts.push(format!("validation loss {loss:.3} after iteration {iteration}"));
        }
        parts.join(", ")
    }

    /// Reports of something else are passed over.
    fn take(&mut self, report: &Map<String, Value>) -> Result<(), String> {
        let number = |key: &str| report.get(key).and_then(Value::as_f64);
        let iteration = || report.get("iteration").and_then(Value::as_u64).ok_or("a report of a loss without its `iteration`");
        if let Some(loss) = number("train_loss") {
            let report = TrainReport {
                loss,
                learning_rate: number("learning_rate"),
                iterations_per_second: number("iterations_per_second"),
                tokens_per_second: number("tokens_per_second"),
                trained_tokens: report.get("trained_tokens").and_then(Value::as_u64),
                peak_memory: number("peak_memory"),
            };
            self.train.insert(iteration()?, report);
        }
        if let Some(loss) = number("val_loss") {
            self.val_loss.insert(iteration()?, loss);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{"iteration": 0, "val_loss": 3.5, "val_time": 0.1}
{"iteration": 10, "train_loss": 3.0, "learning_rate": 1e-5, "iterations_per_second": 2.0, "tokens_per_second": 900.25, "trained_tokens": 4000, "peak_memory": 1.5}

{"iteration": 20, "train_loss": 2.5}
{"iteration": 20, "train_loss": 2.4}
{"resumed_at": 20}
"#;

    #[test]
    fn reports_are_kept_by_iteration_and_the_last_counts() {
        let metrics = Metrics::parse(TEXT).unwrap();
        assert_eq!(metrics.val_loss, BTreeMap::from([(0, 3.5)]));
        let first = TrainReport {
            loss: 3.0,
            learning_rate: Some(1e-5),
            iterations_per_second: Some(2.0),
            tokens_per_second: Some(900.25),
            trained_tokens: Some(4000),
            peak_memory: Some(1.5),
        };
        assert_eq!(metrics.train, BTreeMap::from([(10, first), (20, TrainReport { loss: 2.4, ..TrainReport::default() })]));
    }

    #[test]
    fn a_summary_has_what_was_reported_last() {
        let mut metrics = Metrics::parse(TEXT).unwrap();
        assert_eq!(metrics.summary(), "iteration 20: training loss 2.400, validation loss 3.500 after iteration 0");
        metrics.train.remove(&20);
        let figures = "iteration 10: training loss 3.000, 2.00 it/s, 900 tokens/s, 4000 tokens in all, peak memory 1.50 GB, ";
        assert!(metrics.summary().starts_with(figures), "{}", metrics.summary());
    }

    #[test]
    fn a_line_that_is_being_written_is_left_out_and_a_bad_one_is_named() {
        let metrics = Metrics::parse(&format!("{TEXT}{{\"iteration\": 30, \"train_l")).unwrap();
        assert_eq!(metrics, Metrics::parse(TEXT).unwrap());
        let error = Metrics::parse("{\"iteration\": 1, \"val_loss\": 1}\n{oops\n").unwrap_err();
        assert!(error.starts_with(":2:2: this is not the JSON object"), "{error}");
        assert_eq!(Metrics::parse("{\"val_loss\": 1}\n").unwrap_err(), ":1: a report of a loss without its `iteration`");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        assert!(Metrics::read(&path).unwrap_err().to_string().contains("--run is the folder"));
        fs::write(&path, "{\"started\": true}\n").unwrap();
        assert!(Metrics::read(&path).unwrap_err().to_string().ends_with("has no reports of losses yet"));
    }
}
