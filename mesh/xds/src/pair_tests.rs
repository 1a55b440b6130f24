//! Client and server cores against each other, over queues that the test controls: whatever the order of
//! changes, answers, acks, nacks, disconnections and restarts, both agree in the end.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use ambit_api::core::Node;
use ambit_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use ambit_api::security::Authorization;
use parking_lot::Mutex;
use proptest::prelude::*;
use prost::Message;

use crate::client::handler::Decoders;
use crate::client::session::{Limits, Mode, Session, Subscription as ClientSubscription};
use crate::server::shared::Turn;
use crate::server::subscription::{Lagged, Subscription};
use crate::{Change, Found, Rejected, Resource, Store, StoreConfig, Update};

const TYPE: &str = "type.googleapis.com/istio.security.Authorization";
const LIMIT: usize = 400;
const NAMES: u8 = 8;

/// What the client's handler has applied, and what it refuses.
#[derive(Default)]
struct Applied {
    values: BTreeMap<String, String>,
    refused: BTreeSet<String>,
}

struct Pair {
    store: Store,
    /// `None` while disconnected and until the first request of a stream arrives.
    server: Option<Subscription>,
    client: Session,
    applied: Arc<Mutex<Applied>>,
    to_server: VecDeque<DeltaDiscoveryRequest>,
    to_client: VecDeque<DeltaDiscoveryResponse>,
    connected: bool,
    demanded: BTreeSet<String>,
    found: HashMap<String, Found>,
    lagged: usize,
    hold_removals: bool,
    /// The last answer said that more follows.
    unfinished: bool,
}

fn new_store(max_removals: usize) -> Store {
    let config = StoreConfig { answer_limit: LIMIT, max_removals, ..StoreConfig::default() };
    Store::new(&[TYPE], config).0
}

fn resource(name: u8, value: u8) -> Resource {
    let message =
        Authorization { name: value.to_string(), namespace: "x".repeat(40), ..Authorization::default() };
    let resource = Resource::new(format!("r{name}"), &message);
    // Even names are "services" with an address; odd ones are "workloads" behind the one before, whose
    // address moves with the value.
    if name.is_multiple_of(2) {
        resource.alias(format!("/vip{name}"))
    } else {
        resource.alias(format!("/ip{}", value % 3)).parent(format!("r{}", name - 1))
    }
}

impl Pair {
    fn new(wildcard: bool, max_removals: usize) -> Self {
        let applied = Arc::new(Mutex::new(Applied::default()));
        let handled = Arc::clone(&applied);
        let handler = move |batch: &mut dyn Iterator<Item = Update<Authorization>>| {
            let mut applied = handled.lock();
            let mut rejected = Vec::new();
            for update in batch {
                match update {
                    Update::Remove { name } => {
                        applied.values.remove(&name);
                    }
                    Update::Upsert { name, .. } if applied.refused.contains(&name) => {
                        rejected.push(Rejected { type_url: TYPE.into(), name, reason: "not today".into() });
                    }
                    Update::Upsert { name, resource } => {
                        applied.values.insert(name, resource.name);
                    }
                }
            }
            rejected
        };
        let mut decoders = Decoders::new(handler);
        decoders.add(TYPE, |update| update);
        let mode = if wildcard { Mode::Wildcard } else { Mode::OnDemand(HashMap::new()) };
        let limits = Limits { names: 1000, batch: usize::MAX };
        let types = vec![ClientSubscription::new(TYPE, mode)];
        Self {
            store: new_store(max_removals),
            server: None,
            client: Session::new(Node::default(), types, Box::new(decoders), limits),
            applied,
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            connected: false,
            demanded: BTreeSet::new(),
            found: HashMap::new(),
            lagged: 0,
            hold_removals: false,
            unfinished: false,
        }
    }

    fn connect(&mut self) {
        if !self.connected {
            self.connected = true;
            self.client.handle_connected();
        }
    }

    fn disconnect(&mut self) {
        self.connected = false;
        self.server = None;
        self.unfinished = false;
        self.to_server.clear();
        self.to_client.clear();
        self.client.handle_disconnected();
    }

    /// Replaces the server by one with the same content but without its earlier positions and removals.
    fn restart_server(&mut self, content: &BTreeMap<u8, u8>) {
        self.disconnect();
        self.store = new_store(100);
        let all = content.iter().map(|(name, value)| Change::Upsert(resource(*name, *value)));
        self.store.apply(TYPE, all.collect());
    }

    fn demand(&mut self, name: String) {
        if let Ok(Some(found)) = self.client.handle_demand(TYPE, &name) {
            self.found.insert(name.clone(), found);
        }
        self.demanded.insert(name);
    }

    fn client_sends(&mut self) -> bool {
        let request = if self.connected { self.client.poll_request() } else { None };
        let sent = request.is_some();
        self.to_server.extend(request);
        sent
    }

    fn server_receives(&mut self) -> bool {
        let Some(request) = self.to_server.pop_front() else { return false };
        let content = self.store.inner().read();
        let state = &content.types()[0];
        match &mut self.server {
            Some(server) => server.handle_request(&request, state, 1000).unwrap(),
            None => self.server = Some(Subscription::open(&request, None, state, 1000).unwrap()),
        }
        true
    }

    fn server_sends(&mut self) -> bool {
        let Some(server) = &mut self.server else { return false };
        let store = Arc::clone(self.store.inner());
        let content = store.read();
        let state = &content.types()[0];
        if server.catch_up(state) == Err(Lagged) {
            self.lagged += 1;
            self.disconnect();
            return true;
        }
        let hold_removals = self.hold_removals;
        let turn =
            Turn { batch: content.batch(), hold_removals, more_elsewhere: hold_removals, limit: LIMIT };
        let answer = server.poll_answer(&store.shared, (0, state), turn);
        self.unfinished |= answer.is_some();
        let ending = std::mem::replace(&mut self.unfinished, answer.as_ref().is_some_and(|it| it.more));
        // As the stream does when what was due has gone.
        let ends = answer.is_none() && ending && !hold_removals;
        let answer = answer.or_else(|| ends.then(|| server.empty_answer(state, turn)));
        self.unfinished |= answer.is_none() && ending;
        let Some(answer) = answer else { return false };
        assert!(answer.frame.len() <= LIMIT, "an answer of {} bytes", answer.frame.len());
        self.to_client.push_back(DeltaDiscoveryResponse::decode(&answer.frame[5..]).unwrap());
        true
    }

    fn client_receives(&mut self) -> bool {
        let Some(response) = self.to_client.pop_front() else { return false };
        for answered in self.client.handle_response(response).answered {
            self.found.insert(answered.name, answered.found);
        }
        true
    }

    /// Lets everything flow until nothing moves.
    fn settle(&mut self) {
        self.hold_removals = false;
        self.connect();
        for _ in 0..100_000 {
            self.connect();
            let moved =
                self.client_sends() | self.server_receives() | self.server_sends() | self.client_receives();
            if !moved {
                return;
            }
        }
        panic!("client and server never come to rest");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Upsert(u8, u8),
    Remove(u8),
    ClientSends,
    ServerReceives,
    ServerSends,
    ClientReceives,
    Connect,
    Disconnect,
    RestartServer,
    Refuse(u8),
    Demand(u8),
    HoldRemovals(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..NAMES, any::<u8>()).prop_map(|(name, value)| Step::Upsert(name, value)),
        2 => (0..NAMES).prop_map(Step::Remove),
        4 => Just(Step::ClientSends),
        4 => Just(Step::ServerReceives),
        4 => Just(Step::ServerSends),
        4 => Just(Step::ClientReceives),
        2 => Just(Step::Connect),
        1 => Just(Step::Disconnect),
        1 => Just(Step::RestartServer),
        1 => (0..NAMES).prop_map(Step::Refuse),
        2 => any::<u8>().prop_map(Step::Demand),
        1 => any::<bool>().prop_map(Step::HoldRemovals),
    ];
    prop::collection::vec(step, 0..120)
}

/// Names of every kind: resources, addresses, and some that are never there.
fn demandable(index: u8) -> String {
    match index % 4 {
        0 => format!("r{}", index / 4 % (NAMES + 2)),
        1 => format!("/vip{}", index / 4 % NAMES),
        2 => format!("/ip{}", index / 4 % 4),
        _ => "nowhere".into(),
    }
}

fn run(pair: &mut Pair, steps: Vec<Step>, demands: bool) -> BTreeMap<u8, u8> {
    let mut content = BTreeMap::new();
    for step in steps {
        match step {
            Step::Upsert(name, value) => {
                content.insert(name, value);
                pair.store.apply(TYPE, vec![Change::Upsert(resource(name, value))]);
            }
            Step::Remove(name) => {
                content.remove(&name);
                pair.store.apply(TYPE, vec![Change::Remove(format!("r{name}").into())]);
            }
            Step::ClientSends => drop(pair.client_sends()),
            Step::ServerReceives => drop(pair.server_receives()),
            Step::ServerSends => drop(pair.server_sends()),
            Step::ClientReceives => drop(pair.client_receives()),
            Step::Connect => pair.connect(),
            Step::Disconnect => pair.disconnect(),
            Step::RestartServer => pair.restart_server(&content),
            Step::Refuse(name) => {
                pair.applied.lock().refused.insert(format!("r{name}"));
            }
            Step::Demand(index) if demands => pair.demand(demandable(index)),
            Step::Demand(_) => {}
            Step::HoldRemovals(hold) => pair.hold_removals = hold,
        }
    }
    content
}

fn expected(content: &BTreeMap<u8, u8>) -> BTreeMap<String, String> {
    content.iter().map(|(name, value)| (format!("r{name}"), value.to_string())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_wildcard_client_ends_with_what_the_store_holds(steps in steps(), max_removals in 1usize..12) {
        let mut pair = Pair::new(true, max_removals);
        let content = run(&mut pair, steps, false);
        pair.settle();
        prop_assert!(pair.client.is_ready());
        let refused = std::mem::take(&mut pair.applied.lock().refused);
        let all = expected(&content);
        for (name, value) in &all {
            if !refused.contains(name) {
                let held = pair.applied.lock().values.get(name).cloned();
                prop_assert_eq!(held.as_ref(), Some(value));
            }
        }
        // What was refused comes again with the next stream.
        pair.disconnect();
        pair.settle();
        let held = pair.applied.lock().values.clone();
        prop_assert_eq!(held, all);
        prop_assert!(!pair.server_sends(), "nothing is due when nothing differs");
    }

    #[test]
    fn an_on_demand_client_holds_all_it_asked_for_and_nothing_stale(steps in steps(), max_removals in 1usize..12) {
        let mut pair = Pair::new(false, max_removals);
        let mut content = run(&mut pair, steps, true);
        pair.settle();
        pair.applied.lock().refused.clear();
        pair.disconnect();
        pair.settle();
        check_on_demand(&pair, &content)?;
        // And once more for changes after the last request.
        for name in 0..NAMES {
            content.insert(name, name);
            pair.store.apply(TYPE, vec![Change::Upsert(resource(name, name))]);
        }
        pair.settle();
        check_on_demand(&pair, &content)?;
        prop_assert!(pair.client.is_ready());
    }
}

fn check_on_demand(pair: &Pair, content: &BTreeMap<u8, u8>) -> Result<(), TestCaseError> {
    let all = expected(content);
    let held = &pair.applied.lock().values;
    for (name, value) in held {
        prop_assert_eq!(all.get(name), Some(value), "{} is stale", name);
    }
    let names_of = |name: u8, value: u8| {
        let own = if name.is_multiple_of(2) { format!("/vip{name}") } else { format!("/ip{}", value % 3) };
        [format!("r{name}"), own]
    };
    for (name, value) in content {
        let mut asked = names_of(*name, *value).to_vec();
        let parent = name.wrapping_sub(1);
        if name % 2 == 1 && content.contains_key(&parent) {
            asked.extend([format!("r{parent}"), format!("/vip{parent}")]);
        }
        if asked.iter().any(|name| pair.demanded.contains(name)) {
            prop_assert_eq!(
                held.get(&format!("r{name}")),
                Some(&value.to_string()),
                "r{} was demanded",
                name
            );
        }
    }
    for name in &pair.demanded {
        let there = content.iter().any(|(resource, value)| names_of(*resource, *value).contains(name));
        prop_assert!(pair.found.contains_key(name), "{} was never answered", name);
        if there {
            prop_assert_eq!(pair.found.get(name), Some(&Found::Present), "{}", name);
        }
    }
    Ok(())
}

#[test]
fn a_reconnecting_client_is_sent_only_what_differs() {
    let mut pair = Pair::new(true, 100);
    pair.store.apply(TYPE, (0..NAMES).map(|name| Change::Upsert(resource(name, 1))).collect());
    pair.settle();
    pair.disconnect();
    pair.store.apply(TYPE, vec![Change::Upsert(resource(3, 2)), Change::Remove("r4".into())]);
    pair.connect();
    pair.client_sends();
    pair.server_receives();
    assert!(pair.server_sends());
    let answer = pair.to_client.front().unwrap();
    assert_eq!(answer.removed_resources, ["r4"]);
    assert_eq!(answer.resources.iter().map(|resource| &*resource.name).collect::<Vec<_>>(), ["r3"]);
    assert!(!pair.server_sends());
}

#[test]
fn a_restarted_server_with_equal_content_sends_nothing() {
    let content: BTreeMap<u8, u8> = (0..NAMES).map(|name| (name, 1)).collect();
    let mut pair = Pair::new(true, 100);
    pair.restart_server(&content);
    pair.settle();
    pair.restart_server(&content);
    pair.connect();
    pair.client_sends();
    pair.server_receives();
    assert!(pair.server_sends(), "the first request is always answered");
    let answer = pair.to_client.front().unwrap();
    assert!(answer.resources.is_empty() && answer.removed_resources.is_empty());
    assert!(!pair.server_sends());
}

#[test]
fn removals_overtake_a_snapshot_that_is_still_being_sent() {
    let mut pair = Pair::new(true, 100);
    pair.store.apply(TYPE, (0..NAMES).map(|name| Change::Upsert(resource(name, 1))).collect());
    pair.connect();
    pair.client_sends();
    pair.server_receives();
    assert!(pair.server_sends());
    let first = pair.to_client.pop_back().unwrap();
    assert!(first.resources.len() < usize::from(NAMES), "the snapshot takes several answers");
    assert!(first.system_version_info.ends_with('+'));
    pair.store.apply(TYPE, vec![Change::Remove("r0".into())]);
    assert!(pair.server_sends());
    assert_eq!(pair.to_client.pop_back().unwrap().removed_resources, ["r0"]);
}

#[test]
fn held_removals_are_sent_when_allowed() {
    let mut pair = Pair::new(true, 100);
    pair.store.apply(TYPE, (0..2).map(|name| Change::Upsert(resource(name, 1))).collect());
    pair.settle();
    pair.hold_removals = true;
    pair.store.apply(TYPE, vec![Change::Remove("r0".into()), Change::Upsert(resource(1, 2))]);
    assert!(pair.server_sends());
    let first = pair.to_client.pop_back().unwrap();
    assert_eq!((first.resources.len(), first.removed_resources.len()), (1, 0));
    assert!(first.system_version_info.ends_with('+'), "more follows");
    assert!(!pair.server_sends());
    pair.hold_removals = false;
    assert!(pair.server_sends());
    let second = pair.to_client.pop_back().unwrap();
    assert_eq!(second.removed_resources, ["r0"]);
    assert!(!second.system_version_info.ends_with('+'));
}

#[test]
fn a_client_is_ready_only_when_the_whole_snapshot_has_arrived() {
    let mut pair = Pair::new(true, 100);
    pair.store.apply(TYPE, (0..NAMES).map(|name| Change::Upsert(resource(name, 1))).collect());
    pair.connect();
    pair.client_sends();
    pair.server_receives();
    while pair.server_sends() {}
    let answers = pair.to_client.len();
    assert!(answers > 1);
    for _ in 1..answers {
        pair.client_receives();
        assert!(!pair.client.is_ready());
    }
    pair.client_receives();
    assert!(pair.client.is_ready());
}

#[test]
fn a_lagging_subscriber_must_reconnect_and_loses_nothing() {
    let mut pair = Pair::new(true, 2);
    pair.store.apply(TYPE, (0..NAMES).map(|name| Change::Upsert(resource(name, 1))).collect());
    pair.settle();
    for name in 0..5 {
        pair.store.apply(TYPE, vec![Change::Remove(format!("r{name}").into())]);
    }
    pair.settle();
    assert_eq!(pair.lagged, 1);
    assert_eq!(pair.applied.lock().values.keys().cloned().collect::<Vec<_>>(), ["r5", "r6", "r7"]);
}

#[test]
fn a_demanded_address_brings_its_service_and_workloads() {
    let mut pair = Pair::new(false, 100);
    pair.store.apply(TYPE, (0..NAMES).map(|name| Change::Upsert(resource(name, 1))).collect());
    pair.settle();
    assert!(pair.applied.lock().values.is_empty());
    pair.demand("/vip2".into());
    pair.settle();
    assert_eq!(pair.applied.lock().values.keys().cloned().collect::<Vec<_>>(), ["r2", "r3"]);
    assert_eq!(pair.found.get("/vip2"), Some(&Found::Present));
    pair.demand("nowhere".into());
    pair.settle();
    assert_eq!(pair.found.get("nowhere"), Some(&Found::Absent));
}
