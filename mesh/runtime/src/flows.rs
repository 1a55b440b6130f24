//! Flows that a proxy observes: the records of its access log, counted in a bounded table off the data path.
//!
//! The data path hands a record over through a bounded queue, without waiting; a thread counts it. What the queue has no room for is
//! counted as lost. `/flows` of the admin server shows the table.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ambit_flows::{Kind, Limits, Lost, Observation, ObservedSide, Outcome, Report, Table};
use ambit_telemetry::access::{AccessLog, Direction, Ended, Entry, Party, Record, RequestEntry, Status};
use ambit_telemetry::http::{Reply, reply, text};
use ambit_telemetry::{Admin, Registry};
use http::StatusCode;
use parking_lot::Mutex;

use crate::configuration::flows::FlowSettings;

/// Records that wait to be counted; more are lost.
const QUEUE: usize = 4096;
/// Records that are counted while readers of the table wait.
const TURN: usize = 512;
/// How long records are gathered, so that a busy sender need not wake the thread for each.
const GATHER: Duration = Duration::from_millis(20);
/// How often the thread looks whether it is to end, and for rows that have grown old.
const POLL: Duration = Duration::from_secs(1);
/// How often rows that were not seen for long are removed, in seconds.
const EXPIRE_EVERY: u64 = 60;

/// What a proxy is, which decides what its records are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observer {
    /// A node proxy.
    Node,
    /// A waypoint or gateway.
    Waypoint,
}

/// The flows that a proxy observes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Flows(Option<Arc<Shared>>);

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    settings: FlowSettings,
    since: u64,
    lost: AtomicU64,
}

/// Owns the thread. Dropping it ends the thread, within a second.
#[derive(Debug)]
pub struct FlowCounter {
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Drop for FlowCounter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            thread.join().ok();
        }
    }
}

impl Flows {
    /// Starts to count the records of `log`, where the settings say so. Keep the [`FlowCounter`] until the program ends.
    ///
    /// # Errors
    /// The thread can't be started.
    pub fn observe(
        log: AccessLog,
        settings: FlowSettings,
        observer: Observer,
    ) -> io::Result<(AccessLog, Self, Option<FlowCounter>)> {
        if !settings.enabled {
            return Ok((log, Self(None), None));
        }
        let limits = Limits { bytes: settings.memory, keep: settings.keep.get().as_secs() };
        let shared = Arc::new(Shared {
            table: Mutex::new(Table::new(limits)),
            settings,
            since: seconds(SystemTime::now()),
            lost: AtomicU64::new(0),
        });
        let (queue, records) = sync_channel(QUEUE);
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name("flows".to_owned()).spawn({
            let (shared, stop) = (shared.clone(), stop.clone());
            move || count(&shared, &records, observer, &stop)
        })?;
        let log = log.observed_by(hand_over(shared.clone(), queue));
        Ok((log, Self(Some(shared)), Some(FlowCounter { thread: Some(thread), stop })))
    }

    /// What is known now.
    pub fn report(&self) -> Report {
        let Some(shared) = &self.0 else {
            return Report {
                enabled: false,
                since: 0,
                keep: 0,
                bytes: 0,
                limit: 0,
                lost: Lost::default(),
                flows: Vec::new(),
            };
        };
        let table = shared.table.lock();
        Report {
            enabled: true,
            since: shared.since,
            keep: shared.settings.keep.get().as_secs(),
            bytes: table.bytes() as u64,
            limit: shared.settings.memory as u64,
            lost: Lost { queue: shared.lost.load(Ordering::Relaxed), full: table.full() },
            flows: table.flows(),
        }
    }

    /// Adds `GET /flows`.
    #[must_use]
    pub fn route(&self, admin: Admin) -> Admin {
        let flows = self.clone();
        admin.get("/flows", move |_| {
            let flows = flows.clone();
            async move { answer(flows).await }
        })
    }

    /// Registers the metrics of the table.
    pub fn register(&self, registry: &Registry) {
        let Some(shared) = &self.0 else { return };
        let gauge = |read: fn(&Table) -> usize| {
            let shared = shared.clone();
            move || i64::try_from(read(&shared.table.lock())).unwrap_or(i64::MAX)
        };
        registry.gauge_from("ambit_flows", "Flows that are remembered", gauge(Table::len));
        registry.gauge_from("ambit_flows_bytes", "Memory that remembered flows take", gauge(Table::bytes));
        let (queue, full) = (shared.clone(), shared.clone());
        type Count = Box<dyn Fn() -> u64 + Send + Sync>;
        let reasons: [(String, Count); 2] = [
            ("queue".to_owned(), Box::new(move || queue.lost.load(Ordering::Relaxed))),
            ("full".to_owned(), Box::new(move || full.table.lock().full())),
        ];
        let help = "Connections and requests that were not counted among the flows";
        registry.counters_from("ambit_flow_records_lost", help, "reason", reasons);
    }
}

/// To sort and render many rows takes time, which the control tasks do not have.
async fn answer(flows: Flows) -> Reply {
    let rendered = tokio::task::spawn_blocking(move || serde_json::to_vec(&flows.report())).await;
    match rendered {
        Ok(Ok(body)) => reply(StatusCode::OK, "application/json", body.into()),
        Ok(Err(error)) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// What the data path does with a record.
fn hand_over(shared: Arc<Shared>, queue: SyncSender<Arc<Record>>) -> impl Fn(&Arc<Record>) {
    move |record| {
        if queue.try_send(record.clone()).is_err() {
            shared.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn count(shared: &Shared, records: &Receiver<Arc<Record>>, observer: Observer, stop: &AtomicBool) {
    let mut expired = shared.since;
    let mut runs = Runs::default();
    loop {
        let first = match records.recv_timeout(POLL) {
            Ok(record) => Some(record),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let is_busy = first.is_some();
        let mut next = first.or_else(|| records.try_recv().ok());
        while next.is_some() {
            let mut table = shared.table.lock();
            for _ in 0..TURN {
                let Some(record) = next.take() else { break };
                runs.add(record, &mut |record, several| observe(&mut table, record, observer, several));
                next = records.try_recv().ok();
            }
            runs.end(&mut |record, several| observe(&mut table, record, observer, several));
        }
        let now = seconds(SystemTime::now());
        if now.saturating_sub(expired) >= EXPIRE_EVERY {
            shared.table.lock().expire(now);
            expired = now;
        }
        if stop.load(Ordering::Acquire) {
            return;
        }
        if is_busy {
            std::thread::sleep(GATHER);
        }
    }
}

fn observe(table: &mut Table, record: &Record, observer: Observer, several: u64) {
    if let Some(seen) = observation(record, observer) {
        table.observe_alike(&seen, several, seconds(record.time));
    }
}

/// Requests of one turn that are alike, by the connection that they came on: the table is asked once for all of them.
#[derive(Default)]
struct Runs(HashMap<usize, (Arc<Record>, u64)>);

impl Runs {
    /// Adds a record; what it ends is handed to `count`.
    fn add(&mut self, record: Arc<Record>, count: &mut impl FnMut(&Record, u64)) {
        let Ended::Request(entry) = &record.ended else { return count(&record, 1) };
        // The requests of a connection share what they say of their client, and the run keeps that.
        match self.0.entry(Arc::as_ptr(&entry.source).addr()) {
            Slot::Vacant(vacant) => _ = vacant.insert((record, 1)),
            Slot::Occupied(mut run) => {
                let (last, several) = run.get_mut();
                let is_alike = last.is_open == record.is_open
                    && matches!(&last.ended, Ended::Request(last) if are_alike(last, entry));
                if !is_alike {
                    count(last, *several);
                    *several = 0;
                }
                (*last, *several) = (record, *several + 1);
            }
        }
    }

    /// Hands over what is left.
    fn end(&mut self, count: &mut impl FnMut(&Record, u64)) {
        self.0.drain().for_each(|(_, (record, several))| count(&record, several));
    }
}

/// Whether two requests are of one row of the table.
fn are_alike(one: &RequestEntry, other: &RequestEntry) -> bool {
    Arc::ptr_eq(&one.source, &other.source)
        && Arc::ptr_eq(&one.dialled, &other.dialled)
        // Which endpoint of a service it was says nothing of the flow.
        && (one.dialled.host.is_some() || Arc::ptr_eq(&one.destination, &other.destination))
        && (one.status, &one.method) == (other.status, &other.method)
        && one.was_observed == other.was_observed
        && one.texts.path() == other.texts.path()
        && one.texts.authority() == other.texts.authority()
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// What a record says of a flow. Connections are counted when they open, long requests while they are in progress; their end adds only what
/// went wrong.
fn observation(record: &Record, observer: Observer) -> Option<Observation<'_>> {
    // Policies of the mesh concern no datagrams.
    if matches!(&record.ended, Ended::Connection(entry) if entry.is_udp) {
        return None;
    }
    let was_observed = match &record.ended {
        Ended::Connection(entry) => entry.was_observed,
        Ended::Request(entry) => entry.was_observed,
    };
    let was_counted = !record.is_open && was_observed;
    let outcome = match (record.status(), was_counted) {
        (Status::Ok, true) => return None,
        (Status::Ok, false) => Outcome::Allowed,
        (Status::Denied, _) => Outcome::Denied,
        (Status::Failed, true) => Outcome::FailedLater,
        (Status::Failed, false) => Outcome::Failed,
    };
    Some(match &record.ended {
        Ended::Connection(entry) => of_connection(entry, observer, outcome),
        Ended::Request(entry) => of_request(entry, outcome),
    })
}

fn of_connection(entry: &Entry, observer: Observer, outcome: Outcome) -> Observation<'_> {
    let (kind, destination, port) = match (observer, entry.direction) {
        (Observer::Node, Direction::Inbound) => (Kind::Inbound, side(&entry.destination), port(entry)),
        (Observer::Node, Direction::Outbound) => (Kind::Outbound, side(&entry.destination), port(entry)),
        (Observer::Waypoint, _) => (
            Kind::WaypointConnection,
            dialled_side(entry.dialled.host.is_some(), &entry.destination),
            entry.dialled.port,
        ),
    };
    Observation {
        kind,
        source: side(&entry.source),
        destination,
        service: service(entry.dialled.namespace.as_deref(), entry.dialled.host.as_deref()),
        port,
        method: "",
        path: "",
        host: "",
        outcome,
    }
}

fn of_request(entry: &RequestEntry, outcome: Outcome) -> Observation<'_> {
    Observation {
        kind: Kind::Request,
        source: side(&entry.source),
        destination: dialled_side(entry.dialled.host.is_some(), &entry.destination),
        service: service(entry.dialled.namespace.as_deref(), entry.dialled.host.as_deref()),
        port: entry.dialled.port,
        method: entry.method.as_str(),
        path: entry.texts.path(),
        host: entry.texts.authority(),
        outcome,
    }
}

fn side(party: &Party) -> ObservedSide<'_> {
    ObservedSide {
        namespace: party.namespace.as_deref().unwrap_or_default(),
        workload: party.owner.as_deref().unwrap_or_default(),
        identity: party.identity.as_deref().unwrap_or_default(),
    }
}

/// The destination at a waypoint: which endpoint of a service it was says nothing of the flow.
fn dialled_side(is_service: bool, destination: &Party) -> ObservedSide<'_> {
    if is_service { ObservedSide::default() } else { side(destination) }
}

fn service<'a>(namespace: Option<&'a str>, host: Option<&'a str>) -> Option<(&'a str, &'a str)> {
    Some((namespace.unwrap_or_default(), host?))
}

/// The port of the application: in a tunnel that of the CONNECT.
fn port(entry: &Entry) -> u16 {
    let tunnelled = entry.hbone_addr.as_deref().and_then(|address| address.rsplit_once(':'));
    let tunnelled = tunnelled.and_then(|(_, port)| port.parse().ok());
    tunnelled.or_else(|| entry.destination.addr.map(|address| address.port())).unwrap_or_default()
}

#[cfg(test)]
#[path = "flows_tests.rs"]
mod tests;
