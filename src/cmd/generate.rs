//! `mlx-cluster generate`: one prompt, one answer.

use crate::{
    client::{Client, Piece, Question, Usage},
    signals,
    target::{Target, TargetArgs, interrupted},
};
use serde_json::{Map, Value, json};
use std::{
    io::{self, IsTerminal, Read, Write},
    time::{Duration, Instant},
};

/// Ask once, and print the answer as it comes.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  mlx-cluster generate --prompt 'Why is the sky blue?' --max-tokens 200
  mlx-cluster generate --model mlx-community/Qwen3-0.6B-4bit --prompt - <question.txt")]
pub(crate) struct GenerateArgs {
    /// What to ask; `-` reads it from stdin
    #[arg(long, short)]
    prompt: String,
    /// Put before the prompt as the system's message
    #[arg(long, conflicts_with = "raw")]
    system: Option<String>,
    /// Continue the prompt as it is, without the model's chat template
    #[arg(long)]
    raw: bool,
    /// Print one JSON object when the answer is complete
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// How the tokens of an answer are chosen.
#[derive(clap::Args)]
pub(crate) struct SamplingArgs {
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_tokens: u32,
    /// 0 always takes the most likely token
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Keep the smallest set of tokens that has this probability together
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// Keep this many of the most likely tokens
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Drop tokens less likely than this share of the most likely one
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f64>,
    /// Make tokens that were used lately less likely; 1 is off
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    repetition_penalty: Option<f64>,
    /// The same seed gives the same answer
    #[arg(long)]
    seed: Option<u64>,
    /// End the answer before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

impl SamplingArgs {
    /// The fields of a request; what was not given is left to the server.
    pub(crate) fn fields(&self, model: &str) -> Value {
        let mut fields = Map::from_iter([("model".to_owned(), json!(model)), ("max_tokens".to_owned(), json!(self.max_tokens))]);
        let optional = [
            ("temperature", json!(self.temperature)),
            ("top_p", json!(self.top_p)),
            ("top_k", json!(self.top_k)),
            ("min_p", json!(self.min_p)),
            ("repetition_penalty", json!(self.repetition_penalty)),
            ("seed", json!(self.seed)),
            ("stop", if self.stop.is_empty() { Value::Null } else { json!(self.stop) }),
        ];
        fields.extend(optional.into_iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name.to_owned(), value)));
        Value::Object(fields)
    }
}

pub(crate) async fn run(args: GenerateArgs) -> anyhow::Result<()> {
    let question = question(&args)?;
    signals::until_stopped(async |stop| {
        let target = Target::reach(&args.target, &stop).await?;
        let mut shown = Shown::new(if args.json { Style::Quiet } else { Style::Live });
        let fields = args.sampling.fields(&target.model);
        let answered = tokio::select! {
            answered = shown.ask(&target.client, question, &fields) => answered,
            () = stop.cancelled() => Err(interrupted()),
        };
        let answer = shown.finish();
        let closed = target.close().await;
        answered?;
        closed?;
        match args.json {
            true => println!("{}", answer.json()),
            false => eprintln!("{}", answer.figures()),
        }
        Ok(())
    })
    .await
}

fn question(args: &GenerateArgs) -> anyhow::Result<Question> {
    let mut prompt = args.prompt.clone();
    if prompt == "-" {
        prompt.clear();
        io::stdin().read_to_string(&mut prompt)?;
    }
    if args.raw {
        return Ok(Question::Raw(prompt));
    }
    let system = args.system.iter().map(|text| json!({"role": "system", "content": text}));
    Ok(Question::Chat(system.chain([json!({"role": "user", "content": prompt})]).collect()))
}

/// What came back, with its times.
pub(crate) struct Answer {
    pub(crate) text: String,
    thinking: String,
    finish_reason: String,
    usage: Usage,
    to_first_token: Option<Duration>,
    took: Duration,
}

impl Answer {
    fn tokens_per_second(&self) -> f64 {
        let decoding = self.took.saturating_sub(self.to_first_token.unwrap_or_default()).as_secs_f64();
        let decoded = self.usage.completion_tokens.saturating_sub(1) as f64;
        if decoding > 0.0 { decoded / decoding } else { 0.0 }
    }

    /// One line for people.
    pub(crate) fn figures(&self) -> String {
        if self.finish_reason.is_empty() {
            return format!("[stopped after {:.2} s]", self.took.as_secs_f64());
        }
        let Usage { prompt_tokens, completion_tokens } = self.usage;
        let (first, total) = (self.to_first_token.unwrap_or(self.took).as_secs_f64(), self.took.as_secs_f64());
        format!(
            "[{completion_tokens} tokens after a prompt of {prompt_tokens}, {:.1} tokens/s, first token after {first:.2} s, {total:.2} s in all]",
            self.tokens_per_second()
        )
    }

    fn json(&self) -> Value {
        json!({
            "text": self.text,
            "reasoning": self.thinking,
            "finish_reason": self.finish_reason,
            "usage": {"prompt_tokens": self.usage.prompt_tokens, "completion_tokens": self.usage.completion_tokens},
            "tokens_per_second": self.tokens_per_second(),
            "time_to_first_token_s": self.to_first_token.map(|time| time.as_secs_f64()),
            "time_s": self.took.as_secs_f64(),
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// Every piece as it comes.
    Live,
    Quiet,
}

/// An answer while it is printed.
pub(crate) struct Shown {
    style: Style,
    answer: Answer,
    started: Instant,
    dimmed: bool,
}

const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

impl Shown {
    pub(crate) fn new(style: Style) -> Self {
        let answer = Answer {
            text: String::new(),
            thinking: String::new(),
            finish_reason: String::new(),
            usage: Usage::default(),
            to_first_token: None,
            took: Duration::ZERO,
        };
        Self { style, answer, started: Instant::now(), dimmed: false }
    }

    pub(crate) async fn ask(&mut self, client: &Client, question: Question, fields: &Value) -> anyhow::Result<()> {
        self.started = Instant::now();
        client.ask(question, fields, |piece| self.take(piece)).await
    }

    fn take(&mut self, piece: Piece) -> anyhow::Result<()> {
        if matches!(piece, Piece::Text(_) | Piece::Thinking(_)) {
            self.answer.to_first_token.get_or_insert(self.started.elapsed());
        }
        match piece {
            Piece::Text(text) => {
                self.print(&text, false)?;
                self.answer.text.push_str(&text);
            }
            Piece::Thinking(text) => {
                self.print(&text, true)?;
                self.answer.thinking.push_str(&text);
            }
            Piece::Finished(reason) => self.answer.finish_reason = reason,
            Piece::Usage(usage) => self.answer.usage = usage,
        }
        Ok(())
    }

    /// Thinking is dimmed on a terminal, and set apart by an empty line.
    fn print(&mut self, text: &str, thinking: bool) -> io::Result<()> {
        if self.style == Style::Quiet {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        if self.dimmed != thinking {
            let colour = if thinking { DIM } else { PLAIN };
            write!(out, "{}{}", if io::stdout().is_terminal() { colour } else { "" }, if thinking { "" } else { "\n\n" })?;
            self.dimmed = thinking;
        }
        write!(out, "{text}")?;
        out.flush()
    }

    /// Ends the line; what came so far is the answer.
    pub(crate) fn finish(mut self) -> Answer {
        self.answer.took = self.started.elapsed();
        if self.style == Style::Live {
            let plain = if self.dimmed && io::stdout().is_terminal() { PLAIN } else { "" };
            println!("{plain}");
        }
        self.answer
    }
}
