//! `mlx-cluster chat`: a conversation at the terminal.

use super::generate::{SamplingArgs, Shown, Style};
use crate::{
    client::Question,
    home::home,
    signals::{Interrupts, terminated},
    target::{Target, TargetArgs},
};
use anyhow::Context;
use rustyline::{DefaultEditor, error::ReadlineError};
use serde_json::{Value, json};
use std::{io::IsTerminal, path::PathBuf};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// Talk with the model; it remembers what was said.
#[derive(clap::Args)]
#[command(after_help = "\
In the conversation: /reset forgets what was said, /help lists the commands, /exit ends it; Ctrl-C stops an answer.

Example:
  mlx-cluster chat
  mlx-cluster chat --model mlx-community/Qwen3-0.6B-4bit --system 'Answer in one sentence.'")]
pub(crate) struct ChatArgs {
    /// The system's message at the start of the conversation
    #[arg(long)]
    system: Option<String>,
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

const HELP: &str = "/reset forgets what was said, /exit (or Ctrl-D) ends the conversation, Ctrl-C stops an answer";

pub(crate) async fn run(args: ChatArgs) -> anyhow::Result<()> {
    let mut interrupts = Interrupts::new()?;
    let stop = CancellationToken::new();
    let target = tokio::select! {
        target = Target::reach(&args.target, &stop) => target?,
        () = either(&mut interrupts) => {
            stop.cancel();
            return Err(crate::target::interrupted());
        }
    };
    let talked = tokio::select! {
        talked = talk(&target, &args, &mut interrupts) => talked,
        terminated = terminated() => terminated.context("cannot listen for SIGTERM"),
    };
    target.close().await?;
    talked
}

/// Ctrl-C or SIGTERM.
async fn either(interrupts: &mut Interrupts) {
    tokio::select! {
        () = interrupts.next() => {}
        _ = terminated() => {}
    }
}

async fn talk(target: &Target, args: &ChatArgs, interrupts: &mut Interrupts) -> anyhow::Result<()> {
    let fields = args.sampling.fields(&target.model);
    let beginning: Vec<Value> = args.system.iter().map(|text| json!({"role": "system", "content": text})).collect();
    let mut messages = beginning.clone();
    let mut keyboard = Keyboard::open()?;
    println!("{} at {}; /help lists the commands", target.model, target.client.url());
    loop {
        // At a terminal Ctrl-C is a key like others here; this one came from elsewhere.
        let line = tokio::select! {
            line = keyboard.line() => line?,
            () = interrupts.next() => None,
        };
        let Some(line) = line else { return Ok(()) };
        match line.trim() {
            "" => {}
            "/exit" | "/quit" => return Ok(()),
            "/help" => println!("{HELP}"),
            "/reset" => {
                messages.clone_from(&beginning);
                println!("forgotten");
            }
            command if command.starts_with('/') => println!("there is no command {command}: {HELP}"),
            text => {
                messages.push(json!({"role": "user", "content": text}));
                match answer(target, &fields, &messages, interrupts).await {
                    Ok(text) => messages.push(json!({"role": "assistant", "content": text})),
                    Err(error) => {
                        println!("error: {error:#}");
                        messages.pop();
                    }
                }
            }
        }
    }
}

/// Streams one answer; Ctrl-C ends it, and what was said so far stays.
async fn answer(target: &Target, fields: &Value, messages: &[Value], interrupts: &mut Interrupts) -> anyhow::Result<String> {
    let mut shown = Shown::new(Style::Live);
    let answered = tokio::select! {
        answered = shown.ask(&target.client, Question::Chat(messages.to_vec()), fields) => answered,
        () = interrupts.next() => Ok(()),
    };
    let answer = shown.finish();
    answered?;
    if std::io::stdout().is_terminal() {
        println!("\x1b[2m{}\x1b[0m", answer.figures());
    }
    Ok(answer.text)
}

/// Lines from the terminal, read on a thread of their own because reading blocks.
struct Keyboard {
    requests: mpsc::Sender<oneshot::Sender<rustyline::Result<String>>>,
}

impl Keyboard {
    fn open() -> anyhow::Result<Self> {
        let history = history();
        let mut editor = DefaultEditor::new()?;
        if let Some(path) = &history {
            // There is none the first time.
            let _ = editor.load_history(path);
        }
        let (requests, mut wanted) = mpsc::channel::<oneshot::Sender<_>>(1);
        let read = move || {
            while let Some(reply) = wanted.blocking_recv() {
                let line = editor.readline("> ");
                if let (Ok(line), Some(path)) = (&line, &history) {
                    // A history that cannot be kept must not end the conversation.
                    let _ = editor.add_history_entry(line.as_str());
                    let _ = editor.save_history(path);
                }
                if reply.send(line).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("keyboard".into()).spawn(read)?;
        Ok(Self { requests })
    }

    /// The next line; None at the end of the input. Ctrl-C on an empty line is a line without text.
    async fn line(&mut self) -> anyhow::Result<Option<String>> {
        let (reply, line) = oneshot::channel();
        if self.requests.send(reply).await.is_err() {
            return Ok(None);
        }
        match line.await {
            Ok(Ok(line)) => Ok(Some(line)),
            Ok(Err(ReadlineError::Interrupted)) => Ok(Some(String::new())),
            Ok(Err(ReadlineError::Eof)) | Err(_) => Ok(None),
            Ok(Err(error)) => Err(error).context("cannot read from the terminal"),
        }
    }
}

/// Only what is typed at a terminal is worth keeping.
fn history() -> Option<PathBuf> {
    let home = home().ok().filter(|_| std::io::stdin().is_terminal())?;
    std::fs::create_dir_all(&home).ok()?;
    Some(home.join("chat_history"))
}
