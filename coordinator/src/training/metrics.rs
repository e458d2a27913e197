//! `metrics.jsonl`: an object a line for each report, in the job's folder and beside the adapter; TensorBoard's event files on request.

use super::{
    files::{FileError, attempt, make_folder, write_atomically},
    reports::{TestReport, TrainReport, ValReport},
    tensorboard::EventFile,
};
use serde::Serialize;
use serde_json::{Map, Value};
use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::SystemTime,
};

pub const METRICS_FILE: &str = "metrics.jsonl";
/// About what a report takes.
const LINE_BYTES: u64 = 1024;

/// The files of one run. Numbers stand there unrounded, each as the shortest decimal that reads back as the same.
#[derive(Debug)]
pub struct Metrics {
    files: Vec<(PathBuf, File)>,
    /// With the folder that it is in.
    tensorboard: Option<(PathBuf, EventFile)>,
}

impl Metrics {
    /// For a job that has done `iteration` batches. Of what is there, reports that will be made again are cut off; beside the adapter the
    /// reports of other jobs make room. TensorBoard's event files go into the folder of that name, where one is given.
    pub fn resume(job_folder: &Path, adapter_path: &Path, iteration: u64, tensorboard: Option<&Path>) -> Result<Self, FileError> {
        let path = job_folder.join(METRICS_FILE);
        let text = match attempt("read", &path, || fs::read(&path)) {
            Err(error) if error.is_not_found() => Vec::new(),
            text => text?,
        };
        let text = String::from_utf8_lossy(&text);
        let kept: String = text.lines().filter(|line| is_past(line, iteration)).flat_map(|line| [line, "\n"]).collect();
        make_folder(adapter_path)?;
        let files = [path, adapter_path.join(METRICS_FILE)].map(|path| {
            write_atomically(&path, kept.as_bytes())?;
            let file = attempt("open", &path, || OpenOptions::new().append(true).open(&path))?;
            Ok((path, file))
        });
        let files = files.into_iter().collect::<Result<_, FileError>>()?;
        let events = |folder: &Path| {
            make_folder(folder)?;
            let file = attempt("write TensorBoard's events into", folder, || EventFile::create(folder, SystemTime::now()))?;
            Ok::<_, FileError>((folder.to_path_buf(), file))
        };
        let tensorboard = tensorboard.map(events).transpose()?;
        Ok(Self { files, tensorboard })
    }

    pub fn train(&mut self, report: &TrainReport) -> Result<(), FileError> {
        self.append(report)
    }

    pub fn val(&mut self, report: &ValReport) -> Result<(), FileError> {
        self.append(report)
    }

    pub fn test(&mut self, report: &TestReport) -> Result<(), FileError> {
        self.append(report)
    }

    fn append(&mut self, report: &impl Serialize) -> Result<(), FileError> {
        for (path, file) in &mut self.files {
            attempt("write", path, || {
                let mut line = serde_json::to_vec(report)?;
                line.push(b'\n');
                // At once, so that a reader seldom sees a part of it.
                file.write_all(&line)
            })
            .map_err(|error| error.of_writing(super::files::parent(path), LINE_BYTES))?;
        }
        let Some((folder, events)) = &mut self.tensorboard else { return Ok(()) };
        let added = attempt("write TensorBoard's events into", folder, || match serde_json::to_value(report)? {
            Value::Object(report) => events.add(&report, SystemTime::now()),
            _ => Ok(()),
        });
        added.map_err(|error| error.of_writing(folder, LINE_BYTES))
    }
}

/// Whether a job that has done `iteration` batches will not make this report again. Losses of validation are reported before the batch
/// whose turn it is.
fn is_past(line: &str, iteration: u64) -> bool {
    let Ok(report) = serde_json::from_str::<Map<String, Value>>(line) else { return false };
    match report.get("iteration").and_then(Value::as_u64) {
        Some(number) if report.contains_key("val_loss") => number < iteration,
        Some(number) => number <= iteration,
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::reports::tests::{train, val};

    struct Folders {
        job: tempfile::TempDir,
        adapter: tempfile::TempDir,
    }

    impl Folders {
        fn new() -> Self {
            Self { job: tempfile::tempdir().unwrap(), adapter: tempfile::tempdir().unwrap() }
        }

        fn resume(&self, iteration: u64) -> Metrics {
            Metrics::resume(self.job.path(), &self.adapter.path().join("new"), iteration, None).unwrap()
        }

        /// What both files hold.
        fn lines(&self) -> Vec<String> {
            let read = |folder: &Path| fs::read_to_string(folder.join(METRICS_FILE)).unwrap();
            let text = read(self.job.path());
            assert_eq!(text, read(&self.adapter.path().join("new")));
            text.lines().map(str::to_owned).collect()
        }
    }

    #[test]
    fn reports_stand_there_unrounded() {
        let folders = Folders::new();
        let mut metrics = folders.resume(0);
        metrics.val(&val(0)).unwrap();
        metrics.train(&train(10)).unwrap();
        metrics.test(&TestReport { test_loss: 0.1, test_ppl: 1.1 }).unwrap();
        assert_eq!(
            folders.lines(),
            [
                r#"{"iteration":0,"val_loss":3.25,"val_time":0.5}"#,
                r#"{"iteration":10,"train_loss":2.3451,"learning_rate":0.00001,"iterations_per_second":1.2345,"tokens_per_second":456.75,"trained_tokens":1234,"peak_memory":0.1234,"peak_memory_per_worker":{"mini":0.1,"studio":0.1234},"communication_share":0.056}"#,
                r#"{"test_loss":0.1,"test_ppl":1.1}"#,
            ]
        );
    }

    #[test]
    fn no_report_is_there_twice_after_a_resumption() {
        let run = |metrics: &mut Metrics, from: u64, to: u64| {
            for iteration in from + 1..=to {
                if iteration % 4 == 1 {
                    metrics.val(&val(iteration - 1)).unwrap();
                }
                metrics.train(&train(iteration)).unwrap();
            }
        };
        let whole = Folders::new();
        run(&mut whole.resume(0), 0, 12);
        for checkpoint in 0..12 {
            let folders = Folders::new();
            run(&mut folders.resume(0), 0, 11);
            // A line that was being written when the power failed.
            let torn = folders.job.path().join(METRICS_FILE);
            OpenOptions::new().append(true).open(torn).unwrap().write_all(b"{\"iteration\": 1, \"tr").unwrap();
            run(&mut folders.resume(checkpoint), checkpoint, 12);
            assert_eq!(folders.lines(), whole.lines(), "resumed at {checkpoint}");
        }
    }

    #[test]
    fn event_files_are_written_on_request() {
        let folders = Folders::new();
        let events = folders.adapter.path().join("my-run");
        let mut metrics = Metrics::resume(folders.job.path(), folders.adapter.path(), 0, Some(&events)).unwrap();
        let bytes = || {
            let files = fs::read_dir(&events).unwrap().map(|entry| entry.unwrap());
            let events: Vec<_> = files.filter(|file| file.file_name().to_string_lossy().starts_with("events.out.tfevents")).collect();
            assert_eq!(events.len(), 1);
            fs::read(events[0].path()).unwrap()
        };
        let before = bytes();
        metrics.train(&train(1)).unwrap();
        let added = bytes().split_off(before.len());
        assert!(added.windows(10).any(|text| text == b"train_loss"));
    }

    #[test]
    fn reports_of_another_job_beside_the_adapter_make_room() {
        let folders = Folders::new();
        folders.resume(0).train(&train(5)).unwrap();
        let other = Folders { job: tempfile::tempdir().unwrap(), adapter: folders.adapter };
        other.resume(0);
        assert_eq!(other.lines(), Vec::<String>::new());
    }
}
