//! How a job is spread over workers.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// As `train --strategy` takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainStrategy {
    /// What is predicted to be fastest.
    #[default]
    Auto,
    /// Each worker has all layers and rows of its own.
    Data,
    /// A stage a worker.
    Pipeline,
    /// Each worker has a part of every matrix.
    Tensor,
}

impl FromStr for TrainStrategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(TrainStrategy::Auto),
            "data" => Ok(TrainStrategy::Data),
            "pipeline" => Ok(TrainStrategy::Pipeline),
            "tensor" => Ok(TrainStrategy::Tensor),
            other => Err(format!("strategy `{other}` is not one of auto, data, pipeline, tensor")),
        }
    }
}

impl fmt::Display for TrainStrategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TrainStrategy::Auto => "auto",
            TrainStrategy::Data => "data",
            TrainStrategy::Pipeline => "pipeline",
            TrainStrategy::Tensor => "tensor",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strategies_are_parsed_as_they_are_printed() {
        for strategy in [TrainStrategy::Auto, TrainStrategy::Data, TrainStrategy::Pipeline, TrainStrategy::Tensor] {
            assert_eq!(strategy.to_string().parse(), Ok(strategy));
        }
        let error = "both".parse::<TrainStrategy>().unwrap_err();
        assert_eq!(error, "strategy `both` is not one of auto, data, pipeline, tensor");
    }
}
