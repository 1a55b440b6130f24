//! Why the control plane does not run.

use std::net::SocketAddr;
use std::path::PathBuf;

use ambit_ca::{AuthorityError, JwtError};

use crate::api_server::ConnectError;
use crate::keys::RootsError;
use crate::source::files::WatchError;

/// Why the control plane does not run.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address} for {purpose}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What was to be served.
        purpose: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The certificate authority cannot start.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The key set of callers cannot be used.
    #[error(transparent)]
    Tokens(#[from] JwtError),
    /// The port's own certificate cannot be made.
    #[error(transparent)]
    Serving(#[from] ambit_ca::serving::ServingError),
    /// The roots of servers of key sets cannot be used.
    #[error(transparent)]
    KeySets(#[from] RootsError),
    /// A source cannot be watched.
    #[error(transparent)]
    Source(#[from] WatchError),
    /// The API server's client cannot be made.
    #[error(transparent)]
    ApiServer(#[from] ConnectError),
    /// A setting is missing that the sources need.
    #[error("{0} must be given")]
    Unset(&'static str),
    /// The roots cannot be written out.
    #[error("cannot write the roots to {path}")]
    Roots {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The index's thread cannot be started.
    #[error("cannot start the index's thread")]
    Thread(#[source] std::io::Error),
    /// Something without which the program cannot work ended.
    #[error("{name} ended: {reason}")]
    Died {
        /// What ended.
        name: &'static str,
        /// How.
        reason: String,
    },
}
