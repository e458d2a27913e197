//! Reads the rows of a set, checks them, and tokenizes them.

use super::{
    DataSet, DataSets, Example,
    encode::Encoder,
    error::{DataError, RowFault},
    form::{Content, Features, Form, Object, object},
    lines::{Lines, count},
    locate::{Located, Part, Split},
};
use std::{
    collections::BTreeSet,
    ops::Range,
    path::{Path, PathBuf},
};
use tokio_util::sync::CancellationToken;

/// Rows that are parsed before they are tokenized, all processors at it.
const CHUNK_ROWS: usize = 512;

/// How rows become examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadOptions {
    /// The prompt does not count in the loss.
    pub mask_prompt: bool,
    /// Longer examples are cut.
    pub max_seq_length: usize,
}

/// Reads, checks and tokenizes all sets. Blocks, for minutes where there is much: not for an asynchronous thread.
///
/// # Errors
/// See [`DataError`]; of bad rows, the first is named and all are counted.
pub fn read(located: &Located, encoder: &Encoder, options: ReadOptions, cancel: &CancellationToken) -> Result<DataSets, DataError> {
    if options.max_seq_length < 2 {
        return Err(DataError::SequenceTooShort { given: options.max_seq_length });
    }
    let set = |split: &Option<Split>| {
        let reader = Reader { encoder, options, cancel, bad_lines: 0, fault: None, examples: Vec::new(), counts: Counts::default() };
        split.as_ref().map(|split| reader.read(split)).transpose()
    };
    Ok(DataSets { train: set(&located.train)?, valid: set(&located.valid)?, test: set(&located.test)?, notes: located.notes.clone() })
}

struct Reader<'a> {
    encoder: &'a Encoder,
    options: ReadOptions,
    cancel: &'a CancellationToken,
    bad_lines: u64,
    fault: Option<(PathBuf, u64, RowFault)>,
    examples: Vec<Example>,
    counts: Counts,
}

/// What a user should know.
#[derive(Debug, Default)]
struct Counts {
    cut: u64,
    longest: usize,
    /// Examples of which no target counts.
    masked: u64,
    /// Chats that somebody else than the assistant ends.
    others_end: u64,
}

/// A row that has been checked.
struct Checked {
    line: u64,
    content: Content,
    fields: usize,
}

/// The rows of a part, so far.
struct Progress<'a> {
    part: &'a Part,
    form: Option<Form>,
    columns: BTreeSet<String>,
    waiting: Vec<Checked>,
}

impl Reader<'_> {
    fn read(mut self, split: &Split) -> Result<DataSet, DataError> {
        for part in &split.parts {
            self.part(part)?;
        }
        if let Some((path, line, fault)) = self.fault {
            return Err(DataError::Rows { path, line, fault, bad_lines: self.bad_lines });
        }
        if self.examples.is_empty() {
            return Err(DataError::Empty { name: split.name.clone() });
        }
        let notes = self.counts.notes(&split.name, self.examples.len(), self.options.max_seq_length);
        Ok(DataSet { name: split.name.clone(), examples: self.examples, max_seq_length: self.options.max_seq_length, notes })
    }

    fn part(&mut self, part: &Part) -> Result<(), DataError> {
        let first = self.examples.len();
        let mut progress = Progress { part, form: None, columns: BTreeSet::new(), waiting: Vec::new() };
        for piece in &part.pieces {
            let mut rows = 0..u64::MAX;
            if let Some(slice) = &piece.slice {
                let counts = piece.files.iter().map(|file| count(file)).sum::<Result<u64, _>>()?;
                rows = slice.of(counts);
            }
            for file in &piece.files {
                rows = self.file(file, rows, &mut progress)?;
            }
        }
        if part.columns {
            let columns = progress.columns.len();
            self.examples[first..].iter_mut().for_each(|example| example.order = columns);
        }
        Ok(())
    }

    /// Reads those of `rows` that are in the file; returns what of them is left for the next file.
    fn file(&mut self, path: &Path, rows: Range<u64>, progress: &mut Progress<'_>) -> Result<Range<u64>, DataError> {
        let mut lines = Lines::open(path)?;
        let mut passed = 0;
        while let Some((number, line)) = lines.next()? {
            passed = number;
            if number > rows.end {
                break;
            }
            if !rows.contains(&(number - 1)) {
                continue;
            }
            match line.and_then(object) {
                Ok(row) => self.row(path, number, &row, progress)?,
                Err(fault) => self.note(path, number, fault),
            }
            if progress.waiting.len() >= CHUNK_ROWS {
                self.encode(lines.path(), &mut progress.waiting)?;
            }
        }
        self.encode(path, &mut progress.waiting)?;
        Ok(rows.start.saturating_sub(passed)..rows.end.saturating_sub(passed))
    }

    fn row(&mut self, path: &Path, line: u64, row: &Object, progress: &mut Progress<'_>) -> Result<(), DataError> {
        let features = &progress.part.features;
        let form = match progress.form {
            Some(form) => form,
            None => {
                let Some(form) = Form::of(row, features) else {
                    self.note(path, line, unknown_form(row, features));
                    return Ok(());
                };
                self.check_form(form, path)?;
                *progress.form.insert(form)
            }
        };
        if progress.part.columns {
            for key in row.keys().filter(|key| !progress.columns.contains(*key)).cloned().collect::<Vec<_>>() {
                progress.columns.insert(key);
            }
        }
        let fields = row.len();
        match form.content(row, features, self.options.mask_prompt) {
            Ok(content) => progress.waiting.push(Checked { line, content, fields }),
            Err(fault) => self.note(path, line, fault),
        }
        Ok(())
    }

    /// Whether the model can take rows of this form.
    fn check_form(&self, form: Form, path: &Path) -> Result<(), DataError> {
        let path = path.to_owned();
        match form {
            Form::Text if self.options.mask_prompt => Err(DataError::TextHasNoPrompt { path }),
            Form::Text => self.encoder.eos().map(|_| ()),
            Form::Chat | Form::Completions if !self.encoder.has_template() => Err(DataError::NoTemplate { path, form: form.name() }),
            Form::Chat | Form::Completions => Ok(()),
        }
    }

    /// Keeps the first: what tokenizing finds comes after what parsing found in later lines of the same file.
    fn note(&mut self, path: &Path, line: u64, fault: RowFault) {
        self.bad_lines += 1;
        if self.fault.as_ref().is_none_or(|(noted, first, _)| noted == path && line < *first) {
            self.fault = Some((path.to_owned(), line, fault));
        }
    }

    /// Tokenizes what waits: for more faults alone when the set is bad anyway.
    fn encode(&mut self, path: &Path, waiting: &mut Vec<Checked>) -> Result<(), DataError> {
        let rows = std::mem::take(waiting);
        if self.cancel.is_cancelled() {
            return Err(DataError::Cancelled);
        }
        if rows.is_empty() {
            return Ok(());
        }
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let (encoder, mask_prompt) = (self.encoder, self.options.mask_prompt);
        let encode = |rows: &[Checked]| rows.iter().map(|row| encoder.encode(&row.content, mask_prompt)).collect::<Vec<_>>();
        let encoded: Vec<_> = std::thread::scope(|scope| {
            let parts = rows.chunks(rows.len().div_ceil(threads));
            let running: Vec<_> = parts.map(|part| scope.spawn(move || encode(part))).collect();
            running.into_iter().flat_map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        for (row, encoded) in rows.into_iter().zip(encoded) {
            match encoded {
                Ok((tokens, offset)) if self.fault.is_none() => self.keep(&row, tokens, offset),
                Ok(_) => {}
                Err(fault) => self.note(path, row.line, fault),
            }
        }
        Ok(())
    }

    fn keep(&mut self, row: &Checked, mut tokens: Vec<u32>, offset: u32) {
        let limit = self.options.max_seq_length;
        self.counts.longest = self.counts.longest.max(tokens.len());
        self.counts.cut += u64::from(tokens.len() > limit);
        tokens.truncate(limit);
        tokens.shrink_to_fit();
        let example = Example { tokens, offset, order: row.fields };
        self.counts.masked += u64::from(example.row(limit).n_counted() == 0);
        self.counts.others_end += u64::from(self.options.mask_prompt && !row.content.ends_with_assistant());
        self.examples.push(example);
    }
}

/// What was looked for in the first row, and what is there.
fn unknown_form(row: &Object, features: &Features) -> RowFault {
    let wanted = format!("`{}` and `{}`, nor `{}`, nor `{}`", features.prompt, features.completion, features.chat, features.text);
    let found = if row.is_empty() { "none".to_owned() } else { row.keys().take(10).cloned().collect::<Vec<_>>().join(", ") };
    RowFault::UnknownForm { wanted, found }
}

impl Counts {
    fn notes(&self, name: &str, examples: usize, max_seq_length: usize) -> Vec<String> {
        let mut notes = Vec::new();
        if self.cut > 0 {
            notes.push(format!(
                "{} of {examples} examples of {name} have more than max_seq_length = {max_seq_length} tokens and are cut; the longest has {}",
                self.cut, self.longest
            ));
        }
        if self.masked > 0 {
            notes.push(format!(
                "{} of {examples} examples of {name} teach nothing: their prompts leave nothing to learn within max_seq_length = {max_seq_length}",
                self.masked
            ));
        }
        if self.others_end > 0 {
            notes.push(format!(
                "{} of {examples} examples of {name} do not end with the assistant; with mask_prompt the last message is learned, whoever says it",
                self.others_end
            ));
        }
        notes
    }
}

#[cfg(test)]
mod tests;
