//! The building blocks of decoders, each written once: they read like the maths and fall apart at the cache.

mod activation;
mod alternating_updates;
mod attention;
mod ends;
mod experts;
mod feed_forward;
mod indexer;
mod latent;
mod layer;
mod mixer;
mod norm;
mod recurrence;
mod residual;

pub use ends::{Entry, Exit};
pub use layer::{After, Before, Flow, Layer, over_spans, own_rows, with_arrays};
pub use mixer::{Mix, empty_cache};
pub use recurrence::Recurrence;
