//! Everything that can end a connection badly, split by whose fault it is.
//!
//! One mapping gives the status that an HBONE client gets, one the flags that metrics carry. The text
//! is what the access log says.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use ambit_directory::{Authority, InboundRefusal, Refusal, WorkloadUid};
use ambit_hbone::{Fault, OpenError, ServeError};
use ambit_identity::{CertificateError, PeerError};
use ambit_net::ConnectError;
use ambit_net::relay::RelayError;
use ambit_policy::Decision;
use ambit_telemetry::tcp::ResponseFlags;
use http::StatusCode;

use crate::directory::ondemand::DemandFailure;
use crate::outbound::ejections::Unreachable;
use crate::outbound::socks5::{Reply, Socks5Error};
use ambit_runtime::hostnames::LookupError;
use ambit_runtime::shares::LimitExceeded;

/// Who has to change something for the failure to go away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The side that opened the connection.
    Client,
    /// This proxy, or the node that it runs on.
    Us,
    /// The destination, or the network to it.
    Upstream,
    /// A policy.
    Policy,
    /// A certificate or identity.
    Identity,
}

pub use ambit_runtime::cut::CutReason;

/// Why a connection failed. No byte of the application was sent unless it is one of the last three.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The kernel can't say where a redirected connection was going.
    #[error("original destination unknown: {0}")]
    OriginalDestination(#[source] io::Error),
    /// It was going to one of our own listeners.
    #[error("{0} is a listener of the proxy itself")]
    Loop(SocketAddr),
    /// The SOCKS5 handshake failed.
    #[error(transparent)]
    Socks5(#[from] Socks5Error),
    /// The client's handshake, or its HTTP/2, failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A CONNECT to somewhere that isn't here.
    #[error(transparent)]
    NotHere(#[from] InboundRefusal),
    /// A request that is no CONNECT to a destination.
    #[error(transparent)]
    Malformed(#[from] ambit_hbone::RequestError),
    /// The client gave a CONNECT up before it was answered, or it took too long.
    #[error(transparent)]
    NotAnswered(#[from] ambit_hbone::NotAnswered),
    /// The client's certificate expired, was revoked, or lost its root after the handshake.
    #[error("the client is not trusted any more: {0}")]
    Untrusted(#[source] PeerError),
    /// The pod has no certificate.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// Policy says no.
    #[error("{0}")]
    Denied(Decision),
    /// The pod or the peer holds as much as it may.
    #[error(transparent)]
    Limit(#[from] LimitExceeded),
    /// The client carries an address that is not its workload's, and no address of that is known.
    #[error("{0} is not an address of the client, and none is known")]
    ForeignSource(std::net::IpAddr),
    /// The control plane hasn't sent its first state yet.
    #[error("the control plane's first state is not there yet")]
    NotSynced,
    /// The pod itself isn't in the directory.
    #[error("workload {0} is not in the directory")]
    UnknownPod(WorkloadUid),
    /// DNS has no address for a host.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// Nobody knows the name.
    #[error("{0} is unknown")]
    UnknownName(String),
    /// It isn't known whether the mesh has the destination, so it can't be passed by.
    #[error("not known whether there is {name}: {reason}")]
    Undetermined {
        /// What was asked for.
        name: String,
        /// Why there is no answer.
        reason: DemandFailure,
    },
    /// The directory refuses the destination.
    #[error("no route to {destination}: {reason}")]
    Refused {
        /// What was dialled.
        destination: Authority,
        /// Why.
        reason: Refusal,
    },
    /// The connection to an application of this node failed.
    #[error(transparent)]
    Application(ConnectError),
    /// The connection in plaintext failed.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The tunnel to the destination, or to a gateway or waypoint before it, failed.
    #[error(transparent)]
    Tunnel(#[from] OpenError),
    /// The tunnel through a gateway to a service of another network failed.
    #[error("behind the gateway: {0}")]
    InnerTunnel(#[source] OpenError),
    /// The PROXY header could not be written.
    #[error("PROXY header to {address}: {source}")]
    ApplicationTunnel {
        /// The application's tunnel port.
        address: SocketAddr,
        /// What the socket said.
        source: io::Error,
    },
    /// The way to the other proxy took more than the attempt's part of the budget.
    #[error("not connected to {address} within {limit:?}")]
    AttemptTimedOut {
        /// Where to.
        address: SocketAddr,
        /// The attempt's part of the budget.
        limit: Duration,
    },
    /// All attempts together took too long.
    #[error("not connected to {destination} within {budget:?}")]
    Budget {
        /// What was dialled.
        destination: Authority,
        /// The connect budget.
        budget: Duration,
    },
    /// Relaying broke.
    #[error(transparent)]
    Relay(#[from] RelayError),
    /// It was ended from outside.
    #[error("{0}")]
    Cut(CutReason),
}

impl ConnectionError {
    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Socks5(_)
            | Self::NotHere(_)
            | Self::ForeignSource(_)
            | Self::Loop(_)
            | Self::Malformed(_)
            | Self::NotAnswered(_) => Blame::Client,
            Self::Serve(error) => match error.fault() {
                Fault::Identity => Blame::Identity,
                Fault::Policy => Blame::Policy,
                Fault::Us => Blame::Us,
                Fault::Peer => Blame::Client,
            },
            Self::Tunnel(error) | Self::InnerTunnel(error) => match error.fault() {
                Fault::Identity => Blame::Identity,
                Fault::Policy => Blame::Policy,
                Fault::Us => Blame::Us,
                Fault::Peer => Blame::Upstream,
            },
            Self::Untrusted(_)
            | Self::Certificate(_)
            | Self::Cut(CutReason::Revoked | CutReason::Expired | CutReason::Untrusted) => Blame::Identity,
            Self::Denied(_) | Self::Cut(CutReason::Policy(_)) => Blame::Policy,
            Self::OriginalDestination(_)
            | Self::Limit(_)
            | Self::NotSynced
            | Self::Undetermined { .. }
            | Self::UnknownPod(_)
            | Self::Cut(CutReason::Idle(_) | CutReason::Drained) => Blame::Us,
            Self::Connect(error) | Self::Application(error) => match error {
                ConnectError::Namespace { .. } | ConnectError::Bind { .. } => Blame::Us,
                ConnectError::Refused { .. } | ConnectError::TimedOut { .. } => Blame::Upstream,
            },
            Self::UnknownName(_)
            | Self::Lookup(_)
            | Self::Refused { .. }
            | Self::ApplicationTunnel { .. }
            | Self::AttemptTimedOut { .. }
            | Self::Budget { .. }
            | Self::Relay(_) => Blame::Upstream,
        }
    }

    /// What an HBONE client is answered (HBONE contract).
    pub fn status(&self) -> StatusCode {
        match self {
            Self::NotHere(_) | Self::Loop(_) | Self::Malformed(_) | Self::Socks5(_) => {
                StatusCode::BAD_REQUEST
            }
            other => match other.blame() {
                Blame::Policy | Blame::Identity => StatusCode::UNAUTHORIZED,
                Blame::Client | Blame::Us | Blame::Upstream => StatusCode::SERVICE_UNAVAILABLE,
            },
        }
    }

    /// The label `response_flags` (observability contract).
    pub fn response_flags(&self) -> ResponseFlags {
        match self {
            Self::Denied(_) | Self::Cut(CutReason::Policy(_)) => ResponseFlags::Denied,
            Self::Untrusted(PeerError::Revoked { .. }) | Self::Cut(CutReason::Revoked) => {
                ResponseFlags::Revoked
            }
            Self::Untrusted(_)
            | Self::Certificate(_)
            | Self::Cut(CutReason::Expired | CutReason::Untrusted) => ResponseFlags::Identity,
            Self::Serve(error) => serve_flags(error),
            Self::Tunnel(error) | Self::InnerTunnel(error) => open_flags(error),
            Self::OriginalDestination(_)
            | Self::Loop(_)
            | Self::Socks5(_)
            | Self::NotHere(_)
            | Self::Malformed(_)
            | Self::NotAnswered(_)
            | Self::Limit(_)
            | Self::ForeignSource(_)
            | Self::NotSynced
            | Self::UnknownPod(_)
            | Self::UnknownName(_)
            | Self::Lookup(_)
            | Self::Undetermined { .. }
            | Self::Refused { .. }
            | Self::Connect(_)
            | Self::Application(_)
            | Self::ApplicationTunnel { .. }
            | Self::AttemptTimedOut { .. }
            | Self::Budget { .. }
            | Self::Relay(_)
            | Self::Cut(CutReason::Idle(_) | CutReason::Drained) => ResponseFlags::Connect,
        }
    }

    /// What a SOCKS5 client is answered.
    pub fn socks_reply(&self) -> Reply {
        match self {
            Self::UnknownName(_) | Self::Lookup(_) | Self::Refused { .. } => Reply::HostUnreachable,
            Self::Connect(ConnectError::Refused { .. }) | Self::Application(ConnectError::Refused { .. }) => {
                Reply::ConnectionRefused
            }
            other => match other.blame() {
                Blame::Policy | Blame::Identity => Reply::NotAllowed,
                Blame::Client | Blame::Us | Blame::Upstream => Reply::GeneralFailure,
            },
        }
    }

    /// Whether the peer that was dialled could not be reached, so that other connections are better off elsewhere for a while.
    /// What its application or policy answered, or that its application is slow, says nothing of that, and a proxy that is
    /// being replaced is back at once.
    pub fn unreachable(&self) -> Option<Unreachable> {
        use std::io::ErrorKind::{HostUnreachable, NetworkUnreachable};
        match self {
            Self::AttemptTimedOut { .. } => Some(Unreachable::Node),
            // Perhaps only this port of it.
            Self::Connect(ConnectError::TimedOut { .. }) => Some(Unreachable::Endpoint),
            Self::Connect(ConnectError::Refused { source, .. }) => {
                matches!(source.kind(), HostUnreachable | NetworkUnreachable).then_some(Unreachable::Node)
            }
            Self::Tunnel(error) if error.is_unreachable() => Some(match error {
                OpenError::Dial { .. } | OpenError::HandshakeTimeout { .. } | OpenError::Silent { .. } => {
                    Unreachable::Node
                }
                _ => Unreachable::Endpoint,
            }),
            _ => None,
        }
    }

    /// Whether another endpoint of the same service may do better. Only asked before the first byte.
    pub fn another_endpoint_may_help(&self) -> bool {
        match self {
            Self::Connect(error) | Self::Application(error) => match error {
                ConnectError::Refused { .. } | ConnectError::TimedOut { .. } => true,
                ConnectError::Namespace { .. } | ConnectError::Bind { .. } => false,
            },
            Self::ApplicationTunnel { .. } | Self::AttemptTimedOut { .. } => true,
            Self::Tunnel(error) | Self::InnerTunnel(error) => error.another_endpoint_may_help(),
            _ => false,
        }
    }
}

fn serve_flags(error: &ServeError) -> ResponseFlags {
    match error {
        ServeError::Identity(_) => ResponseFlags::Identity,
        ServeError::Tls(_) | ServeError::HandshakeTimeout(_) | ServeError::NoFirstByte(_) => {
            ResponseFlags::Tls
        }
        ServeError::NoHttp2
        | ServeError::Http2 { .. }
        | ServeError::PingTimeout { .. }
        | ServeError::Abandoned { .. }
        | ServeError::Overhead { .. } => ResponseFlags::Http2,
    }
}

fn open_flags(error: &OpenError) -> ResponseFlags {
    match error {
        OpenError::Identity { .. } => ResponseFlags::Identity,
        // The peer's certificate or ours was refused.
        OpenError::Tls { .. } if error.fault() == Fault::Identity => ResponseFlags::Identity,
        OpenError::Tls { .. } => ResponseFlags::Tls,
        OpenError::NoHttp2 { .. } => ResponseFlags::Http2,
        // As Istio's node proxy has it: what drops packets to the tunnel port is most often a NetworkPolicy.
        OpenError::Dial { source, .. } if source.kind() == io::ErrorKind::TimedOut => {
            ResponseFlags::NetworkPolicy
        }
        OpenError::Refused { .. } if error.fault() == Fault::Policy => ResponseFlags::Denied,
        OpenError::Dial { .. }
        | OpenError::HandshakeTimeout { .. }
        | OpenError::Lost { .. }
        | OpenError::NotProcessed { .. }
        | OpenError::ConnectTimeout { .. }
        | OpenError::Silent { .. }
        | OpenError::Refused { .. }
        | OpenError::Evicted { .. }
        | OpenError::Draining
        | OpenError::Unsendable { .. }
        | OpenError::Exhausted { .. }
        | OpenError::Abandoned { .. } => ResponseFlags::Connect,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_map_to_the_status_codes_of_the_contract() {
        let here = "10.0.0.1:80".parse().unwrap();
        let refused = io::ErrorKind::ConnectionRefused.into();
        for (error, status, flags) in [
            (ConnectionError::Denied(Decision::DeniedByDefault), 401, "DENY"),
            (ConnectionError::Untrusted(PeerError::NoCertificate), 401, "IDENTITY_ERROR"),
            (ConnectionError::Loop(here), 400, "CONNECT"),
            (
                ConnectionError::Connect(ConnectError::Refused { destination: here, source: refused }),
                503,
                "CONNECT",
            ),
            (
                ConnectionError::Budget { destination: here.into(), budget: Duration::from_secs(1) },
                503,
                "CONNECT",
            ),
        ] {
            assert_eq!(error.status().as_u16(), status, "{error}");
            assert_eq!(error.response_flags().as_str(), flags, "{error}");
        }
    }

    #[test]
    fn only_the_way_to_a_peer_ejects_it() {
        let here: SocketAddr = "10.0.0.1:15008".parse().unwrap();
        let limit = Duration::from_secs(1);
        let slow = OpenError::ConnectTimeout { address: here, authority: here.into(), limit };
        let silent = OpenError::Silent { address: here, authority: here.into(), silent: limit };
        let timed_out = || ConnectError::TimedOut { destination: here, limit };
        for (error, expected) in [
            (ConnectionError::AttemptTimedOut { address: here, limit }, Some(Unreachable::Node)),
            (ConnectionError::Tunnel(silent.clone()), Some(Unreachable::Node)),
            (ConnectionError::Tunnel(slow), None),
            (ConnectionError::InnerTunnel(silent), None),
            (ConnectionError::Connect(timed_out()), Some(Unreachable::Endpoint)),
            (ConnectionError::Application(timed_out()), None),
        ] {
            assert_eq!(error.unreachable(), expected, "{error}");
            assert!(error.another_endpoint_may_help(), "{error}");
        }
    }

    #[test]
    fn what_policy_decided_is_not_tried_again_elsewhere() {
        assert!(!ConnectionError::Denied(Decision::DeniedByDefault).another_endpoint_may_help());
        let here = "10.0.0.1:80".parse().unwrap();
        let timed_out = ConnectError::TimedOut { destination: here, limit: Duration::from_secs(1) };
        assert!(ConnectionError::Connect(timed_out).another_endpoint_may_help());
    }
}
