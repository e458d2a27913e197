//! The binary as a black box: real processes, real MLX, real HTTP, everything on loopback.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod bad_input;
mod command_line;
mod engine_loss;
mod fine_tuning;
mod hub;
mod idle;
mod jobs;
mod membership;
mod serving;
mod shutdown;
mod support;
mod tensor_groups;
mod training;
