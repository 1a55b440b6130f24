//! Services and their endpoints: a pure function from objects and pods to ports and targets.
//!
//! The cluster DNS and the translation of VIPs for pods outside the mesh both work from its result.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::{Container, Service, ServicePort};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// A pod as a service sees it.
#[derive(Debug, Clone)]
pub(crate) struct Backend {
    /// Its namespace.
    pub(crate) namespace: String,
    /// Its labels.
    pub(crate) labels: BTreeMap<String, String>,
    /// Its addresses, primary first.
    pub(crate) addresses: Vec<IpAddr>,
    /// Whether it takes traffic.
    pub(crate) ready: bool,
    /// `spec.hostname`, which gives it a name of its own under a headless service.
    pub(crate) hostname: Option<String>,
    /// `spec.subdomain`: the headless service of that name.
    pub(crate) subdomain: Option<String>,
    /// Its containers, for named ports.
    pub(crate) containers: Vec<Container>,
}

/// One port of a service with its targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PortView {
    /// The port's name; empty when it has none.
    pub(crate) name: String,
    /// `TCP` or `UDP`.
    pub(crate) protocol: String,
    /// The service's port.
    pub(crate) port: u16,
    /// Where it leads, both address families mixed, sorted.
    pub(crate) targets: BTreeSet<SocketAddr>,
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServiceView {
    /// Its namespace.
    pub(crate) namespace: String,
    /// Its name.
    pub(crate) name: String,
    /// Its VIPs; none when it is headless.
    pub(crate) vips: Vec<IpAddr>,
    /// Its ports.
    pub(crate) ports: Vec<PortView>,
    /// Ready addresses behind a headless service, with the pod's own name under it where it has one.
    pub(crate) endpoints: BTreeSet<(Option<String>, IpAddr)>,
}

/// The services of type ExternalName: namespace, name, and the name that each stands for.
pub(crate) fn external_names(services: &[Service]) -> Vec<(String, String, String)> {
    let external = services.iter().filter_map(|service| {
        let spec = service.spec.as_ref()?;
        let target = spec.external_name.clone().filter(|_| spec.type_.as_deref() == Some("ExternalName"))?;
        Some((service.metadata.namespace.clone()?, service.metadata.name.clone()?, target))
    });
    external.collect()
}

/// Joins services with the pods they select and, where they select none, with their EndpointSlices. Services of
/// type ExternalName are left out.
pub(crate) fn views(services: &[Service], slices: &[EndpointSlice], pods: &[Backend]) -> Vec<ServiceView> {
    let mut views: Vec<_> = services.iter().filter_map(|service| view(service, slices, pods)).collect();
    views.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    views
}

fn view(service: &Service, slices: &[EndpointSlice], pods: &[Backend]) -> Option<ServiceView> {
    let name = service.metadata.name.clone()?;
    let namespace = service.metadata.namespace.clone()?;
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    let selector = spec.selector.clone().unwrap_or_default();
    let not_ready = spec.publish_not_ready_addresses == Some(true);
    let selected: Vec<&Backend> = pods
        .iter()
        .filter(|pod| !selector.is_empty() && pod.namespace == namespace && (pod.ready || not_ready))
        .filter(|pod| selector.iter().all(|(key, value)| pod.labels.get(key) == Some(value)))
        .collect();
    let by_hand: Vec<&EndpointSlice> =
        slices.iter().filter(|slice| selector.is_empty() && belongs(slice, &namespace, &name)).collect();
    let mut ports: Vec<PortView> = Vec::new();
    for port in spec.ports.iter().flatten() {
        let targets = selected
            .iter()
            .flat_map(|pod| targets(pod, port))
            .chain(by_hand.iter().flat_map(|slice| slice_targets(slice, port)))
            .collect();
        ports.push(PortView {
            name: port.name.clone().unwrap_or_default(),
            protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
            port: u16::try_from(port.port).ok()?,
            targets,
        });
    }
    let named =
        |pod: &Backend| pod.hostname.clone().filter(|_| pod.subdomain.as_deref() == Some(name.as_str()));
    let endpoints = selected
        .iter()
        .flat_map(|pod| pod.addresses.iter().map(|address| (named(pod), *address)))
        .chain(by_hand.iter().flat_map(|slice| slice_addresses(slice)).map(|address| (None, address)))
        .collect();
    let vips = spec.cluster_ips.iter().flatten().filter_map(|ip| ip.parse().ok()).collect();
    Some(ServiceView { namespace, name, vips, ports, endpoints })
}

fn targets(pod: &Backend, port: &ServicePort) -> Vec<SocketAddr> {
    let number = match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => {
            let protocol = |of: &Option<String>| of.clone().unwrap_or_else(|| "TCP".to_owned());
            let ports = pod.containers.iter().flat_map(|container| container.ports.iter().flatten());
            let mut ports = ports.filter(|own| protocol(&own.protocol) == protocol(&port.protocol));
            ports.find(|own| own.name.as_deref() == Some(name)).map(|own| own.container_port)
        }
    };
    let number = number.and_then(|number| u16::try_from(number).ok());
    number
        .map(|number| pod.addresses.iter().map(|ip| SocketAddr::new(*ip, number)).collect())
        .unwrap_or_default()
}

fn belongs(slice: &EndpointSlice, namespace: &str, service: &str) -> bool {
    let labels = slice.metadata.labels.as_ref();
    slice.metadata.namespace.as_deref() == Some(namespace)
        && labels.and_then(|labels| labels.get("kubernetes.io/service-name")).map(String::as_str)
            == Some(service)
}

fn slice_addresses(slice: &EndpointSlice) -> Vec<IpAddr> {
    let ready = |conditions: &k8s_openapi::api::discovery::v1::EndpointConditions| {
        conditions.ready.unwrap_or(true) && !conditions.terminating.unwrap_or(false)
    };
    slice
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.conditions.as_ref().is_none_or(ready))
        .flat_map(|endpoint| endpoint.addresses.iter().filter_map(|address| address.parse().ok()))
        .collect()
}

fn slice_targets(slice: &EndpointSlice, port: &ServicePort) -> Vec<SocketAddr> {
    let same_name = |name: Option<&str>| name.unwrap_or_default() == port.name.as_deref().unwrap_or_default();
    let mut ports = slice.ports.iter().flatten().filter(|candidate| same_name(candidate.name.as_deref()));
    let number = ports.find_map(|port| port.port).and_then(|number| u16::try_from(number).ok());
    let addresses = slice_addresses(slice);
    number
        .map(|number| addresses.into_iter().map(|ip| SocketAddr::new(ip, number)).collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(yaml: &str) -> Service {
        serde_saphyr::from_str(yaml).expect("a service's shape")
    }

    fn backend(ip: &str, ready: bool) -> Backend {
        Backend {
            namespace: "n".to_owned(),
            labels: [("app".to_owned(), "x".to_owned())].into(),
            addresses: vec![ip.parse().expect("a valid address")],
            ready,
            hostname: Some("zero".to_owned()),
            subdomain: Some("s".to_owned()),
            containers: vec![
                serde_saphyr::from_str("{name: c, ports: [{name: web, containerPort: 8080}]}")
                    .expect("sound"),
            ],
        }
    }

    const SELECTING: &str = "metadata: {name: s, namespace: n}\nspec: {selector: {app: x}, clusterIPs: [10.96.1.0], ports: [{port: 80, targetPort: web}]}\n";

    #[test]
    fn only_ready_pods_of_the_same_namespace_stand_behind_a_service() {
        let mut elsewhere = backend("10.0.0.3", true);
        elsewhere.namespace = "m".to_owned();
        let pods = [backend("10.0.0.1", true), backend("10.0.0.2", false), elsewhere];
        let views = views(&[service(SELECTING)], &[], &pods);
        let targets: Vec<_> = views[0].ports[0].targets.iter().map(ToString::to_string).collect();
        assert_eq!(targets, ["10.0.0.1:8080"]);
        assert_eq!(views[0].vips, [IpAddr::from([10, 96, 1, 0])]);
    }

    #[test]
    fn a_pod_with_a_hostname_has_a_name_under_its_headless_service() {
        let views = views(&[service(SELECTING)], &[], &[backend("10.0.0.1", true)]);
        let expected = (Some("zero".to_owned()), IpAddr::from([10, 0, 0, 1]));
        assert_eq!(views[0].endpoints.iter().next(), Some(&expected));
    }

    #[test]
    fn a_service_without_selector_leads_where_its_slices_say() {
        let service = service("metadata: {name: s, namespace: n}\nspec: {ports: [{port: 80}]}\n");
        let slice = serde_saphyr::from_str(
            "metadata: {name: s-1, namespace: n, labels: {kubernetes.io/service-name: s}}\naddressType: IPv4\nendpoints: [{addresses: [10.9.9.9]}, {addresses: [10.9.9.8], conditions: {ready: false}}]\nports: [{port: 81}]\n",
        );
        let views = views(&[service], &[slice.expect("a slice's shape")], &[backend("10.0.0.1", true)]);
        let targets: Vec<_> = views[0].ports[0].targets.iter().map(ToString::to_string).collect();
        assert_eq!(targets, ["10.9.9.9:81"]);
    }
}
