//! What to send to which proxy: the state of the ZDS server, without I/O.
//!
//! Level-triggered: what has been sent to a proxy is compared with what it should know, and the next difference is the
//! next order. A proxy that reconnects, a pod that changes while another order is out, and a retry need no cases of
//! their own. Calls come from the [`Server`](super::Server); `now` is an argument.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use ambit_net::NetnsId;
use tokio::time::Instant;

/// First pause before an add that was nacked is sent again.
const RETRY_FIRST: Duration = Duration::from_millis(500);
/// Longest pause.
const RETRY_LAST: Duration = Duration::from_secs(15);

/// One connection of a proxy; later ones have greater numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProxyId(pub u64);

/// The version of a pod; another value under the same uid is sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// The namespace; `None` when the descriptor was lost.
    pub netns: Option<NetnsId>,
    /// Changes with everything else that the proxy must know.
    pub revision: u64,
}

/// The next message to a proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Serve this pod.
    Add(String, Version),
    /// Keep serving this pod, whose descriptor the agent lost.
    Keep(String, Version),
    /// Stop serving this pod.
    Del(String),
    /// The snapshot is complete.
    SnapshotSent,
}

/// What a connection has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Send this and wait for the answer.
    Send(Order),
    /// Nothing until then, or until something changes.
    WaitUntil(Instant),
    /// Nothing until something changes.
    Wait,
}

#[derive(Debug, Clone)]
struct Sent {
    version: Version,
    outcome: Outcome,
}

#[derive(Debug, Clone)]
enum Outcome {
    Served,
    /// It was sent a Keep, whatever it answered: it serves the pod if it did before.
    Kept,
    Refused {
        again_at: Instant,
        pause: Duration,
    },
}

/// Why an add could not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsendable {
    /// Another process holds the pod's listeners: a predecessor of the proxy, from which they are taken once it has come back.
    Held,
    /// Anything else.
    Failed,
}

/// A pod of the snapshot whose add could not be sent.
#[derive(Debug)]
struct Unsent {
    version: Version,
    /// When it is tried again; `None`: not in this snapshot.
    again_at: Option<Instant>,
}

#[derive(Debug)]
struct Proxy {
    sent: HashMap<String, Sent>,
    unsent: BTreeMap<String, Unsent>,
    /// Until when the end of the snapshot waits for listeners that another process holds.
    wait_until: Instant,
    snapshot_sent: bool,
    in_flight: Option<Order>,
}

/// Pods, proxies, and what each proxy has been sent.
#[derive(Debug, Default)]
pub struct Hub {
    pods: BTreeMap<String, Version>,
    proxies: BTreeMap<ProxyId, Proxy>,
    next_id: u64,
}

impl Hub {
    /// A proxy has said hello. It is the newest. The end of its snapshot, with which it becomes ready and its predecessor
    /// ends, waits until `wait_until` for listeners that another process holds.
    pub fn connect(&mut self, wait_until: Instant) -> ProxyId {
        let id = ProxyId(self.next_id);
        self.next_id += 1;
        let proxy = Proxy {
            sent: HashMap::new(),
            unsent: BTreeMap::new(),
            wait_until,
            snapshot_sent: false,
            in_flight: None,
        };
        self.proxies.insert(id, proxy);
        id
    }

    /// A proxy's connection has ended.
    pub fn disconnect(&mut self, id: ProxyId) {
        self.proxies.remove(&id);
    }

    /// Proxies that are connected.
    pub fn proxies(&self) -> usize {
        self.proxies.len()
    }

    /// A pod is to be served.
    pub fn upsert(&mut self, uid: &str, version: Version) {
        self.pods.insert(uid.into(), version);
    }

    /// Whether the pod is to be served or kept.
    pub fn contains(&self, uid: &str) -> bool {
        self.pods.contains_key(uid)
    }

    /// A pod is no longer to be served.
    pub fn delete(&mut self, uid: &str) {
        self.pods.remove(uid);
    }

    /// Whether a proxy serves the pod as it is now.
    pub fn is_served(&self, uid: &str) -> bool {
        let Some(version) = self.pods.get(uid) else { return false };
        self.proxies.values().any(|proxy| {
            proxy.sent.get(uid).is_some_and(|t| t.version == *version && matches!(t.outcome, Outcome::Served))
        })
    }

    /// Whether a proxy has been sent of the pod, and not yet of its end.
    pub fn is_known(&self, uid: &str) -> bool {
        self.proxies.values().any(|proxy| {
            proxy.sent.contains_key(uid)
                || matches!(&proxy.in_flight, Some(Order::Add(u, _) | Order::Keep(u, _)) if u == uid)
        })
    }

    /// What the connection is to do. An order that was handed out is expected back in
    /// [`handle_ack`](Self::handle_ack) before the next is.
    pub fn poll_next(&mut self, id: ProxyId, now: Instant) -> Next {
        // contracts.md, section 3: with two proxies, adds go to the newest, dels to all.
        let newest = self.proxies.keys().next_back() == Some(&id);
        let Some(proxy) = self.proxies.get_mut(&id) else { return Next::Wait };
        if proxy.in_flight.is_some() {
            return Next::Wait;
        }
        let mut wake: Option<Instant> = None;
        // A snapshot is always whole: a proxy drops what its snapshot did not name.
        let adds = newest || !proxy.snapshot_sent;
        let order = del_order(proxy, &self.pods, adds)
            .or_else(|| keep_order(proxy, &self.pods, now))
            .or_else(|| if adds { add_order(proxy, &self.pods, now, &mut wake) } else { None });
        let is_complete = !proxy.snapshot_sent && proxy.unsent.is_empty();
        let order = order.or_else(|| is_complete.then_some(Order::SnapshotSent));
        match order {
            Some(order) => {
                proxy.in_flight = Some(order.clone());
                Next::Send(order)
            }
            None => wake.map_or(Next::Wait, Next::WaitUntil),
        }
    }

    /// The order in flight could not be sent. In a snapshot, an add is tried again while its listeners are held; then the
    /// proxy is asked to keep the pod instead: it may serve it, and drops what its snapshot does not name. The add is tried
    /// again after that. Returns the pod of an add that has failed for now.
    pub fn handle_unsent(&mut self, id: ProxyId, why: Unsendable, now: Instant) -> Option<String> {
        let proxy = self.proxies.get_mut(&id)?;
        match &proxy.in_flight {
            Some(Order::Add(uid, version)) if !proxy.snapshot_sent => {
                let (uid, version) = (uid.clone(), *version);
                let again_at = match why {
                    Unsendable::Held => Some(now + RETRY_FIRST),
                    Unsendable::Failed => None,
                };
                proxy.unsent.insert(uid.clone(), Unsent { version, again_at });
                proxy.in_flight = None;
                (why == Unsendable::Failed).then_some(uid)
            }
            _ => self.handle_ack(id, false, now),
        }
    }

    /// The answer to the order in flight: `true` if the proxy did it. Returns the pod of an add.
    pub fn handle_ack(&mut self, id: ProxyId, accepted: bool, now: Instant) -> Option<String> {
        let proxy = self.proxies.get_mut(&id)?;
        match proxy.in_flight.take()? {
            Order::Keep(uid, version) => {
                let outcome = match proxy.unsent.remove(&uid) {
                    Some(_) => Outcome::Refused { again_at: now + RETRY_FIRST, pause: RETRY_FIRST },
                    None => Outcome::Kept,
                };
                proxy.sent.insert(uid, Sent { version, outcome });
                None
            }
            Order::Add(uid, version) => {
                proxy.unsent.remove(&uid);
                let outcome = if accepted {
                    Outcome::Served
                } else {
                    let pause = match proxy.sent.get(&uid).map(|sent| &sent.outcome) {
                        Some(Outcome::Refused { pause, .. }) => (*pause * 2).min(RETRY_LAST),
                        _ => RETRY_FIRST,
                    };
                    Outcome::Refused { again_at: now + pause, pause }
                };
                proxy.sent.insert(uid.clone(), Sent { version, outcome });
                Some(uid)
            }
            // A proxy that could not stop a pod will not do better when asked again.
            Order::Del(uid) => {
                proxy.sent.remove(&uid);
                None
            }
            Order::SnapshotSent => {
                proxy.snapshot_sent = true;
                None
            }
        }
    }
}

/// A proxy that gets no adds must not go on in a namespace that its pod has left.
fn del_order(proxy: &Proxy, pods: &BTreeMap<String, Version>, adds: bool) -> Option<Order> {
    let is_over = |uid: &String, sent: &Sent| match pods.get(uid) {
        None => true,
        Some(version) => {
            !adds && sent.version.netns.zip(version.netns).is_some_and(|(before, now)| before != now)
        }
    };
    proxy
        .sent
        .iter()
        .filter(|(uid, sent)| is_over(uid, sent))
        .map(|(uid, _)| uid)
        .min()
        .cloned()
        .map(Order::Del)
}

fn keep_order(proxy: &mut Proxy, pods: &BTreeMap<String, Version>, now: Instant) -> Option<Order> {
    // A pod that is gone, or another one by now, is nothing to keep.
    proxy.unsent.retain(|uid, unsent| pods.get(uid) == Some(&unsent.version));
    let waits = now < proxy.wait_until;
    let given_up = proxy.unsent.iter().find(|(_, unsent)| !waits || unsent.again_at.is_none());
    given_up.map(|(uid, unsent)| Order::Keep(uid.clone(), unsent.version))
}

fn add_order(
    proxy: &Proxy,
    pods: &BTreeMap<String, Version>,
    now: Instant,
    wake: &mut Option<Instant>,
) -> Option<Order> {
    let order = |uid: &String, version: &Version| match version.netns {
        Some(_) => Order::Add(uid.clone(), *version),
        None => Order::Keep(uid.clone(), *version),
    };
    // A Keep belongs into a snapshot: istio's ztunnel takes a later one for an error of the protocol.
    let sendable = |version: &Version| version.netns.is_some() || !proxy.snapshot_sent;
    let is_fresh = |uid: &String, version: &Version| {
        let is_known = proxy.sent.get(uid).is_some_and(|sent| sent.version == *version);
        sendable(version) && !is_known && !proxy.unsent.contains_key(uid)
    };
    let fresh = pods.iter().find(|(uid, version)| is_fresh(uid, version));
    if let Some((uid, version)) = fresh {
        return Some(order(uid, version));
    }
    // A snapshot ends with what could be started; retries of what the proxy refused come after it.
    if !proxy.snapshot_sent {
        return held_order(proxy, now, wake);
    }
    for (uid, version) in pods {
        if let Some(Sent { outcome: Outcome::Refused { again_at, .. }, .. }) = proxy.sent.get(uid) {
            if *again_at <= now {
                return Some(order(uid, version));
            }
            *wake = Some(wake.map_or(*again_at, |at| at.min(*again_at)));
        }
    }
    None
}

/// The next attempt at a pod of the snapshot whose listeners were held. A pod of which nothing is tried before the end of
/// the wait is kept then.
fn held_order(proxy: &Proxy, now: Instant, wake: &mut Option<Instant>) -> Option<Order> {
    for (uid, unsent) in &proxy.unsent {
        let Some(again_at) = unsent.again_at else { continue };
        if again_at <= now {
            return Some(Order::Add(uid.clone(), unsent.version));
        }
        let at = again_at.min(proxy.wait_until);
        *wake = Some(wake.map_or(at, |wake| wake.min(at)));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(ino: u64) -> Version {
        Version { netns: Some(NetnsId { dev: 4, ino }), revision: 0 }
    }

    /// Answers every order until there is nothing to do, and returns the orders.
    fn run(hub: &mut Hub, id: ProxyId, now: Instant, accept: impl Fn(&Order) -> bool) -> Vec<Order> {
        let mut orders = Vec::new();
        while let Next::Send(order) = hub.poll_next(id, now) {
            assert_eq!(hub.poll_next(id, now), Next::Wait, "one order at a time");
            hub.handle_ack(id, accept(&order), now);
            orders.push(order);
        }
        orders
    }

    fn add(uid: &str, ino: u64) -> Order {
        Order::Add(uid.into(), version(ino))
    }

    #[test]
    fn a_proxy_gets_every_pod_the_snapshots_end_then_changes() {
        let now = Instant::now();
        let mut hub = Hub::default();
        hub.upsert("a", version(1));
        hub.upsert("b", Version { netns: None, revision: 0 });
        let id = hub.connect(now);
        let keep = Order::Keep("b".into(), Version { netns: None, revision: 0 });
        assert_eq!(run(&mut hub, id, now, |_| true), [add("a", 1), keep, Order::SnapshotSent]);
        assert!(hub.is_served("a"));
        hub.upsert("c", version(3));
        hub.delete("a");
        assert_eq!(run(&mut hub, id, now, |_| true), [Order::Del("a".into()), add("c", 3)]);
        assert!(!hub.is_known("a"));
    }

    #[test]
    fn a_keep_is_sent_in_snapshots_only_and_is_not_serving() {
        let now = Instant::now();
        let mut hub = Hub::default();
        let lost = Version { netns: None, revision: 0 };
        hub.upsert("a", lost);
        let id = hub.connect(now);
        assert_eq!(run(&mut hub, id, now, |_| true), [Order::Keep("a".into(), lost), Order::SnapshotSent]);
        assert!(!hub.is_served("a"));
        hub.upsert("b", lost);
        assert_eq!(run(&mut hub, id, now, |_| true), []);
        hub.upsert("a", version(1));
        assert_eq!(run(&mut hub, id, now, |_| true), [add("a", 1)]);
        let id = hub.connect(now);
        let refused = run(&mut hub, id, now, |order| !matches!(order, Order::Keep(..)));
        assert_eq!(refused, [add("a", 1), Order::Keep("b".into(), lost), Order::SnapshotSent]);
        assert_eq!(hub.poll_next(id, now), Next::Wait, "a refused Keep is not sent again");
    }

    #[test]
    fn a_pod_whose_add_cannot_be_sent_is_kept_and_added_later() {
        let now = Instant::now();
        let mut hub = Hub::default();
        hub.upsert("a", version(1));
        hub.upsert("b", version(2));
        let id = hub.connect(now);
        assert_eq!(hub.poll_next(id, now), Next::Send(add("a", 1)));
        assert_eq!(hub.handle_unsent(id, Unsendable::Failed, now), Some("a".into()));
        let keep = Order::Keep("a".into(), version(1));
        assert_eq!(run(&mut hub, id, now, |_| true), [keep, add("b", 2), Order::SnapshotSent]);
        assert!(!hub.is_served("a"));
        let Next::WaitUntil(at) = hub.poll_next(id, now) else { panic!("no retry planned") };
        assert_eq!(hub.poll_next(id, at), Next::Send(add("a", 1)));
        // Outside of a snapshot there is nothing to keep: the proxy goes on with what it has.
        assert_eq!(hub.handle_unsent(id, Unsendable::Failed, at), Some("a".into()));
        let Next::WaitUntil(at) = hub.poll_next(id, at) else { panic!("no retry planned") };
        assert_eq!(run(&mut hub, id, at, |_| true), [add("a", 1)]);
        assert!(hub.is_served("a"));
    }

    /// The proxy's predecessor holds the listeners of `a` and comes back to a restarted agent after its successor.
    #[test]
    fn a_snapshot_ends_when_held_listeners_were_taken_over() {
        let now = Instant::now();
        let mut hub = Hub::default();
        hub.upsert("a", version(1));
        hub.upsert("b", version(2));
        let id = hub.connect(now + Duration::from_secs(10));
        assert_eq!(hub.poll_next(id, now), Next::Send(add("a", 1)));
        assert_eq!(hub.handle_unsent(id, Unsendable::Held, now), None);
        assert_eq!(run(&mut hub, id, now, |_| true), [add("b", 2)], "others do not wait");
        let Next::WaitUntil(at) = hub.poll_next(id, now) else { panic!("no retry planned") };
        assert_eq!(hub.poll_next(id, at), Next::Send(add("a", 1)));
        hub.handle_unsent(id, Unsendable::Held, at);
        let Next::WaitUntil(at) = hub.poll_next(id, at) else { panic!("no retry planned") };
        assert_eq!(run(&mut hub, id, at, |_| true), [add("a", 1), Order::SnapshotSent]);
        assert!(hub.is_served("a"));
    }

    #[test]
    fn a_pod_whose_listeners_stay_held_is_kept_at_the_end_of_the_wait() {
        let start = Instant::now();
        let end = start + RETRY_FIRST * 2;
        let mut hub = Hub::default();
        hub.upsert("a", version(1));
        let id = hub.connect(end);
        let mut now = start;
        loop {
            match hub.poll_next(id, now) {
                Next::Send(order) if order == add("a", 1) => {
                    hub.handle_unsent(id, Unsendable::Held, now);
                }
                Next::WaitUntil(at) => now = at,
                Next::Send(order) => {
                    assert_eq!((order, now), (Order::Keep("a".into(), version(1)), end));
                    break;
                }
                Next::Wait => panic!("nothing is planned"),
            }
        }
        hub.handle_ack(id, true, now);
        assert_eq!(run(&mut hub, id, now, |_| true), [Order::SnapshotSent]);
        let Next::WaitUntil(at) = hub.poll_next(id, now) else { panic!("no retry planned") };
        assert_eq!(run(&mut hub, id, at, |_| true), [add("a", 1)]);
    }

    #[test]
    fn a_pod_that_goes_before_it_is_kept_is_not_kept() {
        let now = Instant::now();
        let mut hub = Hub::default();
        hub.upsert("a", version(1));
        let id = hub.connect(now);
        hub.poll_next(id, now);
        hub.handle_unsent(id, Unsendable::Failed, now);
        hub.delete("a");
        assert_eq!(run(&mut hub, id, now, |_| true), [Order::SnapshotSent]);
    }

    #[test]
    fn a_pod_seen_again_in_another_namespace_is_added_again() {
        let now = Instant::now();
        let mut hub = Hub::default();
        let id = hub.connect(now);
        hub.upsert("a", version(1));
        run(&mut hub, id, now, |_| true);
        hub.upsert("a", version(1));
        assert_eq!(run(&mut hub, id, now, |_| true), []);
        hub.upsert("a", version(2));
        assert!(!hub.is_served("a"));
        assert_eq!(run(&mut hub, id, now, |_| true), [add("a", 2)]);
    }

    #[test]
    fn a_refused_pod_is_sent_again_with_growing_pauses() {
        let mut now = Instant::now();
        let mut hub = Hub::default();
        hub.upsert("a", version(1));
        hub.upsert("b", version(2));
        let id = hub.connect(now);
        let orders = run(&mut hub, id, now, |order| *order != add("a", 1));
        assert_eq!(orders, [add("a", 1), add("b", 2), Order::SnapshotSent]);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            let Next::WaitUntil(at) = hub.poll_next(id, now) else { panic!("no retry planned") };
            pauses.push((at - now).as_millis());
            now = at;
            assert_eq!(run(&mut hub, id, now, |_| false), [add("a", 1)]);
        }
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 15000, 15000, 15000]);
        let Next::WaitUntil(at) = hub.poll_next(id, now) else { panic!("no retry planned") };
        assert_eq!(run(&mut hub, id, at, |_| true), [add("a", 1)]);
        assert!(hub.is_served("a"));
        assert_eq!(hub.poll_next(id, at), Next::Wait);
    }

    #[test]
    fn of_two_proxies_the_newest_gets_adds_and_both_get_dels() {
        let now = Instant::now();
        let mut hub = Hub::default();
        hub.upsert("a", version(1));
        let old = hub.connect(now);
        run(&mut hub, old, now, |_| true);
        let new = hub.connect(now);
        assert_eq!(run(&mut hub, new, now, |_| true), [add("a", 1), Order::SnapshotSent]);
        hub.upsert("b", version(2));
        assert_eq!(run(&mut hub, old, now, |_| true), []);
        assert_eq!(run(&mut hub, new, now, |_| true), [add("b", 2)]);
        hub.delete("a");
        assert_eq!(run(&mut hub, old, now, |_| true), [Order::Del("a".into())]);
        assert_eq!(run(&mut hub, new, now, |_| true), [Order::Del("a".into())]);
        hub.disconnect(new);
        assert_eq!(run(&mut hub, old, now, |_| true), [add("b", 2)], "it is the newest again");
    }

    #[test]
    fn the_older_proxy_leaves_a_namespace_that_its_pod_has_left() {
        let now = Instant::now();
        let mut hub = Hub::default();
        hub.upsert("a", version(1));
        let old = hub.connect(now);
        run(&mut hub, old, now, |_| true);
        let new = hub.connect(now);
        run(&mut hub, new, now, |_| true);
        hub.upsert("a", version(2));
        assert_eq!(run(&mut hub, old, now, |_| true), [Order::Del("a".into())]);
        assert_eq!(run(&mut hub, new, now, |_| true), [add("a", 2)]);
    }

    #[test]
    fn two_proxies_that_reconnect_each_get_a_whole_snapshot() {
        let now = Instant::now();
        let mut hub = Hub::default();
        hub.upsert("a", version(1));
        let (first, second) = (hub.connect(now), hub.connect(now));
        for id in [first, second] {
            assert_eq!(run(&mut hub, id, now, |_| true), [add("a", 1), Order::SnapshotSent]);
        }
    }

    #[test]
    fn a_pod_that_goes_while_its_add_is_out_is_deleted_afterwards() {
        let now = Instant::now();
        let mut hub = Hub::default();
        let id = hub.connect(now);
        run(&mut hub, id, now, |_| true);
        hub.upsert("a", version(1));
        assert_eq!(hub.poll_next(id, now), Next::Send(add("a", 1)));
        hub.delete("a");
        assert!(hub.is_known("a"));
        hub.handle_ack(id, true, now);
        assert_eq!(run(&mut hub, id, now, |_| true), [Order::Del("a".into())]);
        assert!(!hub.is_known("a"));
    }
}
