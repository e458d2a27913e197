//! How the tokens of a step lie in memory: segments of several sequences share one activation tensor.

use mlx_cluster_common::{ids::SequenceId, step::Step};
use mlx_rs::Array;

/// Where a segment's tokens stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub sequence: SequenceId,
    /// First row of the segment among all tokens of the step.
    pub row: i32,
    pub length: i32,
}

/// The layout of a step's activations `[B, L, D]`.
///
/// A single segment lies along `L` (`B` is 1), as in any prefill. Otherwise every token is a row of its own (`L` is 1) with its own
/// position, and only attention takes the rows of a sequence together: so sequences of any length share a step without padding, and
/// a row's arithmetic does not depend on its neighbours.
#[derive(Debug)]
pub struct Packing {
    pub spans: Vec<Span>,
    pub batch: i32,
    pub length: i32,
    /// Position of each row's first token, `[B]`.
    pub offsets: Array,
}

impl Packing {
    pub fn of(step: &Step) -> Self {
        let mut row = 0;
        let mut spans = Vec::with_capacity(step.segments.len());
        for segment in &step.segments {
            let length = segment.tokens.len() as i32;
            spans.push(Span { sequence: segment.sequence, row, length });
            row += length;
        }
        let single = step.segments.len() == 1;
        let positions: Vec<i32> = match single {
            true => vec![step.segments[0].start as i32],
            false => step.segments.iter().flat_map(|segment| (0..segment.tokens.len() as i32).map(|i| segment.start as i32 + i)).collect(),
        };
        let (batch, length) = if single { (1, row) } else { (row, 1) };
        Self { spans, batch, length, offsets: Array::from_slice(&positions, &[batch]) }
    }

    /// Whole sequences of these lengths, numbered from 0.
    pub fn whole(lengths: &[i32]) -> Self {
        let mut row = 0;
        let mut spans = Vec::with_capacity(lengths.len());
        for (sequence, length) in (0..).zip(lengths) {
            spans.push(Span { sequence: SequenceId(sequence), row, length: *length });
            row += length;
        }
        let (batch, length) = if lengths.len() == 1 { (1, row) } else { (row, 1) };
        let positions: Vec<i32> = match lengths {
            [_] => vec![0],
            lengths => lengths.iter().flat_map(|length| 0..*length).collect(),
        };
        Self { spans, batch, length, offsets: Array::from_slice(&positions, &[batch]) }
    }

    /// Tokens of the step.
    pub fn tokens(&self) -> i32 {
        self.batch * self.length
    }

    /// Whether each sequence brings one token: a pure decode step.
    pub fn is_decode(&self) -> bool {
        self.length == 1 && self.spans.iter().all(|span| span.length == 1)
    }
}
