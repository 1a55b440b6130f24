//! The TCP metric families that dashboards for Istio use (`istio_tcp_*`).
//!
//! A connection looks up its [`Series`] once (or keeps it with its route) and then updates atomics. The number of series is
//! bounded: when it is reached, series that were not used since the last sweep are evicted. If all are in use, further label
//! sets share one series whose labels are `unknown`.

pub(crate) mod labels;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::RwLock;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

pub use labels::{Labels, Peer, PeerLabels, Reporter, ResponseFlags, Security, ServiceLabels};

use crate::Registry;
use labels::FLAGS;

/// Series kept by default.
pub const DEFAULT_MAX_SERIES: usize = 10_000;

/// The counters of one label set.
#[derive(Debug)]
pub struct Series {
    labels: Labels,
    opened: AtomicU64,
    closed: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    failed: [AtomicU64; FLAGS.len()],
    /// Whether it was looked up since the last sweep.
    touched: AtomicBool,
}

impl Series {
    fn new(labels: Labels) -> Self {
        Self {
            labels,
            opened: AtomicU64::new(0),
            closed: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            failed: Default::default(),
            touched: AtomicBool::new(true),
        }
    }

    /// Counts a connection as opened, and as closed when the returned value is dropped.
    pub fn open(self: &Arc<Self>) -> Connection {
        self.opened.fetch_add(1, Ordering::Relaxed);
        Connection { series: Arc::clone(self), sent: AtomicU64::new(0), received: AtomicU64::new(0) }
    }

    /// Counts a connection that failed.
    pub fn fail(&self, flags: ResponseFlags) {
        if let Some(counter) = self.failed.get(flags.index()) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The labels of these counters.
    pub fn labels(&self) -> &Labels {
        &self.labels
    }
}

/// An open connection as the counters see it.
#[derive(Debug)]
pub struct Connection {
    series: Arc<Series>,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Connection {
    /// Adds the growth since the last report to the counters. Takes the connection's totals in bytes, which only grow. May be
    /// called any number of times and from any thread.
    pub fn report(&self, sent: u64, received: u64) {
        let new_sent = sent.saturating_sub(self.sent.fetch_max(sent, Ordering::Relaxed));
        let new_received = received.saturating_sub(self.received.fetch_max(received, Ordering::Relaxed));
        self.series.sent.fetch_add(new_sent, Ordering::Relaxed);
        self.series.received.fetch_add(new_received, Ordering::Relaxed);
    }

    /// The counters of this connection's label set.
    pub fn series(&self) -> &Arc<Series> {
        &self.series
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.series.closed.fetch_add(1, Ordering::Relaxed);
    }
}

/// All series of the process. Cheap to clone.
///
/// One lock guards the map; a look-up of a known label set shares it.
#[derive(Debug, Clone)]
pub struct TcpMetrics {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    series: RwLock<HashMap<Labels, Arc<Series>>>,
    /// The shared series for label sets beyond the limit, by reporter.
    overflow: [Arc<Series>; 2],
    max_series: usize,
    overflowed: AtomicU64,
    evicted: AtomicU64,
}

impl TcpMetrics {
    /// Registers the families; at most `max_series` label sets are kept.
    pub fn register(registry: &Registry, max_series: usize) -> Self {
        let overflow = [Reporter::Source, Reporter::Destination]
            .map(|reporter| Arc::new(Series::new(Labels::unknown(reporter))));
        let inner = Arc::new(Inner {
            series: RwLock::new(HashMap::new()),
            overflow,
            max_series,
            overflowed: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
        });
        registry.collect(Families(Arc::clone(&inner)));
        let counters = Arc::clone(&inner);
        registry.counter_from(
            "ambit_metrics_series_overflowed",
            "Lookups of label sets that share the series of unknown labels because too many series are in use",
            move || counters.overflowed.load(Ordering::Relaxed),
        );
        let counters = Arc::clone(&inner);
        registry.counter_from(
            "ambit_metrics_series_evicted",
            "Series dropped because nobody used them and others needed the room",
            move || counters.evicted.load(Ordering::Relaxed),
        );
        Self { inner }
    }

    /// The counters of a label set.
    pub fn series(&self, labels: &Labels) -> Arc<Series> {
        if let Some(series) = self.inner.series.read().get(labels) {
            if !series.touched.load(Ordering::Relaxed) {
                series.touched.store(true, Ordering::Relaxed);
            }
            return Arc::clone(series);
        }
        self.inner.insert(labels)
    }

    /// How many label sets are kept now.
    pub fn len(&self) -> usize {
        self.inner.series.read().len()
    }

    /// Whether none is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Inner {
    fn insert(&self, labels: &Labels) -> Arc<Series> {
        let mut series = self.series.write();
        if series.len() >= self.max_series && !series.contains_key(labels) {
            self.sweep(&mut series);
        }
        if series.len() >= self.max_series && !series.contains_key(labels) {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            let [source, destination] = &self.overflow;
            return Arc::clone(match labels.reporter {
                Reporter::Source => source,
                Reporter::Destination | Reporter::Waypoint => destination,
            });
        }
        Arc::clone(series.entry(labels.clone()).or_insert_with(|| Arc::new(Series::new(labels.clone()))))
    }

    /// Drops series that nobody holds and that were not looked up since the last sweep.
    fn sweep(&self, series: &mut HashMap<Labels, Arc<Series>>) {
        let before = series.len();
        series.retain(|_, series| {
            Arc::strong_count(series) > 1 || series.touched.swap(false, Ordering::Relaxed)
        });
        self.evicted.fetch_add((before - series.len()) as u64, Ordering::Relaxed);
    }
}

/// The inner state as a collector.
#[derive(Debug)]
struct Families(Arc<Inner>);

type ReadCounter = fn(&Series) -> u64;

/// Name, help and value of the families that do not depend on response flags.
const FAMILIES: [(&str, &str, ReadCounter); 4] = [
    ("istio_tcp_connections_opened", "The total number of TCP connections opened.", |series| {
        series.opened.load(Ordering::Relaxed)
    }),
    ("istio_tcp_connections_closed", "The total number of TCP connections closed.", |series| {
        series.closed.load(Ordering::Relaxed)
    }),
    ("istio_tcp_sent_bytes", "The total bytes sent as responses in TCP connections.", |series| {
        series.sent.load(Ordering::Relaxed)
    }),
    ("istio_tcp_received_bytes", "The total bytes received as requests in TCP connections.", |series| {
        series.received.load(Ordering::Relaxed)
    }),
];

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut all: Vec<Arc<Series>> = self.0.series.read().values().cloned().collect();
        let overflow = self.0.overflow.iter().filter(|series| series.opened.load(Ordering::Relaxed) > 0);
        all.extend(overflow.cloned());
        for (name, help, read) in FAMILIES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for series in &all {
                let labels = series.labels.with_flags(ResponseFlags::None);
                family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&read(series), None)?;
            }
        }
        let mut family = encoder.encode_descriptor(
            "istio_tcp_connections_failed",
            "The total number of TCP connections that failed.",
            None,
            MetricType::Counter,
        )?;
        for series in &all {
            for (flags, counter) in FLAGS.iter().zip(&series.failed) {
                let count = counter.load(Ordering::Relaxed);
                if count > 0 {
                    let labels = series.labels.with_flags(*flags);
                    family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str) -> Arc<PeerLabels> {
        Arc::new(PeerLabels::new(Peer { workload: name.into(), ..Peer::default() }))
    }

    fn labels(source: &str, destination: &str) -> Labels {
        Labels {
            reporter: Reporter::Source,
            source: peer(source),
            destination: peer(destination),
            service: None,
            request_protocol: "tcp",
            security: Security::MutualTls,
        }
    }

    fn value(registry: &Registry, name: &str, needle: &str) -> Option<u64> {
        let text = registry.encode();
        let line = text.lines().find(|line| line.starts_with(name) && line.contains(needle))?.to_owned();
        line.rsplit(' ').next()?.parse().ok()
    }

    #[test]
    fn a_connection_is_counted_as_opened_reported_and_closed() {
        let registry = Registry::new();
        let metrics = TcpMetrics::register(&registry, 10);
        let connection = metrics.series(&labels("a", "b")).open();
        connection.report(10, 5);
        connection.report(10, 5);
        connection.report(25, 5);
        assert_eq!(value(&registry, "istio_tcp_connections_opened_total{", "source_workload=\"a\""), Some(1));
        assert_eq!(value(&registry, "istio_tcp_connections_closed_total{", ""), Some(0));
        assert_eq!(value(&registry, "istio_tcp_sent_bytes_total{", ""), Some(25));
        assert_eq!(value(&registry, "istio_tcp_received_bytes_total{", ""), Some(5));
        drop(connection);
        assert_eq!(value(&registry, "istio_tcp_connections_closed_total{", ""), Some(1));
    }

    #[test]
    fn equal_labels_are_one_series_whatever_made_them() {
        let metrics = TcpMetrics::register(&Registry::new(), 10);
        assert!(Arc::ptr_eq(&metrics.series(&labels("a", "b")), &metrics.series(&labels("a", "b"))));
        assert!(!Arc::ptr_eq(&metrics.series(&labels("a", "b")), &metrics.series(&labels("b", "a"))));
    }

    #[test]
    fn a_failure_has_its_flags() {
        let registry = Registry::new();
        let metrics = TcpMetrics::register(&registry, 10);
        metrics.series(&labels("a", "b")).fail(ResponseFlags::Denied);
        assert_eq!(
            value(&registry, "istio_tcp_connections_failed_total{", "response_flags=\"DENY\""),
            Some(1)
        );
        assert_eq!(value(&registry, "istio_tcp_connections_failed_total{", "response_flags=\"-\""), None);
    }

    #[test]
    fn series_are_bounded_and_those_in_use_stay() {
        let registry = Registry::new();
        let metrics = TcpMetrics::register(&registry, 4);
        let kept = metrics.series(&labels("kept", "x")).open();
        for name in ["a", "b", "c", "d", "e", "f", "g", "h"] {
            metrics.series(&labels(name, "x")).fail(ResponseFlags::Connect);
            assert!(metrics.len() <= 4);
        }
        assert!(Arc::ptr_eq(&metrics.series(&labels("kept", "x")), kept.series()));
        assert!(value(&registry, "ambit_metrics_series_evicted_total", "").unwrap() > 0);
    }

    #[test]
    fn label_sets_beyond_the_limit_share_the_unknown_series() {
        let registry = Registry::new();
        let metrics = TcpMetrics::register(&registry, 1);
        let _kept = metrics.series(&labels("kept", "x")).open();
        let first = metrics.series(&labels("a", "x")).open();
        let second = metrics.series(&labels("b", "x")).open();
        assert!(Arc::ptr_eq(first.series(), second.series()));
        assert_eq!(
            value(&registry, "istio_tcp_connections_opened_total{", "source_workload=\"unknown\""),
            Some(2)
        );
        assert_eq!(value(&registry, "ambit_metrics_series_overflowed_total", ""), Some(2));
    }

    #[test]
    fn every_label_of_the_contract_is_there() {
        let registry = Registry::new();
        let metrics = TcpMetrics::register(&registry, 10);
        let _open = metrics.series(&labels("a", "b")).open();
        let text = registry.encode();
        let line = text.lines().find(|line| line.starts_with("istio_tcp_connections_opened_total{")).unwrap();
        for side in ["source", "destination"] {
            for label in [
                "workload",
                "workload_namespace",
                "principal",
                "canonical_service",
                "canonical_revision",
                "app",
                "version",
                "cluster",
            ] {
                assert!(line.contains(&format!("{side}_{label}=\"")), "{side}_{label} is missing");
            }
        }
        for label in [
            "reporter=\"source\"",
            "destination_service=\"unknown\"",
            "destination_service_name=\"unknown\"",
            "destination_service_namespace=\"unknown\"",
            "request_protocol=\"tcp\"",
            "response_flags=\"-\"",
            "connection_security_policy=\"mutual_tls\"",
        ] {
            assert!(line.contains(label), "{label} is missing in {line}");
        }
    }
}
