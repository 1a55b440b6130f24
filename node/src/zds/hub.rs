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
        // ZDS contract: with two proxies, adds go to the newest, dels to all.
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
#[path = "hub_tests.rs"]
mod tests;
