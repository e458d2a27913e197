//! What the API says about one row, and sums over rows.

use super::data::{Content, Row};
use crate::client::Client;
use anyhow::Context;
use serde_json::{Value, json};
use std::{fmt, path::Path};

/// How rows are measured.
pub(super) struct Measure<'a> {
    pub(super) client: &'a Client,
    pub(super) model: &'a str,
    /// Of an answer; 0 asks for none.
    pub(super) max_tokens: u32,
    /// Without the chat template.
    pub(super) raw: bool,
}

/// A row as token ids, of which those from `counted_from` on are to be said by the model.
struct Tokens {
    ids: Vec<u64>,
    counted_from: usize,
    /// Some did not fit the context.
    cut: bool,
}

/// The ids of a text, and what the server says along with them.
struct Tokenized {
    ids: Vec<u64>,
    context_tokens: usize,
    eos: Option<u64>,
}

/// Of one row.
pub(super) struct Measured {
    negative_logprob: f64,
    tokens: u64,
    cut: bool,
    /// Whether the answer was exact; None where none was asked for.
    exact: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Totals {
    rows: u64,
    pub(super) tokens: u64,
    negative_logprob: f64,
    answers: u64,
    exact: u64,
    cut_rows: u64,
}

impl Measure<'_> {
    pub(super) async fn row(&self, row: Row) -> anyhow::Result<Measured> {
        let tokens = self.tokens(&row.content).await?;
        let negative_logprob = self.negative_logprob(&tokens).await?;
        let exact = self.exact(&row.content).await?;
        let counted = tokens.ids.len().saturating_sub(tokens.counted_from);
        Ok(Measured { negative_logprob, tokens: counted as u64, cut: tokens.cut, exact })
    }

    /// As mlx-lm's data sets make them (`tuner/datasets.py`).
    async fn tokens(&self, content: &Content) -> anyhow::Result<Tokens> {
        let (all, prompt) = match content {
            Content::Text(text) => {
                let mut all = self.tokenize(json!({"prompt": text})).await?;
                if let Some(eos) = all.eos.filter(|eos| all.ids.last() != Some(eos)) {
                    all.ids.push(eos);
                }
                (all, 1)
            }
            Content::Completion { prompt, completion } if self.raw => {
                let all = self.tokenize(json!({"prompt": format!("{prompt}{completion}")})).await?;
                let prompt = common(&all, &self.tokenize(json!({"prompt": prompt})).await?);
                (all, prompt)
            }
            Content::Completion { prompt, completion } => {
                let answer = json!({"role": "assistant", "content": completion});
                self.conversation(&user(prompt), &answer, None).await?
            }
            Content::Chat { prompt, answer, tools } => self.conversation(prompt, answer, tools.as_ref()).await?,
        };
        let Tokenized { mut ids, context_tokens, .. } = all;
        let cut = ids.len() > context_tokens;
        ids.truncate(context_tokens);
        // Nothing comes before the first token that would say it.
        Ok(Tokens { counted_from: prompt.clamp(1, ids.len().max(1)), ids, cut })
    }

    /// All of a conversation, and the number of its tokens before the answer.
    async fn conversation(&self, prompt: &[Value], answer: &Value, tools: Option<&Value>) -> anyhow::Result<(Tokenized, usize)> {
        let before = json!({"messages": prompt, "tools": tools, "add_generation_prompt": true});
        let whole: Vec<&Value> = prompt.iter().chain([answer]).collect();
        let all = json!({"messages": whole, "tools": tools, "add_generation_prompt": false});
        let (all, before) = (self.tokenize(all).await?, self.tokenize(before).await?);
        // Templates of models that think may start an answer with an empty thought that they leave out of a conversation. What both have in
        // common is the prompt all the same, and all of what the template starts an answer with where there is no such thing.
        let prompt = common(&all, &before);
        Ok((all, prompt))
    }

    async fn tokenize(&self, mut body: Value) -> anyhow::Result<Tokenized> {
        body["model"] = json!(self.model);
        let answer = self.client.post("tokenize", &body).await?;
        let ids = answer["tokens"].as_array().map(|ids| ids.iter().filter_map(Value::as_u64).collect());
        let context_tokens = answer["max_model_len"].as_u64().map(|tokens| tokens as usize);
        let (ids, context_tokens) = ids.zip(context_tokens).context("the coordinator does not say what a text's tokens are")?;
        Ok(Tokenized { ids, context_tokens, eos: answer["eos_token_id"].as_u64() })
    }

    /// Over the tokens that count.
    async fn negative_logprob(&self, tokens: &Tokens) -> anyhow::Result<f64> {
        if tokens.counted_from >= tokens.ids.len() {
            return Ok(0.0);
        }
        let body = json!({"model": self.model, "prompt": tokens.ids, "max_tokens": 0, "echo": true, "logprobs": 0});
        let answer = self.client.post("v1/completions", &body).await?;
        let logprobs = answer.pointer("/choices/0/logprobs/token_logprobs").and_then(Value::as_array);
        let logprobs = logprobs.filter(|logprobs| logprobs.len() == tokens.ids.len());
        let logprobs = logprobs.context("the coordinator gives no log-probabilities of the prompt")?;
        let counted: Option<f64> = logprobs[tokens.counted_from..].iter().map(Value::as_f64).sum();
        Ok(-counted.context("the coordinator leaves out log-probabilities of the prompt")?)
    }

    /// Whether the greedy answer is the one wanted; None where there is none.
    async fn exact(&self, content: &Content) -> anyhow::Result<Option<bool>> {
        if self.max_tokens == 0 {
            return Ok(None);
        }
        let chat = |messages: &[Value], tools: Option<&Value>| json!({"messages": messages, "tools": tools});
        let (path, mut body, wanted) = match content {
            Content::Text(_) => return Ok(None),
            Content::Completion { prompt, completion } if self.raw => ("v1/completions", json!({"prompt": prompt}), completion.as_str()),
            Content::Completion { prompt, completion } => ("v1/chat/completions", chat(&user(prompt), None), completion.as_str()),
            Content::Chat { prompt, answer, tools } => match answer["content"].as_str() {
                Some(wanted) => ("v1/chat/completions", chat(prompt, tools.as_ref()), wanted),
                // It calls a tool; there are no words to compare.
                None => return Ok(None),
            },
        };
        body["model"] = json!(self.model);
        body["temperature"] = json!(0);
        body["max_tokens"] = json!(self.max_tokens);
        let answer = self.client.post(path, &body).await?;
        let said = answer.pointer("/choices/0/message/content").or_else(|| answer.pointer("/choices/0/text"));
        let said = said.and_then(Value::as_str).unwrap_or_default();
        Ok(Some(said.trim() == wanted.trim()))
    }
}

/// Tokens that both begin with.
fn common(one: &Tokenized, other: &Tokenized) -> usize {
    one.ids.iter().zip(&other.ids).take_while(|(one, other)| one == other).count()
}

fn user(prompt: &str) -> [Value; 1] {
    [json!({"role": "user", "content": prompt})]
}

impl Totals {
    pub(super) fn add(&mut self, row: &Measured) {
        self.rows += 1;
        self.tokens += row.tokens;
        self.negative_logprob += row.negative_logprob;
        self.answers += u64::from(row.exact.is_some());
        self.exact += u64::from(row.exact == Some(true));
        self.cut_rows += u64::from(row.cut);
    }

    /// Nats a token.
    pub(super) fn loss(&self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.negative_logprob / self.tokens as f64 }
    }

    fn perplexity(&self) -> f64 {
        self.loss().exp()
    }

    fn exact_share(&self) -> Option<f64> {
        (self.answers > 0).then(|| self.exact as f64 / self.answers as f64)
    }

    pub(super) fn json(&self, model: &str, file: &Path) -> Value {
        json!({
            "model": model,
            "data": file.display().to_string(),
            "rows": self.rows,
            "rows_cut": self.cut_rows,
            "tokens": self.tokens,
            "loss": self.loss(),
            "perplexity": self.perplexity(),
            "answers": self.answers,
            "exact": self.exact,
            "exact_match": self.exact_share(),
        })
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows, {} tokens: loss {:.4}, perplexity {:.3}", self.rows, self.tokens, self.loss(), self.perplexity())?;
        if let Some(share) = self.exact_share() {
            write!(f, ", {} of {} answers exact ({:.1} %)", self.exact, self.answers, 100.0 * share)?;
        }
        match self.cut_rows {
            0 => Ok(()),
            rows => write!(f, "; {rows} rows were longer than the context and are cut"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_is_a_mean_over_tokens_and_answers_are_counted_apart() {
        let mut totals = Totals::default();
        let measured = |negative_logprob, tokens, cut, exact| Measured { negative_logprob, tokens, cut, exact };
        totals.add(&measured(3.0, 3, false, Some(true)));
        totals.add(&measured(3.0, 1, true, Some(false)));
        totals.add(&measured(0.0, 2, false, None));
        assert_eq!((totals.loss(), totals.exact_share()), (1.0, Some(0.5)));
        let text = totals.to_string();
        assert_eq!(
            text,
            "3 rows, 6 tokens: loss 1.0000, perplexity 2.718, 1 of 2 answers exact (50.0 %); 1 rows were longer than the context and are cut"
        );
        assert_eq!(totals.json("m", Path::new("d"))["exact_match"], json!(0.5));
        assert_eq!(Totals::default().json("m", Path::new("d"))["exact_match"], Value::Null);
    }
}
