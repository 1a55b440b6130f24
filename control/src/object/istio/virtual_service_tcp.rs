//! Rules for connections of a VirtualService, `tcp` and `tls` alike, and what a waypoint makes of one.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ambit_api::{l7, security};
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use super::virtual_service::{Destination, is_for_mesh};
use super::virtual_service_http::{Referents, Share};

/// A rule as written.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Tcp {
    #[serde(rename = "match")]
    matches: Vec<Match>,
    route: Vec<Share>,
}

/// A rule, as far as it could be read.
#[derive(Clone, Debug, PartialEq)]
pub struct ReadTcp {
    /// The rule; its matches alone where the rest could not be read.
    pub rule: Tcp,
    /// Why its connections are closed.
    pub fault: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Match {
    port: u32,
    destination_subnets: Vec<String>,
    source_subnet: String,
    /// Of `tls` only.
    sni_hosts: Vec<String>,
    source_labels: BTreeMap<String, String>,
    source_namespace: String,
    gateways: Vec<String>,
}

impl Tcp {
    /// Reads a rule of `tcp`, or one of `tls`, which is for names.
    pub(super) fn read(value: &Value, is_tls: bool) -> ReadTcp {
        let (rule, fault) = match serde_path_to_error::deserialize(value) {
            Ok(rule) => (rule, None),
            Err(error) => {
                let matches = value.get("match").cloned().and_then(|it| serde_json::from_value(it).ok());
                (Tcp { matches: matches.unwrap_or_default(), route: Vec::new() }, Some(error.to_string()))
            }
        };
        let named = |one: &Match| one.sni_hosts.is_empty() != is_tls;
        let wrong = match is_tls {
            true if rule.matches.is_empty() || !rule.matches.iter().all(named) => {
                Some("a match of `tls` without `sniHosts`")
            }
            false if !rule.matches.iter().all(named) => Some("`sniHosts` is for matches of `tls`"),
            _ => None,
        };
        ReadTcp { rule, fault: fault.or_else(|| wrong.map(str::to_owned)) }
    }

    /// Every destination that it names.
    pub fn destinations(&self) -> impl Iterator<Item = &Destination> {
        self.route.iter().map(|share| &share.destination)
    }

    /// Whether connections of clients in the mesh to a port of a service (0: any) can match at all.
    pub fn is_for_port(&self, port: u16) -> bool {
        let fits = |one: &Match| port == 0 || one.port == 0 || one.port == u32::from(port);
        self.matches.is_empty() || self.matches.iter().any(|one| is_for_mesh(&one.gateways) && fits(one))
    }

    /// The rule as a waypoint follows it; `port` is the port of the service that it is for, or 0 for all of them. A part
    /// that can't be followed closes its connections.
    pub fn lower(&self, port: u16, referents: &dyn Referents) -> l7::StreamRule {
        let mut faults = Vec::new();
        let matches = self.matches.iter().filter(|one| is_for_mesh(&one.gateways));
        let matches = matches.filter(|one| port == 0 || one.port == 0 || one.port == u32::from(port));
        let mut matches: Vec<l7::StreamMatch> =
            matches.map(|one| one.lower(referents, &mut faults)).collect();
        if self.matches.is_empty() {
            matches.push(l7::StreamMatch::default());
        }
        for one in matches.iter_mut().filter(|_| port != 0) {
            one.port = port.into();
        }
        let sole = self.route.len() == 1;
        let backend = |share: &Share| l7::Backend {
            weight: if sole { 1 } else { share.weight },
            ..referents.backend(&share.destination)
        };
        let backends: Vec<l7::Backend> = self.route.iter().map(backend).collect();
        if backends.iter().all(|backend| backend.weight == 0) {
            faults.push("no destination has a weight".to_owned());
        }
        let mut rule = l7::StreamRule { matches, backends, ..l7::StreamRule::default() };
        let first = faults.into_iter().next();
        rule.invalid = first.or_else(|| ambit_route::stream_fault(&rule)).unwrap_or_default();
        rule
    }
}

impl Match {
    /// The match; what can't be followed is added to `faults` and counts as met.
    fn lower(&self, referents: &dyn Referents, faults: &mut Vec<String>) -> l7::StreamMatch {
        if !self.source_subnet.is_empty() {
            faults.push("`sourceSubnet` is not supported".to_owned());
        }
        let mut subnets = Vec::new();
        for text in &self.destination_subnets {
            match subnet(text) {
                Some(subnet) => subnets.push(subnet),
                None => faults.push(format!("{text:?} in `destinationSubnets` is no network")),
            }
        }
        let mut lowered = l7::StreamMatch {
            port: self.port,
            server_names: self.sni_hosts.iter().map(|name| name.to_ascii_lowercase()).collect(),
            destination_subnets: subnets,
            source_namespace: self.source_namespace.clone(),
            clients: None,
        };
        if !self.source_labels.is_empty() {
            let clients = referents.clients(&self.source_labels, &self.source_namespace);
            lowered.clients = clients.map_err(|fault| faults.push(fault)).ok();
        }
        lowered
    }
}

/// A network, or one address.
fn subnet(text: &str) -> Option<security::Address> {
    let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).ok()?;
    let address = match net.network() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    Some(security::Address { address: address.into(), length: net.prefix_len().into() })
}
