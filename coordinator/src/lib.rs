//! placeholder
pub mod api;
pub mod chat;
pub mod serving;
