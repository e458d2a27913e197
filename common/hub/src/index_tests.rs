//! Whole and broken model folders (items 46, 54 and 71 of the reliability notes).

use super::*;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

fn weights(names: &[&str]) -> Vec<u8> {
    let data = [0u8; 8];
    let tensors = names.iter().map(|name| (*name, TensorView::new(Dtype::F16, vec![2, 2], &data).unwrap()));
    safetensors::serialize(tensors.collect::<Vec<_>>(), None).unwrap()
}

fn folder(files: &[(&str, Vec<u8>)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn index_file(placed: &[(&str, &str)]) -> (&'static str, Vec<u8>) {
    let map: BTreeMap<_, _> = placed.iter().copied().collect();
    (WEIGHT_INDEX_FILE, serde_json::to_vec(&serde_json::json!({"metadata": {}, "weight_map": map})).unwrap())
}

fn refused(files: &[(&str, Vec<u8>)]) -> String {
    folder_weight_index(folder(files).path()).unwrap_err().to_string()
}

#[test]
fn one_file_needs_no_index() {
    let model = folder(&[("model.safetensors", weights(&["a", "b"])), ("adapters.safetensors", weights(&["c"]))]);
    let index = folder_weight_index(model.path()).unwrap();
    assert_eq!(index.tensors.keys().collect::<Vec<_>>(), ["a", "b"]);
    let entry = &index.tensors["a"];
    assert_eq!((entry.file.as_str(), entry.shape.as_slice(), entry.bytes), ("model.safetensors", &[2, 2][..], 8));
}

#[test]
fn several_files_follow_the_index() {
    let model = folder(&[
        ("model-00001-of-00002.safetensors", weights(&["a"])),
        ("model-00002-of-00002.safetensors", weights(&["b", "unlisted"])),
        index_file(&[("a", "model-00001-of-00002.safetensors"), ("b", "model-00002-of-00002.safetensors")]),
    ]);
    let index = folder_weight_index(model.path()).unwrap();
    assert_eq!(index.tensors["b"].file, "model-00002-of-00002.safetensors");
    assert!(index.tensors.contains_key("unlisted"));
}

#[test]
fn of_files_that_are_not_here_the_index_tells_the_names() {
    let model = folder(&[
        ("model-00001-of-00002.safetensors", weights(&["a"])),
        index_file(&[("a", "model-00001-of-00002.safetensors"), ("b", "model-00002-of-00002.safetensors")]),
    ]);
    let index = partial_weight_index(model.path()).unwrap();
    assert_eq!(index.tensors.keys().collect::<Vec<_>>(), ["a"]);
    assert_eq!(index.elsewhere.iter().collect::<Vec<_>>(), ["b"]);
}

#[test]
fn a_file_that_the_index_names_is_missing() {
    let message =
        refused(&[("model-1.safetensors", weights(&["a"])), index_file(&[("a", "model-1.safetensors"), ("b", "model-2.safetensors")])]);
    assert!(message.contains("model-2.safetensors") && message.contains("missing"), "{message}");
}

#[test]
fn a_tensor_is_not_where_the_index_places_it() {
    let index = index_file(&[("a", "model-1.safetensors"), ("gone", "model-1.safetensors")]);
    let message = refused(&[("model-1.safetensors", weights(&["a"])), index]);
    assert!(message.contains("`gone`") && message.contains("model-1.safetensors"), "{message}");
}

#[test]
fn a_tensor_is_in_two_files() {
    let message = refused(&[("model-1.safetensors", weights(&["a"])), ("model-2.safetensors", weights(&["a"]))]);
    assert!(message.contains("`a`") && message.contains("model-1.safetensors and model-2.safetensors"), "{message}");
}

#[test]
fn the_index_may_not_name_a_path() {
    for file in [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        ".hidden.safetensors",
        "model.bin",
        "a\0.safetensors",
        "",
    ] {
        let message = refused(&[("model.safetensors", weights(&["a"])), index_file(&[("a", file)])]);
        assert!(message.contains("not a plain .safetensors file name"), "{file:?}: {message}");
    }
}

#[test]
fn a_broken_index_is_named() {
    for (text, expected) in [
        (&b"<html>busy</html>"[..], "web page"),
        (b"{}", "weight_map"),
        (b"{\"weight_map\": {\"a\": 7}}", "index.json:1:"),
        (b"{\"weight_map\": {}}", "names no file"),
    ] {
        let message = refused(&[("model.safetensors", weights(&["a"])), (WEIGHT_INDEX_FILE, text.to_vec())]);
        assert!(message.contains(expected) && message.contains(WEIGHT_INDEX_FILE), "{message}");
    }
}

#[test]
fn pickles_are_refused() {
    for name in ["pytorch_model.bin", "model.pt", "weights.pkl"] {
        let message = refused(&[("config.json", b"{}".to_vec()), (name, b"x".to_vec())]);
        assert!(message.contains(name) && message.contains("pickle files can run code; convert to safetensors"), "{message}");
    }
}

#[test]
fn no_weights_at_all() {
    assert!(refused(&[("config.json", b"{}".to_vec())]).contains("holds no model*.safetensors"));
    assert!(refused(&[("m.gguf", b"x".to_vec())]).contains("(only m.gguf)"));
}

#[test]
fn a_bad_weight_file_is_named() {
    let mut bytes = weights(&["a"]);
    bytes.truncate(bytes.len() - 1);
    let message = refused(&[("model.safetensors", bytes)]);
    assert!(message.contains("model.safetensors") && message.contains("incomplete download"), "{message}");
}
