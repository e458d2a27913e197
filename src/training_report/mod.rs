//! What became of a training run, from its `metrics.jsonl`.

mod metrics;
mod svg;

pub(crate) use metrics::Metrics;
