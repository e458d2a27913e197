//! How the next token is chosen: the parameters of a request, checked.

use serde::{Deserialize, Serialize};

/// Tokens that the repetition penalty looks back on, as in mlx-lm.
pub const REPETITION_WINDOW: usize = 20;

/// Most alternatives per position that log-probabilities are given for, as in OpenAI's API.
pub const TOP_LOGPROBS_MAX: u32 = 20;

/// The draw for token `i` depends on (`seed`, `i`) and the logits alone. Order of the stages, as in mlx-lm: logit bias,
/// repetition penalty, presence and frequency penalty on the logits; then top-p, min-p, top-k on the log-probabilities; then the temperature.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// The smallest set of tokens whose probability reaches this stays; 1 keeps all.
    pub top_p: f32,
    /// Tokens less likely than this share of the most likely one go; 0 keeps all.
    pub min_p: f32,
    /// This many of the most likely tokens stay; 0 keeps all.
    pub top_k: u32,
    /// Logits of the last [`REPETITION_WINDOW`] tokens are divided by this when positive, multiplied when negative; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of each token generated so far; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token for each time it was generated so far; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: u64,
    /// Log-probabilities of the generated tokens are wanted, with so many alternatives each.
    pub logprobs: Option<u32>,
    /// Log-probabilities of the prompt's tokens are wanted, with so many alternatives each.
    pub prompt_logprobs: Option<u32>,
    /// Tokens to generate at most; 0 only reads the prompt.
    pub max_tokens: u32,
    /// Generation ends with any of these; the token itself is not delivered as text.
    pub stop_tokens: Vec<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            min_p: 0.0,
            top_k: 0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            prompt_logprobs: None,
            max_tokens: 256,
            stop_tokens: Vec::new(),
        }
    }
}

/// A sampling parameter outside of what it may be.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{param} must be {wanted}, not {value}")]
pub struct SamplingError {
    pub param: &'static str,
    pub wanted: String,
    pub value: String,
}

impl SamplingParams {
    /// Checks every value against its range and every token id against the vocabulary.
    pub fn check(&self, vocab_size: u32) -> Result<(), SamplingError> {
        let range = |param, value: f32, min: f32, max: f32| {
            if value.is_finite() && (min..=max).contains(&value) {
                return Ok(());
            }
            Err(SamplingError { param, wanted: format!("a number from {min} to {max}"), value: value.to_string() })
        };
        range("temperature", self.temperature, 0.0, 100.0)?;
        range("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)
            .map_err(|error| SamplingError { wanted: "above 0 and at most 1".into(), ..error })?;
        range("min_p", self.min_p, 0.0, 1.0)?;
        range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)?;
        range("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        for &(token, bias) in &self.logit_bias {
            range("logit_bias", bias, -100.0, 100.0)?;
            if token >= vocab_size {
                return Err(SamplingError {
                    param: "logit_bias",
                    wanted: format!("for token ids below {vocab_size}"),
                    value: token.to_string(),
                });
            }
        }
        for (param, count) in [("top_logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if count.is_some_and(|count| count > TOP_LOGPROBS_MAX) {
                return Err(SamplingError {
                    param,
                    wanted: format!("at most {TOP_LOGPROBS_MAX}"),
                    value: count.unwrap_or_default().to_string(),
                });
            }
        }
        Ok(())
    }

    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether choosing a token needs the tokens before it.
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_out_of_range_are_named() {
        let bad = |change: fn(&mut SamplingParams)| {
            let mut params = SamplingParams::default();
            change(&mut params);
            params.check(100).expect_err("out of range").param
        };
        assert_eq!(SamplingParams::default().check(100), Ok(()));
        assert_eq!(bad(|p| p.temperature = -1.0), "temperature");
        assert_eq!(bad(|p| p.temperature = f32::NAN), "temperature");
        assert_eq!(bad(|p| p.top_p = 0.0), "top_p");
        assert_eq!(bad(|p| p.min_p = 2.0), "min_p");
        assert_eq!(bad(|p| p.logit_bias = vec![(100, 1.0)]), "logit_bias");
        assert_eq!(bad(|p| p.logit_bias = vec![(1, f32::INFINITY)]), "logit_bias");
        assert_eq!(bad(|p| p.logprobs = Some(21)), "top_logprobs");
    }
}
