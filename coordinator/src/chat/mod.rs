//! Chat text: messages to a prompt, prompt to tokens, tokens to text, and text to reasoning, answer and tool calls.
//! Everything here is a function of its arguments and of the model's files; nothing waits on the network.

pub mod detokenize;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod output;
pub mod reasoning;
pub mod stop;
pub mod template;
pub mod tokenizer;
pub mod tools;

use std::io::{self, Read};
use std::path::Path;

const MAX_SMALL_FILE_BYTES: u64 = 16 << 20;

/// Reads a configuration file; one of more than 16 MiB is no configuration file.
fn read_small_file(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_SMALL_FILE_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_SMALL_FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "larger than 16 MiB"));
    }
    Ok(text)
}
