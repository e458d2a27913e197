//! A YAML file (JSON is YAML) as the mapping of keys that a config is.

use crate::failure::{Exit, Failure};
use serde_json::{Map, Value};
use std::{fs, path::Path};

/// Errors say file, line and column.
pub(crate) fn read(path: &Path) -> Result<Map<String, Value>, Failure> {
    let text = fs::read_to_string(path).map_err(|error| Failure::new(Exit::BadFile, format!("cannot read {}: {error}", path.display())))?;
    parse(&text).map_err(|message| Failure::new(Exit::BadFile, format!("{}{message}", path.display())))
}

/// The message continues the name of the file.
fn parse(text: &str) -> Result<Map<String, Value>, String> {
    // By default a key that is there twice is an error, and so is NaN, which JSON could not hold.
    let options = serde_saphyr::options! { with_snippet: false };
    match serde_saphyr::from_str_with_options(text, options) {
        Ok(Value::Object(keys)) => Ok(keys),
        // Nothing but comments.
        Ok(Value::Null) => Ok(Map::new()),
        Ok(_) => Err(": a config is a mapping, lines such as `iters: 1000`".to_owned()),
        Err(error) => Err(message(&error)),
    }
}

fn message(error: &serde_saphyr::Error) -> String {
    let text = error.render_with_formatter(&serde_saphyr::UserMessageFormatter);
    match error.location() {
        Some(at) => {
            let (line, column) = (at.line(), at.column());
            format!(":{line}:{column}: {}", text.replace(&format!(" at line {line}, column {column}"), ""))
        }
        None => format!(": {text}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn scalars_are_what_mlx_lms_loader_makes_of_them() {
        let text = "a: 1e-5\nb: 1E5\nc: 5e-4 # why\nd: [1e-5, 1000, 1e-7]\ne: yes\nf: True\ng: ~\nh:\ni: '1e-5'\nj: 1_000\nk: .5\nl: 1.\nm: 2GB\nn: -1\n";
        let wanted = json!({
            "a": 1e-5, "b": 1e5, "c": 5e-4, "d": [1e-5, 1000, 1e-7], "e": true, "f": true, "g": null, "h": null, "i": "1e-5", "j": 1000, "k": 0.5,
            "l": 1.0, "m": "2GB", "n": -1,
        });
        assert_eq!(Value::Object(parse(text).unwrap()), wanted);
        assert_eq!(Value::Object(parse(r#"{"iters": 3, "lr_schedule": null}"#).unwrap()), json!({"iters": 3, "lr_schedule": null}));
        assert_eq!(parse("# nothing\n").unwrap(), Map::new());
        let anchored = parse("a: &x {rank: 8}\nb:\n  <<: *x\n  scale: 1\n").unwrap();
        assert_eq!(anchored["b"], json!({"rank": 8, "scale": 1}));
    }

    #[test]
    fn an_error_says_line_and_column() {
        for (text, place) in [
            ("iters: 1\niters: 2\n", ":2:1: "),
            ("iters: 1\n  seed: 2\n", ":2:7: "),
            ("iters: [1, 2\nseed: 3\n", ":2:5: "),
            ("learning_rate: .nan\n", ":1:16: "),
            ("iters: 1\n---\niters: 2\n", ":3:1: "),
            ("- 1\n", ": a config is a mapping"),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.starts_with(place) && !message.contains('\n') && !message.contains("column"), "{text:?}: {message}");
        }
    }
}
