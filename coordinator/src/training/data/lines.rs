//! The lines of a JSON lines file, with bounds on the file and on each line.

use super::error::{DataError, RowFault};
use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

/// An example that is longer is no example.
pub(super) const MAX_LINE_BYTES: u64 = 16 << 20;
/// Its tokens, all in memory, would take about as much.
pub(super) const MAX_FILE_BYTES: u64 = 8 << 30;

/// Reads a file line by line. Blank lines at the end are no lines.
#[derive(Debug)]
pub(super) struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    buffer: Vec<u8>,
    /// Of the line that was read last, from 1.
    number: u64,
    /// Blank lines that come before the buffer's line, which tell only by what follows whether they count.
    blank: u64,
    pending: Option<Result<(), RowFault>>,
}

/// One line, without its end, or what is wrong with it.
pub(super) type Line<'a> = (u64, Result<&'a [u8], RowFault>);

impl Lines {
    pub(super) fn open(path: &Path) -> Result<Self, DataError> {
        let failed = |source| DataError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        if bytes > MAX_FILE_BYTES {
            return Err(DataError::FileTooLarge { path: path.to_owned(), bytes, limit: MAX_FILE_BYTES });
        }
        let reader = BufReader::with_capacity(1 << 20, file);
        Ok(Self { path: path.to_owned(), reader, buffer: Vec::new(), number: 0, blank: 0, pending: None })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// None at the end.
    pub(super) fn next(&mut self) -> Result<Option<Line<'_>>, DataError> {
        while self.pending.is_none() {
            let Some(read) = self.read().map_err(|source| DataError::Read { path: self.path.clone(), source })? else { return Ok(None) };
            if read.is_ok() && self.buffer.iter().all(u8::is_ascii_whitespace) {
                self.blank += 1;
            } else {
                self.pending = Some(read);
            }
        }
        if self.blank > 0 {
            self.blank -= 1;
            self.number += 1;
            return Ok(Some((self.number, Err(RowFault::Blank))));
        }
        self.number += 1;
        let read = self.pending.take().unwrap_or(Ok(()));
        Ok(Some((self.number, read.map(|()| self.buffer.trim_ascii_end()))))
    }

    /// Fills the buffer with the next line; of one that is too long, only its length is kept.
    fn read(&mut self) -> io::Result<Option<Result<(), RowFault>>> {
        self.buffer.clear();
        let mut bytes = (&mut self.reader).take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut self.buffer)? as u64;
        if bytes == 0 {
            return Ok(None);
        }
        if bytes <= MAX_LINE_BYTES || self.buffer.ends_with(b"\n") {
            return Ok(Some(Ok(())));
        }
        loop {
            self.buffer.clear();
            let more = (&mut self.reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut self.buffer)? as u64;
            bytes += more;
            if more == 0 || self.buffer.ends_with(b"\n") {
                self.buffer.clear();
                return Ok(Some(Err(RowFault::TooLong { bytes, limit: MAX_LINE_BYTES })));
            }
        }
    }
}

/// Number of lines.
pub(super) fn count(path: &Path) -> Result<u64, DataError> {
    let mut lines = Lines::open(path)?;
    let mut count = 0;
    while let Some((number, _)) = lines.next()? {
        count = number;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &[u8]) -> Vec<(u64, Result<Vec<u8>, String>)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.jsonl");
        std::fs::write(&path, text).unwrap();
        let mut lines = Lines::open(&path).unwrap();
        let mut all = Vec::new();
        while let Some((number, line)) = lines.next().unwrap() {
            all.push((number, line.map(<[u8]>::to_vec).map_err(|fault| fault.to_string())));
        }
        assert_eq!(count(&path).unwrap(), all.len() as u64);
        all
    }

    #[test]
    fn blank_lines_count_but_at_the_end() {
        assert_eq!(lines(b""), []);
        assert_eq!(lines(b"\n \r\n\n"), []);
        let found = lines(b"a\r\n\n\t\nb\n\n");
        let blank = || Err(RowFault::Blank.to_string());
        assert_eq!(found, [(1, Ok(b"a".to_vec())), (2, blank()), (3, blank()), (4, Ok(b"b".to_vec()))]);
    }

    #[test]
    fn a_line_that_is_too_long_is_passed_over() {
        let mut text = vec![b'x'; MAX_LINE_BYTES as usize];
        text.extend_from_slice(b"y\nb\n");
        let found = lines(&text);
        assert_eq!(found.len(), 2);
        assert!(found[0].1.as_ref().unwrap_err().contains("at most"), "{:?}", found[0].1);
        assert_eq!(found[1], (2, Ok(b"b".to_vec())));
        text.truncate(MAX_LINE_BYTES as usize);
        assert_eq!(lines(&text).len(), 1);
        assert!(lines(&text)[0].1.is_ok());
    }

    #[test]
    fn a_file_that_is_too_large_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.jsonl");
        File::create(&path).unwrap().set_len(MAX_FILE_BYTES + 1).unwrap();
        let error = Lines::open(&path).unwrap_err().to_string();
        assert!(error.contains("split it"), "{error}");
    }
}
