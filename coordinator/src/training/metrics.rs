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
    /// In the job's folder.
    own: (PathBuf, File),
    beside: Beside,
    /// With the folder that it is in.
    tensorboard: Option<(PathBuf, EventFile)>,
}

/// The file beside the adapter.
#[derive(Debug)]
enum Beside {
    /// The job has no adapter.
    Nowhere,
    /// There is nothing to write yet, so what another job left stays; then it makes room.
    Waits(PathBuf),
    Open(PathBuf, File),
}

/// Whose reports may be beside the adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// Of other adapters that were in this place: they make room for this job's.
    Replaced,
    /// Of how the adapter was made, which this job only tests.
    Kept,
}

impl Metrics {
    /// For a job that has done `iteration` batches. Of what is there, reports that will be made again are cut off. No `adapter_path`: the job's own
    /// folder alone. TensorBoard's event files go into the folder of that name, where one is given.
    pub fn resume(
        job_folder: &Path,
        adapter_path: Option<&Path>,
        others: Others,
        iteration: u64,
        tensorboard: Option<&Path>,
    ) -> Result<Self, FileError> {
        let path = job_folder.join(METRICS_FILE);
        let text = match attempt("read", &path, || fs::read(&path)) {
            Err(error) if error.is_not_found() => Vec::new(),
            text => text?,
        };
        let text = String::from_utf8_lossy(&text);
        let kept: String = text.lines().filter(|line| is_past(line, iteration)).flat_map(|line| [line, "\n"]).collect();
        write_atomically(&path, kept.as_bytes())?;
        let own = (path.clone(), opened(&path)?);
        let beside = match adapter_path {
            None => Beside::Nowhere,
            Some(folder) => {
                make_folder(folder)?;
                let path = folder.join(METRICS_FILE);
                match others {
                    Others::Replaced if kept.is_empty() => Beside::Waits(path),
                    Others::Replaced => {
                        write_atomically(&path, kept.as_bytes())?;
                        Beside::Open(path.clone(), opened(&path)?)
                    }
                    Others::Kept => Beside::Open(path.clone(), opened(&path)?),
                }
            }
        };
        let events = |folder: &Path| {
            make_folder(folder)?;
            let file = attempt("write TensorBoard's events into", folder, || EventFile::create(folder, SystemTime::now()))?;
            Ok::<_, FileError>((folder.to_path_buf(), file))
        };
        let tensorboard = tensorboard.map(events).transpose()?;
        Ok(Self { own, beside, tensorboard })
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
        if let Beside::Waits(path) = &self.beside {
            write_atomically(path, b"")?;
            self.beside = Beside::Open(path.clone(), opened(path)?);
        }
        let (own, file) = &mut self.own;
        let beside = match &mut self.beside {
            Beside::Open(path, file) => Some((&*path, file)),
            Beside::Nowhere | Beside::Waits(_) => None,
        };
        for (path, file) in [(&*own, file)].into_iter().chain(beside) {
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

fn opened(path: &Path) -> Result<File, FileError> {
    attempt("open", path, || OpenOptions::new().append(true).create(true).open(path))
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
            Metrics::resume(self.job.path(), Some(&self.adapter.path().join("new")), Others::Replaced, iteration, None).unwrap()
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
        let mut metrics = Metrics::resume(folders.job.path(), Some(folders.adapter.path()), Others::Replaced, 0, Some(&events)).unwrap();
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
    fn reports_of_another_job_beside_the_adapter_make_room_when_there_is_something_to_say() {
        let folders = Folders::new();
        folders.resume(0).train(&train(5)).unwrap();
        let before = folders.lines();
        let other = Folders { job: tempfile::tempdir().unwrap(), adapter: folders.adapter };
        let mut metrics = other.resume(0);
        let beside = || fs::read_to_string(other.adapter.path().join("new").join(METRICS_FILE)).unwrap();
        assert_eq!(beside().lines().collect::<Vec<_>>(), before);
        metrics.train(&train(1)).unwrap();
        assert_eq!(other.lines().len(), 1);
    }

    #[test]
    fn a_test_of_an_adapter_adds_to_what_is_known_of_it() {
        let folders = Folders::new();
        folders.resume(0).train(&train(5)).unwrap();
        let (job, adapter) = (tempfile::tempdir().unwrap(), folders.adapter.path().join("new"));
        let mut metrics = Metrics::resume(job.path(), Some(&adapter), Others::Kept, 0, None).unwrap();
        metrics.test(&TestReport { test_loss: 0.1, test_ppl: 1.1 }).unwrap();
        assert_eq!(fs::read_to_string(adapter.join(METRICS_FILE)).unwrap().lines().count(), 2);
        assert_eq!(fs::read_to_string(job.path().join(METRICS_FILE)).unwrap().lines().count(), 1);
        Metrics::resume(job.path(), None, Others::Kept, 0, None).unwrap();
    }
}
