//! Writes boxes of tensors into files of a checkpoint: the opposite of `files`.

use super::copies::{Copies, Run};
use mlx_cluster_common::published::{Assignment, Piece, Span};
use std::{fs::File, io, os::unix::fs::FileExt};

/// Runs of a box that lie so close together are read with what is between them, changed, and written as one.
const BLOCK_BYTES: u64 = 1 << 20;

/// Writes `bytes`, the row-major elements of a box, to where they belong in a file, in which the tensor starts at `offset`.
pub(crate) fn write_box(file: &File, assignment: &Assignment, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let size = assignment.source.dtype.size();
    let mut strides = vec![size; assignment.spans.len()];
    for axis in (1..strides.len()).rev() {
        strides[axis - 1] = strides[axis] * assignment.spans[axis].count();
    }
    let wanted = assignment.spans.iter().map(Span::count).product::<u64>() * size;
    if wanted != bytes.len() as u64 {
        return Err(io::Error::other(format!("{} bytes for a box of {wanted}", bytes.len())));
    }
    let piece = Piece { source: assignment.source, spans: assignment.spans.clone(), offset: 0, strides };
    let mut block: Vec<Run> = Vec::new();
    for run in Copies::new(&piece, offset).runs(0..wanted) {
        if block.first().is_some_and(|first| run.from + run.bytes - first.from > BLOCK_BYTES) {
            write_runs(file, &block, bytes)?;
            block.clear();
        }
        block.push(run);
    }
    write_runs(file, &block, bytes)
}

fn write_runs(file: &File, runs: &[Run], bytes: &[u8]) -> io::Result<()> {
    let of = |run: &Run| &bytes[run.to as usize..(run.to + run.bytes) as usize];
    match runs {
        [] => Ok(()),
        [run] => file.write_all_at(of(run), run.from),
        [first, .., last] => {
            let mut block = vec![0; (last.from + last.bytes - first.from) as usize];
            file.read_exact_at(&mut block, first.from)?;
            for run in runs {
                block[(run.from - first.from) as usize..][..run.bytes as usize].copy_from_slice(of(run));
            }
            file.write_all_at(&block, first.from)
        }
    }
}
