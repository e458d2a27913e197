//! `metrics.jsonl`: an object a line for each report of a run.

use crate::failure::{Exit, Failure};
use mlx_cluster_common::config::parse_json;
use serde_json::{Map, Value};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

const TRAIN_LOSS: &str = "train_loss";
const VAL_LOSS: &str = "val_loss";

/// The reports of a run by their iteration. What was reported again, after a resumption, counts as reported last.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Metrics {
    pub(crate) train: BTreeMap<u64, TrainReport>,
    /// The loss on the validation set.
    pub(crate) val_loss: BTreeMap<u64, f64>,
    /// Names and iterations of losses that were reported, but are no number that a loss (an f32) can be.
    pub(super) not_finite: BTreeSet<(&'static str, u64)>,
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
    /// Says on stderr how many losses are left out.
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        let bad = |message: String| Failure::new(Exit::BadFile, message);
        let text = fs::read(path)
            .map_err(|error| bad(format!("cannot read {}: {error}; --run is the folder of a job or of its adapter", path.display())))?;
        // A line that is being written may end inside a character.
        let metrics = Self::parse(&String::from_utf8_lossy(&text)).map_err(|error| bad(format!("{}{error}", path.display())))?;
        let left_out = metrics.not_finite.len();
        if metrics.train.is_empty() && metrics.val_loss.is_empty() {
            return Err(bad(match left_out {
                0 => format!("{} has no reports of losses yet", path.display()),
                _ => format!("{} has no losses to draw: all {left_out} are not finite", path.display()),
            }));
        }
        if left_out > 0 {
            eprintln!("{}: {left_out} losses are not finite and are left out", path.display());
        }
        Ok(metrics)
    }

    /// Errors continue the name of the file.
    fn parse(text: &str) -> Result<Self, String> {
        let mut metrics = Self::default();
        let last = text.lines().count();
        for (i, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
            match parse_json(line.as_bytes()).and_then(serde_json::from_value::<Map<String, Value>>) {
                Ok(report) => metrics.take(&report).map_err(|error| format!(":{i}: {error}"))?,
                // It is being written.
                Err(_) if i == last && !text.ends_with('\n') => break,
                Err(error) => return Err(format!(":{i}:{}: this is not the JSON object of a report: {error}", error.column())),
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
        // Losses are f32. What is beyond cannot be drawn.
        let number = |key: &str| report.get(key).and_then(Value::as_f64).filter(|number| (*number as f32).is_finite());
        if report.contains_key(TRAIN_LOSS) {
            let loss = number(TRAIN_LOSS).map(|loss| TrainReport {
                loss,
                learning_rate: number("learning_rate"),
                iterations_per_second: number("iterations_per_second"),
                tokens_per_second: number("tokens_per_second"),
                trained_tokens: report.get("trained_tokens").and_then(Value::as_u64),
                peak_memory: number("peak_memory"),
            });
            put(&mut self.train, &mut self.not_finite, (TRAIN_LOSS, iteration(report)?), loss);
        }
        if report.contains_key(VAL_LOSS) {
            put(&mut self.val_loss, &mut self.not_finite, (VAL_LOSS, iteration(report)?), number(VAL_LOSS));
        }
        Ok(())
    }
}

fn iteration(report: &Map<String, Value>) -> Result<u64, &'static str> {
    report.get("iteration").and_then(Value::as_u64).ok_or("a report of a loss without its `iteration`")
}

/// Takes the place of what was reported before, as a number or as none.
fn put<T>(numbers: &mut BTreeMap<u64, T>, not_finite: &mut BTreeSet<(&'static str, u64)>, key: (&'static str, u64), value: Option<T>) {
    match value {
        Some(value) => {
            not_finite.remove(&key);
            numbers.insert(key.1, value);
        }
        None => {
            not_finite.insert(key);
            numbers.remove(&key.1);
        }
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

    #[test]
    fn losses_that_are_not_finite_are_counted_and_left_out() {
        let lines = ["null", "NaN", "-Infinity", "1.7e308", "1e39", "2.0"];
        let lines =
            lines.iter().zip(1..).map(|(loss, i)| format!("{{\"iteration\": {i}, \"train_loss\": {loss}, \"val_loss\": {loss}}}\n"));
        let text = lines.collect::<String>() + "{\"iteration\": 1, \"train_loss\": 3.0, \"learning_rate\": 1e300}\n";
        let metrics = Metrics::parse(&text).unwrap();
        assert_eq!(metrics.train.iter().map(|(i, report)| (*i, report.loss)).collect::<Vec<_>>(), [(1, 3.0), (6, 2.0)]);
        assert_eq!((&metrics.val_loss, metrics.not_finite.len()), (&BTreeMap::from([(6, 2.0)]), 4 + 5));
        assert_eq!(metrics.train[&1].learning_rate, None);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, "{\"iteration\": 1, \"val_loss\": null}\n").unwrap();
        assert!(Metrics::read(&path).unwrap_err().to_string().ends_with("has no losses to draw: all 1 are not finite"));
    }

    #[test]
    fn a_line_that_ends_inside_a_character_is_left_out_and_many_lines_take_no_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut text = (0..100_000).map(|i| format!("{{\"iteration\": {i}, \"val_loss\": 1}}\n")).collect::<String>().into_bytes();
        text.extend_from_slice(&"{\"iteration\": 1, \"note\": \"ä".as_bytes()[..27]);
        assert!(String::from_utf8(text.clone()).is_err());
        fs::write(&path, text).unwrap();
        assert_eq!(Metrics::read(&path).unwrap().val_loss.len(), 100_000);
    }
}
