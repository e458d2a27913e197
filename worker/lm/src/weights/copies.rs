//! A box of a tensor as runs of bytes, from a file to an array.

use mlx_cluster_common::published::Piece;
use std::ops::Range;

/// Bytes that lie side by side in a file and in an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// In the file.
    pub from: u64,
    /// In the array.
    pub to: u64,
    pub bytes: u64,
}

/// Equal runs at regular distances along several axes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Copies {
    first: Run,
    /// From the outermost on.
    axes: Vec<Axis>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Axis {
    count: u64,
    from_step: u64,
    to_step: u64,
}

impl Copies {
    /// `offset` is that of the tensor in its file.
    pub(super) fn new(piece: &Piece, offset: u64) -> Self {
        let size = piece.source.dtype.size();
        let mut first = Run { from: offset, to: piece.offset, bytes: size };
        let mut axes: Vec<Axis> = Vec::new();
        let mut stride = size;
        for ((span, dim), to_step) in piece.spans.iter().zip(&piece.source.shape).zip(&piece.strides).rev() {
            first.from += span.start * stride;
            let axis = Axis { count: span.count(), from_step: stride * span.step, to_step: *to_step };
            // Entries that follow one another on both sides are one run, as long as no axis inside is cut.
            match axes.is_empty() && axis.from_step == first.bytes && axis.to_step == first.bytes {
                true => first.bytes *= axis.count,
                false if axis.count > 1 => axes.push(axis),
                false => {}
            }
            stride *= dim;
        }
        axes.reverse();
        Self { first, axes }
    }

    /// The parts of runs that go to a range of the array, in order.
    pub(super) fn runs(&self, range: Range<u64>) -> impl Iterator<Item = Run> {
        let all: u64 = self.axes.iter().map(|axis| axis.count).product();
        let start = self.first_ending_after(range.start, all);
        let runs = (start..all).map(|i| self.run(i)).take_while({
            let end = range.end;
            move |run| run.to < end
        });
        runs.map(move |run| {
            let skipped = range.start.saturating_sub(run.to);
            let bytes = run.bytes.min(range.end - run.to) - skipped;
            Run { from: run.from + skipped, to: run.to + skipped, bytes }
        })
    }

    /// Runs go to ascending places: the row-major order of the box is that of the array.
    fn first_ending_after(&self, place: u64, all: u64) -> u64 {
        let (mut low, mut high) = (0, all);
        while low < high {
            let middle = low + (high - low) / 2;
            let run = self.run(middle);
            match run.to + run.bytes > place {
                true => high = middle,
                false => low = middle + 1,
            }
        }
        low
    }

    fn run(&self, mut i: u64) -> Run {
        let mut run = self.first;
        for axis in self.axes.iter().rev() {
            let at = i % axis.count;
            i /= axis.count;
            run.from += at * axis.from_step;
            run.to += at * axis.to_step;
        }
        run
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlx_cluster_common::{
        dtype::DType,
        published::{SourceTensor, Span},
    };

    fn source(shape: &[u64]) -> SourceTensor {
        SourceTensor { name: "x".into(), dtype: DType::F16, shape: shape.to_vec() }
    }

    fn span(start: u64, stop: u64, step: u64) -> Span {
        Span { start, stop, step }
    }

    fn runs(piece: &Piece, range: Range<u64>) -> Vec<[u64; 3]> {
        Copies::new(piece, 1000).runs(range).map(|run| [run.from, run.to, run.bytes]).collect()
    }

    #[test]
    fn rows_are_one_run_and_columns_one_a_row() {
        let source = source(&[2, 4, 8]);
        let piece =
            |spans: [Span; 3], strides: [u64; 3]| Piece { source: &source, spans: spans.to_vec(), offset: 10, strides: strides.to_vec() };
        let rows = piece([span(0, 2, 1), span(0, 4, 1), span(0, 8, 1)], [64, 16, 2]);
        assert_eq!(runs(&rows, 0..1000), [[1000, 10, 128]]);
        let rows = piece([span(1, 2, 1), span(1, 3, 1), span(0, 8, 1)], [32, 16, 2]);
        assert_eq!(runs(&rows, 0..1000), [[1080, 10, 32]]);
        let columns = piece([span(1, 2, 1), span(0, 4, 1), span(2, 4, 1)], [16, 4, 2]);
        assert_eq!(runs(&columns, 0..1000), [[1068, 10, 4], [1084, 14, 4], [1100, 18, 4], [1116, 22, 4]]);
        // Into every second column of a wider array.
        let stepped = piece([span(0, 2, 1), span(0, 1, 1), span(0, 8, 4)], [100, 50, 2]);
        assert_eq!(runs(&stepped, 0..1000), [[1000, 10, 2], [1008, 12, 2], [1064, 110, 2], [1072, 112, 2]]);
    }

    #[test]
    fn a_range_cuts_runs_at_both_ends() {
        let source = source(&[4, 8]);
        let piece = Piece { source: &source, spans: vec![span(0, 4, 1), span(0, 4, 1)], offset: 0, strides: vec![8, 2] };
        assert_eq!(runs(&piece, 0..32).len(), 4);
        assert_eq!(runs(&piece, 6..18), [[1006, 6, 2], [1016, 8, 8], [1032, 16, 2]]);
        assert_eq!(runs(&piece, 8..16), [[1016, 8, 8]]);
        assert!(runs(&piece, 32..40).is_empty());
    }
}
