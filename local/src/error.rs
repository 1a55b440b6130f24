//! What can go wrong while a local cluster is built or driven: one enum, split by cause.
//!
//! Every variant says what was attempted with which object, since the reader of the message has only that.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A failure of the local cluster.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refused a system call. Missing privileges appear here as "Operation not permitted".
    #[error("{attempt}: {source}")]
    System {
        /// What was being done, with which object.
        attempt: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel refused a routing-netlink request.
    #[error("{attempt}: {reason}")]
    Netlink {
        /// What was being done, with which link, address or route.
        attempt: String,
        /// The kernel's answer.
        reason: String,
    },
    /// A manifest can't be read or says something the local cluster can't honour.
    #[error("{}{}: {message}", file.display(), line.map(|line| format!(":{line}")).unwrap_or_default())]
    Manifest {
        /// The file it stands in, or the name under which it was applied.
        file: PathBuf,
        /// Line of the fault, counted from 1, where it is known.
        line: Option<u64>,
        /// What is wrong, with the field's name.
        message: String,
    },
    /// A program of the mesh or of a pod could not be run.
    #[error("program {program}: {message}")]
    Program {
        /// Which program, of which pod.
        program: String,
        /// Why.
        message: String,
    },
    /// A wait ended without what it waited for.
    #[error("{what} did not happen within {after:?}{}", detail.as_ref().map(|detail| format!(": {detail}")).unwrap_or_default())]
    Deadline {
        /// What was waited for.
        what: String,
        /// For how long.
        after: Duration,
        /// The last thing that was seen instead.
        detail: Option<String>,
    },
    /// The named object is not in the cluster.
    #[error("there is no {0}")]
    Unknown(String),
    /// An address range of the cluster is used up.
    #[error("no address is left in {0}")]
    Exhausted(String),
    /// The node agent refused or failed.
    #[error("node agent of {node}, {attempt}: {reason}")]
    Agent {
        /// The node.
        node: String,
        /// What it was asked.
        attempt: String,
        /// Its answer.
        reason: String,
    },
    /// A signing key or token could not be made.
    #[error("{attempt}: {reason}")]
    Token {
        /// What was being made.
        attempt: String,
        /// Why it failed.
        reason: String,
    },
    /// The part that was asked has already ended, or a closure that ran in it panicked.
    #[error("{0} has ended")]
    Ended(String),
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Wraps an I/O error with what was attempted.
    pub(crate) fn system(attempt: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let attempt = attempt.into();
        move |source| Self::System { attempt, source }
    }

    /// Wraps an errno with what was attempted.
    pub(crate) fn errno(attempt: impl Into<String>) -> impl FnOnce(nix::errno::Errno) -> Self {
        let attempt = attempt.into();
        move |errno| Self::System { attempt, source: errno.into() }
    }

    /// Wraps a routing-netlink error with what was attempted.
    pub(crate) fn netlink(attempt: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let attempt = attempt.into();
        move |error| {
            let reason = match error {
                rtnetlink::Error::NetlinkError(message) => message.to_io().to_string(),
                other => other.to_string(),
            };
            Self::Netlink { attempt, reason }
        }
    }

    /// A manifest fault without a line.
    pub(crate) fn manifest(file: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Self::Manifest { file: file.into(), line: None, message: message.into() }
    }

    /// A program fault.
    pub(crate) fn program(program: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Program { program: program.into(), message: message.into() }
    }
}
