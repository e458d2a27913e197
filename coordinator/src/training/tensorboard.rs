//! TensorBoard event files: framed records (TensorFlow's `record_writer.cc`) of `Event` messages (`event.proto`, `summary.proto`).

use crc_fast::{CrcAlgorithm, checksum};
use prost::Message;
use serde_json::{Map, Value};
use std::{
    fs::File,
    io::{self, Write},
    mem,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// An event file that scalars are added to. Whole records are handed to the system at once, so that a reader never waits for the end of one.
#[derive(Debug)]
pub struct EventFile {
    file: File,
    has_started: bool,
    /// The last that a report named.
    step: i64,
}

/// The part of TensorFlow's message that scalars need.
#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    /// In the first record.
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

/// On a start, TensorBoard forgets what older files of the folder say of the event's step and of later ones. It passes over the first start of
/// a folder, so that the first file needs one too.
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    /// An enum.
    #[prost(int32, tag = "1")]
    status: i32,
}

const START: i32 = 1;

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Scalar>,
}

#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    /// A member of a oneof: written also when it is 0.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

impl EventFile {
    /// A new file in `folder`, which is made where it is missing; TensorBoard reads all event files of a folder as one run.
    pub fn create(folder: &Path, now: SystemTime) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let since = since_1970(now);
        let name = format!("events.out.tfevents.{:010}.mlx-cluster.{}.{}", since.as_secs(), std::process::id(), since.subsec_nanos());
        let mut file = Self { file: File::create_new(folder.join(name))?, has_started: false, step: 0 };
        file.append(Event { wall_time: since.as_secs_f64(), step: 0, what: Some(What::FileVersion("brain.Event:2".into())) })?;
        Ok(file)
    }

    /// Adds a report as it stands in metrics.jsonl: each number under its key, at the report's `iteration`, or at the last one where it has
    /// none, as a report on the test set.
    pub fn add(&mut self, report: &Map<String, Value>, now: SystemTime) -> io::Result<()> {
        let wall_time = since_1970(now).as_secs_f64();
        if let Some(iteration) = report.get("iteration").and_then(Value::as_i64) {
            self.step = iteration;
            if !mem::replace(&mut self.has_started, true) {
                let what = Some(What::SessionLog(SessionLog { status: START }));
                self.append(Event { wall_time, step: first_again(report, iteration), what })?;
            }
        }
        let scalar =
            |(key, value): (&String, &Value)| value.as_f64().map(|value| Scalar { tag: key.clone(), simple_value: Some(value as f32) });
        let values: Vec<Scalar> = report.iter().filter(|(key, _)| *key != "iteration").filter_map(scalar).collect();
        self.append(Event { wall_time, step: self.step, what: Some(What::Summary(Summary { values })) })
    }

    fn append(&mut self, event: Event) -> io::Result<()> {
        self.file.write_all(&record(&event.encode_to_vec()))
    }
}

/// The step from which on a run whose first report this is says everything again. The loss of validation is reported before the batch whose
/// turn it is: of a run that goes on, the training report of the same iteration does not come again, so it has to stay.
fn first_again(report: &Map<String, Value>, iteration: i64) -> i64 {
    let goes_on = report.contains_key("val_loss") && iteration > 0;
    iteration + i64::from(goes_on)
}

fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Length (u64), its check sum, the data, its check sum; all little-endian.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_crc(&length).to_le_bytes());
    record.extend_from_slice(data);
    record.extend_from_slice(&masked_crc(data).to_le_bytes());
    record
}

/// CRC-32C, masked since a check sum over data that holds check sums is a weak one (TensorFlow's `crc32c.h`).
fn masked_crc(data: &[u8]) -> u32 {
    let crc = checksum(CrcAlgorithm::Crc32Iscsi, data) as u32;
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Splits by the documented frame, with a CRC of its own.
    fn frames(mut bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let crc = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            let data = &bytes[12..12 + length];
            assert_eq!(crc(8), masked(bitwise_crc32c(&bytes[..8])));
            assert_eq!(crc(12 + length), masked(bitwise_crc32c(data)));
            events.push(Event::decode(data).unwrap());
            bytes = &bytes[16 + length..];
        }
        events
    }

    fn masked(crc: u32) -> u32 {
        crc.rotate_left(17).wrapping_add(0xa282_ead8)
    }

    fn bitwise_crc32c(data: &[u8]) -> u32 {
        !data.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 * (crc & 1))))
    }

    #[test]
    fn check_sums_are_crc32c() {
        // RFC 3720, B.4: 32 bytes of zeros.
        assert_eq!(bitwise_crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked_crc(&[0; 32]), masked(0x8a91_36aa));
    }

    #[test]
    fn a_file_holds_its_version_and_then_a_record_for_each_report() {
        let folder = tempfile::tempdir().unwrap();
        let runs = folder.path().join("runs");
        let now = UNIX_EPOCH + Duration::from_millis(1_700_000_000_500);
        let mut file = EventFile::create(&runs, now).unwrap();
        for report in
            [json!({"iteration": 0, "val_loss": 3.5}), json!({"iteration": 10, "train_loss": 2.25, "learning_rate": 0, "note": "text"})]
        {
            file.add(report.as_object().unwrap(), now).unwrap();
        }
        let path = std::fs::read_dir(&runs).unwrap().next().unwrap().unwrap().path();
        assert!(path.file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents.1700000000.mlx-cluster."), "{path:?}");
        let scalar = |tag: &str, value: f32| Scalar { tag: tag.into(), simple_value: Some(value) };
        let event = |step: i64, what: What| Event { wall_time: 1_700_000_000.5, step, what: Some(what) };
        let wanted = [
            event(0, What::FileVersion("brain.Event:2".into())),
            event(0, What::SessionLog(SessionLog { status: START })),
            event(0, What::Summary(Summary { values: vec![scalar("val_loss", 3.5)] })),
            event(10, What::Summary(Summary { values: vec![scalar("train_loss", 2.25), scalar("learning_rate", 0.0)] })),
        ];
        assert_eq!(frames(&std::fs::read(path).unwrap()), wanted);
    }

    #[test]
    fn a_start_takes_back_what_comes_again_and_a_report_on_the_test_set_is_one_of_the_last_iteration() {
        let val = |iteration: u64| json!({"iteration": iteration, "val_loss": 3.5});
        let train = |iteration: u64| json!({"iteration": iteration, "train_loss": 2.5});
        for (first, start) in [(train(30), 30), (val(20), 21), (val(0), 0)] {
            let folder = tempfile::tempdir().unwrap();
            let mut file = EventFile::create(folder.path(), UNIX_EPOCH).unwrap();
            for report in [&first, &train(40), &json!({"test_loss": 1.5})] {
                file.add(report.as_object().unwrap(), UNIX_EPOCH).unwrap();
            }
            let path = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
            let events = frames(&std::fs::read(path).unwrap());
            assert_eq!(events[1].what, Some(What::SessionLog(SessionLog { status: START })));
            // Field 7, whose field 1 is 1.
            assert!(events[1].encode_to_vec().ends_with(&[0x3a, 2, 8, 1]));
            let steps: Vec<i64> = events[1..].iter().map(|event| event.step).collect();
            assert_eq!(steps, [start, first["iteration"].as_i64().unwrap(), 40, 40]);
        }
    }
}
