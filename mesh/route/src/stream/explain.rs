//! Why a connection follows its rule: every rule for connections to its port, and what of each is not met. For people; the data path calls
//! [`StreamTable::find`] alone.

use std::sync::Arc;

use super::{Conditions, ConnectionHead, Entry, StreamTable, is_named};
use crate::explain::Candidate;

impl StreamTable {
    /// Every rule of a service's routes, those first that are asked first. Of a rule with several matches the one counts that matches, else
    /// the first. The rule that the connection follows is the first without anything unmet.
    pub fn candidates(&self, namespace: &str, hostname: &str, head: &ConnectionHead<'_>) -> Vec<Candidate> {
        let mut found: Vec<Candidate> = Vec::new();
        for entry in self.of(namespace, hostname) {
            let unmet = entry.unmet(head);
            match found.iter_mut().find(|known| Arc::ptr_eq(&known.rule, &entry.rule)) {
                Some(known) if known.unmet.is_some() && unmet.is_none() => known.unmet = None,
                Some(_) => {}
                None => found.push(Candidate { rule: entry.rule.clone(), unmet }),
            }
        }
        found
    }
}

impl Entry {
    fn unmet(&self, head: &ConnectionHead<'_>) -> Option<String> {
        if let Some(port) = self.port.filter(|port| *port != head.port) {
            return Some(format!("port {port} is wanted"));
        }
        if let Some(client) = self.consumer.as_deref().filter(|client| *client != head.client_namespace) {
            return Some(format!("it is for clients of namespace {client}"));
        }
        if self.tls_only && head.tls.is_none() {
            return Some("TLS is wanted, and the client does not begin with it".to_owned());
        }
        self.conditions.unmet(head)
    }
}

impl Conditions {
    /// The first condition that is not met, in the order in which [`Conditions::match_head`] asks.
    fn unmet(&self, head: &ConnectionHead<'_>) -> Option<String> {
        let Self { port, server_names, destinations, source_namespace, clients } = self;
        if let Some(port) = port.filter(|port| *port != head.port) {
            return Some(format!("port {port} is wanted"));
        }
        let name = head.tls.and_then(|hello| hello.server_name);
        if !server_names.is_empty() && !server_names.iter().any(|wanted| is_named(wanted, name)) {
            let asked = name.unwrap_or("none");
            return Some(format!("server name: {} is wanted, not {asked}", server_names.join(" or ")));
        }
        if !destinations.is_empty() && !destinations.iter().any(|net| net.contains(&head.destination)) {
            let wanted: Vec<String> = destinations.iter().map(ToString::to_string).collect();
            return Some(format!("destination: {} is wanted, not {}", wanted.join(" or "), head.destination));
        }
        if let Some(wanted) = source_namespace.as_deref().filter(|wanted| *wanted != head.client_namespace) {
            return Some(format!("it is for clients of namespace {wanted}"));
        }
        let is_client = clients.as_ref().is_none_or(|clients| clients.contains(&head.client_address));
        (!is_client).then(|| "it is for other clients".to_owned())
    }
}
