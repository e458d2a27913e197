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
    /// Behind the prompt, for an answer.
    has_room: bool,
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
    /// The prompt left the answer no room in the context.
    no_room: bool,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Totals {
    rows: u64,
    pub(super) tokens: u64,
    negative_logprob: f64,
    answers: u64,
    exact: u64,
    answers_without_room: u64,
    cut_rows: u64,
}

impl Measure<'_> {
    pub(super) async fn row(&self, row: Row) -> anyhow::Result<Measured> {
        let tokens = self.tokens(&row.content).await?;
        let negative_logprob = self.negative_logprob(&tokens).await?;
        let exact = self.exact(&row.content, tokens.has_room).await?;
        let counted = tokens.ids.len().saturating_sub(tokens.counted_from);
        let no_room = exact.is_some() && !tokens.has_room;
        Ok(Measured { negative_logprob, tokens: counted as u64, cut: tokens.cut, exact, no_room })
    }

    /// As mlx-lm's data sets make them (`tuner/datasets.py`).
    async fn tokens(&self, content: &Content) -> anyhow::Result<Tokens> {
        let (all, prompt) = match content {
            Content::Text(text) => {
                let mut all = self.tokenize(json!({"prompt": text})).await?;
                if let Some(eos) = all.eos.filter(|eos| all.ids.last() != Some(eos)) {
                    all.ids.push(eos);
                }
                (all, None)
            }
            Content::Completion { prompt, completion } if self.raw => {
                let all = self.tokenize(json!({"prompt": format!("{prompt}{completion}")})).await?;
                (all, Some(self.tokenize(json!({"prompt": prompt})).await?))
            }
            Content::Completion { prompt, completion } => {
                let answer = json!({"role": "assistant", "content": completion});
                self.conversation(&user(prompt), &answer, None).await?
            }
            Content::Chat { prompt, answer, tools } => self.conversation(prompt, answer, tools.as_ref()).await?,
        };
        // Templates of models that think may start an answer with an empty thought that they leave out of a conversation. What both have in
        // common is the prompt all the same, and all of what the template starts an answer with where there is no such thing.
        let counted_from = prompt.as_ref().map_or(1, |prompt| common(&all, prompt));
        let has_room = prompt.is_none_or(|prompt| prompt.ids.len() < prompt.context_tokens);
        let Tokenized { mut ids, context_tokens, .. } = all;
        let cut = ids.len() > context_tokens;
        ids.truncate(context_tokens);
        // Nothing comes before the first token that would say it.
        Ok(Tokens { counted_from: counted_from.clamp(1, ids.len().max(1)), ids, cut, has_room })
    }

    /// All of a conversation, and what of it the model is given before the answer.
    async fn conversation(
        &self,
        prompt: &[Value],
        answer: &Value,
        tools: Option<&Value>,
    ) -> anyhow::Result<(Tokenized, Option<Tokenized>)> {
        let before = json!({"messages": prompt, "tools": tools, "add_generation_prompt": true});
        let whole: Vec<&Value> = prompt.iter().chain([answer]).collect();
        let all = json!({"messages": whole, "tools": tools, "add_generation_prompt": false});
        Ok((self.tokenize(all).await?, Some(self.tokenize(before).await?)))
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

    /// Whether the greedy answer is the one wanted, which it is not without room for a token; None where there is none.
    async fn exact(&self, content: &Content, has_room: bool) -> anyhow::Result<Option<bool>> {
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
        // The coordinator would refuse it, and with it all other rows would be lost.
        if !has_room {
            return Ok(Some(false));
        }
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
        self.answers_without_room += u64::from(row.no_room);
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
            "answers_without_room": self.answers_without_room,
        })
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows, {} tokens: loss {:.4}, perplexity {:.3}", self.rows, self.tokens, self.loss(), self.perplexity())?;
        if let Some(share) = self.exact_share() {
            write!(f, ", {} of {} answers exact ({:.1} %)", self.exact, self.answers, 100.0 * share)?;
        }
        if self.cut_rows > 0 {
            write!(f, "; {} rows were longer than the context and are cut", self.cut_rows)?;
        }
        match self.answers_without_room {
            0 => Ok(()),
            answers => write!(f, "; {answers} prompts left no room for an answer, which counts as not exact"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
        net::{TcpListener, TcpStream},
    };

    const CONTEXT_TOKENS: usize = 8;

    #[test]
    fn loss_is_a_mean_over_tokens_and_answers_are_counted_apart() {
        let mut totals = Totals::default();
        let measured = |negative_logprob, tokens, cut, exact| Measured { negative_logprob, tokens, cut, exact, no_room: false };
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

    /// A coordinator whose tokens are bytes, each with the log-probability -1. It says `ab` to everything that leaves room for it.
    async fn answer(mut stream: TcpStream) {
        let (read, mut write) = stream.split();
        let (mut read, mut path, mut length) = (BufReader::new(read), String::new(), 0);
        read.read_line(&mut path).await.expect("a request");
        loop {
            let mut line = String::new();
            read.read_line(&mut line).await.expect("a header");
            match line.trim_end().to_ascii_lowercase().split_once(": ") {
                Some(("content-length", bytes)) => length = bytes.parse().expect("a number"),
                Some(_) => {}
                None => break,
            }
        }
        let mut body = vec![0; length];
        read.read_exact(&mut body).await.expect("a body");
        let body: Value = serde_json::from_slice(&body).expect("JSON");
        let ids = match &body["prompt"] {
            Value::String(text) => text.bytes().map(u64::from).collect(),
            ids => serde_json::from_value::<Vec<u64>>(ids.clone()).expect("ids"),
        };
        let (status, said) = if path.contains("/tokenize") {
            (200, json!({"tokens": ids, "max_model_len": CONTEXT_TOKENS, "eos_token_id": null}))
        } else if ids.len() >= CONTEXT_TOKENS + usize::from(body["max_tokens"] == json!(0)) {
            (400, json!({"error": {"message": "too long; send a shorter one"}}))
        } else {
            (200, json!({"choices": [{"text": "ab", "logprobs": {"token_logprobs": vec![-1.0; ids.len()]}}]}))
        };
        let said = said.to_string();
        let head =
            format!("HTTP/1.1 {status} X\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", said.len());
        write.write_all(format!("{head}{said}").as_bytes()).await.expect("sent");
    }

    #[tokio::test]
    async fn a_prompt_without_room_for_an_answer_is_counted_and_ends_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let client = Client::new(&format!("http://{}", listener.local_addr().expect("bound"))).expect("a client");
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream));
            }
        });
        let mut totals = Totals::default();
        let measure = Measure { client: &client, model: "m", max_tokens: 2, raw: true };
        for prompt in ["1234", "1234567", "12345678", "123456789"] {
            let content = Content::Completion { prompt: prompt.into(), completion: "ab".into() };
            totals.add(&measure.row(Row { line: 1, content }).await.expect("measured"));
        }
        server.abort();
        let wanted = "4 rows, 3 tokens: loss 1.0000, perplexity 2.718, 2 of 4 answers exact (50.0 %); 3 rows were longer than the context and \
                      are cut; 2 prompts left no room for an answer, which counts as not exact";
        assert_eq!(totals.to_string(), wanted);
        assert_eq!(totals.json("m", Path::new("d"))["answers_without_room"], json!(2));
    }
}
