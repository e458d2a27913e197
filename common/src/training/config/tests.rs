//! Each key of a config: what it says, and why it is refused.

use super::*;
use crate::training::AdapterConfig;
use crate::training::{Decay, LoraParameters, Warmup, optimizer::Adafactor};
use serde_json::json;

/// `train: true` and these keys.
fn given(more: Value) -> Map<String, Value> {
    let mut map = Map::from_iter([("train".to_owned(), json!(true))]);
    map.extend(more.as_object().cloned().unwrap());
    map
}

fn parse(more: Value) -> TrainingConfig {
    TrainingConfig::parse(&given(more)).unwrap()
}

fn refused(more: Value) -> String {
    TrainingConfig::parse(&given(more)).unwrap_err().to_string()
}

#[test]
fn what_is_not_given_is_mlx_lms_default() {
    let config = parse(json!({}));
    assert_eq!((config.model.as_str(), config.train, config.test), ("Qwen/Qwen3-0.6b", true, false));
    assert_eq!((config.num_layers, config.batch_size, config.iters, config.grad_accumulation_steps), (Some(16), 4, 1000, 1));
    assert_eq!((config.val_batches, config.test_batches), (Some(25), Some(500)));
    assert_eq!((config.steps_per_report, config.steps_per_eval, config.save_every), (10, 200, 100));
    assert_eq!((config.max_seq_length, config.seed, config.clear_cache_threshold), (2048, 0, Bytes(0)));
    assert!(!config.mask_prompt && !config.packing && !config.grad_checkpoint && !config.tensorboard);
    assert_eq!((config.adapter_path.to_str(), &config.resume_adapter_file, &config.project_name), (Some("adapters"), &None, &None));
    assert_eq!(config.optimizer, Optimizer::Adam { betas: [0.9, 0.999], eps: 1e-8, bias_correction: false });
    assert_eq!(config.schedule, Schedule::constant(1e-5));
    assert_eq!(config.fine_tune, FineTune::Lora(LoraParameters { rank: 8, scale: 20.0, dropout: 0.0, keys: None }));
    let features = Features { prompt: "prompt".into(), completion: "completion".into(), text: "text".into(), chat: "messages".into() };
    assert_eq!(config.data, DataSource::Named { name: "mlx-community/WikiSQL".into(), features });
    assert_eq!(parse(json!({"iters": null, "lora_parameters": null, "hf_dataset": null})), config);
}

#[test]
fn each_optimizer_takes_the_arguments_of_its_constructor() {
    let all = json!({
        "adam": {"betas": [0.8, 0.95], "eps": 1e-6, "bias_correction": true}, "adamw": {"weight_decay": 0.1},
        "sgd": {"momentum": 0.9, "nesterov": true}, "muon": {"ns_steps": 3, "nesterov": false}, "adafactor": {"eps": [1e-20, 1e-2], "beta_1": 0.9},
    });
    let of = |name: &str| parse(json!({"optimizer": name, "optimizer_config": all})).optimizer.clone();
    assert_eq!(of("Adam"), Optimizer::Adam { betas: [0.8, 0.95], eps: 1e-6, bias_correction: true });
    assert_eq!(of("adamw"), Optimizer::AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.1, bias_correction: false });
    assert_eq!(of("sgd"), Optimizer::Sgd { momentum: 0.9, weight_decay: 0.0, dampening: 0.0, nesterov: true });
    assert_eq!(of("muon"), Optimizer::Muon { momentum: 0.95, weight_decay: 0.01, nesterov: false, ns_steps: 3 });
    let adafactor = Adafactor {
        eps: [1e-20, 1e-2],
        clip_threshold: 1.0,
        decay_rate: -0.8,
        beta_1: Some(0.9),
        weight_decay: 0.0,
        scale_parameter: true,
        relative_step: true,
        warmup_init: false,
    };
    assert_eq!(of("adafactor"), Optimizer::Adafactor(adafactor));
}

#[test]
fn a_schedule_takes_positional_arguments_and_a_warm_up() {
    let of = |schedule: Value| parse(json!({"lr_schedule": schedule})).schedule.clone();
    let cosine = of(json!({"name": "cosine_decay", "warmup": 5, "warmup_init": 1e-6, "arguments": [1e-3, 100, 1e-6]}));
    assert_eq!(cosine.warmup, Some(Warmup { init: 1e-6, steps: 5 }));
    assert_eq!(cosine.decay, Decay::Cosine { init: 1e-3, steps: 100, end: 1e-6 });
    let cosine = of(json!({"name": "cosine_decay", "warmup": 0, "arguments": [1e-3, 1e2]}));
    assert_eq!((cosine.warmup, cosine.decay), (None, Decay::Cosine { init: 1e-3, steps: 100, end: 0.0 }));
    assert_eq!(of(json!({"name": "exponential_decay", "arguments": [0.1, 0.9]})).decay, Decay::Exponential { init: 0.1, rate: 0.9 });
    assert_eq!(of(json!({"name": "step_decay", "arguments": [0.1, 0.9, 10]})).decay, Decay::Step { init: 0.1, rate: 0.9, size: 10 });
    assert_eq!(of(json!({"name": "linear_schedule", "arguments": [0, 0.1, 9]})).decay, Decay::Linear { init: 0.0, end: 0.1, steps: 9 });
}

#[test]
fn an_unknown_key_is_named_with_the_nearest() {
    for (config, message) in [
        (json!({"batch_sise": 2}), "`batch_sise` is not a key of a training config; the nearest is `batch_size`"),
        (json!({"xyzzyqq": 2}), "`xyzzyqq` is not a key of a training config"),
        (json!({"lr": 1e-5}), "`lr` is not a key of a training config: mlx-lm calls it `learning_rate`"),
        (json!({"alpha": 16}), "`alpha` is not a key of a training config: it belongs into `lora_parameters`"),
        (json!({"strategy": "data"}), "`strategy` is not a key of a training config: how a job is spread is told by `--strategy`"),
        (
            json!({"optimizer_config": {"adam": {"beta": [0.9, 0.9]}}}),
            "`optimizer_config.adam.beta` is not a key of a training config; the nearest is `optimizer_config.adam.betas`",
        ),
        (
            json!({"optimizer_config": {"adamm": {}}}),
            "`optimizer_config.adamm` is not a key of a training config; the nearest is `optimizer_config.adam`",
        ),
        (
            json!({"lr_schedule": {"name": "cosine_decay", "warm_up": 3, "arguments": [1, 2]}}),
            "`lr_schedule.warm_up` is not a key of a training config; the nearest is `lr_schedule.warmup`",
        ),
        (
            json!({"lora_parameters": {"rnak": 8, "scale": 1, "dropout": 0}}),
            "`lora_parameters.rnak` is not a key of a training config; the nearest is `lora_parameters.rank`",
        ),
        (
            json!({"hf_dataset": [{"path": "a/b"}, {"path": "a/c", "train_spilt": "train"}]}),
            "`hf_dataset[1].train_spilt` is not a key of a training config; the nearest is `hf_dataset[1].train_split`",
        ),
    ] {
        assert_eq!(refused(config), message);
    }
    let alpha = refused(json!({"lora_parameters": {"rank": 8, "alpha": 16, "dropout": 0}}));
    assert!(alpha.starts_with("`lora_parameters.alpha` is not a key") && alpha.ends_with("write `scale` instead"), "{alpha}");
    let arguments = refused(json!({"optimizer_config": {"sgd": {"learning_rate": 1}}}));
    assert!(arguments.contains("stand at the top of the config"), "{arguments}");
}

#[test]
fn a_wrong_value_is_named_with_what_is_allowed() {
    let lora = |rank: Value, dropout: Value| json!({"lora_parameters": {"rank": rank, "scale": 20.0, "dropout": dropout}});
    for (config, message) in [
        (json!({"iters": 0}), "`iters` is 0, but must be a whole number from 1 to 4294967295"),
        (json!({"iters": "many"}), "`iters` is \"many\", but must be a whole number from 1 to 4294967295"),
        (json!({"batch_size": 0}), "`batch_size` is 0, but must be a whole number from 1 to 1048576"),
        (json!({"batch_size": 2.5}), "`batch_size` is 2.5, but must be a whole number from 1 to 1048576"),
        (json!({"seed": -1}), "`seed` is -1, but must be a whole number from 0 to 4294967295"),
        (json!({"num_layers": 0}), "`num_layers` is 0, but must be a whole number from 1 to 4294967295, or -1 for all"),
        (json!({"num_layers": -2}), "`num_layers` is -2, but must be a whole number from 1 to 4294967295, or -1 for all"),
        (json!({"val_batches": 0}), "`val_batches` is 0, but must be a whole number from 1 to 4294967295, or -1 for all"),
        (json!({"max_seq_length": 1}), "`max_seq_length` is 1, but must be a whole number from 2 to 16777216"),
        (json!({"grad_accumulation_steps": 0}), "`grad_accumulation_steps` is 0, but must be a whole number from 1 to 4294967295"),
        (json!({"learning_rate": -1e-5}), "`learning_rate` is -0.00001, but must be a number from 0"),
        (json!({"learning_rate": "1e-5"}), "`learning_rate` is \"1e-5\", but must be a number from 0"),
        (json!({"learning_rate": 1e300}), "`learning_rate` is 1e+300, but must be a number from 0"),
        (json!({"train": "yes"}), "`train` is \"yes\", but must be true or false"),
        (json!({"model": ""}), "`model` is \"\", but must be a text that is not empty"),
        (json!({"adapter_path": ""}), "`adapter_path` is \"\", but must be a folder when `train` is true"),
        (
            json!({"clear_cache_threshold": "2 parsecs"}),
            "`clear_cache_threshold` is \"2 parsecs\", but must be a number of bytes from 0, or a text such as \"2GB\"",
        ),
        (lora(json!(0), json!(0)), "`lora_parameters.rank` is 0, but must be a whole number from 1 to 4096"),
        (lora(json!(5000), json!(0)), "`lora_parameters.rank` is 5000, but must be a whole number from 1 to 4096"),
        (lora(json!(8), json!(1.0)), "`lora_parameters.dropout` is 1.0, but must be a number from 0 to below 1"),
        (json!({"fine_tune_type": "lorra"}), "`fine_tune_type` is \"lorra\", but must be one of lora, dora, full; the nearest is `lora`"),
        (
            json!({"optimizer": "adan"}),
            "`optimizer` is \"adan\", but must be one of adam, adamw, muon, sgd, adafactor; the nearest is `adam`",
        ),
        (
            json!({"optimizer_config": {"adam": {"betas": [0.9, 1.0]}}}),
            "`optimizer_config.adam.betas[1]` is 1.0, but must be a number from 0 to below 1",
        ),
        (
            json!({"optimizer_config": {"sgd": {"nesterov": true}}}),
            "`optimizer_config.sgd.nesterov` is true, but must be false unless `momentum` is above 0 and `dampening` is 0",
        ),
        (
            json!({"lr_schedule": {"name": "cosine", "arguments": [1, 2]}}),
            "`lr_schedule.name` is \"cosine\", but must be one of cosine_decay, exponential_decay, step_decay, linear_schedule; the nearest is `cosine_decay`",
        ),
        (
            json!({"lr_schedule": {"name": "step_decay", "arguments": [0.1, 0.9]}}),
            "`lr_schedule.arguments` is [0.1,0.9], but must be what step_decay takes: a list [init, decay_rate, step_size]",
        ),
        (
            json!({"lr_schedule": {"name": "step_decay", "arguments": [0.1, 0.9, 0]}}),
            "`lr_schedule.arguments[2]` is 0, but must be a whole number from 1 to 4294967295",
        ),
        (json!({"optimizer_config": 3}), "`optimizer_config` is 3, but must be a mapping of keys to values"),
    ] {
        assert_eq!(refused(config), message);
    }
}

#[test]
fn what_mlx_cluster_does_not_do_is_refused_with_what_to_do() {
    assert!(refused(json!({"trust_remote_code": true})).contains("never runs code"));
    assert_eq!(parse(json!({"trust_remote_code": false})).record["trust_remote_code"], false);
    let wandb = refused(json!({"report_to": "tensorboard, WandB"}));
    assert!(wandb.starts_with("`report_to` is \"WandB\"") && wandb.contains("metrics.jsonl"), "{wandb}");
    assert!(refused(json!({"report_to": ["swanlab"]})).contains("`report_to: tensorboard` writes event files"));
    assert!(refused(json!({"report_to": "tensorbord"})).ends_with("the nearest is `tensorboard`"));
    assert!(parse(json!({"report_to": ["tensorboard"]})).tensorboard);
    assert!(parse(json!({"report_to": "TensorBoard"})).tensorboard);
    assert!(!parse(json!({"report_to": ""})).tensorboard);
    let outside = refused(json!({"report_to": "tensorboard", "project_name": "../logs"}));
    assert!(outside.contains("without slashes"), "{outside}");
    assert_eq!(parse(json!({"project_name": "first try"})).project_name.as_deref(), Some("first try"));
    let missing = refused(json!({"lora_parameters": {"rank": 4, "dropout": 0.0}}));
    assert!(missing.starts_with("`lora_parameters.scale` is missing"), "{missing}");
    let idle = TrainingConfig::parse(&Map::new()).unwrap_err().to_string();
    assert!(idle.contains("--train or --test"), "{idle}");
}

#[test]
fn data_sets_of_the_hub_have_features_of_their_own() {
    let config =
        parse(json!({"hf_dataset": {"path": "a/b", "config": {"name": "main"}, "valid_split": "test", "prompt_feature": "question"}}));
    let DataSource::Hub(sets) = &config.data else { panic!("{:?}", config.data) };
    let [set] = sets.as_slice() else { panic!("{sets:?}") };
    assert_eq!((set.path.as_str(), set.config_name.as_deref(), set.revision.as_deref()), ("a/b", Some("main"), None));
    assert_eq!((set.train_split.as_str(), set.valid_split.as_str(), set.test_split.as_deref()), ("train[:80%]", "test", None));
    assert_eq!((set.features.prompt.as_str(), set.features.completion.as_str()), ("question", "completion"));
    assert!(refused(json!({"hf_dataset": {"path": "a/b"}, "text_feature": "body"})).contains("write it into the entry"));
    assert!(refused(json!({"hf_dataset": {"train_split": "train"}})).starts_with("`hf_dataset.path` is missing"));
    assert!(refused(json!({"hf_dataset": []})).contains("at least one"));
    let untested = refused(json!({"hf_dataset": {"path": "a/b"}, "test": true}));
    assert_eq!(untested, "`hf_dataset `a/b`: test_split` is missing, and `test` is true");
}

#[test]
fn the_record_has_all_keys_sorted_and_as_given() {
    let config = parse(json!({"learning_rate": 3e-4, "clear_cache_threshold": "2GB", "report_to": ["tensorboard"], "num_layers": -1}));
    let record = config.adapter_config();
    let keys: Vec<&str> = record.keys().map(String::as_str).collect();
    assert!(keys.is_sorted() && keys.len() == 30, "{keys:?}");
    assert_eq!((&record["learning_rate"], &record["clear_cache_threshold"]), (&json!(3e-4), &json!(2_000_000_000u64)));
    assert_eq!((&record["report_to"], &record["num_layers"]), (&json!("tensorboard"), &json!(-1)));
    assert_eq!(record["lora_parameters"], json!({"rank": 8, "dropout": 0.0, "scale": 20.0}));
    assert_eq!(parse(json!({"fine_tune_type": "full"})).adapter_config()["lora_parameters"], Value::Null);
}

#[test]
fn whole_numbers_that_are_written_as_floats_are_recorded_whole() {
    let counts = [
        "batch_size",
        "grad_accumulation_steps",
        "iters",
        "max_seq_length",
        "num_layers",
        "save_every",
        "seed",
        "steps_per_eval",
        "steps_per_report",
        "test_batches",
        "val_batches",
    ];
    let mut keys: Map<String, Value> = counts.iter().map(|key| ((*key).to_owned(), json!(2.0))).collect();
    keys.insert("lora_parameters".into(), json!({"rank": 8.0, "scale": 20.0, "dropout": 0.0}));
    keys.insert("optimizer_config".into(), json!({"muon": {"ns_steps": 5.0, "momentum": 0.0}}));
    let of = |schedule: Value| {
        let mut keys = keys.clone();
        keys.insert("lr_schedule".into(), schedule);
        parse(Value::Object(keys)).adapter_config()
    };
    let record = of(json!({"name": "linear_schedule", "warmup": 5.0, "arguments": [0.0, 1.0, 9.0]}));
    for key in counts {
        assert_eq!(record[key], json!(2), "{key}");
    }
    assert_eq!(record["lora_parameters"], json!({"rank": 8, "scale": 20.0, "dropout": 0.0}));
    assert_eq!(record["optimizer_config"], json!({"muon": {"ns_steps": 5, "momentum": 0.0}}));
    assert_eq!(record["lr_schedule"], json!({"name": "linear_schedule", "warmup": 5, "arguments": [0.0, 1.0, 9]}));
    for (name, arguments, wanted) in [
        ("cosine_decay", json!([1.0, 100.0, 0.0]), json!([1.0, 100, 0.0])),
        ("step_decay", json!([1.0, 1.0, 10.0]), json!([1.0, 1.0, 10])),
        ("exponential_decay", json!([1.0, 1.0]), json!([1.0, 1.0])),
    ] {
        assert_eq!(of(json!({"name": name, "arguments": arguments}))["lr_schedule"]["arguments"], wanted, "{name}");
    }
}

#[test]
fn a_config_survives_its_way_through_json() {
    let config = parse(json!({
        "fine_tune_type": "full", "packing": true, "lr_schedule": {"name": "exponential_decay", "arguments": [1e-1, 0.9]},
        "optimizer": "adafactor", "optimizer_config": {"adafactor": {"eps": [1e-30, 0.1]}}, "hf_dataset": {"path": "a/b"},
    }));
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<TrainingConfig>(&text).unwrap(), config);
    let error = serde_json::from_str::<TrainingConfig>(&text.replace("\"iters\":1000", "\"iters\":-3")).unwrap_err().to_string();
    assert!(error.contains("`iters` is -3"), "{error}");
}

#[test]
fn a_role_is_what_an_engine_needs() {
    let role = parse(json!({"seed": 7, "num_layers": -1, "grad_checkpoint": true, "clear_cache_threshold": 5})).role(Parallel::Data);
    assert_eq!((role.seed, role.num_layers, role.grad_checkpoint), (7, None, true));
    assert_eq!((role.clear_cache_threshold, role.parallel), (Bytes(5), Parallel::Data));
}

#[test]
fn differences_are_what_changes_the_numbers() {
    let before = parse(json!({"lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.1}}));
    let same = parse(json!({
        "lora_parameters": {"rank": 8, "scale": 20, "dropout": 0.1}, "iters": 5, "save_every": 1, "steps_per_report": 1, "adapter_path": "elsewhere",
        "val_batches": 3, "optimizer_config": {"adam": {"betas": [0.9, 0.999]}}, "test": true, "grad_checkpoint": true,
    }));
    assert_eq!(same.differences(&before), Vec::<String>::new());
    let other = parse(json!({
        "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.1, "keys": ["self_attn.q_proj"]}, "batch_size": 8, "seed": 1, "data": "x",
        "optimizer_config": {"adam": {"betas": [0.8, 0.999]}},
        "lr_schedule": {"name": "exponential_decay", "arguments": [0.1, 0.9]},
    }));
    assert_eq!(
        other.differences(&before),
        [
            "`batch_size` is 8, the checkpoint was made with 4",
            "`data` is \"x\", the checkpoint was made with \"mlx-community/WikiSQL\"",
            "`learning_rate` is not set, the checkpoint was made with 0.00001",
            "`lora_parameters.keys` is [\"self_attn.q_proj\"], the checkpoint was made with not set",
            "`lora_parameters.rank` is 4, the checkpoint was made with 8",
            "`lr_schedule.arguments` is [0.1,0.9], the checkpoint was made with not set",
            "`lr_schedule.name` is \"exponential_decay\", the checkpoint was made with not set",
            "`lr_schedule.warmup` is 0, the checkpoint was made with not set",
            "`optimizer_config.adam.betas` is [0.8,0.999], the checkpoint was made with [0.9,0.999]",
            "`seed` is 1, the checkpoint was made with 0",
        ]
    );
    let full = parse(json!({"fine_tune_type": "full", "optimizer": "sgd"}));
    assert_eq!(
        full.differences(&before),
        [
            "`fine_tune_type` is \"full\", the checkpoint was made with \"lora\"",
            "`optimizer` is \"sgd\", the checkpoint was made with \"adam\"",
        ]
    );
}

#[test]
fn what_is_written_beside_an_adapter_is_read_back() {
    let config = parse(json!({"fine_tune_type": "dora", "model": "a/b", "num_layers": 3}));
    let ours = AdapterConfig::from_json(&Value::Object(config.adapter_config())).unwrap();
    assert_eq!((&ours.fine_tune, ours.num_layers, ours.model.as_deref()), (&config.fine_tune, config.num_layers, Some("a/b")));
    // A test of an adapter takes from its record what it is, and nothing else.
    let other = parse(json!({"fine_tune_type": "lora", "batch_size": 9}));
    let tested = other.for_adapter(&config.adapter_config()).unwrap();
    assert_eq!((&tested.fine_tune, tested.num_layers, tested.batch_size), (&config.fine_tune, Some(3), 9));
    let old = json!({"lora_parameters": {"rank": 8, "scale": 10.0, "dropout": 0.05}, "num_layers": 0, "beam": [1]});
    assert_eq!(other.for_adapter(old.as_object().unwrap()).unwrap().num_layers, None, "mlx-lm takes all layers for 0");
}
