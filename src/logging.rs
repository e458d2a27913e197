//! Logs go to stderr as readable lines; `RUST_LOG` overrides what is shown.

use crate::progress;
use std::io::{self, IsTerminal, Write};
use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

#[derive(Debug, Clone, Copy)]
pub(crate) enum Verbosity {
    /// A process that runs for long: what it does is worth a line.
    Service,
    /// A tool whose output is the answer; what goes wrong is its own last line.
    Tool,
}

pub(crate) fn start(verbosity: Verbosity) {
    let default = match verbosity {
        // The hub's client logs what our own errors say better.
        Verbosity::Service => "warn,hf_hub=off,mlx_cluster=info,mlx_cluster_coordinator=info,mlx_cluster_worker=info,mlx_cluster_hub=info",
        Verbosity::Tool => "error,hf_hub=off",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(BesideBars)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .compact()
        .init();
}

/// Writes to stderr without tearing progress bars.
struct BesideBars;

impl<'a> MakeWriter<'a> for BesideBars {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line
    }
}

struct Line;

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        progress::suspended(|| io::stderr().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
