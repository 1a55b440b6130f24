//! Rules for connections of a VirtualService, and what a waypoint makes of one.

use std::collections::BTreeMap;

use ambit_api::l7;
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
    source_labels: BTreeMap<String, String>,
    source_namespace: String,
    gateways: Vec<String>,
}

impl Tcp {
    pub(super) fn read(value: &Value) -> ReadTcp {
        match serde_path_to_error::deserialize(value) {
            Ok(rule) => ReadTcp { rule, fault: None },
            Err(error) => {
                let matches = value.get("match").cloned().and_then(|it| serde_json::from_value(it).ok());
                let rule = Tcp { matches: matches.unwrap_or_default(), route: Vec::new() };
                ReadTcp { rule, fault: Some(error.to_string()) }
            }
        }
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
    pub fn lower(&self, port: u16, referents: &dyn Referents) -> l7::Rule {
        let mut faults = Vec::new();
        let matches = self.matches.iter().filter(|one| is_for_mesh(&one.gateways));
        let matches = matches.filter(|one| port == 0 || one.port == 0 || one.port == u32::from(port));
        let mut matches: Vec<l7::Match> = matches.map(|one| one.lower(referents, &mut faults)).collect();
        if self.matches.is_empty() {
            matches.push(l7::Match::default());
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
        let mut rule = l7::Rule { matches, backends, ..l7::Rule::default() };
        rule.invalid = faults.into_iter().next().or_else(|| ambit_route::fault(&rule)).unwrap_or_default();
        rule
    }
}

impl Match {
    /// The match; what can't be followed is added to `faults` and counts as met.
    fn lower(&self, referents: &dyn Referents, faults: &mut Vec<String>) -> l7::Match {
        for (field, given) in [
            ("destinationSubnets", !self.destination_subnets.is_empty()),
            ("sourceSubnet", !self.source_subnet.is_empty()),
        ] {
            if given {
                faults.push(format!("`{field}` is not supported"));
            }
        }
        let mut lowered = l7::Match {
            port: self.port,
            source_namespace: self.source_namespace.clone(),
            ..l7::Match::default()
        };
        if !self.source_labels.is_empty() {
            let clients = referents.clients(&self.source_labels, &self.source_namespace);
            lowered.clients = clients.map_err(|fault| faults.push(fault)).ok();
        }
        lowered
    }
}
