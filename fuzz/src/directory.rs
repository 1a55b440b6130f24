//! The directory: whatever the control plane sends, in whatever order, and whatever is dialled then.

use std::net::IpAddr;
use std::sync::Arc;

use ambit_api::security::Authorization;
use ambit_api::workload::{Address, address};
use ambit_directory::TunnelProtocol;
use ambit_directory::{
    Authority, ClientRole, Directory, Mode, Question, Reader, Route, Snapshot, Update, Workload, WorkloadUid,
    resolve,
};
use ambit_policy::{Peer, Request, evaluate};
use prost::Message;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::pieces::cut;

/// Clients, and destinations, that are tried at most: the square of them is what it costs.
const TRIED: usize = 6;

/// Parts that begin with what they are: a workload or service, a policy, a removal of either, a dialled destination.
pub(crate) fn directory(data: &[u8]) {
    let (mut directory, reader) = Directory::new();
    let mut kept = Kept::default();
    let mut dialled = Vec::new();
    for part in cut(data) {
        let Some((kind, body)) = part.split_first() else { continue };
        let text = || String::from_utf8_lossy(body).into_owned();
        let update = match kind {
            b'a' => match Address::decode(body) {
                Ok(address) => Update::Address { name: "sent".into(), address },
                Err(_) => continue,
            },
            b'p' => match Authorization::decode(body) {
                Ok(policy) => Update::Policy { name: "sent".into(), policy },
                Err(_) => continue,
            },
            b'A' => Update::AddressRemoved { name: text() },
            b'P' => Update::PolicyRemoved { name: text() },
            _ => {
                dialled.extend(text().parse::<Authority>());
                continue;
            }
        };
        let rejected = directory.apply([update.clone()]);
        kept.note(update, rejected.is_empty());
    }
    let snapshot = reader.snapshot();
    is_consistent(&snapshot);
    leads_somewhere(&snapshot, &dialled);
    decides_naively(&snapshot);
    kept.again(&snapshot);
    kept.gone(directory, &reader);
}

/// What is in force, in the order in which it first came.
#[derive(Default)]
struct Kept(Vec<(Key, Update)>);

#[derive(Clone, PartialEq)]
enum Key {
    Address(String),
    Policy(String),
}

impl Kept {
    fn note(&mut self, update: Update, accepted: bool) {
        let key = match &update {
            Update::Address { address, .. } => match &address.r#type {
                Some(address::Type::Workload(it)) => Key::Address(it.uid.clone()),
                Some(address::Type::Service(it)) => {
                    Key::Address(format!("{}/{}", it.namespace, it.hostname.to_ascii_lowercase()))
                }
                None => return,
            },
            Update::Policy { policy, .. } => Key::Policy(format!("{}/{}", policy.namespace, policy.name)),
            Update::AddressRemoved { name } => return self.drop_address(name),
            Update::PolicyRemoved { name } => {
                return self.0.retain(|(key, _)| *key != Key::Policy(name.clone()));
            }
        };
        // A policy that was rejected stands as one that refuses; an address that was rejected changes nothing.
        if !accepted && matches!(key, Key::Address(_)) {
            return;
        }
        match self.0.iter_mut().find(|(known, _)| *known == key) {
            Some((_, known)) => *known = update,
            None => self.0.push((key, update)),
        }
    }

    /// A name is first a workload's.
    fn drop_address(&mut self, name: &str) {
        let is_workload = |update: &Update| matches!(update, Update::Address { address, .. } if matches!(address.r#type, Some(address::Type::Workload(_))));
        let at = self.0.iter().position(|(key, it)| *key == Key::Address(name.to_owned()) && is_workload(it));
        let (namespace, hostname) = name.split_once('/').unwrap_or(("", name));
        let lower = Key::Address(format!("{namespace}/{}", hostname.to_ascii_lowercase()));
        let at = at.or_else(|| self.0.iter().position(|(key, it)| *key == lower && !is_workload(it)));
        if let Some(at) = at {
            self.0.remove(at);
        }
    }

    /// Sent anew to a proxy that knows nothing, it comes to the same.
    fn again(&self, snapshot: &Snapshot) {
        let (mut directory, reader) = Directory::new();
        directory.apply(self.0.iter().map(|(_, update)| update.clone()));
        let dump = |snapshot: &Snapshot| serde_json::to_value(snapshot).expect("a dump");
        assert_eq!(dump(&reader.snapshot()), dump(snapshot), "what is left depends on what was");
    }

    /// Taken away, nothing is left.
    fn gone(self, mut directory: Directory, reader: &Reader) {
        let removals = self.0.into_iter().map(|(key, _)| match key {
            Key::Address(name) => Update::AddressRemoved { name },
            Key::Policy(name) => Update::PolicyRemoved { name },
        });
        directory.apply(removals);
        let dump = serde_json::to_value(&*reader.snapshot()).expect("a dump");
        let empty = serde_json::json!({"services": [], "workloads": [], "policies": []});
        assert_eq!(dump, empty, "something outlives its removal");
    }
}

/// The indexes name what there is, and nothing else.
pub(crate) fn is_consistent(snapshot: &Snapshot) {
    let is_known =
        |it: &Arc<Workload>| snapshot.workload(it.uid.as_str()).is_some_and(|known| Arc::ptr_eq(known, it));
    for workload in snapshot.workloads() {
        assert!(is_known(workload));
        // Those that share their node's address are not found by it.
        for address in workload.addresses.iter().filter(|_| !workload.host_network) {
            let there = snapshot.workload_at(&workload.network, *address).expect("somebody at the address");
            assert!(is_known(there) && there.has_address(*address) && !there.host_network);
        }
        assert!(snapshot.workloads_of(&workload.identity).any(|it| Arc::ptr_eq(it, workload)));
        for membership in &*workload.services {
            let endpoints = snapshot.endpoints(membership.host.as_ref()).expect("endpoints");
            assert!(endpoints.iter().any(|endpoint| Arc::ptr_eq(&endpoint.workload, workload)));
        }
    }
    for service in snapshot.services() {
        let same = snapshot.service(service.host.as_ref()).is_some_and(|known| Arc::ptr_eq(known, service));
        assert!(same, "{}", service.host);
        let endpoints = snapshot.endpoints(service.host.as_ref());
        assert!(
            endpoints.into_iter().flat_map(|all| all.iter()).all(|endpoint| is_known(&endpoint.workload))
        );
    }
}

/// Every way is to somebody that is known, through the tunnel of whoever has one, and retries end.
pub(crate) fn leads_somewhere(snapshot: &Snapshot, dialled: &[Authority]) {
    let mut clients: Vec<&Arc<Workload>> = snapshot.workloads().collect();
    clients.sort_unstable_by(|one, other| one.uid.cmp(&other.uid));
    let own =
        clients.iter().flat_map(|client| &client.addresses).map(|ip| Authority::Address((*ip, 80).into()));
    let mut destinations: Vec<Authority> = dialled.iter().cloned().chain(own).collect();
    destinations.truncate(TRIED);
    clients.truncate(TRIED);
    for client in clients {
        let source = client.addresses.first().copied().unwrap_or(IpAddr::from([127, 0, 0, 1]));
        for destination in &destinations {
            for role in [ClientRole::Workload, ClientRole::Ingress, ClientRole::Waypoint] {
                dial(snapshot, client, role, source, destination);
            }
            if let Ok(target) = snapshot.inbound_target(client, source, destination) {
                assert_eq!(target.dial.ip(), source.to_canonical(), "a CONNECT leaves the pod");
            }
        }
    }
}

/// Asks, and asks again without what was said, until there is no more.
fn dial(
    snapshot: &Snapshot,
    client: &Arc<Workload>,
    role: ClientRole,
    source: IpAddr,
    destination: &Authority,
) {
    let mut exclude: Vec<WorkloadUid> = Vec::new();
    loop {
        let question = Question { client, role, source, destination: destination.clone(), exclude: &exclude };
        let route = resolve(snapshot, &question, &|_: &WorkloadUid| 0, &mut SmallRng::seed_from_u64(1));
        is_sound(snapshot, &route);
        let Some(next) = route.next_hop().cloned() else { return };
        if matches!(route, Route::Own(_)) {
            return;
        }
        assert!(!exclude.contains(&next), "{next} was tried and is chosen again: {route:?}");
        exclude.push(next);
    }
}

fn is_sound(snapshot: &Snapshot, route: &Route) {
    let known = |it: &Arc<Workload>| {
        let known = snapshot.workload(it.uid.as_str());
        assert!(known.is_some_and(|known| Arc::ptr_eq(known, it)), "a way to an unknown workload: {route:?}");
    };
    match route {
        Route::Tunnel(tunnel) | Route::SameNode(tunnel) => {
            known(&tunnel.workload);
            assert_eq!(tunnel.workload.tunnel, TunnelProtocol::Hbone, "{route:?}");
            assert_eq!(tunnel.expected.first(), Some(&tunnel.workload.identity));
            assert!(tunnel.workload.has_address(tunnel.address.ip()), "{route:?}");
            assert_ne!(tunnel.address.port(), 0);
        }
        Route::Waypoint(tunnel) => {
            known(&tunnel.waypoint);
            assert_eq!(tunnel.expected.first(), Some(&tunnel.waypoint.identity));
            assert!(tunnel.waypoint.has_address(tunnel.hbone.ip()), "{route:?}");
        }
        Route::DoubleHbone(double) => {
            known(&double.gateway);
            known(&double.workload);
            assert_eq!(double.expected.first(), Some(&double.gateway.identity));
            assert!(!double.inner_expected.is_empty());
        }
        Route::Plain(plain) => {
            let Some(workload) = &plain.workload else { return };
            known(workload);
            let past = plain.service.as_ref().is_some_and(|it| it.load_balancing.mode == Mode::Passthrough);
            assert!(past || workload.tunnel != TunnelProtocol::Hbone, "in the clear: {route:?}");
        }
        Route::Own(own) => own.workload.iter().for_each(known),
        Route::Lookup(lookup) => {
            known(&lookup.workload);
            assert!(lookup.workload.addresses.is_empty(), "{route:?}");
        }
        Route::Unknown(unknown) => assert!(!unknown.demand.to_string().is_empty()),
        Route::Refuse(refusal) => assert!(!refusal.to_string().is_empty()),
    }
}

/// The indexed policies decide as the walk over all of them does.
pub(crate) fn decides_naively(snapshot: &Snapshot) {
    let workloads: Vec<&Arc<Workload>> = snapshot.workloads().take(TRIED).collect();
    for workload in &workloads {
        let applying: Vec<_> =
            snapshot.policies().applying(&workload.namespace, &workload.policies).collect();
        for client in workloads.iter().map(Some).chain([None]) {
            let source_ip =
                client.and_then(|it| it.addresses.first().copied()).unwrap_or([192, 0, 2, 1].into());
            let ip = workload.addresses.first().copied().unwrap_or([192, 0, 2, 2].into());
            for port in [80, 8080, 15008] {
                let peer = client.map(|it| &it.identity);
                let verdict = snapshot.authorize(workload, peer, source_ip, (ip, port).into());
                let request = Request {
                    peer: peer.map(|id| Peer {
                        principal: id.principal(),
                        namespace: id.namespace(),
                        service_account: id.service_account(),
                    }),
                    source_ip,
                    destination_ip: ip,
                    destination_port: port,
                };
                let naive = evaluate(applying.iter().map(|policy| &***policy), &request);
                assert_eq!(verdict.allowed(), naive.allowed(), "{verdict:?} is not {naive:?}");
                assert_eq!(verdict.dry_run.map(|it| it.allowed()), naive.dry_run.map(|it| it.allowed()));
            }
        }
    }
}
