//! placeholder
pub mod serving;
