//! The API against a scripted cluster: requests as clients send them, answers byte by byte.

mod adapters;
mod bad_input;
mod chat;
mod completions;
mod fake;
mod jobs;
mod load;
mod server;
mod status;
mod tokenize;
