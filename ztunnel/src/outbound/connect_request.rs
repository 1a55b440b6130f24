//! What a CONNECT says: where to, for whom, and who the client is (HBONE contract).

use ambit_directory::{Authority, Service, Workload};
use ambit_hbone::{Baggage, ConnectRequest, Forwarded, TraceParent, WorkloadKind};

use super::dial::Dial;

impl Dial<'_> {
    /// What the CONNECT says of us.
    pub(super) fn request(&self, authority: Authority, service: Option<&Service>) -> ConnectRequest {
        ConnectRequest {
            baggage: Some(baggage(&self.client)),
            forwarded: Some(Forwarded {
                client: self.source,
                host: service.map(|service| service.host.hostname.to_string()),
            }),
            traceparent: Some(TraceParent::new(&mut rand::rng())),
            ..ConnectRequest::new(authority)
        }
    }
}

/// What a workload says of itself (HBONE contract).
pub fn baggage(workload: &Workload) -> Baggage {
    use ambit_directory::WorkloadType;
    let kind = match workload.workload_type {
        WorkloadType::Deployment => WorkloadKind::Deployment,
        WorkloadType::CronJob => WorkloadKind::CronJob,
        WorkloadType::Pod => WorkloadKind::Pod,
        WorkloadType::Job => WorkloadKind::Job,
    };
    Baggage {
        cluster: workload.cluster_id.to_string(),
        namespace: workload.namespace.to_string(),
        workload: Some((kind, workload.workload_name.to_string())),
        service: workload.canonical_name.to_string(),
        version: workload.canonical_revision.to_string(),
        region: workload.locality.region.to_string(),
        zone: workload.locality.zone.to_string(),
    }
}
