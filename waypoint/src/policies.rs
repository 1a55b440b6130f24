//! The policies of what is bound here: by service, and for all that is reached through the waypoint.

use std::collections::{BTreeMap, HashMap};

use ambit_api::l7;
use ambit_directory::NamespacedHost;

use crate::accept::Destination;

/// Policies by what they are for. Immutable; made anew when one changes.
#[derive(Debug, Default)]
pub struct Policies {
    /// For everything that is reached through this waypoint.
    everywhere: Vec<Box<str>>,
    services: HashMap<NamespacedHost, Vec<Box<str>>>,
}

impl Policies {
    /// The policies for what is reached through the gateways whose names `is_own` knows.
    pub fn new(all: &BTreeMap<String, l7::Policy>, is_own: impl Fn(&str) -> bool) -> Self {
        let mut policies = Self::default();
        for (name, policy) in all {
            if policy.gateways.iter().any(|gateway| is_own(gateway)) {
                policies.everywhere.push(name.as_str().into());
            }
            for target in &policy.targets {
                let hostname = target.hostname.to_ascii_lowercase().into();
                let service = NamespacedHost { namespace: target.namespace.as_str().into(), hostname };
                policies.services.entry(service).or_default().push(name.as_str().into());
            }
        }
        policies
    }

    /// Whether what goes to `destination` is let through.
    ///
    /// # Errors
    /// Why it is not.
    pub fn decide(&self, destination: &Destination) -> Result<(), String> {
        let of_service = destination.service().and_then(|service| self.services.get(&service.host));
        match self.everywhere.iter().chain(of_service.into_iter().flatten()).next() {
            Some(name) => Err(format!("denied by policy {name}, which can't be enforced")),
            None => Ok(()),
        }
    }
}
