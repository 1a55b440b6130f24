//! The table: rows found by a hash of what they are of, bounded by the bytes that they take.
//!
//! To count what has a row already allocates nothing. Peers choose hosts, methods and paths; so methods are those that HTTP names, patterns
//! of paths are few for each pair of ends, no client may take more than a quarter of the memory, and what finds no room is counted as lost
//! only: no client can push out what others did, or keep them out.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::mem::size_of;

use crate::flow::{Flow, Kind, ServiceName, Side};
use crate::pattern::{ANY_PATH, path_pattern};

/// Patterns of paths of the same ends, port and method; further ones are [`ANY_PATH`].
const MAX_PATHS: u32 = 50;
/// One client's rows take at most this part of the bytes.
const SHARE: usize = 4;
/// Longest text of a row that comes from a peer or another object.
const MAX_TEXT: usize = 256;
/// What a row takes beside its texts: itself, its place in the maps, and what the allocator adds to each text.
const ROW_BYTES: usize = 2 * size_of::<Flow>() + 14 * 16 + 160;

/// Bounds of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that rows may take.
    pub bytes: usize,
    /// How long a row stays after it was last seen, in seconds.
    pub keep: u64,
}

/// What became of a connection or request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was not denied, and did not fail.
    Allowed,
    /// Policy denied it.
    Denied,
    /// It was not denied, and failed.
    Failed,
    /// It failed after it was counted as allowed.
    FailedLater,
}

/// One end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct ObservedSide<'a> {
    /// Its namespace, or nothing.
    pub namespace: &'a str,
    /// What the pod belongs to, or nothing.
    pub workload: &'a str,
    /// What it proved to be, or nothing.
    pub identity: &'a str,
}

/// A connection that opened, a request that ended or has been in progress for long, or the end of what was counted before.
#[derive(Debug, Clone, Copy)]
pub struct Observation<'a> {
    /// What it is.
    pub kind: Kind,
    /// The client.
    pub source: ObservedSide<'a>,
    /// The server.
    pub destination: ObservedSide<'a>,
    /// Namespace and host of the service that was dialled.
    pub service: Option<(&'a str, &'a str)>,
    /// The port.
    pub port: u16,
    /// The method of a request.
    pub method: &'a str,
    /// The path of a request.
    pub path: &'a str,
    /// The host of a request.
    pub host: &'a str,
    /// What became of it.
    pub outcome: Outcome,
}

/// Flows, counted.
#[derive(Debug)]
pub struct Table {
    limits: Limits,
    hasher: RandomState,
    /// By hash; rows of one hash are few.
    rows: HashMap<u64, Vec<Flow>>,
    /// Patterns of paths by the hash of the rest.
    paths: HashMap<u64, u32>,
    /// Bytes that rows of a client take, by its hash.
    clients: HashMap<u64, usize>,
    bytes: usize,
    count: usize,
    full: u64,
    /// Kept for its allocation.
    pattern: String,
}

impl Table {
    /// An empty one.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            hasher: RandomState::new(),
            rows: HashMap::new(),
            paths: HashMap::new(),
            clients: HashMap::new(),
            bytes: 0,
            count: 0,
            full: 0,
            pattern: String::new(),
        }
    }

    /// Counts what was seen at `now`, in seconds since the epoch.
    pub fn observe(&mut self, seen: &Observation<'_>, now: u64) {
        self.observe_alike(seen, 1, now);
    }

    /// Counts several that are alike.
    pub fn observe_alike(&mut self, seen: &Observation<'_>, several: u64, now: u64) {
        let seen = &Observation { method: known_method(seen), ..*seen };
        let mut pattern = std::mem::take(&mut self.pattern);
        match seen.kind {
            Kind::Request => path_pattern(seen.path, &mut pattern),
            Kind::Inbound | Kind::Outbound | Kind::WaypointConnection => pattern.clear(),
        }
        self.count_in(seen, &pattern, several, now);
        self.pattern = pattern;
    }

    fn count_in(&mut self, seen: &Observation<'_>, pattern: &str, several: u64, now: u64) {
        let rest = self.hasher.hash_one((
            seen.kind,
            seen.source,
            seen.destination,
            seen.service,
            seen.port,
            seen.method,
        ));
        let hash = self.hasher.hash_one((rest, pattern));
        if let Some(row) = self.find(hash, seen, pattern) {
            return count(row, seen.outcome, several, now);
        }
        let known = self.paths.get(&rest).copied().unwrap_or_default();
        if known >= MAX_PATHS && pattern != ANY_PATH {
            return self.count_in(seen, ANY_PATH, several, now);
        }
        let mut row = new_row(seen, pattern, now);
        let bytes = bytes_of(&row);
        let client = self.hasher.hash_one(observed(&row.source));
        let taken = self.clients.get(&client).copied().unwrap_or_default();
        if self.bytes + bytes > self.limits.bytes || taken + bytes > self.limits.bytes / SHARE {
            self.full += several;
            return;
        }
        self.clients.insert(client, taken + bytes);
        count(&mut row, seen.outcome, several, now);
        self.rows.entry(hash).or_default().push(row);
        *self.paths.entry(rest).or_default() += 1;
        self.bytes += bytes;
        self.count += 1;
    }

    fn find(&mut self, hash: u64, seen: &Observation<'_>, pattern: &str) -> Option<&mut Flow> {
        self.rows.get_mut(&hash)?.iter_mut().find(|row| is_of(row, seen, pattern))
    }

    /// Removes rows that were not seen for longer than they are kept.
    pub fn expire(&mut self, now: u64) {
        let keep = self.limits.keep;
        let (mut freed, mut removed) = (0, 0);
        self.rows.retain(|_, rows| {
            rows.retain(|row| {
                let stays = row.last_seen.saturating_add(keep) >= now;
                if !stays {
                    freed += bytes_of(row);
                    removed += 1;
                }
                stays
            });
            !rows.is_empty()
        });
        if removed == 0 {
            return;
        }
        self.bytes = self.bytes.saturating_sub(freed);
        self.count = self.count.saturating_sub(removed);
        // These are counted anew: rows do not know the hashes that they were counted by.
        self.paths.clear();
        self.clients.clear();
        for row in self.rows.values().flatten() {
            let service = row.service.as_ref().map(|it| (&*it.namespace, &*it.host));
            let (source, destination) = (observed(&row.source), observed(&row.destination));
            let rest = (row.kind, source, destination, service, row.port, &*row.method);
            *self.paths.entry(self.hasher.hash_one(rest)).or_default() += 1;
            *self.clients.entry(self.hasher.hash_one(source)).or_default() += bytes_of(row);
        }
        self.rows.shrink_to_fit();
        self.clients.shrink_to_fit();
        self.paths.shrink_to_fit();
    }

    /// The rows, sorted by what they are of.
    pub fn flows(&self) -> Vec<Flow> {
        let mut flows: Vec<Flow> = self.rows.values().flatten().cloned().collect();
        flows.sort_by(|a, b| {
            let key =
                |row: &Flow| (row.kind, row.service.clone(), row.destination.clone(), row.source.clone());
            key(a).cmp(&key(b)).then_with(|| {
                (a.port, &a.path, &a.method, a.first_seen).cmp(&(b.port, &b.path, &b.method, b.first_seen))
            })
        });
        flows
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes that the rows take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Observations for which there was no room.
    pub fn full(&self) -> u64 {
        self.full
    }
}

/// The method if HTTP or WebDAV names it; else one name for all others.
fn known_method<'a>(seen: &Observation<'a>) -> &'a str {
    const KNOWN: [&str; 10] =
        ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", ""];
    if KNOWN.contains(&seen.method) { seen.method } else { "OTHER" }
}

fn observed(side: &Side) -> ObservedSide<'_> {
    ObservedSide { namespace: &side.namespace, workload: &side.workload, identity: &side.identity }
}

fn is_of(row: &Flow, seen: &Observation<'_>, pattern: &str) -> bool {
    row.kind == seen.kind
        && row.port == seen.port
        && *row.path == *pattern
        && *row.method == *seen.method
        && observed(&row.source) == cut_side(seen.source)
        && observed(&row.destination) == cut_side(seen.destination)
        && row.service.as_ref().map(|it| (&*it.namespace, &*it.host))
            == seen.service.map(|(namespace, host)| (cut(namespace), cut(host)))
}

/// At most so much of a text that a row stays small.
fn cut(text: &str) -> &str {
    text.get(..text.floor_char_boundary(MAX_TEXT)).unwrap_or_default()
}

fn cut_side(side: ObservedSide<'_>) -> ObservedSide<'_> {
    let ObservedSide { namespace, workload, identity } = side;
    ObservedSide { namespace: cut(namespace), workload: cut(workload), identity: cut(identity) }
}

fn new_row(seen: &Observation<'_>, pattern: &str, now: u64) -> Flow {
    let side = |side| {
        let ObservedSide { namespace, workload, identity } = cut_side(side);
        Side { namespace: namespace.into(), workload: workload.into(), identity: identity.into() }
    };
    Flow {
        kind: seen.kind,
        source: side(seen.source),
        destination: side(seen.destination),
        service: seen.service.map(|(namespace, host)| ServiceName {
            namespace: cut(namespace).into(),
            host: cut(host).into(),
        }),
        port: seen.port,
        method: seen.method.into(),
        path: pattern.into(),
        example_path: cut(seen.path).into(),
        example_host: cut(seen.host).into(),
        allowed: 0,
        denied: 0,
        failed: 0,
        first_seen: now,
        last_seen: now,
    }
}

fn count(row: &mut Flow, outcome: Outcome, several: u64, now: u64) {
    row.last_seen = row.last_seen.max(now);
    match outcome {
        Outcome::Allowed => row.allowed += several,
        Outcome::Denied => row.denied += several,
        Outcome::Failed => {
            row.allowed += several;
            row.failed += several;
        }
        Outcome::FailedLater => row.failed += several,
    }
}

/// What a row takes.
fn bytes_of(row: &Flow) -> usize {
    let side = |side: &Side| side.namespace.len() + side.workload.len() + side.identity.len();
    let service = row.service.as_ref().map_or(0, |it| it.namespace.len() + it.host.len());
    let texts = [&row.method, &row.path, &row.example_path, &row.example_host];
    ROW_BYTES
        + side(&row.source)
        + side(&row.destination)
        + service
        + texts.iter().map(|text| text.len()).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { bytes: 1 << 20, keep: 100 };

    fn request<'a>(method: &'a str, path: &'a str) -> Observation<'a> {
        Observation {
            kind: Kind::Request,
            source: ObservedSide {
                namespace: "shop",
                workload: "cli",
                identity: "spiffe://td/ns/shop/sa/cli",
            },
            destination: ObservedSide::default(),
            service: Some(("shop", "web.shop.svc.cluster.local")),
            port: 80,
            method,
            path,
            host: "web",
            outcome: Outcome::Allowed,
        }
    }

    #[test]
    fn what_is_alike_is_counted_in_one_row() {
        let mut table = Table::new(LIMITS);
        table.observe(&request("GET", "/users/1"), 10);
        table.observe(&request("GET", "/users/22"), 12);
        table.observe(&Observation { outcome: Outcome::Denied, ..request("GET", "/users/3") }, 11);
        table.observe(&Observation { outcome: Outcome::Failed, ..request("GET", "/users/3") }, 11);
        table.observe(&request("POST", "/users"), 11);
        let flows = table.flows();
        assert_eq!((flows.len(), table.len()), (2, 2), "{flows:?}");
        let users = flows.iter().find(|flow| *flow.path == *"/users/{*}").unwrap();
        assert_eq!((users.allowed, users.denied, users.failed), (3, 1, 1));
        assert_eq!((users.first_seen, users.last_seen), (10, 12));
        assert_eq!(&*users.example_path, "/users/1");
    }

    #[test]
    fn a_peer_that_asks_for_many_paths_gets_few_rows() {
        let mut table = Table::new(LIMITS);
        for number in 0..1000 {
            table.observe(&request("GET", &format!("/page-{}", "x".repeat(number % 60 + 1))), 1);
            table.observe(&request(&format!("M{number}"), "/"), 1);
        }
        let flows = table.flows();
        assert_eq!(flows.iter().filter(|flow| *flow.method == *"OTHER").count(), 1);
        assert_eq!(flows.len(), 50 + 1 + 1, "the paths, any other path, and any other method");
        assert_eq!(flows.iter().map(|flow| flow.allowed).sum::<u64>(), 2000, "nothing is lost");
    }

    #[test]
    fn a_full_table_keeps_what_it_has_and_counts_what_it_loses() {
        let mut table = Table::new(Limits { bytes: 20 * ROW_BYTES, ..LIMITS });
        let clients: Vec<String> = (0..1000).map(|number| format!("client-{number}")).collect();
        let of = |workload| {
            let source = ObservedSide { workload, ..request("GET", "/").source };
            Observation { source, ..request("GET", "/") }
        };
        clients.iter().for_each(|client| table.observe(&of(client), 1));
        assert!(table.bytes() <= 20 * ROW_BYTES && table.len() > 10, "{} rows", table.len());
        assert_eq!(table.len() as u64 + table.full(), 1000);
        table.observe(&of(&clients[0]), 2);
        assert_eq!(table.flows().iter().map(|flow| flow.allowed).max(), Some(2));
    }

    #[test]
    fn a_client_that_tries_every_port_leaves_room_for_others() {
        let mut table = Table::new(Limits { bytes: 40 * ROW_BYTES, ..LIMITS });
        for port in 0..=u16::MAX {
            table.observe(&Observation { port, ..request("GET", "/") }, 1);
        }
        assert!(table.bytes() <= 10 * ROW_BYTES && table.len() > 5, "{} rows", table.len());
        let other = ObservedSide { workload: "other", ..request("GET", "/").source };
        table.observe(&Observation { source: other, ..request("GET", "/") }, 1);
        assert!(table.flows().iter().any(|flow| *flow.source.workload == *"other"));
        table.expire(200);
        assert!(table.is_empty() && table.bytes() == 0 && table.clients.is_empty());
    }

    #[test]
    fn rows_that_were_not_seen_for_long_make_room() {
        let mut table = Table::new(LIMITS);
        for number in 0..60 {
            table.observe(&request("GET", &format!("/{}", "a".repeat(number + 1))), 1);
        }
        table.observe(&request("POST", "/stays"), 50);
        table.expire(101);
        assert_eq!(table.len(), 52, "rows are kept for the whole time");
        table.expire(102);
        assert_eq!(table.len(), 1);
        assert_eq!(table.bytes(), bytes_of(&table.flows()[0]));
        table.observe(&request("GET", "/b"), 103);
        assert!(table.flows().iter().any(|flow| *flow.path == *"/b"), "patterns are counted anew");
    }

    #[test]
    fn texts_of_peers_are_cut() {
        let mut table = Table::new(LIMITS);
        let long = "ä".repeat(5000);
        let seen = Observation { host: &long, service: Some(("shop", &long)), ..request("GET", "/") };
        table.observe(&seen, 1);
        table.observe(&seen, 2);
        assert_eq!(table.len(), 1);
        assert!(table.bytes() < ROW_BYTES + 4 * MAX_TEXT);
    }
}
