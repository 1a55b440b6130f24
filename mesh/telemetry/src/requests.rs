//! The families of requests that dashboards know (`istio_requests_total` and its histograms).
//!
//! As with connections ([`crate::tcp`]), a label set is resolved to a handle, and the number of label sets is bounded: when
//! it is reached, further ones share one series of unknowns.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::RwLock;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, LabelSetEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use crate::Registry;
use crate::tcp::labels::label;
use crate::tcp::{Labels, Reporter};

/// Upper bounds of the buckets that Istio's dashboards expect, of milliseconds and of bytes alike.
const BOUNDS: [f64; 19] = [
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 3e4, 6e4, 3e5, 6e5, 1.8e6,
    3.6e6,
];

/// How a request ended, as labels say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Outcome {
    /// The answer's status; 0 if the client went before there was one.
    pub code: u16,
    /// gRPC's own status.
    pub grpc_status: Option<u8>,
    /// Why the answer is not the endpoint's, or `-`.
    pub flags: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    labels: Labels,
    outcome: Outcome,
}

impl EncodeLabelSet for Key {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let Outcome { code, grpc_status, flags } = self.outcome;
        self.labels.encode(encoder)?;
        label(encoder, "response_code", &code.to_string())?;
        let status = grpc_status.map(|status| status.to_string()).unwrap_or_default();
        // Istio leaves it empty where there is none.
        prometheus_client::encoding::EncodeLabel::encode(
            &("grpc_response_status", status.as_str()),
            encoder.encode_label(),
        )?;
        label(encoder, "response_flags", flags)
    }
}

#[derive(Debug, Default)]
struct Histogram {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    /// In thousandths.
    sum: AtomicU64,
}

impl Histogram {
    fn observe(&self, thousandths: u64) {
        let value = thousandths as f64 / 1e3;
        let at = BOUNDS.partition_point(|bound| *bound < value);
        if let Some(bucket) = self.buckets.get(at) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.sum.fetch_add(thousandths, Ordering::Relaxed);
    }
}

/// The counters of one label set.
#[derive(Debug)]
pub struct RequestSeries {
    key: Key,
    duration: Histogram,
    request_bytes: Histogram,
    response_bytes: Histogram,
    retries: AtomicU64,
    request_messages: AtomicU64,
    response_messages: AtomicU64,
}

impl RequestSeries {
    fn new(key: Key) -> Self {
        let [duration, request_bytes, response_bytes] = Default::default();
        let [retries, request_messages, response_messages] = Default::default();
        Self { key, duration, request_bytes, response_bytes, retries, request_messages, response_messages }
    }

    /// Counts a request that ended, which was sent again `retries` times.
    pub fn count(&self, duration: Duration, request_bytes: u64, response_bytes: u64, retries: u32) {
        if retries > 0 {
            self.retries.fetch_add(retries.into(), Ordering::Relaxed);
        }
        self.duration.observe(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
        self.request_bytes.observe(request_bytes.saturating_mul(1000));
        self.response_bytes.observe(response_bytes.saturating_mul(1000));
    }

    /// Counts the messages of a gRPC call that ended.
    pub fn count_messages(&self, of_request: u64, of_response: u64) {
        self.request_messages.fetch_add(of_request, Ordering::Relaxed);
        self.response_messages.fetch_add(of_response, Ordering::Relaxed);
    }
}

/// All series of the process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct RequestMetrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    series: RwLock<HashMap<Key, Arc<RequestSeries>>>,
    overflow: Arc<RequestSeries>,
    max_series: usize,
    overflowed: AtomicU64,
}

impl RequestMetrics {
    /// Registers the families; at most `max_series` label sets are kept.
    pub fn register(registry: &Registry, max_series: usize) -> Self {
        let unknown = Key {
            labels: Labels::unknown(Reporter::Waypoint),
            outcome: Outcome { code: 0, grpc_status: None, flags: "-" },
        };
        let inner = Arc::new(Inner {
            series: RwLock::default(),
            overflow: Arc::new(RequestSeries::new(unknown)),
            max_series,
            overflowed: AtomicU64::new(0),
        });
        registry.collect(Families(inner.clone()));
        let counted = inner.clone();
        registry.counter_from(
            "ambit_request_series_overflowed",
            "Look-ups of label sets of requests that had to share the series of unknowns because there are too many",
            move || counted.overflowed.load(Ordering::Relaxed),
        );
        Self(inner)
    }

    /// The counters of a label set.
    pub fn series(&self, labels: &Labels, outcome: Outcome) -> Arc<RequestSeries> {
        let key = Key { labels: labels.clone(), outcome };
        if let Some(series) = self.0.series.read().get(&key) {
            return series.clone();
        }
        let mut all = self.0.series.write();
        if all.len() >= self.0.max_series && !all.contains_key(&key) {
            self.0.overflowed.fetch_add(1, Ordering::Relaxed);
            return self.0.overflow.clone();
        }
        all.entry(key.clone()).or_insert_with(|| Arc::new(RequestSeries::new(key))).clone()
    }
}

#[derive(Debug)]
struct Families(Arc<Inner>);

type ReadCounter = fn(&RequestSeries) -> &AtomicU64;

/// Counters that only some requests have: series of zero are left out.
const COUNTERS: [(&str, &str, ReadCounter); 3] = [
    (
        "ambit_request_retries",
        "How often requests were sent again, each with the labels of its request.",
        |series| &series.retries,
    ),
    ("istio_request_messages", "Messages of gRPC calls from clients.", |series| &series.request_messages),
    ("istio_response_messages", "Messages of gRPC calls to clients.", |series| &series.response_messages),
];

type ReadHistogram = fn(&RequestSeries) -> &Histogram;

const HISTOGRAMS: [(&str, &str, ReadHistogram); 3] = [
    ("istio_request_duration_milliseconds", "How long requests took.", |series| &series.duration),
    ("istio_request_bytes", "Bytes of the bodies of requests.", |series| &series.request_bytes),
    ("istio_response_bytes", "Bytes of the bodies of answers.", |series| &series.response_bytes),
];

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut all: Vec<Arc<RequestSeries>> = self.0.series.read().values().cloned().collect();
        if self.0.overflowed.load(Ordering::Relaxed) > 0 {
            all.push(self.0.overflow.clone());
        }
        let mut family = encoder.encode_descriptor(
            "istio_requests",
            "The total number of requests.",
            None,
            MetricType::Counter,
        )?;
        for series in &all {
            let count: u64 =
                series.duration.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum();
            family.encode_family(&series.key)?.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
        }
        for (name, help, read) in COUNTERS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for series in &all {
                let count = read(series).load(Ordering::Relaxed);
                if count > 0 {
                    family.encode_family(&series.key)?.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
                }
            }
        }
        for (name, help, read) in HISTOGRAMS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for series in &all {
                let Histogram { buckets, sum } = read(series);
                let counts = buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed));
                let bounds = BOUNDS.into_iter().chain([f64::INFINITY]);
                let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
                let count = buckets.iter().map(|(_, count)| count).sum();
                let sum = sum.load(Ordering::Relaxed) as f64 / 1e3;
                family
                    .encode_family(&series.key)?
                    .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_counted_with_its_code_and_flags() {
        let registry = Registry::new();
        let metrics = RequestMetrics::register(&registry, 10);
        let outcome = Outcome { code: 503, grpc_status: None, flags: "UF" };
        let labels = Labels::unknown(Reporter::Waypoint);
        metrics.series(&labels, outcome).count(Duration::from_micros(700), 0, 12, 2);
        metrics.series(&labels, outcome).count_messages(3, 0);
        let text = registry.encode();
        let total = text.lines().find(|line| line.starts_with("istio_requests_total{")).unwrap();
        for part in ["reporter=\"waypoint\"", "response_code=\"503\"", "response_flags=\"UF\"", "} 1"] {
            assert!(total.contains(part), "{part} is missing in {total}");
        }
        let retries = text.lines().find(|line| line.starts_with("ambit_request_retries_total{")).unwrap();
        assert!(retries.contains("response_code=\"503\"") && retries.ends_with("} 2"), "{retries}");
        let messages = text.lines().find(|line| line.starts_with("istio_request_messages_total{")).unwrap();
        assert!(messages.ends_with("} 3"), "{messages}");
        assert!(!text.contains("istio_response_messages_total{"), "{text}");
        let bucket = |bound: &str| {
            let line = text.lines().find(|line| {
                line.starts_with("istio_request_duration_milliseconds_bucket{") && line.contains(bound)
            });
            line.unwrap().rsplit(' ').next().unwrap().to_owned()
        };
        assert_eq!((bucket("le=\"0.5\"").as_str(), bucket("le=\"1.0\"").as_str()), ("0", "1"));
        // Without it, Prometheus computes no quantile.
        assert_eq!(bucket("le=\"+Inf\""), "1");
    }

    #[test]
    fn label_sets_of_requests_are_bounded() {
        let metrics = RequestMetrics::register(&Registry::new(), 2);
        let of = |code| {
            let outcome = Outcome { code, grpc_status: None, flags: "-" };
            metrics.series(&Labels::unknown(Reporter::Waypoint), outcome)
        };
        assert!(!Arc::ptr_eq(&of(200), &of(404)));
        assert!(Arc::ptr_eq(&of(500), &of(503)));
    }
}
