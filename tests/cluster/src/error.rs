//! What can go wrong while the test cluster is built or driven.

use std::io;
use std::time::Duration;

/// A failure of the test cluster.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refused a system call or a file.
    #[error("{attempt}: {source}")]
    System {
        /// What was being done, with which object.
        attempt: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A namespace, link or process could not be made.
    #[error(transparent)]
    Local(#[from] ambit_local::Error),
    /// A program is not installed, or this process has not the right that it needs.
    #[error("{0}")]
    Missing(String),
    /// A program failed.
    #[error("{program}: {message}")]
    Program {
        /// The program and its arguments.
        program: String,
        /// The end of its output.
        message: String,
    },
    /// A condition did not come true in time.
    #[error("not within {after:?}: {what}: {detail}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// For how long.
        after: Duration,
        /// What was seen instead.
        detail: String,
    },
    /// A certificate could not be made.
    #[error("certificate of {name}: {reason}")]
    Certificate {
        /// Whose.
        name: String,
        /// Why.
        reason: rcgen::Error,
    },
    /// The supervisor refused a request, or speaks another language.
    #[error("cluster {cluster}: {message}")]
    Refused {
        /// The cluster.
        cluster: String,
        /// Its answer.
        message: String,
    },
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Wraps an I/O error, or an errno, with what was attempted.
    pub(crate) fn system<E: Into<io::Error>>(attempt: impl Into<String>) -> impl FnOnce(E) -> Self {
        let attempt = attempt.into();
        move |source| Self::System { attempt, source: source.into() }
    }

    /// A failure of a program.
    pub(crate) fn program(program: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Program { program: program.into(), message: message.into() }
    }
}
