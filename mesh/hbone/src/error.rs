//! Errors of opening and serving tunnels, split by whose fault they are.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ambit_identity::{PeerError, SpiffeId};
use http::StatusCode;

use crate::Authority;

/// The party that has to change something to end the failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The peer, or the network to it.
    Peer,
    /// The destination's policy.
    Policy,
    /// A certificate: the peer has the wrong one, or rejects ours.
    Identity,
    /// This process: it is stopping, or at one of its limits.
    Us,
}

/// Why no tunnel could be opened. No byte of the application has been sent then.
///
/// Cloned for every waiter of a shared connection attempt.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenError {
    /// The TCP connection to the other proxy failed.
    #[error("connecting to {address}: {source}")]
    Dial {
        /// Where to.
        address: SocketAddr,
        /// The error of the dial.
        source: Arc<io::Error>,
    },
    /// TCP, TLS and HTTP/2 were not ready in time.
    #[error("no tunnel connection to {address} within {limit:?}")]
    HandshakeTimeout {
        /// Where to.
        address: SocketAddr,
        /// The limit.
        limit: Duration,
    },
    /// TLS failed: we rejected the peer's certificate or it rejected ours, or it does not speak TLS. With TLS 1.3, a peer's
    /// rejection may arrive in answer to CONNECT.
    #[error("TLS with {address}: {}", describe(source))]
    Tls {
        /// Where to.
        address: SocketAddr,
        /// The error of rustls or of the socket.
        source: Arc<io::Error>,
    },
    /// The peer does not speak HTTP/2 over TLS.
    #[error("{address} did not agree to HTTP/2")]
    NoHttp2 {
        /// Where to.
        address: SocketAddr,
    },
    /// The peer is authentic but not the one that must answer there.
    #[error("{address}: {source}")]
    Identity {
        /// Where to.
        address: SocketAddr,
        /// The presented and the expected identities.
        source: PeerError,
    },
    /// The connection to the other proxy ended before CONNECT was answered.
    #[error("connection to {address} ended before CONNECT {authority} was answered: {source}")]
    Lost {
        /// The other proxy.
        address: SocketAddr,
        /// The destination asked for.
        authority: Authority,
        /// The error of HTTP/2.
        source: Arc<h2::Error>,
    },
    /// The other proxy did not process the request: its connection is closing, or has too many requests.
    #[error("{address} did not process CONNECT {authority}: {source}")]
    NotProcessed {
        /// The other proxy.
        address: SocketAddr,
        /// The destination asked for.
        authority: Authority,
        /// The error of HTTP/2.
        source: Arc<h2::Error>,
    },
    /// CONNECT was not answered in time.
    #[error("CONNECT {authority} at {address} was not answered within {limit:?}")]
    ConnectTimeout {
        /// The other proxy.
        address: SocketAddr,
        /// The destination asked for.
        authority: Authority,
        /// The limit.
        limit: Duration,
    },
    /// Neither CONNECT nor a PING after it was answered.
    #[error("{address} was silent for {silent:?} after CONNECT {authority}")]
    Silent {
        /// The other proxy.
        address: SocketAddr,
        /// The destination asked for.
        authority: Authority,
        /// For how long.
        silent: Duration,
    },
    /// CONNECT was answered with another status than 200.
    #[error("CONNECT {authority} at {address} was answered with {status}")]
    Refused {
        /// The other proxy.
        address: SocketAddr,
        /// The destination asked for.
        authority: Authority,
        /// Its answer: 401 is policy, 503 an application that could not be reached.
        status: StatusCode,
    },
    /// The key was evicted from the pool while its connection was being dialled.
    #[error("the workload behind {address} was removed")]
    Evicted {
        /// Where to.
        address: SocketAddr,
    },
    /// The pool takes no new tunnels.
    #[error("the proxy is draining")]
    Draining,
    /// All connections for the key are full and no more are allowed, or too many wait for the first.
    #[error("{address}: no tunnel free, {connections} connections are the limit")]
    Exhausted {
        /// The other proxy.
        address: SocketAddr,
        /// Connections for this key.
        connections: usize,
    },
    /// The task that dialled the connection ended without a result, or nothing that it dialled could be used.
    #[error("connecting to {address} was abandoned")]
    Abandoned {
        /// Where to.
        address: SocketAddr,
    },
    /// The authority cannot be expressed in a request.
    #[error("authority {authority} cannot be sent")]
    Unsendable {
        /// The destination asked for.
        authority: Authority,
    },
}

impl OpenError {
    /// Whose fault it is.
    pub fn fault(&self) -> Fault {
        match self {
            OpenError::Tls { source, .. } if is_identity(source) => Fault::Identity,
            OpenError::Identity { .. } => Fault::Identity,
            OpenError::Refused { status, .. } if *status == StatusCode::UNAUTHORIZED => Fault::Policy,
            OpenError::Dial { .. }
            | OpenError::HandshakeTimeout { .. }
            | OpenError::Tls { .. }
            | OpenError::NoHttp2 { .. }
            | OpenError::Lost { .. }
            | OpenError::NotProcessed { .. }
            | OpenError::ConnectTimeout { .. }
            | OpenError::Silent { .. }
            | OpenError::Refused { .. }
            | OpenError::Evicted { .. } => Fault::Peer,
            OpenError::Draining
            | OpenError::Exhausted { .. }
            | OpenError::Abandoned { .. }
            | OpenError::Unsendable { .. } => Fault::Us,
        }
    }

    /// Whether another endpoint of the same service may succeed. A decision of the destination's policy or of our own state
    /// would be repeated.
    pub fn another_endpoint_may_help(&self) -> bool {
        match self.fault() {
            Fault::Peer | Fault::Identity => {
                !matches!(self, OpenError::Refused { status, .. } if *status == StatusCode::BAD_REQUEST)
            }
            Fault::Policy => false,
            Fault::Us => matches!(self, OpenError::Exhausted { .. } | OpenError::Abandoned { .. }),
        }
    }

    /// Whether the proxy itself cannot be reached, so that every request to it would fail. False for a proxy that ends its
    /// connections because it is being replaced: it is reachable again at once.
    pub fn is_unreachable(&self) -> bool {
        match self {
            // All other kinds concern only the dialling pod: a limit, a shortage or its routes.
            OpenError::Dial { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::TimedOut | io::ErrorKind::ConnectionRefused | io::ErrorKind::HostUnreachable
            ),
            // A server that rejects the certificate of one pod may accept those of others.
            OpenError::Tls { .. } if self.fault() == Fault::Identity => false,
            OpenError::HandshakeTimeout { .. }
            | OpenError::NoHttp2 { .. }
            | OpenError::Identity { .. }
            | OpenError::Silent { .. } => true,
            OpenError::Tls { source, .. } => {
                !matches!(source.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
            }
            OpenError::Lost { .. }
            | OpenError::NotProcessed { .. }
            | OpenError::ConnectTimeout { .. }
            | OpenError::Refused { .. }
            | OpenError::Evicted { .. }
            | OpenError::Draining
            | OpenError::Exhausted { .. }
            | OpenError::Abandoned { .. }
            | OpenError::Unsendable { .. } => false,
        }
    }

    /// Whether the peer certainly did not process the request (RFC 9113 §8.7), so that it may be sent again, even
    /// to the same peer.
    pub fn never_processed(&self) -> bool {
        matches!(self, OpenError::NotProcessed { .. })
    }
}

/// The text of a TLS failure. For a certificate that we rejected, it is the message of our verifier, which rustls shows only
/// as debug output.
fn describe(error: &io::Error) -> String {
    use rustls::{CertificateError, Error};
    match tls_error(error) {
        Some(Error::InvalidCertificate(CertificateError::Other(reason))) => reason.0.to_string(),
        _ => error.to_string(),
    }
}

/// Whether TLS failed because of a certificate, the peer's or ours.
fn is_identity(error: &io::Error) -> bool {
    use rustls::Error::{InvalidCertificate, NoCertificatesPresented};
    let ours = matches!(tls_error(error), Some(InvalidCertificate(_) | NoCertificatesPresented));
    ours || is_rejection(error)
}

/// Whether the peer sent an alert that rejects our certificate.
pub(crate) fn is_rejection(error: &io::Error) -> bool {
    use rustls::AlertDescription as Alert;
    let Some(rustls::Error::AlertReceived(alert)) = tls_error(error) else { return false };
    matches!(
        alert,
        Alert::BadCertificate
            | Alert::CertificateExpired
            | Alert::CertificateRequired
            | Alert::CertificateRevoked
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::UnsupportedCertificate
            | Alert::AccessDenied
    )
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// Why an accepted connection was closed.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The client sent nothing.
    #[error("the client sent nothing within {0:?}")]
    NoFirstByte(Duration),
    /// TLS and HTTP/2 were not ready in time.
    #[error("no handshake within {0:?}")]
    HandshakeTimeout(Duration),
    /// TLS failed, most often because of the peer's certificate.
    #[error("TLS: {}", describe(.0))]
    Tls(#[source] io::Error),
    /// The peer does not speak HTTP/2 over TLS.
    #[error("peer did not agree to HTTP/2")]
    NoHttp2,
    /// The peer has no identity.
    #[error(transparent)]
    Identity(#[from] PeerError),
    /// The peer broke HTTP/2, exceeded one of its limits, or its connection broke.
    #[error("HTTP/2 with {peer}: {source}")]
    Http2 {
        /// The peer.
        peer: SpiffeId,
        /// The error of h2.
        source: h2::Error,
    },
    /// No answer to a PING.
    #[error("{peer} did not answer a PING within {limit:?}")]
    PingTimeout {
        /// The peer.
        peer: SpiffeId,
        /// The limit.
        limit: Duration,
    },
    /// The peer abandoned too many requests before they were answered (CVE-2023-44487).
    #[error("{peer} abandoned {count} requests within {within:?}")]
    Abandoned {
        /// The peer.
        peer: SpiffeId,
        /// The number of them.
        count: u32,
        /// The period in which it was counted.
        within: Duration,
    },
    /// The peer sent too many frames that carry nothing (CVE-2019-9512, 9515, 9518).
    #[error("{peer} sent {count} frames that carry nothing within {within:?}")]
    Overhead {
        /// The peer.
        peer: SpiffeId,
        /// The number of them.
        count: u64,
        /// The period in which it was counted.
        within: Duration,
    },
}

impl ServeError {
    /// Whether the peer broke the protocol or one of its limits, which neither a correct peer nor a lost link does.
    pub fn is_misconduct(&self) -> bool {
        match self {
            ServeError::Abandoned { .. } | ServeError::Overhead { .. } => true,
            ServeError::Http2 { source, .. } => {
                source.is_library() && source.reason() != Some(h2::Reason::NO_ERROR)
            }
            ServeError::NoFirstByte(_)
            | ServeError::HandshakeTimeout(_)
            | ServeError::Tls(_)
            | ServeError::NoHttp2
            | ServeError::Identity(_)
            | ServeError::PingTimeout { .. } => false,
        }
    }

    /// Whose fault it is.
    pub fn fault(&self) -> Fault {
        match self {
            ServeError::Tls(error) if is_identity(error) => Fault::Identity,
            ServeError::Identity(_) => Fault::Identity,
            ServeError::NoFirstByte(_)
            | ServeError::HandshakeTimeout(_)
            | ServeError::Tls(_)
            | ServeError::NoHttp2
            | ServeError::Http2 { .. }
            | ServeError::PingTimeout { .. }
            | ServeError::Abandoned { .. }
            | ServeError::Overhead { .. } => Fault::Peer,
        }
    }
}
