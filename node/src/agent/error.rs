//! Why a pod could not be enrolled or unenrolled, and whether trying again can help.

use std::io;
use std::net::IpAddr;

use ambit_net::{NetnsError, NetnsId};

use crate::discovery::Ambiguous;
use crate::nft::NftError;
use crate::redirect::{RedirectError, RoutingError};
use crate::registry::RegistryError;
use crate::zds::ZdsError;

/// What can be done about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The same call may succeed later.
    Retryable,
    /// A person has to change something first: a privilege, a kernel module, a disk, the pod.
    Permanent,
}

impl ErrorKind {
    /// The name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Retryable => "retryable",
            Self::Permanent => "permanent",
        }
    }
}

/// Why a pod could not be enrolled or unenrolled, or the agent not be started.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The ZDS socket.
    #[error(transparent)]
    Zds(#[from] ZdsError),
    /// A namespace could not be opened or entered.
    #[error(transparent)]
    Namespace(#[from] NetnsError),
    /// Redirection.
    #[error("pod {uid}: {source}")]
    Redirect {
        /// The pod.
        uid: String,
        /// What failed.
        source: RedirectError,
    },
    /// The namespace is the node's own: its rules would capture the node.
    #[error("pod {uid}: its network namespace is the host's")]
    HostNetwork {
        /// The pod.
        uid: String,
    },
    /// The namespace is not that pod's.
    #[error("pod {uid}: network namespace {netns} does not hold its address ({missing:?} missing)")]
    WrongNamespace {
        /// The pod.
        uid: String,
        /// The namespace that was given.
        netns: NetnsId,
        /// The addresses that it should hold; empty if the pod has none.
        missing: Vec<IpAddr>,
    },
    /// The namespace is another pod's, or is being cleaned.
    #[error("pod {uid}: network namespace {netns} is in use by {holder}")]
    NamespaceTaken {
        /// The pod.
        uid: String,
        /// The namespace.
        netns: NetnsId,
        /// Who uses it.
        holder: String,
    },
    /// The pod's namespace was not found.
    #[error("pod {uid}: its network namespace was not found")]
    NamespaceNotFound {
        /// The pod.
        uid: String,
    },
    /// More than one namespace could be the pod's.
    #[error("pod {uid}: {source}")]
    Ambiguous {
        /// The pod.
        uid: String,
        /// The namespaces.
        source: Ambiguous,
    },
    /// The agent does not know the pod, so there is no namespace to remove rules from.
    #[error("pod {uid} is not enrolled")]
    NotEnrolled {
        /// The pod.
        uid: String,
    },
    /// The agent has ended.
    #[error("the agent has ended")]
    Ended,
}

impl AgentError {
    /// Whether trying again can help.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Registry(error) => kind_of(&error.source),
            Self::Zds(error) => kind_of(&error.source),
            Self::Namespace(error) => of_namespace(error),
            Self::Redirect { source, .. } => of_redirect(source),
            Self::HostNetwork { .. } | Self::Ambiguous { .. } | Self::NotEnrolled { .. } => {
                ErrorKind::Permanent
            }
            // Addresses, namespaces and predecessors come and go.
            Self::WrongNamespace { .. }
            | Self::NamespaceTaken { .. }
            | Self::NamespaceNotFound { .. }
            | Self::Ended => ErrorKind::Retryable,
        }
    }
}

fn of_redirect(error: &RedirectError) -> ErrorKind {
    match error {
        RedirectError::Nft(NftError::Refused { source, .. } | NftError::Talk(source)) => kind_of(source),
        RedirectError::Nft(NftError::Namespace(error)) | RedirectError::Namespace(error) => {
            of_namespace(error)
        }
        RedirectError::Routing(RoutingError::Namespace(error)) => of_namespace(error),
        RedirectError::Routing(RoutingError::Open(source)) => kind_of(source),
        RedirectError::Routing(RoutingError::Refused { source, .. }) => match source {
            rtnetlink::Error::NetlinkError(message) => kind_of(&message.to_io()),
            _ => ErrorKind::Retryable,
        },
    }
}

fn of_namespace(error: &NetnsError) -> ErrorKind {
    error.raw_os_error().map_or(ErrorKind::Retryable, |code| kind_of(&io::Error::from_raw_os_error(code)))
}

/// Refusals that stay the same until somebody changes the system; everything else may pass.
fn kind_of(error: &io::Error) -> ErrorKind {
    match error.raw_os_error() {
        Some(
            libc::EPERM
            | libc::EACCES
            | libc::EROFS
            | libc::ENOSYS
            | libc::EOPNOTSUPP
            | libc::EPROTONOSUPPORT
            | libc::EAFNOSUPPORT
            | libc::ENOENT
            | libc::EINVAL,
        ) => ErrorKind::Permanent,
        _ => ErrorKind::Retryable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_privilege_is_permanent_and_a_busy_kernel_is_not() {
        let refused = |code| AgentError::Redirect {
            uid: "a".into(),
            source: RedirectError::Nft(NftError::Refused {
                attempt: "apply".into(),
                source: io::Error::from_raw_os_error(code),
            }),
        };
        assert_eq!(refused(libc::EPERM).kind(), ErrorKind::Permanent);
        assert_eq!(refused(libc::EOPNOTSUPP).kind(), ErrorKind::Permanent);
        assert_eq!(refused(libc::EBUSY).kind(), ErrorKind::Retryable);
        assert_eq!(refused(libc::ENOMEM).kind(), ErrorKind::Retryable);
    }
}
