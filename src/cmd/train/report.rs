//! `mlx-cluster train report`: the curves of a run.

use crate::{
    failure::{Exit, Failure},
    training_report::Metrics,
};
use std::{fs, path::PathBuf};

/// Draw the losses and the learning rate of a run.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  mlx-cluster train report --run adapters --svg losses.svg")]
pub(crate) struct ReportArgs {
    /// The picture to write
    #[arg(long, value_name = "FILE")]
    svg: PathBuf,
    /// A folder with a metrics.jsonl, such as the one of the adapter
    #[arg(long, value_name = "FOLDER", default_value = "adapters")]
    run: PathBuf,
}

pub(crate) fn run(args: &ReportArgs) -> anyhow::Result<()> {
    let metrics = Metrics::read(&args.run.join("metrics.jsonl"))?;
    let picture = metrics.svg(&args.run.display().to_string())?;
    fs::write(&args.svg, picture).map_err(|error| Failure::new(Exit::BadFile, format!("cannot write {}: {error}", args.svg.display())))?;
    println!("{}", metrics.summary());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_written_for_a_folder_with_metrics() {
        let folder = tempfile::tempdir().unwrap();
        let args = ReportArgs { svg: folder.path().join("losses.svg"), run: folder.path().to_owned() };
        assert!(run(&args).unwrap_err().to_string().contains("metrics.jsonl"));
        fs::write(folder.path().join("metrics.jsonl"), "{\"iteration\": 1, \"train_loss\": 2.0, \"learning_rate\": 1e-5}\n").unwrap();
        run(&args).unwrap();
        assert!(fs::read_to_string(&args.svg).unwrap().contains("training"));
        let nowhere = ReportArgs { svg: folder.path().join("no/losses.svg"), ..args };
        assert!(run(&nowhere).unwrap_err().to_string().starts_with("cannot write "));
    }
}
