//! The building blocks of decoders, each written once: they read like the maths and fall apart at the cache.

mod attention;
mod feed_forward;
mod layer;
mod norm;

pub use attention::{Attend, Heads, Merge, Project};
pub use feed_forward::FeedForwardBlock;
pub use layer::{After, Before, Layer};
pub use norm::Norm;
