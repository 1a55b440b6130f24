//! Reports connections: metrics when one opens and ends, one line in the access log at its end.
//!
//! An [`AccessRecord`] is what is known of a connection. [`Reporter::open`] starts a [`ConnectionReport`]; one that is dropped
//! without an outcome reports a cancelled connection. The counters of a pair of workloads are looked up by pointer, not by
//! label.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ambit_directory::{Authority, Service};
use ambit_hbone::Baggage;
use ambit_identity::SpiffeId;
use ambit_telemetry::access::{self, AccessLog, Entry, Status};
use ambit_telemetry::tcp::{Labels, ResponseFlags, Security, Series};
use ambit_telemetry::{TcpMetrics, tcp};
use parking_lot::Mutex;

use crate::connection::error::ConnectionError;
use ambit_runtime::connections::{Direction, Open};
pub use ambit_runtime::peers::End;
use ambit_runtime::peers::{dialled, party, peer_labels, service_labels};

/// Pairs of workloads whose counters are cached; above this number the cache is cleared.
const MAX_PAIRS: usize = 512;

/// What is known of a connection.
#[derive(Debug, Clone)]
pub struct AccessRecord {
    /// Which way it goes.
    pub direction: Direction,
    /// The client.
    pub source: End,
    /// The client's address.
    pub source_address: SocketAddr,
    /// The server.
    pub destination: End,
    /// What is connected to: the workload's address, or what was dialled while no workload is known.
    pub destination_address: SocketAddr,
    /// The CONNECT's authority, if there is a tunnel (or would be one between nodes).
    pub hbone_address: Option<Arc<str>>,
    /// The service that was dialled.
    pub service: Option<Arc<Service>>,
    /// Since when.
    pub since: Instant,
}

impl AccessRecord {
    /// What is known before a pod's connection is routed.
    pub fn outbound(source: End, source_address: SocketAddr, dialled: &Authority, since: Instant) -> Self {
        Self {
            direction: Direction::Outbound,
            source,
            source_address,
            destination: End::default(),
            destination_address: match dialled {
                Authority::Address(address) => *address,
                Authority::Host { port, .. } => (Ipv4Addr::UNSPECIFIED, *port).into(),
            },
            hbone_address: None,
            service: None,
            since,
        }
    }

    fn security(&self) -> Security {
        match (&self.source.identity, &self.destination.identity) {
            (Some(_), Some(_)) => Security::MutualTls,
            _ => Security::Unknown,
        }
    }
}

/// Counts and logs. Each worker has its own, so that the cache of pairs is not shared.
#[derive(Debug)]
pub struct Reporter {
    metrics: TcpMetrics,
    log: AccessLog,
    /// Locked for a look-up, by its own worker only.
    pairs: Mutex<Pairs>,
}

#[derive(Debug, Default)]
struct Pairs {
    series: HashMap<PairKey, (AccessRecord, Arc<Series>)>,
}

/// A pair by the addresses of its parts. The record that is cached with it keeps them alive, so that no address is used
/// again while the key exists.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct PairKey {
    direction: Direction,
    source: Option<usize>,
    destination: Option<usize>,
    service: Option<usize>,
    source_identity: Option<SpiffeId>,
    destination_identity: Option<SpiffeId>,
    source_baggage: Option<Arc<Baggage>>,
    destination_baggage: Option<Arc<Baggage>>,
}

fn address_of<T>(part: &Option<Arc<T>>) -> Option<usize> {
    part.as_ref().map(|part| Arc::as_ptr(part) as usize)
}

impl PairKey {
    fn of(record: &AccessRecord) -> Self {
        Self {
            direction: record.direction,
            source: address_of(&record.source.workload),
            destination: address_of(&record.destination.workload),
            service: address_of(&record.service),
            source_identity: record.source.identity.clone(),
            destination_identity: record.destination.identity.clone(),
            source_baggage: record.source.baggage.clone().filter(|_| record.source.workload.is_none()),
            destination_baggage: record
                .destination
                .baggage
                .clone()
                .filter(|_| record.destination.workload.is_none()),
        }
    }
}

impl Reporter {
    /// A reporter for one worker.
    pub fn new(metrics: TcpMetrics, log: AccessLog) -> Self {
        Self { metrics, log, pairs: Mutex::default() }
    }

    /// Counts a connection as opened. Its bytes are those of `connection`.
    pub fn open(self: &Arc<Self>, record: AccessRecord, connection: &Open) -> ConnectionReport {
        let counted = self.series(&record).open();
        connection.set_metrics(counted);
        if self.log.is_observed() {
            self.log.observe_open(entry(&record, (0, 0), Duration::ZERO, None));
        }
        ConnectionReport {
            reporter: self.clone(),
            record,
            connection: connection.connection(),
            reported: false,
        }
    }

    /// Reports a connection that failed before it was open.
    pub fn failed(&self, record: &AccessRecord, error: &ConnectionError) {
        self.series(record).fail(error.response_flags());
        self.write(record, (0, 0), Some((status(error), error.to_string())), false);
    }

    fn series(&self, record: &AccessRecord) -> Arc<Series> {
        let key = PairKey::of(record);
        let mut pairs = self.pairs.lock();
        if let Some((_, series)) = pairs.series.get(&key) {
            return series.clone();
        }
        if pairs.series.len() >= MAX_PAIRS {
            pairs.series.clear();
        }
        let series = self.metrics.series(&labels(record));
        let kept = AccessRecord { hbone_address: None, ..record.clone() };
        pairs.series.insert(key, (kept, series.clone()));
        series
    }

    fn write(
        &self,
        record: &AccessRecord,
        bytes: (u64, u64),
        failure: Option<(Status, String)>,
        was_open: bool,
    ) {
        if !self.log.is_enabled() {
            return;
        }
        let entry = entry(record, bytes, record.since.elapsed(), failure);
        self.log.log(Entry { was_observed: was_open && self.log.is_observed(), ..entry });
    }
}

fn entry(
    record: &AccessRecord,
    (bytes_sent, bytes_received): (u64, u64),
    duration: Duration,
    failure: Option<(Status, String)>,
) -> Entry {
    let (status, error) = failure.map_or((Status::Ok, None), |(status, error)| (status, Some(error)));
    Entry {
        is_udp: false,
        source: party(&record.source, record.source_address),
        destination: party(&record.destination, record.destination_address),
        hbone_addr: record.hbone_address.clone(),
        service: record.service.as_ref().map(|service| service.host.hostname.clone()),
        dialled: dialled(record.service.as_deref(), 0),
        direction: match record.direction {
            Direction::Inbound => access::Direction::Inbound,
            Direction::Outbound => access::Direction::Outbound,
        },
        status,
        bytes_sent,
        bytes_received,
        duration,
        error,
        was_observed: false,
    }
}

/// The report of one open connection.
#[derive(Debug)]
#[must_use = "a report without an outcome reports a cancelled connection"]
pub struct ConnectionReport {
    reporter: Arc<Reporter>,
    record: AccessRecord,
    connection: Arc<ambit_runtime::connections::Connection>,
    reported: bool,
}

impl ConnectionReport {
    /// The connection ended.
    pub fn finish(mut self, outcome: &Result<(), ConnectionError>) {
        self.write(outcome.as_ref().err().map(|error| (status(error), error.to_string())));
    }

    fn write(&mut self, failure: Option<(Status, String)>) {
        if std::mem::replace(&mut self.reported, true) {
            return;
        }
        self.connection.report_bytes();
        let counters = &self.connection.counters;
        // Metrics contract: what dashboards call sent is what the server sent.
        let bytes = (counters.received(), counters.sent());
        self.reporter.write(&self.record, bytes, failure, true);
    }
}

impl Drop for ConnectionReport {
    fn drop(&mut self) {
        self.write(Some((Status::Failed, "cancelled".to_owned())));
    }
}

fn status(error: &ConnectionError) -> Status {
    match error.response_flags() {
        ResponseFlags::Denied => Status::Denied,
        _ => Status::Failed,
    }
}

fn labels(record: &AccessRecord) -> Labels {
    Labels {
        reporter: match record.direction {
            Direction::Inbound => tcp::Reporter::Destination,
            Direction::Outbound => tcp::Reporter::Source,
        },
        source: peer_labels(&record.source),
        destination: peer_labels(&record.destination),
        service: record.service.as_deref().map(service_labels),
        request_protocol: "tcp",
        security: record.security(),
    }
}
