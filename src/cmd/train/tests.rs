//! Flags and file together.

use super::*;
use clap::Parser;
use mlx_cluster_common::training::{Decay, FineTune, Schedule, config::DataSource};
use std::fs;
use tempfile::{TempDir, tempdir};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    train: TrainArgs,
}

fn args(flags: &[&str]) -> TrainArgs {
    Cli::try_parse_from(std::iter::once(&"train").chain(flags)).unwrap_or_else(|error| panic!("{error}")).train
}

fn folder_with(yaml: &str) -> TempDir {
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("lora.yaml"), yaml).unwrap();
    folder
}

fn refused(flags: &[&str], yaml: &str) -> String {
    config_in(&args(flags), folder_with(yaml).path()).unwrap_err().to_string()
}

#[test]
fn flags_win_over_the_file_and_defaults_fill_the_rest() {
    let yaml = "model: a/b\ntrain: true\niters: 7\nbatch_size: 2\nlearning_rate: 1e-3\nlora_parameters: {rank: 4, scale: 10, dropout: 0}\n";
    let folder = folder_with(yaml);
    let config =
        config_in(&args(&["-c", "lora.yaml", "--iters", "9", "--learning-rate", "2e-4", "--num-layers", "-1"]), folder.path()).unwrap();
    assert_eq!((config.model.as_str(), config.train, config.test), ("a/b", true, false));
    assert_eq!((config.iters, config.batch_size, config.save_every, config.num_layers), (9, 2, 100, None));
    assert_eq!(config.schedule, Schedule::constant(2e-4));
    let FineTune::Lora(lora) = &config.fine_tune else { panic!("{:?}", config.fine_tune) };
    assert_eq!((lora.rank, lora.scale), (4, 10.0));
    assert_eq!(config.adapter_config()["config"], "lora.yaml");
}

#[test]
fn each_flag_sets_its_key() {
    let flags = "--model a/b --train --test --data c/d --fine-tune-type dora --optimizer muon --mask-prompt --packing --num-layers 3 --batch-size 5 --iters 6 \
        --val-batches 7 --learning-rate 0.5 --steps-per-report 8 --steps-per-eval 9 --grad-accumulation-steps 10 --resume-adapter-file /x/y --adapter-path /z \
        --save-every 11 --test-batches 12 --max-seq-length 13 --grad-checkpoint --clear-cache-threshold 2GB --report-to tensorboard --project-name p --seed 14";
    let args = args(&flags.split_whitespace().collect::<Vec<_>>());
    let record = config_in(&args, Path::new("/")).unwrap().adapter_config();
    let wanted = json!({
        "model": "a/b", "train": true, "test": true, "data": "c/d", "fine_tune_type": "dora", "optimizer": "muon", "mask_prompt": true, "packing": true,
        "num_layers": 3, "batch_size": 5, "iters": 6, "val_batches": 7, "learning_rate": 0.5, "steps_per_report": 8, "steps_per_eval": 9,
        "grad_accumulation_steps": 10, "resume_adapter_file": "/x/y", "adapter_path": "/z", "save_every": 11, "test_batches": 12, "max_seq_length": 13,
        "grad_checkpoint": true, "clear_cache_threshold": 2_000_000_000u64, "report_to": "tensorboard", "project_name": "p", "seed": 14,
    });
    for (key, value) in wanted.as_object().unwrap() {
        assert_eq!(&record[key], value, "{key}");
    }
    assert_eq!((args.strategy, args.detach), (TrainStrategy::Auto, false));
}

#[test]
fn relative_paths_start_from_the_working_directory() {
    let folder = folder_with("train: true\nmodel: base\ndata: ./rows\nresume_adapter_file: old/adapters.safetensors\n");
    let at = |name: &str| folder.path().join(name);
    for name in ["base", "rows"] {
        fs::create_dir(at(name)).unwrap();
    }
    let config = config_in(&args(&["--config", "lora.yaml"]), folder.path()).unwrap();
    assert_eq!((Path::new(&config.model), &config.adapter_path), (at("base").as_path(), &at("adapters")));
    assert_eq!(config.resume_adapter_file, Some(at("old/adapters.safetensors")));
    let DataSource::Named { name, .. } = &config.data else { panic!("{:?}", config.data) };
    assert_eq!(Path::new(name), at("rows"));
    let on_the_hub = config_in(&args(&["--train", "--data", "rows", "--model", "org/base"]), Path::new("/")).unwrap();
    assert_eq!(on_the_hub.model, "org/base");
    assert!(matches!(&on_the_hub.data, DataSource::Named { name, .. } if name == "rows"));
    let base_alone = config_in(&args(&["--test", "--adapter-path", ""]), folder.path()).unwrap();
    assert_eq!(base_alone.adapter_path, Path::new(""));
}

#[test]
fn local_data_sets_in_a_list_and_files_are_found_from_there_too() {
    let folder = folder_with("train: true\nhf_dataset:\n- path: ./rows\n- path: a/b\n");
    fs::create_dir(folder.path().join("rows")).unwrap();
    fs::write(folder.path().join("rows/train.jsonl"), "{}").unwrap();
    let paths = |config: &TrainingConfig| match &config.data {
        DataSource::Hub(sets) => sets.iter().map(|set| set.path.clone()).collect::<Vec<_>>(),
        DataSource::Named { name, .. } => vec![name.clone()],
    };
    let at = |path: &str| folder.path().join(path).to_string_lossy().into_owned();
    assert_eq!(paths(&config_in(&args(&["-c", "lora.yaml"]), folder.path()).unwrap()), [at("rows"), "a/b".to_owned()]);
    fs::write(folder.path().join("lora.yaml"), "train: true\nhf_dataset: {path: rows}\n").unwrap();
    assert_eq!(paths(&config_in(&args(&["-c", "lora.yaml"]), folder.path()).unwrap()), [at("rows")]);
    let file = config_in(&args(&["--train", "--data", "rows/train.jsonl"]), folder.path()).unwrap();
    assert_eq!(paths(&file), [at("rows/train.jsonl")]);
}

#[cfg(unix)]
#[test]
fn the_path_of_a_config_need_not_be_unicode() {
    use std::os::unix::ffi::OsStrExt;
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(b"lora\xff.yaml"));
    let config = flags(&TrainArgs { config: Some(path), ..args(&[]) }).find(|(key, _)| key == "config");
    assert_eq!(config.map(|(_, value)| value), Some(json!("lora\u{fffd}.yaml")));
}

#[test]
fn schedules_and_empty_keys_of_a_file_are_read_as_by_mlx_lm() {
    let yaml =
        "train: yes\niters:\nlr_schedule:\n  name: cosine_decay\n  warmup: 100\n  warmup_init: 1e-7\n  arguments: [1e-5, 1000, 1e-7]\n";
    let config = config_in(&args(&["-c", "lora.yaml"]), folder_with(yaml).path()).unwrap();
    assert_eq!(config.iters, 1000);
    assert_eq!(config.schedule.decay, Decay::Cosine { init: 1e-5, steps: 1000, end: 1e-7 });
    assert_eq!(config.schedule.warmup.map(|warmup| (warmup.init, warmup.steps)), Some((1e-7, 100)));
}

#[test]
fn errors_name_the_file_where_there_is_one() {
    assert_eq!(refused(&["-c", "lora.yaml"], "itres: 3\n"), "lora.yaml: `itres` is not a key of a training config; the nearest is `iters`");
    assert!(refused(&["-c", "lora.yaml"], "iters: [\n").contains("lora.yaml:"));
    let missing = refused(&["-c", "other.yaml"], "");
    assert!(missing.starts_with("cannot read ") && missing.contains("other.yaml: "), "{missing}");
    assert_eq!(refused(&["--train", "--iters", "-3"], ""), "`iters` is -3, but must be a whole number from 1 to 4294967295");
    assert!(refused(&[], "").contains("--train or --test"));
    assert!(Cli::try_parse_from(["train", "--learning-rate", "nan"]).is_err());
    assert!(Cli::try_parse_from(["train", "--strategy", "both"]).is_err());
}
