//! Checkpoints survive whatever the disk does while they are written, and give back the bits that they were given.

use super::*;
use crate::training::files::failpoint::{self, Failure};
use bytes::Bytes;
use mlx_cluster_common::{dtype::DType, training::TrainingConfig};
use mlx_cluster_proto::wire;
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::json;

pub(in crate::training) fn config(changes: serde_json::Value) -> TrainingConfig {
    let mut keys = json!({"model": "org/tiny", "train": true, "data": "/data", "adapter_path": "/adapters", "learning_rate": 1e-5});
    keys.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    TrainingConfig::parse(keys.as_object().unwrap()).unwrap()
}

fn state(iteration: u64) -> CheckpointState {
    CheckpointState {
        iteration,
        updates: iteration / 2,
        trained_tokens: 77 * iteration,
        since_report: SinceReport { losses: f64::from(0.1f32) + 1e-17, tokens: 31, steps: 3, seconds: 0.3, waiting_seconds: 1.0 / 3.0 },
        seed: 7,
        data_fingerprint: "abc".into(),
        config: config(json!({"iters": 5})),
    }
}

fn tensor(part: Part, name: &str, dtype: DType, shape: &[u64], fill: u8) -> SavedTensor {
    let bytes = shape.iter().product::<u64>() * dtype.size();
    let data: Vec<u8> = (0..bytes).map(|i| fill.wrapping_add(i as u8)).collect();
    SavedTensor { part, name: name.into(), dtype, shape: shape.to_vec(), data: data.into() }
}

/// `fill` tells checkpoints apart.
fn tensors(fill: u8) -> Vec<SavedTensor> {
    vec![
        tensor(Part::Adapters, "layers.1.q_proj.lora_b", DType::BF16, &[3, 5], fill),
        tensor(Part::Optimizer, "layers.0.q_proj.lora_a.m", DType::F32, &[2, 3], fill.wrapping_add(1)),
        tensor(Part::Adapters, "layers.0.q_proj.lora_a", DType::F32, &[2, 3], fill.wrapping_add(2)),
        tensor(Part::Optimizer, "step", DType::U64, &[], fill.wrapping_add(3)),
        tensor(Part::Adapters, "empty", DType::F32, &[0, 3], fill),
    ]
}

fn save(checkpoints: &Checkpoints, iteration: u64, tensors: Vec<SavedTensor>) -> Result<Checkpoint, CheckpointError> {
    let mut writer = checkpoints.begin(true);
    for tensor in tensors {
        writer.add(tensor)?;
    }
    writer.finish(state(iteration))
}

fn read(checkpoint: &Checkpoint) -> Vec<SavedTensor> {
    let mut tensors: Vec<SavedTensor> = checkpoint.tensors(&[Part::Adapters, Part::Optimizer]).unwrap().collect::<Result<_, _>>().unwrap();
    tensors.sort_by(|a, b| (a.part, &a.name).cmp(&(b.part, &b.name)));
    tensors
}

fn sorted(mut tensors: Vec<SavedTensor>) -> Vec<SavedTensor> {
    tensors.sort_by(|a, b| (a.part, &a.name).cmp(&(b.part, &b.name)));
    tensors
}

fn newest(checkpoints: &Checkpoints) -> Option<Checkpoint> {
    let Newest { checkpoint, warnings } = checkpoints.newest().unwrap();
    assert_eq!(warnings, Vec::<String>::new());
    checkpoint
}

#[test]
fn what_was_saved_comes_back_to_the_bit() {
    let home = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(home.path()).unwrap();
    assert!(newest(&checkpoints).is_none());
    save(&checkpoints, 40, tensors(9)).unwrap();
    let found = newest(&checkpoints).unwrap();
    assert_eq!(read(&found), sorted(tensors(9)));
    let (got, wanted) = (&found.state, state(40));
    assert_eq!(*got, wanted);
    assert_eq!(got.since_report.losses.to_bits(), wanted.since_report.losses.to_bits());
    assert_eq!(got.since_report.waiting_seconds.to_bits(), wanted.since_report.waiting_seconds.to_bits());
    // Another reader agrees on what the file says.
    let bytes = fs::read(found.path(Part::Adapters)).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.names().len(), 3);
    assert_eq!(theirs.tensor("layers.1.q_proj.lora_b").unwrap().data(), &tensors(9)[0].data[..]);
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "mlx");
}

#[test]
fn files_do_not_depend_on_the_order_in_which_tensors_come() {
    let homes = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut backwards = tensors(3);
    backwards.reverse();
    let [one, other] = [tensors(3), backwards];
    let files = [(one, &homes[0]), (other, &homes[1])].map(|(tensors, home)| {
        let checkpoint = save(&Checkpoints::open(home.path()).unwrap(), 1, tensors).unwrap();
        [Part::Adapters.file(), Part::Optimizer.file(), STATE_FILE].map(|file| fs::read(checkpoint.folder().join(file)).unwrap())
    });
    assert_eq!(files[0], files[1]);
}

#[test]
fn the_last_two_are_kept_and_a_future_that_was_given_up_is_not() {
    let home = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(home.path()).unwrap();
    for iteration in [10, 20, 30, 20_000_000] {
        save(&checkpoints, iteration, tensors(1)).unwrap();
    }
    assert_eq!(checkpoints.iterations().unwrap(), [20_000_000, 30]);
    save(&checkpoints, 40, tensors(2)).unwrap();
    assert_eq!(checkpoints.iterations().unwrap(), [40, 30]);
    assert_eq!(read(&newest(&checkpoints).unwrap()), sorted(tensors(2)));
}

#[test]
fn files_of_others_stay_and_are_not_in_the_way_and_a_file_in_place_of_a_folder_of_ours_goes() {
    let home = tempfile::tempdir().unwrap();
    let folder = Checkpoints::open(home.path()).unwrap().folder;
    let others = [".DS_Store", ".x.partial", ".x.replaced", "notes"];
    for name in others.iter().chain(&[".0000007.partial"]) {
        fs::write(folder.join(name), "x").unwrap();
    }
    let checkpoints = Checkpoints::open(home.path()).unwrap();
    assert_eq!(checkpoints.entries().unwrap().len(), others.len());
    fs::write(folder.join(".0000008.damaged"), "x").unwrap();
    for iteration in [10, 20, 30] {
        save(&checkpoints, iteration, tensors(1)).unwrap();
    }
    let mut left = checkpoints.entries().unwrap();
    left.sort();
    assert_eq!(left, [".DS_Store", ".x.partial", ".x.replaced", "0000020", "0000030", "notes"]);
}

/// A checkpoint at 10 is there; one at `next` is written, and the disk fails after more and more operations.
fn cut_everywhere(failure: Failure, next: u64) {
    let home = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(home.path()).unwrap();
    for operations in 0.. {
        let _ = fs::remove_dir_all(&checkpoints.folder);
        fs::create_dir(&checkpoints.folder).unwrap();
        save(&checkpoints, 5, tensors(3)).unwrap();
        save(&checkpoints, 10, tensors(50)).unwrap();
        failpoint::arm(operations, failure);
        let saved = save(&checkpoints, next, tensors(90));
        let survived = failpoint::disarm();
        // As the next start does it.
        let checkpoints = Checkpoints::open(home.path()).unwrap();
        let found = newest(&checkpoints).unwrap();
        let is_new = read(&found) == sorted(tensors(90));
        assert!(is_new || (found.state.iteration == 10 && read(&found) == sorted(tensors(50))), "{failure:?} after {operations}");
        assert_eq!(found.state, state(if is_new { next } else { 10 }));
        match saved {
            Ok(checkpoint) => assert!(is_new && read(&checkpoint) == sorted(tensors(90))),
            Err(CheckpointError::File(error)) => {
                assert_eq!(error.is_disk_full(), failure == Failure::Full, "after {operations}: {error}");
            }
            Err(error) => panic!("after {operations}: {error}"),
        }
        let left = checkpoints.entries().unwrap();
        assert!(left.iter().all(|name| !name.starts_with('.')), "after {operations}: {left:?}");
        // The next save is not in the way of what was left.
        save(&checkpoints, 30, tensors(7)).unwrap();
        assert_eq!(newest(&checkpoints).unwrap().state.iteration, 30);
        if survived {
            assert!(operations > 20, "few operations were checked");
            return;
        }
    }
}

#[test]
fn a_disk_that_is_full_anywhere_leaves_the_older_checkpoint_whole() {
    cut_everywhere(Failure::Full, 20);
    cut_everywhere(Failure::Full, 10);
}

#[test]
fn a_kill_anywhere_leaves_a_whole_checkpoint() {
    cut_everywhere(Failure::Killed, 20);
    cut_everywhere(Failure::Killed, 10);
}

#[test]
fn a_disk_without_room_is_refused_before_anything_is_written() {
    let home = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(home.path()).unwrap();
    failpoint::set_free_bytes(Some(1_000_000));
    let refused = save(&checkpoints, 3, tensors(1));
    failpoint::set_free_bytes(None);
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("1.0 MB are needed, 1.0 MB are free"), "{message}");
    assert_eq!(checkpoints.entries().unwrap(), Vec::<String>::new());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_flipped_bit_anywhere_makes_the_one_before_the_newest(place in any::<prop::sample::Index>(), file in 0usize..3, bit in 0u8..8) {
        let home = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(home.path()).unwrap();
        save(&checkpoints, 10, tensors(50)).unwrap();
        let checkpoint = save(&checkpoints, 20, tensors(90)).unwrap();
        let path = checkpoint.folder().join([Part::Adapters.file(), Part::Optimizer.file(), STATE_FILE][file]);
        let mut bytes = fs::read(&path).unwrap();
        let at = place.index(bytes.len());
        bytes[at] ^= 1 << bit;
        fs::write(&path, bytes).unwrap();
        let found = checkpoints.newest().unwrap();
        prop_assert_eq!(read(&found.checkpoint.unwrap()), sorted(tensors(50)));
        prop_assert!(found.warnings[0].contains("the checkpoint at iteration 20 is damaged"), "{:?}", found.warnings);
        prop_assert_eq!(newest(&checkpoints).unwrap().state.iteration, 10);
    }

    #[test]
    fn a_cut_file_makes_the_one_before_the_newest(place in any::<prop::sample::Index>(), file in 0usize..3) {
        let home = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(home.path()).unwrap();
        save(&checkpoints, 10, tensors(50)).unwrap();
        let checkpoint = save(&checkpoints, 20, tensors(90)).unwrap();
        let path = checkpoint.folder().join([Part::Adapters.file(), Part::Optimizer.file(), STATE_FILE][file]);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..place.index(bytes.len())]).unwrap();
        let found = checkpoints.newest().unwrap();
        prop_assert_eq!(found.checkpoint.unwrap().state, state(10));
    }
}

#[test]
fn a_missing_file_is_damage_too_and_without_a_whole_one_there_is_none() {
    let home = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(home.path()).unwrap();
    let first = save(&checkpoints, 10, tensors(1)).unwrap();
    let second = save(&checkpoints, 20, tensors(2)).unwrap();
    fs::remove_file(second.path(Part::Optimizer)).unwrap();
    fs::remove_file(first.folder().join(STATE_FILE)).unwrap();
    let found = checkpoints.newest().unwrap();
    assert!(found.checkpoint.is_none());
    assert_eq!(found.warnings.len(), 2);
    // They make room for good ones.
    save(&checkpoints, 10, tensors(3)).unwrap();
    assert_eq!(checkpoints.entries().unwrap(), ["0000010"]);
}

#[test]
fn tensors_that_cannot_be_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(home.path()).unwrap();
    let mut writer = checkpoints.begin(false);
    let good = tensor(Part::Adapters, "a", DType::F32, &[2], 0);
    writer.add(good.clone()).unwrap();
    assert!(writer.add(good.clone()).unwrap_err().to_string().contains("`a` was saved by two engines"));
    for shape in [vec![3], vec![], vec![u64::MAX, u64::MAX]] {
        let refused = writer.add(SavedTensor { shape, name: "b".into(), ..good.clone() });
        assert!(matches!(refused, Err(CheckpointError::BadTensor { name }) if name == "b"));
    }
}

#[test]
fn what_an_optimizer_remembers_may_be_missing() {
    let home = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(home.path()).unwrap();
    let mut writer = checkpoints.begin(false);
    tensors(4).into_iter().for_each(|tensor| writer.add(tensor).unwrap());
    writer.finish(state(8)).unwrap();
    let found = newest(&checkpoints).unwrap();
    assert!(read(&found).iter().all(|tensor| tensor.part == Part::Adapters));
    let message = found.check_optimizer().unwrap_err().to_string();
    assert!(message.contains("iteration 8") && message.contains("--warm-start"), "{message}");
    assert!(save(&checkpoints, 9, tensors(4)).unwrap().check_optimizer().is_ok());
}

#[test]
fn what_would_make_other_numbers_is_listed() {
    let state = state(12);
    assert!(state.check_config(&config(json!({"iters": 900, "steps_per_report": 1}))).is_ok());
    let message = state.check_config(&config(json!({"seed": 1, "batch_size": 2}))).unwrap_err().to_string();
    assert!(
        ["iteration 12", "`seed` is 1", "`batch_size` is 2", "resume_adapter_file"].iter().all(|part| message.contains(part)),
        "{message}"
    );
    assert!(state.check_data("abc").is_ok());
    assert!(state.check_data("abd").unwrap_err().to_string().contains("training examples"));
}

#[test]
fn an_adapter_is_exported_under_mlx_lms_names() {
    let home = tempfile::tempdir().unwrap();
    let checkpoint = save(&Checkpoints::open(home.path()).unwrap(), 300, tensors(1)).unwrap();
    let adapter = home.path().join("some/adapter");
    checkpoint.export(&adapter, Some(checkpoint.state.iteration)).unwrap();
    export_config(&config(json!({"iters": 5})), &adapter).unwrap();
    let mut names: Vec<String> = fs::read_dir(&adapter).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["0000300_adapters.safetensors", "adapter_config.json", "adapters.safetensors"]);
    assert_eq!(fs::read(adapter.join("adapters.safetensors")).unwrap(), fs::read(checkpoint.path(Part::Adapters)).unwrap());
    let text = fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    assert!(text.starts_with("{\n    \"adapter_path\": \"/adapters\",\n    \"batch_size\": 4,"), "{text}");
    // As a job that starts from it reads it.
    let file = TensorFile::open(&adapter.join("0000300_adapters.safetensors"), Part::Adapters).unwrap();
    assert_eq!(file.left().map(|(name, _)| name.to_owned()).collect::<Vec<_>>().len(), 3);
    let tensors_read: Vec<SavedTensor> = file.collect::<Result<_, _>>().unwrap();
    assert_eq!(tensors_read, sorted(tensors(1)).into_iter().filter(|tensor| tensor.part == Part::Adapters).collect::<Vec<_>>());
}

#[test]
fn tensors_survive_the_wire_and_bad_ones_do_not() {
    for tensor in tensors(8) {
        let sent = wire::SavedTensor::try_from(tensor.clone()).unwrap();
        assert_eq!(SavedTensor::try_from(sent).unwrap(), tensor);
    }
    let broken = |change: fn(&mut wire::Tensor)| {
        let mut sent = wire::SavedTensor::try_from(tensors(8).remove(0)).unwrap();
        change(sent.tensor.as_mut().unwrap());
        SavedTensor::try_from(sent)
    };
    assert!(broken(|tensor| tensor.dtype = "F4".into()).is_err());
    assert!(broken(|tensor| tensor.shape.push(2)).is_err());
    assert!(broken(|tensor| tensor.data = Bytes::new()).is_err());
    assert!(SavedTensor::try_from(wire::SavedTensor { is_optimizer: false, tensor: None }).is_err());
}
