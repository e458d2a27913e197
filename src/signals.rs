//! Signals: the first SIGINT or SIGTERM asks for an orderly end, the second ends at once.

use std::{future::Future, io, time::Duration};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Whoever stops us waits this long before something harsher: an orderly end that takes longer is cut off.
const ORDERLY_END_TIMEOUT: Duration = Duration::from_secs(9);
/// An end that takes no longer is not worth a line.
const QUICK_END: Duration = Duration::from_millis(200);
/// 128 + SIGINT, as shells count.
const EXIT_INTERRUPTED: i32 = 130;

/// Runs `work` with a token that is cancelled by the first SIGINT or SIGTERM. A second signal, or an end that takes too long,
/// ends the process; engines end with it because their stdin closes.
pub(crate) async fn until_stopped<T, F, Fut>(work: F) -> anyhow::Result<T>
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = anyhow::Result<T>>,
{
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let token = CancellationToken::new();
    let mut work = std::pin::pin!(work(token.clone()));
    tokio::select! {
        done = &mut work => return done,
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    token.cancel();
    tokio::select! {
        done = &mut work => return done,
        () = tokio::time::sleep(QUICK_END) => eprintln!("stopping: what runs is finished first; once more to stop at once"),
    }
    let why = tokio::select! {
        done = &mut work => return done,
        _ = interrupt.recv() => "stopped at once by a second signal".to_owned(),
        _ = terminate.recv() => "stopped at once by a second signal".to_owned(),
        () = tokio::time::sleep(ORDERLY_END_TIMEOUT) => format!("stopped: the orderly end took more than {} s", ORDERLY_END_TIMEOUT.as_secs()),
    };
    eprintln!("{why}");
    std::process::exit(EXIT_INTERRUPTED);
}

/// Ctrl-C presses, for a verb that gives them a meaning of its own.
pub(crate) struct Interrupts(tokio::signal::unix::Signal);

impl Interrupts {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(signal(SignalKind::interrupt())?))
    }

    pub(crate) async fn next(&mut self) {
        self.0.recv().await;
    }
}

/// Resolves with the first SIGTERM.
pub(crate) async fn terminated() -> io::Result<()> {
    signal(SignalKind::terminate())?.recv().await;
    Ok(())
}
