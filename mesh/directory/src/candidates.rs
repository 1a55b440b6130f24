//! The endpoints of a service as a proxy sees them that balances by itself: the waypoint keeps what it learns of each from one
//! request to the next, so it asks for all of them once for each state of the service.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ambit_api::ports::INBOUND_HBONE;

use crate::endpoints::{Endpoint, Known};
use crate::name::HostRef;
use crate::route::Expected;
use crate::service::{IpFamilies, Mode, Service, Transport};
use crate::snapshot::Snapshot;
use crate::upstream::expected;
use crate::workload::{TunnelProtocol, Workload};

/// A service with its endpoints, in one state.
#[derive(Debug, Clone)]
pub struct ServiceState(Arc<Known>);

/// An endpoint that may get requests.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Its address and the port that requests go to; an unspecified address for a workload that only DNS can locate.
    pub address: SocketAddr,
    /// Where its HBONE listener is and who must answer there; `None`: plain TCP.
    pub tunnel: Option<(SocketAddr, Expected)>,
    /// How far it is by the service's own preference; the nearest have 0.
    pub distance: usize,
    /// Whether it is terminating and only for when nothing else is left.
    pub is_terminating: bool,
}

impl Snapshot {
    /// A service with its endpoints; `hostname` in lower case.
    pub fn service_state(&self, host: HostRef<'_>) -> Option<ServiceState> {
        self.known(host).cloned().map(ServiceState)
    }

    /// Whether an endpoint claims an address that is a pod's own. It must not get what is meant for that pod.
    pub fn claims_a_pods_place(&self, workload: &Workload) -> bool {
        !workload.is_pod && self.claims_a_pods_address(workload)
    }
}

impl ServiceState {
    /// The service.
    pub fn service(&self) -> &Arc<Service> {
        &self.0.service
    }

    /// Whether nothing has changed from one to the other.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Number of endpoints, whatever their health.
    pub fn endpoints(&self) -> usize {
        self.0.endpoints.len()
    }

    /// The endpoints that may get requests of `client` to a port of the service, in no order. Those in other networks, and those known
    /// by neither address nor host name, are left out.
    pub fn candidates(&self, client: &Workload, port: u16) -> Vec<Candidate> {
        self.candidates_of(Transport::Tcp, client, port)
    }

    /// The endpoints that may get datagrams or connections of `client`, as [`candidates`](Self::candidates). Tunnels carry no datagrams.
    pub fn candidates_of(&self, transport: Transport, client: &Workload, port: u16) -> Vec<Candidate> {
        let candidate = |endpoint| self.candidate(client, (transport, port), endpoint);
        self.0.endpoints.iter().filter_map(candidate).collect()
    }

    fn candidate(
        &self,
        client: &Workload,
        (transport, port): (Transport, u16),
        endpoint: &Endpoint,
    ) -> Option<Candidate> {
        let (service, workload) = (&self.0.service, &endpoint.workload);
        if workload.capacity == 0 || workload.network != client.network {
            return None;
        }
        let is_eligible = self.0.endpoints.is_eligible(workload);
        if !is_eligible && !workload.serving_while_terminating {
            return None;
        }
        let balancing = &service.load_balancing;
        let shares = |scope: &&crate::service::Scope| workload.scope(**scope) == client.scope(**scope);
        let shared = balancing.preference.iter().take_while(shares).count();
        let distance = match balancing.mode {
            Mode::Any | Mode::Passthrough => 0,
            Mode::Failover => balancing.preference.len() - shared,
            Mode::Strict if shared < balancing.preference.len() => return None,
            Mode::Strict => 0,
        };
        let known = workload.address_like(family(service, client));
        let ip = known.or_else(|| workload.is_only_named().then_some(Ipv4Addr::UNSPECIFIED.into()))?;
        let port = endpoint.target_port_of(transport, service, port)?;
        let tunnel = match workload.tunnel {
            TunnelProtocol::Hbone if transport == Transport::Tcp && !workload.is_same(client) => {
                Some((SocketAddr::new(ip, INBOUND_HBONE), expected(workload, Some(service))))
            }
            TunnelProtocol::Hbone | TunnelProtocol::None | TunnelProtocol::LegacyIstioMtls => None,
        };
        Some(Candidate {
            workload: Arc::clone(workload),
            address: SocketAddr::new(ip, port),
            tunnel,
            distance,
            is_terminating: !is_eligible,
        })
    }
}

/// An address of the family that is preferred for endpoints of a service.
fn family(service: &Service, client: &Workload) -> Option<IpAddr> {
    match service.ip_families {
        IpFamilies::Ipv4Only => Some(Ipv4Addr::UNSPECIFIED.into()),
        IpFamilies::Ipv6Only => Some(Ipv6Addr::UNSPECIFIED.into()),
        IpFamilies::Automatic | IpFamilies::Dual => client.addresses.first().copied(),
    }
}
