//! From a cause to an exit status: the one place. What to try next is part of every message already.

use mlx_cluster_coordinator::{CoordinatorError, ErrorKind};
use mlx_cluster_hub::{HubError, HubErrorKind};
use mlx_cluster_worker::supervisor::WorkerError;
use std::{fmt, io, process::ExitCode};

/// Exit statuses, as `--help` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Other = 1,
    Usage = 2,
    BadFile = 3,
    Network = 4,
    Access = 5,
    Resources = 6,
    /// 128 + SIGINT, as shells count.
    Interrupted = 130,
}

/// A failure that the command line itself found.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    message: String,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Says on stderr what went wrong, in one line, and returns the exit status.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    let exit = exit_of(error);
    if exit != Exit::Interrupted {
        eprintln!("error: {}", sentence(error));
    }
    ExitCode::from(exit as u8)
}

fn exit_of(error: &anyhow::Error) -> Exit {
    error.chain().find_map(known_exit).unwrap_or(Exit::Other)
}

fn known_exit(cause: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if let Some(failure) = cause.downcast_ref::<Failure>() {
        return Some(failure.exit);
    }
    if let Some(error) = cause.downcast_ref::<CoordinatorError>() {
        return Some(match error.kind() {
            ErrorKind::Usage => Exit::Usage,
            ErrorKind::BadFile => Exit::BadFile,
            ErrorKind::Network => Exit::Network,
            ErrorKind::Access => Exit::Access,
            ErrorKind::Resources => Exit::Resources,
            ErrorKind::Internal => Exit::Other,
        });
    }
    if let Some(error) = cause.downcast_ref::<HubError>() {
        return Some(match error.kind() {
            HubErrorKind::NotFound | HubErrorKind::BadFile => Exit::BadFile,
            HubErrorKind::Network => Exit::Network,
            HubErrorKind::Access => Exit::Access,
            HubErrorKind::Resources => Exit::Resources,
        });
    }
    if let Some(error) = cause.downcast_ref::<WorkerError>() {
        return Some(match error {
            WorkerError::Name { .. } | WorkerError::ClusterName { .. } => Exit::Usage,
            WorkerError::Listen { .. } => Exit::Network,
            WorkerError::Home(_) => Exit::Resources,
            WorkerError::Program { .. } | WorkerError::EndedEarly { .. } => Exit::Other,
        });
    }
    if let Some(error) = cause.downcast_ref::<io::Error>() {
        return match error.kind() {
            io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable | io::ErrorKind::ConnectionRefused => Some(Exit::Network),
            io::ErrorKind::PermissionDenied | io::ErrorKind::StorageFull | io::ErrorKind::ReadOnlyFilesystem => Some(Exit::Resources),
            _ => None,
        };
    }
    cause.downcast_ref::<reqwest::Error>().map(|_| Exit::Network)
}

/// The causes from the outermost to the root in one line, each said once.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_cause_decides_the_exit_status_wherever_it_stands_in_the_chain() {
        let error =
            Err::<(), _>(io::Error::from(io::ErrorKind::AddrInUse)).context("cannot listen on 127.0.0.1:6590").expect_err("an error");
        assert_eq!(exit_of(&error), Exit::Network);
        let error = anyhow::Error::from(Failure::new(Exit::BadFile, "no such model"));
        assert_eq!((exit_of(&error), sentence(&error)), (Exit::BadFile, "no such model".to_owned()));
        assert_eq!(exit_of(&anyhow::anyhow!("anything")), Exit::Other);
    }

    #[test]
    fn a_cause_that_the_message_repeats_is_said_once() {
        let error = anyhow::anyhow!("disk full").context("cannot write: disk full");
        assert_eq!(sentence(&error), "cannot write: disk full");
    }
}
