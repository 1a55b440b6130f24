//! Where a connection goes, and why it goes nowhere.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ambit_api::Authority;
use ambit_api::ports::INBOUND_HBONE;
use ambit_identity::SpiffeId;
use smallvec::SmallVec;

use crate::name::{Demand, NamespacedHost, WorkloadUid};
use crate::service::{GatewayDestination, Service};
use crate::workload::{TunnelProtocol, Workload};

/// Identities of which the other end must prove one.
pub type Expected = SmallVec<[SpiffeId; 1]>;

/// Where a connection goes.
#[derive(Debug, Clone)]
pub enum Route {
    /// Through HBONE to the workload.
    Tunnel(Tunnel),
    /// To a workload behind this node's proxy: handed over in its namespace after its policy was evaluated. Holds what a tunnel would need,
    /// for when hand-over is switched off or the workload is not served here after all.
    SameNode(Tunnel),
    /// Through HBONE to a waypoint.
    Waypoint(WaypointTunnel),
    /// Through the gateway of another network, in two layers of HBONE.
    DoubleHbone(DoubleTunnel),
    /// Plain TCP to a workload that has no tunnel, or past the mesh by its service's wish.
    Plain(Plain),
    /// From the pod to itself: plain TCP inside its namespace, subject to no policy.
    Own(Plain),
    /// To a workload whose address comes from DNS; see [`Lookup::at`].
    Lookup(Lookup),
    /// To nothing that the directory knows: plain TCP, once asking the control plane (where that is done on demand) has changed nothing.
    Unknown(Unknown),
    /// Nowhere.
    Refuse(Refusal),
}

/// The route to a workload through HBONE.
#[derive(Debug, Clone)]
pub struct Tunnel {
    /// The workload.
    pub workload: Arc<Workload>,
    /// The service that was dialled.
    pub service: Option<Arc<Service>>,
    /// The workload's address and target port: the CONNECT's authority.
    pub address: SocketAddr,
    /// Where its HBONE listener is.
    pub hbone: SocketAddr,
    /// Who must answer there.
    pub expected: Expected,
    /// Whether a waypoint was passed by because it was missing and the owner allows that. To be counted.
    pub waypoint_bypassed: bool,
}

/// The route to a waypoint.
#[derive(Debug, Clone)]
pub struct WaypointTunnel {
    /// The waypoint's workload.
    pub waypoint: Arc<Workload>,
    /// The waypoint's service.
    pub waypoint_service: Option<Arc<Service>>,
    /// The service that was dialled.
    pub service: Option<Arc<Service>>,
    /// The workload that was dialled, when it was no service.
    pub workload: Option<Arc<Workload>>,
    /// What was dialled: the CONNECT's authority.
    pub authority: Authority,
    /// Where the waypoint's HBONE listener is.
    pub hbone: SocketAddr,
    /// Who must answer there.
    pub expected: Expected,
}

/// The route into another network.
#[derive(Debug, Clone)]
pub struct DoubleTunnel {
    /// The network gateway's workload.
    pub gateway: Arc<Workload>,
    /// The service that was dialled.
    pub service: Arc<Service>,
    /// The workload chosen for its network; which one answers there is the other network's choice.
    pub workload: Arc<Workload>,
    /// Where the gateway's HBONE listener is.
    pub hbone: SocketAddr,
    /// Who must answer there.
    pub expected: Expected,
    /// `<service host>:<service port>`: the authority of both CONNECTs.
    pub authority: Authority,
    /// Who must answer inside.
    pub inner_expected: Expected,
    /// The client's network, for the inner request's `x-forwarded-network`.
    pub network: Arc<str>,
    /// As in [`Tunnel`].
    pub waypoint_bypassed: bool,
}

/// The route without a tunnel.
#[derive(Debug, Clone)]
pub struct Plain {
    /// Where to connect.
    pub address: SocketAddr,
    /// The workload there, if known.
    pub workload: Option<Arc<Workload>>,
    /// The service that was dialled.
    pub service: Option<Arc<Service>>,
    /// As in [`Tunnel`].
    pub waypoint_bypassed: bool,
}

/// The route to a workload that is known by host name only.
#[derive(Debug, Clone)]
pub struct Lookup {
    /// The workload.
    pub workload: Arc<Workload>,
    /// The service that was dialled.
    pub service: Option<Arc<Service>>,
    /// The workload's port.
    pub port: u16,
    /// Who must answer, if it is reached through a tunnel.
    pub expected: Expected,
    /// As in [`Tunnel`].
    pub waypoint_bypassed: bool,
}

impl Lookup {
    /// The route once DNS has resolved the name.
    pub fn at(self, ip: IpAddr) -> Route {
        let Self { workload, service, port, expected, waypoint_bypassed } = self;
        let address = SocketAddr::new(ip.to_canonical(), port);
        match workload.tunnel {
            TunnelProtocol::Hbone => {
                let hbone = SocketAddr::new(address.ip(), INBOUND_HBONE);
                Route::Tunnel(Tunnel { workload, service, address, hbone, expected, waypoint_bypassed })
            }
            TunnelProtocol::None | TunnelProtocol::LegacyIstioMtls => {
                Route::Plain(Plain { address, workload: Some(workload), service, waypoint_bypassed })
            }
        }
    }
}

/// A destination that the directory does not know.
#[derive(Debug, Clone)]
pub struct Unknown {
    /// What was dialled.
    pub authority: Authority,
    /// What to ask the control plane for.
    pub demand: Demand,
}

impl Unknown {
    /// The plain route to the address that was dialled; `None` for a host name.
    pub fn passthrough(&self) -> Option<Plain> {
        match self.authority {
            Authority::Address(address) => {
                Some(Plain { address, workload: None, service: None, waypoint_bypassed: false })
            }
            Authority::Host { .. } => None,
        }
    }
}

/// Why a service has no endpoint to offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NoEndpoint {
    /// It has none at all.
    NoneKnown,
    /// None is healthy.
    NoneHealthy,
    /// No healthy one is in the scope that the service demands, serves the port, and is in a network that can be reached.
    NoneSuitable,
    /// Every suitable one was tried.
    AllTried,
}

impl std::fmt::Display for NoEndpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NoneKnown => "no endpoint is known",
            Self::NoneHealthy => "no endpoint is healthy",
            Self::NoneSuitable => "no healthy endpoint is in scope, serves the port and can be reached",
            Self::AllTried => "every suitable endpoint was tried",
        })
    }
}

/// Why a connection goes nowhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The service has no such port.
    #[error("service {service} has no port {port}")]
    NoSuchPort {
        /// The service.
        service: NamespacedHost,
        /// The port that was dialled.
        port: u16,
    },
    /// The service has no endpoint to offer.
    #[error("service {service}, port {port}: {cause}")]
    NoEndpoint {
        /// The service.
        service: NamespacedHost,
        /// The port that was dialled.
        port: u16,
        /// Why.
        cause: NoEndpoint,
    },
    /// The workload that was dialled was tried, and there is no other.
    #[error("workload {workload} was tried and has no alternative")]
    Tried {
        /// The workload.
        workload: WorkloadUid,
    },
    /// A required waypoint is not known.
    #[error("waypoint {waypoint} is not known")]
    WaypointUnknown {
        /// Where it should be.
        waypoint: GatewayDestination,
    },
    /// A required waypoint has no endpoint to offer.
    #[error("waypoint {waypoint}: {cause}")]
    WaypointUnavailable {
        /// Where it should be.
        waypoint: GatewayDestination,
        /// Why.
        cause: NoEndpoint,
    },
    /// The workload is in another network and names no gateway.
    #[error("workload {workload} is in network {network:?}, which has no gateway")]
    NoNetworkGateway {
        /// The workload.
        workload: WorkloadUid,
        /// Its network.
        network: Arc<str>,
    },
    /// The workload is in another network, and was dialled by address: only services can be reached there.
    #[error("workload {workload} is in network {network:?}, where only services can be reached")]
    NoServiceInNetwork {
        /// The workload.
        workload: WorkloadUid,
        /// Its network.
        network: Arc<str>,
    },
    /// The gateway of another network is not known, so its identity isn't either.
    #[error("network gateway {gateway} is not known")]
    NetworkGatewayUnknown {
        /// Where it should be.
        gateway: GatewayDestination,
    },
    /// The gateway of another network has no endpoint to offer.
    #[error("network gateway {gateway}: {cause}")]
    NetworkGatewayUnavailable {
        /// Where it should be.
        gateway: GatewayDestination,
        /// Why.
        cause: NoEndpoint,
    },
}

impl Refusal {
    /// What to ask the control plane for before giving up, where resources come on demand.
    pub fn demand(&self) -> Option<Demand> {
        match self {
            Self::WaypointUnknown { waypoint: destination }
            | Self::NetworkGatewayUnknown { gateway: destination } => Some(destination.demand()),
            Self::NoSuchPort { .. }
            | Self::NoEndpoint { .. }
            | Self::Tried { .. }
            | Self::WaypointUnavailable { .. }
            | Self::NoNetworkGateway { .. }
            | Self::NoServiceInNetwork { .. }
            | Self::NetworkGatewayUnavailable { .. } => None,
        }
    }

    /// Whether the reason is that every endpoint was tried already: the last attempt's error is then the one to report.
    pub fn is_exhausted(&self) -> bool {
        match self {
            Self::Tried { .. } => true,
            Self::NoEndpoint { cause, .. }
            | Self::WaypointUnavailable { cause, .. }
            | Self::NetworkGatewayUnavailable { cause, .. } => *cause == NoEndpoint::AllTried,
            Self::NoSuchPort { .. }
            | Self::WaypointUnknown { .. }
            | Self::NoNetworkGateway { .. }
            | Self::NoServiceInNetwork { .. }
            | Self::NetworkGatewayUnknown { .. } => false,
        }
    }
}

impl Route {
    /// The uid of [`peer`](Route::peer), for exclusion on a retry.
    pub fn next_hop(&self) -> Option<&WorkloadUid> {
        self.peer().map(|workload| &workload.uid)
    }

    /// The workload at the other end of what this proxy connects to: a gateway or waypoint, if one is first.
    pub fn peer(&self) -> Option<&Arc<Workload>> {
        match self {
            Self::Tunnel(tunnel) | Self::SameNode(tunnel) => Some(&tunnel.workload),
            Self::Waypoint(waypoint) => Some(&waypoint.waypoint),
            Self::DoubleHbone(double) => Some(&double.gateway),
            Self::Plain(plain) | Self::Own(plain) => plain.workload.as_ref(),
            Self::Lookup(lookup) => Some(&lookup.workload),
            Self::Unknown(_) | Self::Refuse(_) => None,
        }
    }

    /// The service that was dialled.
    pub fn service(&self) -> Option<&Arc<Service>> {
        match self {
            Self::Tunnel(tunnel) | Self::SameNode(tunnel) => tunnel.service.as_ref(),
            Self::Waypoint(waypoint) => waypoint.service.as_ref(),
            Self::DoubleHbone(double) => Some(&double.service),
            Self::Plain(plain) | Self::Own(plain) => plain.service.as_ref(),
            Self::Lookup(lookup) => lookup.service.as_ref(),
            Self::Unknown(_) | Self::Refuse(_) => None,
        }
    }
}
