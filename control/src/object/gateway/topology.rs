//! The proxies in front of a gateway, as its annotations and Istio's MeshConfig have them.

use std::sync::Arc;

use ambit_api::l7;
use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::Value;

use crate::object::NamespacedName;
use crate::object::meta::annotation;

/// Annotation with Istio's ProxyConfig, of a Gateway or of its `spec.infrastructure`.
const PROXY_CONFIG: &str = "proxy.istio.io/config";
/// Annotation of a Gateway with the networks that its trusted proxies are in.
const TRUSTED_PROXIES: &str = "ambit.dev/trusted-proxies";
/// Annotation of a waypoint's Gateway with the gateways that it believes about their clients.
const TRUSTED_GATEWAYS: &str = "ambit.dev/trusted-gateways";
/// Networks that one Gateway may name.
const MOST_NETWORKS: usize = 256;

/// Which proxies in front of a gateway are believed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// How many there are between clients and the gateway.
    pub hops: Option<u32>,
    /// Where they are.
    pub networks: Vec<IpNet>,
    /// Whether every connection begins with a header of the PROXY protocol.
    pub proxy_protocol: bool,
}

/// Istio's GatewayTopology as written.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Manifest {
    num_trusted_proxies: Option<u32>,
    proxy_protocol: Option<Value>,
    forward_client_cert_details: Option<String>,
}

/// Istio's ProxyConfig, as far as it is followed.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ProxyConfig {
    gateway_topology: Manifest,
}

impl Manifest {
    /// What it says.
    ///
    /// # Errors
    /// What of it can't be followed.
    pub(crate) fn read(self) -> Result<Topology, String> {
        match self.forward_client_cert_details.as_deref() {
            None | Some("UNDEFINED" | "SANITIZE") => {}
            Some(other) => {
                return Err(format!(
                    "forwardClientCertDetails {other} is not supported: gateways remove the field"
                ));
            }
        }
        let Self { num_trusted_proxies: hops, proxy_protocol, .. } = self;
        let proxy_protocol = proxy_protocol.is_some_and(|value| value.is_object());
        Ok(Topology { hops, networks: Vec::new(), proxy_protocol })
    }
}

impl Topology {
    /// What the annotations of a Gateway and of its infrastructure say.
    ///
    /// # Errors
    /// What can't be read. Then nobody is to be believed.
    pub(super) fn read(meta: &ObjectMeta, infrastructure: &ObjectMeta) -> Result<Topology, String> {
        let text = annotation(meta, PROXY_CONFIG).or_else(|| annotation(infrastructure, PROXY_CONFIG));
        let of_config = |text: &str| -> Result<Topology, String> {
            let config: Option<ProxyConfig> =
                serde_saphyr::from_str(text).map_err(|error| error.without_snippet().to_string())?;
            config.unwrap_or_default().gateway_topology.read()
        };
        let topology = text.map_or(Ok(Topology::default()), of_config);
        let topology = topology.map_err(|problem| format!("annotation {PROXY_CONFIG}: {problem}"))?;
        let networks = annotation(meta, TRUSTED_PROXIES)
            .or_else(|| annotation(infrastructure, TRUSTED_PROXIES))
            .map_or(Ok(Vec::new()), networks);
        let networks = networks.map_err(|problem| format!("annotation {TRUSTED_PROXIES}: {problem}"))?;
        Ok(Topology { networks, ..topology })
    }

    /// What holds where this is said of a gateway and `mesh` of all of them.
    pub(crate) fn within(&self, mesh: &Topology) -> l7::TrustedProxies {
        let networks = if self.networks.is_empty() { &mesh.networks } else { &self.networks };
        l7::TrustedProxies {
            hops: self.hops.or(mesh.hops).unwrap_or_default(),
            networks: networks.iter().map(ToString::to_string).collect(),
            proxy_protocol: self.proxy_protocol || mesh.proxy_protocol,
        }
    }
}

/// Networks and addresses, separated by commas.
fn networks(text: &str) -> Result<Vec<IpNet>, String> {
    let mut found = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let address = || part.parse().ok().map(|address: std::net::IpAddr| IpNet::from(address));
        let network = part.parse().ok().or_else(address);
        found.push(network.ok_or_else(|| format!("{part:?} is neither a network nor an address"))?);
        if found.len() > MOST_NETWORKS {
            return Err(format!("more than {MOST_NETWORKS} networks"));
        }
    }
    Ok(found)
}

/// The gateways that a waypoint in `namespace` believes about their clients: `NAMESPACE/NAME`, or the name of one beside it.
pub(super) fn trusted_gateways(meta: &ObjectMeta, namespace: &Arc<str>) -> Vec<NamespacedName> {
    let text = annotation(meta, TRUSTED_GATEWAYS).unwrap_or_default();
    let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
    let read = |name: &str| match name.split_once('/') {
        Some((namespace, name)) => NamespacedName::new(namespace, name),
        None => NamespacedName::new(namespace.clone(), name),
    };
    names.map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(annotations: &[(&str, &str)]) -> ObjectMeta {
        let pairs = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        ObjectMeta { annotations: Some(pairs.collect()), ..ObjectMeta::default() }
    }

    #[test]
    fn annotations_of_a_gateway_override_those_of_the_mesh() {
        let of = |text: &str| meta(&[(PROXY_CONFIG, text)]);
        let own = of("{gatewayTopology: {numTrustedProxies: 2, proxyProtocol: {}}, concurrency: 2}");
        let none = ObjectMeta::default();
        let read = Topology::read(&own, &none).unwrap();
        assert_eq!((read.hops, read.proxy_protocol), (Some(2), true));
        assert_eq!(Topology::read(&none, &own).unwrap(), read);
        assert_eq!(Topology::read(&of("{}"), &own).unwrap(), Topology::default());
        let mesh = Topology { hops: Some(1), ..Topology::default() };
        assert_eq!(read.within(&mesh).hops, 2);
        assert_eq!(Topology::default().within(&mesh).hops, 1);
        let networks = meta(&[(TRUSTED_PROXIES, "10.0.0.0/8, 192.0.2.1,2001:db8::/32")]);
        let networks = Topology::read(&networks, &none).unwrap().within(&mesh).networks;
        assert_eq!(networks, ["10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32"]);
    }

    #[test]
    fn what_cannot_be_followed_is_named() {
        let none = ObjectMeta::default();
        for (key, text, problem) in [
            (PROXY_CONFIG, "{gatewayTopology: {numTrustedProxies: -1}}", "numTrustedProxies"),
            (PROXY_CONFIG, "{gatewayTopology: {numTrustedProxy: 1}}", "unknown field"),
            (
                PROXY_CONFIG,
                "{gatewayTopology: {forwardClientCertDetails: APPEND_FORWARD}}",
                "forwardClientCertDetails",
            ),
            (TRUSTED_PROXIES, "10.0.0.0/33", "neither a network nor an address"),
        ] {
            let error = Topology::read(&meta(&[(key, text)]), &none).unwrap_err();
            assert!(error.contains(key), "{error}");
            assert!(error.contains(problem) || text.contains("-1"), "{error}");
        }
    }

    #[test]
    fn gateways_of_other_namespaces_are_named_with_them() {
        let named = trusted_gateways(&meta(&[(TRUSTED_GATEWAYS, "web, edge/other ,")]), &"shop".into());
        assert_eq!(named.iter().map(ToString::to_string).collect::<Vec<_>>(), ["shop/web", "edge/other"]);
    }
}
