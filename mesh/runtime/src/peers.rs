//! The two ends of a connection or request, as metrics and the access log show them.

use std::net::SocketAddr;
use std::sync::Arc;

use ambit_directory::{Service, Workload};
use ambit_hbone::Baggage;
use ambit_identity::SpiffeId;
use ambit_telemetry::access::{Dialled, Party};
use ambit_telemetry::tcp::{Peer, PeerLabels, ServiceLabels};

/// What is known of one side of a connection.
#[derive(Debug, Clone, Default)]
pub struct End {
    /// The workload.
    pub workload: Option<Arc<Workload>>,
    /// Its identity, authenticated or expected.
    pub identity: Option<SpiffeId>,
    /// What its proxy says of it: for metrics and logs of a workload that the directory does not hold, never for a decision.
    pub baggage: Option<Arc<Baggage>>,
}

impl End {
    /// What its proxy says of it, where the directory does not know better.
    fn described(&self) -> Option<&Baggage> {
        self.baggage.as_deref().filter(|_| self.workload.is_none())
    }
}

/// The labels of a service.
pub fn service_labels(service: &Service) -> Arc<ServiceLabels> {
    Arc::new(ServiceLabels {
        host: service.host.hostname.clone(),
        name: service.name.clone(),
        namespace: service.host.namespace.clone(),
    })
}

/// The labels of an end.
pub fn peer_labels(end: &End) -> Arc<PeerLabels> {
    let principal: Arc<str> = end.identity.as_ref().map(|id| id.as_str().into()).unwrap_or_default();
    let peer = match &end.workload {
        Some(workload) => Peer {
            workload: workload.workload_name.clone(),
            workload_namespace: workload.namespace.clone(),
            principal,
            canonical_service: workload.canonical_name.clone(),
            canonical_revision: workload.canonical_revision.clone(),
            app: workload.canonical_name.clone(),
            version: workload.canonical_revision.clone(),
            cluster: workload.cluster_id.clone(),
        },
        None => match end.described() {
            Some(baggage) => described_peer(baggage, principal),
            None => Peer { principal, ..Peer::default() },
        },
    };
    Arc::new(PeerLabels::new(peer))
}

/// Labels from what a proxy says of its workload.
fn described_peer(baggage: &Baggage, principal: Arc<str>) -> Peer {
    let Baggage { cluster, namespace, workload, service, version, region: _, zone: _ } = baggage;
    let workload = workload.as_ref().map(|(_, name)| name.as_str()).unwrap_or_default();
    let (service, version): (Arc<str>, Arc<str>) = (service.as_str().into(), version.as_str().into());
    Peer {
        workload: workload.into(),
        workload_namespace: namespace.as_str().into(),
        principal,
        canonical_service: service.clone(),
        canonical_revision: version.clone(),
        app: service,
        version,
        cluster: cluster.as_str().into(),
    }
}

/// An end as the access log shows it.
pub fn party(end: &End, address: SocketAddr) -> Party {
    let described = end.described();
    let name = || described.and_then(|baggage| Some(baggage.workload.as_ref()?.1.as_str().into()));
    let namespace = || described.map(|baggage| baggage.namespace.as_str().into());
    Party {
        addr: Some(address),
        workload: end.workload.as_ref().map(|workload| workload.name.clone()).or_else(name),
        namespace: end.workload.as_ref().map(|workload| workload.namespace.clone()).or_else(namespace),
        identity: end.identity.as_ref().map(|identity| identity.shared().clone()),
        owner: end.workload.as_ref().map(|workload| workload.workload_name.clone()).or_else(name),
    }
}

/// What was dialled, for the access log's observers.
pub fn dialled(service: Option<&Service>, port: u16) -> Dialled {
    Dialled {
        namespace: service.map(|service| service.host.namespace.clone()),
        host: service.map(|service| service.host.hostname.clone()),
        port,
    }
}
