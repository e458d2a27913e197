//! Reads boxes of tensors from the files of a checkpoint straight to where they belong.

use super::copies::{Copies, Run};
use crate::{error::LmError, ffi};
use mlx_cluster_common::{
    dtype::DType,
    published::{Piece, Recipe},
    weights::{TensorEntry, WeightIndex},
};
use mlx_rs::Array;
use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

/// Shorter runs are read in blocks with what lies between them, when that is no more than they are.
const LONG_RUN_BYTES: u64 = 256 << 10;
/// Of a block of short runs.
const BLOCK_BYTES: u64 = 1 << 20;
/// A gap of so many bytes costs no more than a call to the system.
const SMALL_GAP_BYTES: u64 = 1 << 10;
/// What one thread reads at least.
const THREAD_BYTES: usize = 2 << 20;
const MAX_THREADS: usize = 4;

/// Files of a folder, opened when first needed.
pub(crate) struct Files<'a> {
    folder: &'a Path,
    index: &'a WeightIndex,
    open: HashMap<&'a str, File>,
    bytes_read: AtomicU64,
}

/// A piece with the file that has it, ready to be read by several threads.
struct Source<'a> {
    name: &'a str,
    entry: &'a TensorEntry,
    file: &'a File,
    copies: Copies,
}

impl<'a> Files<'a> {
    pub(crate) fn new(folder: &'a Path, index: &'a WeightIndex) -> Self {
        Self { folder, index, open: HashMap::new(), bytes_read: AtomicU64::new(0) }
    }

    /// Bytes that were read so far, with those between runs that were read in blocks.
    pub(super) fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// An array of parts of tensors; None for a recipe that computes. In memory is the array alone, and a block for each thread.
    pub(super) fn gather(&mut self, recipe: &Recipe) -> Result<Option<Array>, LmError> {
        let Some((pieces, (dtype, shape))) = recipe.pieces().zip(recipe.gathered_type()) else { return Ok(None) };
        for piece in &pieces {
            self.open(piece)?;
        }
        let sources = pieces.iter().map(|piece| self.source(piece)).collect::<Result<Vec<_>, _>>()?;
        let dims = shape.iter().map(|dim| i32::try_from(*dim)).collect::<Result<Vec<_>, _>>();
        let dims = dims.map_err(|_| LmError::Mlx(format!("an array of shape {shape:?}")))?;
        ffi::array_filled(&dims, dtype, |bytes| self.fill(&sources, bytes)).map(Some)
    }

    /// Opens the file of a tensor, and looks whether both are what the headers said.
    fn open(&mut self, piece: &Piece) -> Result<(), LmError> {
        let (name, entry) = self.entry(piece)?;
        if entry.dtype != piece.source.dtype || entry.shape != piece.source.shape {
            let said = |dtype: DType, shape: &[u64]| format!("{dtype} {shape:?}");
            let (found, planned) = (said(entry.dtype, &entry.shape), said(piece.source.dtype, &piece.source.shape));
            return Err(LmError::Made { name: name.to_owned(), found, planned });
        }
        if self.open.contains_key(entry.file.as_str()) {
            return Ok(());
        }
        let unreadable = |error: io::Error| LmError::Read { file: entry.file.clone(), cause: error.to_string() };
        let file = File::open(self.folder.join(&entry.file)).map_err(unreadable)?;
        let found = file.metadata().map_err(unreadable)?.len();
        let end = |entry: &TensorEntry| entry.offset + entry.bytes;
        let wanted = self.index.tensors.values().filter(|other| other.file == entry.file).map(end).max().unwrap_or(0);
        if found != wanted {
            let bytes = |bytes: u64| format!("in a file of {bytes} bytes");
            let (name, file) = (name.to_owned(), entry.file.clone());
            return Err(LmError::Changed { name, file, found: bytes(found), wanted: bytes(wanted) });
        }
        self.open.insert(&entry.file, file);
        Ok(())
    }

    fn entry(&self, piece: &Piece) -> Result<(&'a str, &'a TensorEntry), LmError> {
        let index: &'a WeightIndex = self.index;
        let found = index.tensors.get_key_value(&piece.source.name).map(|(name, entry)| (name.as_str(), entry));
        found.ok_or_else(|| LmError::NotLoaded { name: piece.source.name.clone() })
    }

    fn source(&self, piece: &Piece) -> Result<Source<'_>, LmError> {
        let (name, entry) = self.entry(piece)?;
        let file = self.open.get(entry.file.as_str()).ok_or_else(|| LmError::NotLoaded { name: name.to_owned() })?;
        Ok(Source { name, entry, file, copies: Copies::new(piece, entry.offset) })
    }

    /// Each thread fills its own part of the bytes.
    fn fill(&self, sources: &[Source], bytes: &mut [u8]) -> Result<(), LmError> {
        let threads = thread::available_parallelism().map_or(1, |n| n.get()).min(MAX_THREADS);
        let part_bytes = bytes.len().div_ceil(threads).max(THREAD_BYTES);
        if bytes.len() <= part_bytes {
            return self.fill_part(sources, 0, bytes);
        }
        let mut starts = (0..).step_by(part_bytes);
        thread::scope(|scope| {
            let parts = bytes.chunks_mut(part_bytes).zip(&mut starts);
            let readers: Vec<_> = parts.map(|(part, start)| scope.spawn(move || self.fill_part(sources, start as u64, part))).collect();
            let panicked = || LmError::Mlx("a thread that read weights panicked".into());
            readers.into_iter().try_for_each(|reader| reader.join().unwrap_or_else(|_| Err(panicked())))
        })
    }

    /// `part` is what starts at `start` of the array.
    fn fill_part(&self, sources: &[Source], start: u64, part: &mut [u8]) -> Result<(), LmError> {
        let mut block = Vec::new();
        for source in sources {
            let mut reader = PartReader { source, start, part, block: &mut block, runs: Vec::new(), bytes_read: 0 };
            let end = start + reader.part.len() as u64;
            let result = source.copies.runs(start..end).try_for_each(|run| reader.add(run)).and_then(|()| reader.flush());
            self.bytes_read.fetch_add(reader.bytes_read, Ordering::Relaxed);
            result.map_err(|error| source.failed(&error))?;
        }
        Ok(())
    }
}

impl Source<'_> {
    fn failed(&self, error: &io::Error) -> LmError {
        let (name, file) = (self.name.to_owned(), self.entry.file.clone());
        match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                let wanted = format!("{} bytes from byte {} on", self.entry.bytes, self.entry.offset);
                LmError::Changed { name, file, found: "cut short".into(), wanted }
            }
            _ => LmError::Read { file, cause: format!("tensor `{name}`: {error}") },
        }
    }
}

/// Puts runs of one tensor into a part of an array.
struct PartReader<'a> {
    source: &'a Source<'a>,
    start: u64,
    part: &'a mut [u8],
    block: &'a mut Vec<u8>,
    /// Short runs that the next block has.
    runs: Vec<Run>,
    bytes_read: u64,
}

impl PartReader<'_> {
    fn add(&mut self, run: Run) -> io::Result<()> {
        if let (Some(first), Some(last)) = (self.runs.first(), self.runs.last()) {
            let end = last.from + last.bytes;
            let gap = run.from.checked_sub(end).filter(|gap| *gap <= SMALL_GAP_BYTES.max(run.bytes));
            if gap.is_none() || run.from + run.bytes - first.from > BLOCK_BYTES {
                self.flush()?;
            }
        }
        match run.bytes < LONG_RUN_BYTES {
            true => self.runs.push(run),
            false => {
                self.flush()?;
                self.read(&run)?;
            }
        }
        Ok(())
    }

    /// Reads what was added.
    fn flush(&mut self) -> io::Result<()> {
        let runs = std::mem::take(&mut self.runs);
        match &runs[..] {
            [] => {}
            [run] => self.read(run)?,
            [first, .., last] => {
                let bytes = last.from + last.bytes - first.from;
                self.block.resize(bytes as usize, 0);
                self.source.file.read_exact_at(self.block, first.from)?;
                self.bytes_read += bytes;
                for run in &runs {
                    let from = (run.from - first.from) as usize;
                    let read = &self.block[from..from + run.bytes as usize];
                    self.part[(run.to - self.start) as usize..][..run.bytes as usize].copy_from_slice(read);
                }
            }
        }
        // The list keeps its room.
        self.runs = runs;
        self.runs.clear();
        Ok(())
    }

    fn read(&mut self, run: &Run) -> io::Result<()> {
        let to = (run.to - self.start) as usize;
        self.source.file.read_exact_at(&mut self.part[to..to + run.bytes as usize], run.from)?;
        self.bytes_read += run.bytes;
        Ok(())
    }
}
