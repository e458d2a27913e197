//! How the work of training is spread over workers.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainStrategy {
    /// What is predicted to be fastest.
    #[default]
    Auto,
    /// A replica of the whole model (or, where that does not fit, of a pipeline) on each worker.
    Data,
    /// A stage a worker.
    Pipeline,
    /// Each matrix split over all workers.
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
    fn strategies_are_read_as_they_are_written() {
        for strategy in [TrainStrategy::Auto, TrainStrategy::Data, TrainStrategy::Pipeline, TrainStrategy::Tensor] {
            assert_eq!(strategy.to_string().parse(), Ok(strategy));
        }
        assert!("ddp".parse::<TrainStrategy>().is_err_and(|error| error.contains("auto, data, pipeline, tensor")));
    }
}
