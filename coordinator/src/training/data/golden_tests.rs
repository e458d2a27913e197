//! Against what mlx-lm itself does with the same data, as golden.py wrote it down.

use super::{fixtures::set, *};
use mlx_cluster_common::training::Row;
use serde_json::Value;
use std::path::Path;
use tokio_util::sync::CancellationToken;

fn golden(part: &str) -> Vec<Value> {
    let all: Value = serde_json::from_str(include_str!("golden.json")).unwrap();
    all[part].as_array().unwrap().clone()
}

fn number(case: &Value, key: &str) -> usize {
    usize::try_from(case[key].as_u64().unwrap()).unwrap()
}

/// Place, input and target of the first and the last target that counts, and how many count.
fn summary(row: &Row) -> Value {
    let at = |place: usize| serde_json::json!([place, row.tokens[place], row.targets[place]]);
    assert_eq!(row.tokens.len(), row.targets.len());
    match row.n_counted() {
        0 => serde_json::json!([]),
        count => serde_json::json!([at(row.counted.start as usize), at(row.counted.end as usize - 1), count]),
    }
}

#[test]
fn rows_count_what_mlx_lm_counts() {
    let cases = golden("rows");
    for case in &cases {
        let limit = number(case, "limit");
        let example = |(index, example): (usize, &Value)| Example {
            tokens: (1 + index as u32..).take(number(example, "len").min(limit)).collect(),
            offset: number(example, "offset") as u32,
            order: 1,
        };
        let examples = case["examples"].as_array().unwrap().iter().enumerate().map(example).collect();
        let set = DataSet { name: "golden".to_owned(), examples, max_seq_length: limit, notes: vec![] };
        let seed = number(case, "seed") as u32;
        let batches = test_only(&set, number(case, "batch_size"), None, seed).unwrap();
        let found: Vec<Vec<Value>> = batches.iter().map(|batch| set.rows(batch).iter().map(summary).collect()).collect();
        assert_eq!(serde_json::to_value(found).unwrap(), case["batches"], "limit {limit}");
    }
    assert!(cases.len() > 4);
}

fn grouped(case: &Value, key: &str) -> Option<Grouped> {
    let fields: Vec<usize> = serde_json::from_value(case[key].clone()).unwrap();
    let set = set(&fields.iter().map(|fields| (4, *fields)).collect::<Vec<_>>(), 64);
    (!fields.is_empty()).then(|| Grouped::new(&set, number(case, "batch_size")).unwrap())
}

#[test]
fn iterations_come_as_mlx_lms_trainer_asks_for_them() {
    for case in golden("runs") {
        let plan = BatchPlan {
            iters: number(&case, "iters") as u64,
            steps_per_eval: number(&case, "steps_per_eval") as u64,
            val_batches: case["val_batches"].as_u64(),
            seed: number(&case, "seed") as u32,
        };
        let start = Batches::new(grouped(&case, "train").unwrap(), grouped(&case, "valid"), plan).unwrap();
        let mut log: Vec<(&str, Vec<u32>)> = Vec::new();
        let mut all = Vec::new();
        for iteration in start.clone() {
            all.push(iteration.clone());
            log.push(("train", iteration.batch));
            log.extend(iteration.evaluation.into_iter().flatten().map(|batch| ("valid", batch)));
        }
        let test = grouped(&case, "test").unwrap();
        log.extend(start.clone().test(&test, Some(2)).into_iter().map(|batch| ("test", batch)));
        assert_eq!(serde_json::to_value(&log).unwrap(), case["log"], "seed {}", plan.seed);
        for done in (0..=plan.iters).rev() {
            let mut resumed = start.clone();
            resumed.go_to(done);
            assert_eq!(resumed.done(), done);
            assert!(resumed.by_ref().eq(all[done as usize..].iter().cloned()), "seed {} after {done}", plan.seed);
            resumed.go_to(1);
            assert!(resumed.eq(all[1..].iter().cloned()));
        }
    }
}

#[test]
fn examples_are_tokenized_as_mlx_lm_does() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/model");
    let encoder = Encoder::load(&model).unwrap();
    for case in golden("tokenized") {
        let folder = tempfile::tempdir().unwrap();
        let lines: Vec<String> = case["rows"].as_array().unwrap().iter().map(|row| format!("{row}\n")).collect();
        std::fs::write(folder.path().join("train.jsonl"), lines.concat()).unwrap();
        let features = match case["name"].as_str() {
            Some("renamed") => Features { prompt: "q".to_owned(), completion: "a".to_owned(), ..Features::default() },
            _ => Features::default(),
        };
        let source = DataSource::Named { data: folder.path().display().to_string(), features };
        let settings = mlx_cluster_hub::HubSettings::new("http://127.0.0.1:9", folder.path());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let wanted = Wanted { train: true, test: false };
        let located = runtime.block_on(locate(&source, wanted, &settings, &|_| {})).unwrap();
        let options = ReadOptions { mask_prompt: case["mask_prompt"].as_bool().unwrap(), max_seq_length: 4096 };
        let sets = read(&located, &encoder, options, &CancellationToken::new()).unwrap();
        let found = sets.train.unwrap().examples;
        let expected = case["examples"].as_array().unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            let tokens: Vec<u32> = serde_json::from_value(expected["tokens"].clone()).unwrap();
            assert_eq!(found.tokens, tokens, "{} {}", case["name"], case["mask_prompt"]);
            assert_eq!((found.offset as usize, found.order), (number(expected, "offset"), number(expected, "order")));
        }
    }
}
