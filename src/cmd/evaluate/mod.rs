//! `mlx-cluster evaluate`: loss, perplexity and exact answers of a served model on data that it was not trained on.

mod data;
mod measure;

use crate::{
    failure::{Exit, Failure},
    signals,
    target::{Target, TargetArgs, interrupted},
};
use data::{Row, read_rows};
use futures_util::{StreamExt, TryStreamExt, stream};
use indicatif::{ProgressBar, ProgressStyle};
use measure::{Measure, Totals};
use std::path::{Path, PathBuf};

/// Requests at the same time: enough to fill the engines' batches, few enough to be fair to others.
const IN_FLIGHT: usize = 8;

/// Measure a model on held-out data: loss and perplexity of what it should say, and how often it says exactly that.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  mlx-cluster evaluate --data ./data                           (test.jsonl, of the model that a coordinator serves)
  mlx-cluster evaluate --data ./data --split valid --limit 100 --json
  mlx-cluster evaluate --data questions.jsonl --model ./fused_model --max-tokens 0

Rows are those of mlx-lm: {\"messages\": [...]}, {\"prompt\": ..., \"completion\": ...} or {\"text\": ...}, one JSON object a line. As mlx-lm's
--mask-prompt has it, loss is the mean over the tokens of completions (a chat's last message), of a text over all but the first token; the
token of padding that mlx-lm counts behind each row is not counted. An answer is exact when it equals the completion but for white space at its
ends, and is not where its prompt fills the context; texts have no answers.")]
pub(crate) struct EvaluateArgs {
    /// A JSONL file, or a folder with one for each split
    #[arg(long, value_name = "FOLDER|FILE.jsonl")]
    data: PathBuf,
    /// The file of a folder: test.jsonl unless given, valid.jsonl, …
    #[arg(long, value_name = "NAME")]
    split: Option<String>,
    /// So many rows at most, from the first on
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Tokens of an answer at most; 0 asks for none and measures loss alone
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_tokens: u32,
    /// Continue prompts as they are, without the model's chat template
    #[arg(long)]
    raw: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: TargetArgs,
}

pub(crate) async fn run(args: EvaluateArgs) -> anyhow::Result<()> {
    let file = file_of(&args.data, args.split.as_deref())?;
    let rows = read_rows(&file, args.limit)?;
    if let (true, Some(row)) = (args.raw, rows.iter().find(|row| row.is_chat())) {
        let message = format!("{}: line {} has `messages`, which need the chat template: leave --raw out", file.display(), row.line);
        return Err(Failure::new(Exit::Usage, message).into());
    }
    signals::until_stopped(async |stop| {
        let target = Target::reach(&args.target, &stop).await?;
        let measure = Measure { client: &target.client, model: &target.model, max_tokens: args.max_tokens, raw: args.raw };
        let measured = tokio::select! {
            measured = all(&measure, rows) => measured.map_err(|error| error.context(format!("{}", file.display()))),
            () = stop.cancelled() => Err(interrupted()),
        };
        let model = target.model.clone();
        let closed = target.close().await;
        let totals = measured?;
        closed?;
        match args.json {
            true => println!("{}", totals.json(&model, &file)),
            false => println!("{totals}"),
        }
        Ok(())
    })
    .await
}

/// The rows' file: `data`, or that of a split in it.
fn file_of(data: &Path, split: Option<&str>) -> Result<PathBuf, Failure> {
    if data.is_dir() {
        return Ok(data.join(format!("{}.jsonl", split.unwrap_or("test"))));
    }
    match split {
        Some(split) if data.exists() => {
            let message = format!("{} is a file, which has no split `{split}`: leave --split out, or give --data a folder", data.display());
            Err(Failure::new(Exit::Usage, message))
        }
        _ => Ok(data.to_path_buf()),
    }
}

/// Measures rows, some at a time. The first failure ends it.
async fn all(measure: &Measure<'_>, rows: Vec<Row>) -> anyhow::Result<Totals> {
    let style = ProgressStyle::with_template("{pos} of {len} rows {wide_bar} {msg} {eta}").unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(rows.len() as u64).with_style(style);
    let row = async |row: Row| {
        let line = row.line;
        measure.row(row).await.map_err(|error| error.context(format!("line {line}")))
    };
    let totals = stream::iter(rows).map(row).buffer_unordered(IN_FLIGHT).try_fold(Totals::default(), async |mut totals, measured| {
        totals.add(&measured);
        bar.inc(1);
        bar.set_message(format!("loss {:.3}", totals.loss()));
        Ok(totals)
    });
    let totals = totals.await;
    bar.finish_and_clear();
    let totals = totals?;
    if totals.tokens == 0 {
        return Err(Failure::new(Exit::BadFile, "no row has a token to count: every one is cut off by the context").into());
    }
    Ok(totals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_is_a_file_of_a_folder_and_none_of_a_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("questions.jsonl");
        std::fs::write(&file, "x").expect("written");
        for (data, split, wanted) in
            [(folder.path(), None, "test.jsonl"), (folder.path(), Some("valid"), "valid.jsonl"), (&file, None, "questions.jsonl")]
        {
            assert_eq!(file_of(data, split).expect("a file"), folder.path().join(wanted));
        }
        let message = file_of(&file, Some("valid")).expect_err("refused").to_string();
        assert!(message.contains("questions.jsonl is a file") && message.contains("`valid`: leave --split out"), "{message}");
    }
}
