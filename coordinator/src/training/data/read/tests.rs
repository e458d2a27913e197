//! What is read from lines, good and bad ones, and how the bad ones are named.

use super::*;
use crate::training::data::{
    fixtures::{model, usual_config},
    locate::Piece,
    split,
};
use serde_json::{Value, json};
use tempfile::TempDir;

struct World {
    folder: TempDir,
    encoder: Encoder,
}

impl World {
    fn new(config: &Value) -> Self {
        let folder = tempfile::tempdir().unwrap();
        model(folder.path(), config);
        let encoder = Encoder::load(folder.path()).unwrap();
        Self { folder, encoder }
    }

    fn usual() -> Self {
        Self::new(&usual_config())
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn read_parts(&self, parts: Vec<Part>, options: ReadOptions) -> Result<DataSet, DataError> {
        let located = Located { train: Some(Split { name: "the set".to_owned(), parts }), ..Located::default() };
        read(&located, &self.encoder, options, &CancellationToken::new()).map(|sets| sets.train.unwrap())
    }

    fn read(&self, text: &str, mask_prompt: bool) -> Result<DataSet, DataError> {
        let files = vec![self.file("train.jsonl", text)];
        let part = Part { pieces: vec![Piece { files, slice: None }], features: Features::default(), columns: false };
        self.read_parts(vec![part], ReadOptions { mask_prompt, max_seq_length: 12 })
    }

    fn error(&self, text: &str, mask_prompt: bool) -> String {
        let error = self.read(text, mask_prompt).unwrap_err().to_string();
        error.replace(&format!("{}/", self.folder.path().display()), "")
    }
}

fn texts(texts: &[&str]) -> String {
    texts.iter().map(|text| format!("{}\n", json!({"text": text}))).collect()
}

#[test]
fn the_first_bad_line_is_named_and_all_are_counted() {
    let world = World::usual();
    let good = r#"{"text": "a"}"#;
    for (text, wanted) in [
        (
            format!("{good}\n{{\"text\": \"a\"\n{good}\n"),
            "train.jsonl, line 2, column 12: not JSON (EOF while parsing an object): give one JSON object a line",
        ),
        (format!("{good}\n\n{good}\n{{]\n5\n"), "train.jsonl, line 2: empty: remove the line (3 lines are bad in all)"),
        (format!("{good}\n[{good}]\n\n"), "train.jsonl, line 2: a list instead of an object: give one JSON object a line"),
        (
            format!("{good}\n{{\"txt\": 1}}\n{{\"text\": null}}\n"),
            "train.jsonl, line 2: no `text`, which the first row has: give all rows the same form (2 lines are bad in all)",
        ),
        ("{\"text\": 5}\n".to_owned(), "train.jsonl, line 1: `text` is a number instead of a text"),
        ("{\"prompt\": \"a\", \"completion\": [1]}\n".to_owned(), "train.jsonl, line 1: `completion` is a list instead of a text"),
        (
            "{\"messages\": \"a\"}\n".to_owned(),
            "train.jsonl, line 1: `messages` is a text instead of a list of messages, each an object with a text as its `role`",
        ),
        (
            "{\"messages\": []}\n{\"messages\": [{\"content\": \"a\"}]}\n".to_owned(),
            "train.jsonl, line 1: `messages` is an empty list instead of a list of messages, each an object with a text as its `role` (2 lines are bad in all)",
        ),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": \"x\"}".to_owned(),
            "train.jsonl, line 1: `tools` is a text instead of a list of objects",
        ),
        (
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": [1]}".to_owned(),
            "train.jsonl, line 1: `tools` is a list with something else in it instead of a list of objects",
        ),
        (String::new(), "the set has no rows: add examples, or remove it"),
        ("\n\n".to_owned(), "the set has no rows: add examples, or remove it"),
        (
            "{}\n".to_owned(),
            "train.jsonl, line 1: the row has neither `prompt` and `completion`, nor `messages`, nor `text`; its fields are none: name the fields of your data with prompt_feature and completion_feature, chat_feature or text_feature",
        ),
    ] {
        assert_eq!(world.error(&text, false), wanted);
    }
    assert!(world.error("{\"txt\": 1, \"b\": 2}", false).contains("its fields are txt, b"));
}

#[test]
fn columns_are_characters() {
    let error = World::usual().error("{\"text\": \"ääää\", }\n", false);
    assert!(error.starts_with("train.jsonl, line 1, column 18: not JSON"), "{error}");
}

#[test]
fn one_field_may_be_prompt_and_completion() {
    let world = World::usual();
    let files = vec![world.file("train.jsonl", "{\"text\": \"a\"}\n")];
    let features = Features { prompt: "text".to_owned(), completion: "text".to_owned(), ..Features::default() };
    let part = Part { pieces: vec![Piece { files, slice: None }], features, columns: false };
    let both = world.read_parts(vec![part], ReadOptions { mask_prompt: false, max_seq_length: 99 }).unwrap();
    let files = vec![world.file("train.jsonl", "{\"prompt\": \"a\", \"completion\": \"a\"}\n")];
    let part = Part { pieces: vec![Piece { files, slice: None }], features: Features::default(), columns: false };
    let usual = world.read_parts(vec![part], ReadOptions { mask_prompt: false, max_seq_length: 99 }).unwrap();
    assert_eq!(both.examples[0].tokens, usual.examples[0].tokens);
}

#[test]
fn bytes_that_are_no_text_are_bad_json() {
    let world = World::usual();
    let path = world.file("train.jsonl", "");
    std::fs::write(&path, b"\xef\xbb\xbf{\"text\": \"a\"}\n{\"text\": \"\xff\"}\n").unwrap();
    let part = Part { pieces: vec![Piece { files: vec![path], slice: None }], features: Features::default(), columns: false };
    let error = world.read_parts(vec![part], ReadOptions { mask_prompt: false, max_seq_length: 9 }).unwrap_err();
    assert!(matches!(error, DataError::Rows { line: 2, bad_lines: 1, fault: RowFault::NotJson { .. }, .. }), "{error}");
}

#[test]
fn masked_prompts_need_answers() {
    let world = World::usual();
    let row = |roles: &[&str]| {
        let messages: Vec<_> = roles.iter().map(|role| json!({"role": role, "content": "a"})).collect();
        format!("{}\n", json!({"messages": messages}))
    };
    let rows = [row(&["user", "assistant"]), row(&["user"]), row(&["system", "user"]), row(&["assistant", "user"])].concat();
    assert_eq!(
        world.error(&rows, true),
        "train.jsonl, line 2: no message of the assistant in `messages`, so that with mask_prompt nothing would be learned: add the answer, \
         or unset mask_prompt (2 lines are bad in all)"
    );
    assert_eq!(world.read(&rows, false).unwrap().examples.len(), 4);
    let notes = world.read(&row(&["assistant", "user"]), true).unwrap().notes;
    assert_eq!(notes.len(), 3, "{notes:?}");
    assert!(notes[2].starts_with("1 of 1 examples of the set do not end with the assistant"), "{notes:?}");
    assert!(world.error(&texts(&["a"]), true).contains("mask_prompt is not supported for text data"));
}

#[test]
fn what_the_model_lacks_is_named() {
    let bare = World::new(&json!({"bos_token": "<|begin|>"}));
    let error = bare.error("{\"prompt\": \"a\", \"completion\": \"b\"}\n", false);
    assert!(error.starts_with("train.jsonl: the model has no chat template, which prompt and completion data needs"), "{error}");
    assert!(bare.error(&texts(&["a"]), false).contains("names no eos_token"));
}

#[test]
fn a_template_that_refuses_names_the_line() {
    let mut config = usual_config();
    config["chat_template"] = "{% if messages | length > 1 %}{{ raise_exception('one is enough') }}{% endif %}x".into();
    let world = World::new(&config);
    let row = |count: usize| format!("{}\n", json!({"messages": vec![json!({"role": "user", "content": "a"}); count]}));
    assert_eq!(world.error(&[row(1), row(2), row(1)].concat(), false), "train.jsonl, line 2: one is enough");
}

#[test]
fn bad_lines_of_all_kinds_are_counted_together() {
    let mut config = usual_config();
    config["chat_template"] = "{% if messages | length > 1 %}{{ raise_exception('one is enough') }}{% endif %}x".into();
    let world = World::new(&config);
    let row = |count: usize| format!("{}\n", json!({"messages": vec![json!({"role": "user", "content": "a"}); count]}));
    let text = [&row(2), &row(1), "{bad\n", &row(2)].concat();
    assert_eq!(world.error(&text, false), "train.jsonl, line 1: one is enough (3 lines are bad in all)");
    let text = ["{bad\n", "{\"foo\": 1}\n", "{bad\n"].concat();
    let error = world.error(&text, false);
    assert!(error.starts_with("train.jsonl, line 1, column 2: not JSON") && error.ends_with("(3 lines are bad in all)"), "{error}");
    let error = world.error(&["{\"foo\": 1}\n", &row(1), "{\"foo\": 1}\n"].concat(), false);
    assert!(error.contains("line 1: the row has neither") && error.ends_with("(2 lines are bad in all)"), "{error}");
}

#[test]
fn long_examples_are_cut_and_counted() {
    let world = World::usual();
    let set = world.read(&texts(&["abc", "abcdefghijkl", "abcdefghijklmnop"]), false).unwrap();
    assert_eq!(set.examples.iter().map(|example| example.tokens.len()).collect::<Vec<_>>(), [5, 12, 12]);
    assert_eq!(set.notes, ["2 of 3 examples of the set have more than max_seq_length = 12 tokens and are cut; the longest has 18"]);
    let masked = world.read("{\"prompt\": \"a long prompt, longer than that\", \"completion\": \"b\"}\n", true).unwrap();
    assert!(masked.notes[1].starts_with("1 of 1 examples of the set teach nothing"), "{:?}", masked.notes);
}

#[test]
fn rows_keep_their_order_over_many_chunks() {
    let world = World::usual();
    let words: Vec<String> = (0..2 * CHUNK_ROWS + 3).map(|number| number.to_string()).collect();
    let set = world.read(&texts(&words.iter().map(String::as_str).collect::<Vec<_>>()), false).unwrap();
    assert_eq!(set.examples.len(), words.len());
    let last = world.read(&texts(&[words.last().unwrap()]), false).unwrap();
    assert_eq!(set.examples.last(), last.examples.last());
}

#[test]
fn a_fingerprint_tells_sets_apart() {
    let world = World::usual();
    let of = |text: &str| world.read(text, false).unwrap().fingerprint();
    let first = of(&texts(&["a", "b"]));
    assert_eq!((first.len(), &first), (64, &of(&texts(&["a", "b"]))));
    assert_ne!(first, of(&texts(&["b", "a"])));
    assert_ne!(first, of("{\"text\": \"a\", \"x\": 1}\n{\"text\": \"b\"}\n"));
}

#[test]
fn slices_go_over_the_files_of_a_split() {
    let world = World::usual();
    let files = vec![world.file("a.jsonl", &texts(&["a", "b", "c"])), world.file("b.jsonl", "{\"text\": \"d\", \"x\": 1}\n\n")];
    let part = |expression: &str| {
        let pieces = split::parse(expression).unwrap().into_iter().map(|slice| Piece { files: files.clone(), slice: Some(slice) });
        Part { pieces: pieces.collect(), features: Features::default(), columns: true }
    };
    let options = ReadOptions { mask_prompt: false, max_seq_length: 9 };
    let letters = |parts: Vec<Part>| {
        let set = world.read_parts(parts, options).unwrap();
        let letter = |example: &Example| (example.tokens[1] - (u32::from(b'a') - 0x21), example.order);
        set.examples.iter().map(letter).collect::<Vec<_>>()
    };
    assert_eq!(letters(vec![part("x")]), [(0, 2), (1, 2), (2, 2), (3, 2)]);
    assert_eq!(letters(vec![part("x[1:3]"), part("x[-1:]")]), [(1, 1), (2, 1), (3, 2)]);
    assert_eq!(letters(vec![part("x[75%:]+x[:25%]")]), [(3, 2), (0, 2)]);
    let error = world.read_parts(vec![part("x[2:1]")], options).unwrap_err();
    assert!(matches!(error, DataError::Empty { .. }), "{error}");
}

#[test]
fn reading_can_be_cancelled_and_needs_a_length() {
    let world = World::usual();
    let files = vec![world.file("train.jsonl", &texts(&["a"]))];
    let part = Part { pieces: vec![Piece { files, slice: None }], features: Features::default(), columns: false };
    let located = Located { train: Some(Split { name: "the set".to_owned(), parts: vec![part] }), ..Located::default() };
    let cancel = CancellationToken::new();
    let options = ReadOptions { mask_prompt: false, max_seq_length: 1 };
    let error = read(&located, &world.encoder, options, &cancel).unwrap_err();
    assert!(matches!(error, DataError::SequenceTooShort { given: 1 }), "{error}");
    cancel.cancel();
    let error = read(&located, &world.encoder, ReadOptions { max_seq_length: 2, ..options }, &cancel).unwrap_err();
    assert!(matches!(error, DataError::Cancelled), "{error}");
}
