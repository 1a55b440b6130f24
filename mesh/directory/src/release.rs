//! Resources that are there on demand only, and are dropped when nothing demands them any more.
//!
//! The control plane sends nothing more about a name that is unsubscribed, so what stays would grow old: an address that is used again by
//! another workload would be taken for its former holder. A service that is demanded brings the workloads behind it (xDS contract),
//! and these go with it.

use std::net::IpAddr;
use std::sync::Arc;

use crate::name::{AddressRef, HostRef};
use crate::service::{Service, Vip};
use crate::workload::Workload;
use crate::writer::Directory;

impl Directory {
    /// Drops the workloads and services that were there only because `name` was subscribed, and returns their resource names.
    /// `is_subscribed` says of other names whether they still are.
    pub fn release(&mut self, name: &str, is_subscribed: impl Fn(&str) -> bool) -> Vec<String> {
        let before = self.next.revision;
        let mut dropped = Vec::new();
        let (services, mut workloads) = self.named(name);
        for service in services {
            if is_demanded(&service, &is_subscribed) {
                continue;
            }
            let endpoints = self.next.endpoints(service.host.as_ref());
            workloads.extend(endpoints.into_iter().flatten().map(|endpoint| Arc::clone(&endpoint.workload)));
            dropped.push(service.host.to_string());
            self.remove_address(&service.host.to_string());
        }
        for workload in workloads {
            if !self.is_needed(&workload, &is_subscribed) {
                dropped.push(workload.uid.to_string());
                self.remove_address(workload.uid.as_str());
            }
        }
        self.publish(before);
        dropped
    }

    /// What a name on the control plane stands for.
    fn named(&self, name: &str) -> (Vec<Arc<Service>>, Vec<Arc<Workload>>) {
        if let Some(workload) = self.next.workload(name) {
            return (Vec::new(), vec![Arc::clone(workload)]);
        }
        if let Some((network, address)) = name.rsplit_once('/')
            && let Ok(address) = address.parse::<IpAddr>()
        {
            let at = AddressRef { network, address: address.to_canonical() };
            let services = self.next.vips.at(at).iter().map(|known| Arc::clone(&known.service));
            let workloads = self.next.by_address.get(&at).into_iter().flatten().cloned();
            return (services.collect(), workloads.collect());
        }
        let service = HostRef::parse(name).and_then(|host| self.next.service(host));
        (service.into_iter().cloned().collect(), Vec::new())
    }

    fn is_needed(&self, workload: &Workload, is_subscribed: &impl Fn(&str) -> bool) -> bool {
        let by_address = |address: &IpAddr| is_subscribed(&format!("{}/{address}", workload.network));
        is_subscribed(workload.uid.as_str())
            || workload.addresses.iter().any(by_address)
            || workload
                .services
                .iter()
                .any(|membership| self.next.service(membership.host.as_ref()).is_some())
    }
}

fn is_demanded(service: &Service, is_subscribed: &impl Fn(&str) -> bool) -> bool {
    let by_address = |vip: &Vip| match vip {
        Vip::Address(address) => is_subscribed(&address.to_string()),
        Vip::Net { .. } => false,
    };
    is_subscribed(&service.host.to_string()) || service.vips.iter().any(by_address)
}
