//! Lines of a process's output: cut at a length, without control characters, the last ones kept.

use std::collections::VecDeque;
use tokio::io::{AsyncRead, AsyncReadExt};

/// The rest of a longer line is dropped.
const LINE_BYTES_MAX: usize = 8 << 10;
/// What is kept for the report of a death: this many lines, each cut at this length.
const TAIL_LINES: usize = 40;
const TAIL_LINE_CHARS: usize = 400;
const READ_BYTES: usize = 8 << 10;

/// Cuts bytes into lines.
#[derive(Debug, Default)]
pub(crate) struct LineSplitter {
    partial: Vec<u8>,
    lines: VecDeque<String>,
}

impl LineSplitter {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                b'\n' => self.finish_line(),
                _ if self.partial.len() < LINE_BYTES_MAX => self.partial.push(*byte),
                _ => {}
            }
        }
    }

    /// Takes what was written without a line break at the end for a line.
    pub(crate) fn finish(&mut self) {
        if !self.partial.is_empty() {
            self.finish_line();
        }
    }

    pub(crate) fn next_line(&mut self) -> Option<String> {
        self.lines.pop_front()
    }

    fn finish_line(&mut self) {
        let text = String::from_utf8_lossy(&self.partial);
        // Terminals obey control characters, and these lines end up in one.
        self.lines.push_back(text.trim_end().chars().filter(|c| *c == '\t' || !c.is_control()).collect());
        self.partial.clear();
    }
}

/// The lines that a pipe brings.
#[derive(Debug)]
pub(crate) struct Lines<R> {
    reader: Option<R>,
    splitter: LineSplitter,
    buffer: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(crate) fn new(reader: Option<R>) -> Self {
        Self { reader, splitter: LineSplitter::default(), buffer: vec![0; READ_BYTES] }
    }

    /// The next line; None at the end. Can be cancelled without losing anything.
    pub(crate) async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(line) = self.splitter.next_line() {
                return Some(line);
            }
            let reader = self.reader.as_mut()?;
            match reader.read(&mut self.buffer).await {
                Ok(bytes) if bytes > 0 => self.splitter.push(&self.buffer[..bytes]),
                Ok(_) | Err(_) => {
                    self.reader = None;
                    self.splitter.finish();
                }
            }
        }
    }

    /// Whether everything was read.
    pub(crate) fn is_finished(&self) -> bool {
        self.reader.is_none() && self.splitter.lines.is_empty()
    }
}

/// The last lines of a process.
#[derive(Debug, Default)]
pub(crate) struct Tail(VecDeque<String>);

impl Tail {
    pub(crate) fn push(&mut self, line: &str) {
        if self.0.len() == TAIL_LINES {
            self.0.pop_front();
        }
        self.0.push_back(line.chars().take(TAIL_LINE_CHARS).collect());
    }

    pub(crate) fn into_lines(self) -> Vec<String> {
        self.0.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(splitter: &mut LineSplitter) -> Vec<String> {
        std::iter::from_fn(|| splitter.next_line()).collect()
    }

    #[test]
    fn lines_are_put_together_from_pieces() {
        let mut splitter = LineSplitter::default();
        splitter.push(b"one\r\nt");
        splitter.push(b"wo\n\nrest");
        assert_eq!(all(&mut splitter), ["one", "two", ""]);
        splitter.finish();
        splitter.finish();
        assert_eq!(all(&mut splitter), ["rest"]);
    }

    #[test]
    fn long_and_hostile_lines_are_tamed() {
        let mut splitter = LineSplitter::default();
        splitter.push(&vec![b'x'; 10 * LINE_BYTES_MAX]);
        splitter.push(b"\n\x1b[31mred\x07\xff\n");
        let lines = all(&mut splitter);
        assert_eq!(lines[0].len(), LINE_BYTES_MAX);
        assert_eq!(lines[1], "[31mred\u{fffd}");
    }

    #[test]
    fn the_tail_keeps_the_last_lines() {
        let mut tail = Tail::default();
        (0..100).for_each(|n| tail.push(&n.to_string()));
        tail.push(&"x".repeat(2 * TAIL_LINE_CHARS));
        let lines = tail.into_lines();
        assert_eq!((lines.len(), lines[0].as_str(), lines[TAIL_LINES - 2].as_str()), (TAIL_LINES, "61", "99"));
        assert_eq!(lines[TAIL_LINES - 1].len(), TAIL_LINE_CHARS);
    }
}
