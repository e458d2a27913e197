//! What is refused before anything is loaded, and what a resumed job must find again.

use super::*;
use crate::training::data::fixtures::{model, usual_config};
use serde_json::{Map, Value, json};

const SHORT: &str = "{\"prompt\": \"a\", \"completion\": \"b\"}\n";
const LONG: &str = "{\"prompt\": \"a prompt that leaves no room for an answer\", \"completion\": \"b\"}\n";

/// Examples of files with these texts, in batches of one.
async fn examples(files: &[(&str, &str)], more: Value) -> Result<Examples, String> {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), &usual_config());
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let mut keys: Map<String, Value> = more.as_object().cloned().unwrap();
    if !keys.contains_key("hf_dataset") {
        keys.insert("data".into(), json!(folder.path()));
    }
    keys.extend([("train".into(), json!(true)), ("batch_size".into(), json!(1)), ("max_seq_length".into(), json!(30))]);
    let config = TrainingConfig::parse(&keys).unwrap();
    let settings = HubSettings { offline: true, ..HubSettings::new("http://127.0.0.1:1", folder.path()) };
    let read = Examples::read(&config, folder.path().to_owned(), &settings, &CancellationToken::new()).await;
    read.map_err(|error| error.to_string())
}

#[tokio::test]
async fn prompts_without_room_for_an_answer_are_refused_at_once() {
    let train = [SHORT, LONG, SHORT, LONG].concat();
    let of = |files: &'static [&'static str]| files.iter().map(|name| (*name, SHORT)).collect::<Vec<_>>();
    let masked = json!({"mask_prompt": true, "test": true});
    let error = examples(&[("train.jsonl", &train), ("test.jsonl", SHORT)], masked.clone()).await.err().unwrap();
    assert!(error.starts_with("2 of the batches to be trained on have no target that counts"), "{error}");
    assert!(error.contains("number 2 of ") && error.contains("train.jsonl"), "{error}");
    for bad in ["valid.jsonl", "test.jsonl"] {
        let mut files = of(&["train.jsonl", "valid.jsonl", "test.jsonl"]);
        files.iter_mut().filter(|(name, _)| *name == bad).for_each(|(_, text)| *text = LONG);
        let error = examples(&files, masked.clone()).await.err().unwrap();
        assert!(error.starts_with("no target of ") && error.contains(bad), "{error}");
        assert!(examples(&files, json!({"test": true})).await.is_ok(), "without mask_prompt all targets count");
    }
}

#[tokio::test]
async fn a_fingerprint_tells_how_many_batches_an_evaluation_draws_from() {
    let of = async |valid: &str| examples(&[("train.jsonl", SHORT), ("valid.jsonl", valid)], json!({})).await.unwrap().fingerprint();
    let (one, two) = (of(SHORT).await, of(&SHORT.repeat(2)).await);
    assert_ne!(one, two);
    assert_eq!(one, of(SHORT).await);
    let alone = examples(&[("train.jsonl", SHORT)], json!({})).await.unwrap().fingerprint();
    assert_eq!((alone.len(), one), (64, format!("{alone}+1")));
}

#[tokio::test]
async fn a_configuration_and_a_revision_get_to_whoever_opens_the_set() {
    let named = json!({"hf_dataset": {"path": "a/b", "config": {"name": "main"}}});
    let error = examples(&[], named).await.err().unwrap();
    assert!(error.contains("`hf_dataset.config.name` is `main`"), "{error}");
    let at = json!({"hf_dataset": {"path": "a/b", "config": {"revision": "v2"}}});
    let error = examples(&[], at).await.err().unwrap();
    assert!(error.contains("a/b@v2"), "{error}");
}
