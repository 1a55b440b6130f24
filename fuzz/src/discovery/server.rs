//! A node proxy's requests, at the control plane.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use ambit_api::ADDRESS_TYPE_URL;
use ambit_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use ambit_xds::{Change, Resource, Server, ServerConfig, Store, StoreConfig};
use bytes::Bytes;
use futures_util::FutureExt;
use http_body_util::BodyExt;
use prost::Message;
use tower::Service;

use super::{Fed, block_on, framed, unframed};
use crate::pieces::cut;

const METHOD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// Parts that begin with what they are: a request, a raw piece of the body, a resource that changes or goes. The
/// subscriber holds what it asked for as it is in the store.
pub(crate) fn server(data: &[u8]) {
    block_on(async { converse(data) });
}

/// Nothing here ever waits: everything is polled until it has nothing more to say.
fn converse(data: &[u8]) {
    // Answers as small as can be, and removals soon forgotten.
    let config = StoreConfig { batch: Duration::ZERO, answer_limit: 200, max_removals: 4, shared_answers: 2 };
    let (store, _publisher) = Store::new(&[ADDRESS_TYPE_URL], config);
    let mut world = World { store: store.clone(), live: BTreeMap::new() };
    let config = ServerConfig { max_names: 16, ..ServerConfig::default() };
    let mut server = Server::new(store, config);
    let requests = Fed::default();
    let request = http::Request::post(METHOD).body(requests.clone()).expect("a request");
    let called = server.call(request).now_or_never().expect("an answer at once").expect("infallible");
    let mut answers = called.into_body();
    let mut subscriber = Subscriber::default();
    for part in cut(data) {
        let Some((kind, body)) = part.split_first() else { continue };
        match kind {
            b'r' => {
                let Ok(request) = DeltaDiscoveryRequest::decode(body) else { continue };
                requests.push(framed(body));
                subscriber.ask(&request, &world);
            }
            b'x' => {
                requests.push(body.to_vec().into());
                subscriber.is_garbled = true;
            }
            _ => world.change(*kind, body),
        }
        if !poll(&mut answers, &mut subscriber) {
            return;
        }
        subscriber.holds_what_it_asked_for(&world);
    }
}

/// Takes all answers that are due; false when the stream has ended.
fn poll(answers: &mut tonic::body::Body, subscriber: &mut Subscriber) -> bool {
    while let Some(frame) = answers.frame().now_or_never() {
        let Some(Ok(frame)) = frame else { return false };
        let Ok(data) = frame.into_data() else { return false };
        for message in unframed(&data) {
            let answer = DeltaDiscoveryResponse::decode(message.as_slice()).expect("an answer");
            subscriber.take(&answer);
        }
    }
    true
}

/// What a live resource is called beside its name, and whose it is.
struct Live {
    aliases: Vec<String>,
    parents: Vec<String>,
}

struct World {
    store: Store,
    live: BTreeMap<String, Live>,
}

impl World {
    /// One of eight resources changes or goes.
    fn change(&mut self, kind: u8, body: &[u8]) {
        let number = kind % 8;
        let name = format!("name-{number}");
        if kind & 8 != 0 {
            self.live.remove(&name);
            self.store.apply(ADDRESS_TYPE_URL, vec![Change::Remove(name.into())]);
            return;
        }
        let (alias, parent) = (format!("alias-{}", number / 2), format!("name-{}", (number + 1) % 4));
        let resource = Resource::from_bytes(name.clone(), Bytes::copy_from_slice(body)).alias(alias.clone());
        let has_parent = kind & 16 != 0;
        let resource = if has_parent { resource.parent(parent.clone()) } else { resource };
        let parents = if has_parent { vec![parent] } else { Vec::new() };
        self.live.insert(name, Live { aliases: vec![alias], parents });
        self.store.apply(ADDRESS_TYPE_URL, vec![Change::Upsert(resource)]);
    }

    /// Whether these names bring the resource: by its own, or through live resources at most four levels above it.
    fn covers(&self, names: &BTreeSet<String>, name: &str) -> bool {
        self.covers_levels(names, name, 4)
    }

    fn covers_levels(&self, names: &BTreeSet<String>, name: &str, levels: u32) -> bool {
        let Some(live) = self.live.get(name) else { return false };
        let own = names.contains(name) || live.aliases.iter().any(|it| names.contains(it));
        let above = |parent: &String| self.covers_levels(names, parent, levels - 1);
        own || (levels > 0 && live.parents.iter().any(above))
    }
}

/// A correct subscriber: holds the resources that it was sent and that were not removed.
#[derive(Default)]
struct Subscriber {
    /// Nothing was asked of the type so far, or: everything, and single names.
    asked: Option<(bool, BTreeSet<String>)>,
    held: HashMap<String, String>,
    /// The body is not a series of messages any more.
    is_garbled: bool,
}

impl Subscriber {
    fn ask(&mut self, request: &DeltaDiscoveryRequest, world: &World) {
        if request.type_url != ADDRESS_TYPE_URL || self.is_garbled {
            return;
        }
        let subscribe = &request.resource_names_subscribe;
        let unsubscribe = &request.resource_names_unsubscribe;
        let drops_all = unsubscribe.iter().any(|name| name == "*");
        let asks_all = !drops_all && (subscribe.iter().any(|name| name == "*"));
        let named = subscribe.iter().filter(|name| *name != "*").cloned();
        match &mut self.asked {
            None => {
                let all = asks_all || (subscribe.is_empty() && !drops_all);
                let mut names: BTreeSet<String> = named.filter(|name| !unsubscribe.contains(name)).collect();
                if !all && names.is_empty() {
                    names.extend(request.initial_resource_versions.keys().cloned());
                }
                self.asked = Some((all, names));
                self.held.clone_from(&request.initial_resource_versions.clone().into_iter().collect());
            }
            Some((all, names)) => {
                *all |= asks_all;
                names.extend(named);
                *all &= !drops_all;
                names.retain(|name| !unsubscribe.contains(name));
                if !unsubscribe.is_empty() && !*all {
                    self.held.retain(|name, _| world.covers(names, name));
                }
            }
        }
    }

    fn take(&mut self, answer: &DeltaDiscoveryResponse) {
        assert!(!answer.nonce.is_empty());
        if answer.type_url != ADDRESS_TYPE_URL {
            assert!(answer.resources.is_empty() && answer.removed_resources.is_empty());
            return;
        }
        assert!(self.asked.is_some() || self.is_garbled, "an answer to nothing");
        for name in &answer.removed_resources {
            self.held.remove(name);
        }
        for resource in &answer.resources {
            assert!(resource.resource.as_ref().is_some_and(|any| any.type_url == ADDRESS_TYPE_URL));
            self.held.insert(resource.name.clone(), resource.version.clone());
        }
    }

    /// It holds everything that it asked for, as it is; nothing that it holds is gone.
    fn holds_what_it_asked_for(&self, world: &World) {
        let Some((all, names)) = self.asked.as_ref().filter(|_| !self.is_garbled) else { return };
        for name in world.live.keys() {
            let version = world.store.version(ADDRESS_TYPE_URL, name).expect("a live resource");
            match self.held.get(name) {
                Some(held) => assert_eq!(**held, *version, "{name} is held as it was"),
                None => assert!(!all && !world.covers(names, name), "{name} was not sent"),
            }
        }
        for name in self.held.keys() {
            assert!(world.live.contains_key(name), "{name} is gone and was not taken away");
        }
    }
}
