//! How the directory shows in the admin server's `/config_dump`.

use ambit_identity::SpiffeId;
use serde::Serializer;
use serde::ser::SerializeMap;

use crate::name::NamespacedHost;
use crate::service::Service;
use crate::snapshot::Snapshot;
use crate::workload::Workload;

/// An identity as its URI.
pub(crate) fn identity<S: Serializer>(identity: &SpiffeId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(identity.as_str())
}

/// Identities as their URIs.
pub(crate) fn identities<S: Serializer>(identities: &[SpiffeId], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(identities.iter().map(SpiffeId::as_str))
}

/// A service's name as the two fields `namespace` and `hostname`.
pub(crate) fn host_fields<S: Serializer>(host: &NamespacedHost, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(2))?;
    map.serialize_entry("namespace", &host.namespace)?;
    map.serialize_entry("hostname", &host.hostname)?;
    map.end()
}

/// A service with the uids of its endpoints.
#[derive(serde::Serialize)]
struct ServiceWithEndpoints<'a> {
    #[serde(flatten)]
    service: &'a Service,
    endpoints: Vec<&'a str>,
}

impl serde::Serialize for Snapshot {
    /// As `{"services": […], "workloads": […], "policies": […]}`, each in the order of names.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut services: Vec<ServiceWithEndpoints<'_>> = self
            .services()
            .map(|service| {
                let endpoints = self.endpoints(service.host.as_ref()).into_iter().flatten();
                let mut endpoints: Vec<&str> =
                    endpoints.map(|endpoint| endpoint.workload.uid.as_str()).collect();
                endpoints.sort_unstable();
                ServiceWithEndpoints { service, endpoints }
            })
            .collect();
        services.sort_unstable_by(|one, other| one.service.host.cmp(&other.service.host));
        let mut workloads: Vec<&Workload> = self.workloads().map(|workload| &**workload).collect();
        workloads.sort_unstable_by(|one, other| one.uid.cmp(&other.uid));
        let mut map = serializer.serialize_map(Some(3))?;
        map.serialize_entry("services", &services)?;
        map.serialize_entry("workloads", &workloads)?;
        map.serialize_entry("policies", self.policies())?;
        map.end()
    }
}
