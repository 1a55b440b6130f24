//! The registry of metrics, rendered as OpenMetrics text.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64};

use parking_lot::RwLock;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::family::Family;

/// A counter without labels. Clones count together.
pub type Counter = prometheus_client::metrics::counter::Counter<u64, AtomicU64>;
/// A gauge without labels. Clones are one gauge.
pub type Gauge = prometheus_client::metrics::gauge::Gauge<i64, AtomicI64>;

/// The process's metrics. Cheap to clone; all clones are one registry.
///
/// One lock guards the list of families; it is taken to register and to scrape, never to count.
#[derive(Clone, Default)]
pub struct Registry {
    inner: Arc<RwLock<prometheus_client::registry::Registry>>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Registry")
    }
}

impl Registry {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers a counter. `name` goes without `_total`, which the text format adds.
    pub fn counter(&self, name: &str, help: &str) -> Counter {
        let counter = Counter::default();
        self.inner.write().register(name, sentence(help), counter.clone());
        counter
    }

    /// Registers a gauge.
    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        let gauge = Gauge::default();
        self.inner.write().register(name, sentence(help), gauge.clone());
        gauge
    }

    /// Registers a counter that lives elsewhere; `read` is called at each scrape.
    pub fn counter_from(&self, name: &str, help: &str, read: impl Fn() -> u64 + Send + Sync + 'static) {
        self.collect(Observed {
            name: name.to_owned(),
            help: help.to_owned(),
            read: Read::Counter(Box::new(read)),
        });
    }

    /// Registers counters of one family that live elsewhere, by the value of one label.
    pub fn counters_from<F>(
        &self,
        name: &str,
        help: &str,
        label: &str,
        series: impl IntoIterator<Item = (String, F)>,
    ) where
        F: Fn() -> u64 + Send + Sync + 'static,
    {
        let series = series.into_iter().map(|(value, read)| (value, Read::Counter(Box::new(read)))).collect();
        self.collect_family(name, help, MetricType::Counter, label, series);
    }

    /// Registers gauges of one family that live elsewhere, by the value of one label.
    pub fn gauges_from<F>(
        &self,
        name: &str,
        help: &str,
        label: &str,
        series: impl IntoIterator<Item = (String, F)>,
    ) where
        F: Fn() -> i64 + Send + Sync + 'static,
    {
        let series = series.into_iter().map(|(value, read)| (value, Read::Gauge(Box::new(read)))).collect();
        self.collect_family(name, help, MetricType::Gauge, label, series);
    }

    /// Registers a histogram that lives elsewhere. `read` gives the sum and the buckets at each scrape: each bucket's upper
    /// bound, the last one infinite, and the observations that fell into it and no lower one.
    pub fn histogram_from(
        &self,
        name: &str,
        help: &str,
        read: impl Fn() -> (f64, Vec<(f64, u64)>) + Send + Sync + 'static,
    ) {
        self.collect(ObservedHistogram {
            name: name.to_owned(),
            help: help.to_owned(),
            read: Box::new(read),
        });
    }

    /// Registers `istio_build`, which says what a component is and its version.
    pub fn build_info(&self, component: &str, version: &str) {
        let family = Family::<Vec<(String, String)>, Gauge>::default();
        let labels = [("component", component), ("tag", version)];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned()));
        family.get_or_create(&labels.into()).set(1);
        self.register("istio_build", "Component and version", family);
    }

    /// Registers a gauge that lives elsewhere; `read` is called at each scrape.
    pub fn gauge_from(&self, name: &str, help: &str, read: impl Fn() -> i64 + Send + Sync + 'static) {
        self.collect(Observed {
            name: name.to_owned(),
            help: help.to_owned(),
            read: Read::Gauge(Box::new(read)),
        });
    }

    /// Registers any metric of prometheus-client, families included.
    pub fn register(&self, name: &str, help: &str, metric: impl prometheus_client::registry::Metric) {
        self.inner.write().register(name, sentence(help), metric);
    }

    /// Registers families that are made at each scrape.
    pub fn collect(&self, collector: impl Collector) {
        self.inner.write().register_collector(Box::new(collector));
    }

    fn collect_family(
        &self,
        name: &str,
        help: &str,
        kind: MetricType,
        label: &str,
        series: Vec<(String, Read)>,
    ) {
        let (name, help, label) = (name.to_owned(), help.to_owned(), label.to_owned());
        self.collect(ObservedFamily { name, help, kind, label, series });
    }

    /// Everything as OpenMetrics text ([`CONTENT_TYPE`](Self::CONTENT_TYPE)).
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail; a collector that does leaves its family out.
        if let Err(error) = text::encode(&mut text, &self.inner.read()) {
            tracing::warn!(%error, "a metric could not be rendered");
        }
        text
    }

    /// The media type of [`encode`](Self::encode).
    pub const CONTENT_TYPE: &'static str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
}

/// prometheus-client ends help texts with a full stop of its own.
fn sentence(help: &str) -> &str {
    help.trim_end_matches('.')
}

/// A metric without labels that lives elsewhere.
struct Observed {
    name: String,
    help: String,
    read: Read,
}

/// Metrics of one family that live elsewhere, by the value of one label.
struct ObservedFamily {
    name: String,
    help: String,
    kind: MetricType,
    label: String,
    series: Vec<(String, Read)>,
}

/// Reads a metric's value.
enum Read {
    Counter(Box<dyn Fn() -> u64 + Send + Sync>),
    Gauge(Box<dyn Fn() -> i64 + Send + Sync>),
}

impl Read {
    fn kind(&self) -> MetricType {
        match self {
            Read::Counter(_) => MetricType::Counter,
            Read::Gauge(_) => MetricType::Gauge,
        }
    }

    fn encode(&self, mut metric: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        match self {
            Read::Counter(read) => metric.encode_counter::<NoLabelSet, _, u64>(&read(), None),
            Read::Gauge(read) => metric.encode_gauge(&read()),
        }
    }
}

impl fmt::Debug for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Observed({})", self.name)
    }
}

impl Collector for Observed {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = format!("{}.", sentence(&self.help));
        self.read.encode(encoder.encode_descriptor(&self.name, &help, None, self.read.kind())?)
    }
}

impl fmt::Debug for ObservedFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ObservedFamily({})", self.name)
    }
}

impl Collector for ObservedFamily {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = format!("{}.", sentence(&self.help));
        let mut family = encoder.encode_descriptor(&self.name, &help, None, self.kind)?;
        for (value, read) in &self.series {
            read.encode(family.encode_family(&[(self.label.as_str(), value.as_str())])?)?;
        }
        Ok(())
    }
}

/// The sum of a histogram, and its buckets.
type Distribution = (f64, Vec<(f64, u64)>);

struct ObservedHistogram {
    name: String,
    help: String,
    read: Box<dyn Fn() -> Distribution + Send + Sync>,
}

impl fmt::Debug for ObservedHistogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ObservedHistogram({})", self.name)
    }
}

impl Collector for ObservedHistogram {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = format!("{}.", sentence(&self.help));
        let (sum, buckets) = (self.read)();
        let count = buckets.iter().map(|(_, count)| count).sum();
        encoder
            .encode_descriptor(&self.name, &help, None, MetricType::Histogram)?
            .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_rendered_as_open_metrics() {
        let registry = Registry::new();
        registry.counter("ambit_a", "Things.").inc_by(3);
        registry.gauge("ambit_b", "Level").set(-2);
        registry.counter_from("ambit_c", "Seen", || 7);
        registry.gauge_from("ambit_d", "Now.", || 9);
        registry.counters_from("ambit_e", "Ends", "reason", [("Error".to_owned(), || 4)]);
        registry.gauges_from("ambit_f", "Ages", "kind", [("Pod".to_owned(), || 5)]);
        registry.histogram_from("ambit_g", "Times", || (1.5, vec![(0.1, 2), (1.0, 0), (f64::INFINITY, 1)]));
        registry.build_info("ztunnel", "1");
        let text = registry.encode();
        for line in [
            "# HELP ambit_a Things.",
            "# TYPE ambit_a counter",
            "ambit_a_total 3",
            "ambit_b -2",
            "# HELP ambit_c Seen.",
            "ambit_c_total 7",
            "ambit_d 9",
            "ambit_e_total{reason=\"Error\"} 4",
            "ambit_f{kind=\"Pod\"} 5",
            "ambit_g_sum 1.5",
            "ambit_g_count 3",
            "ambit_g_bucket{le=\"0.1\"} 2",
            "ambit_g_bucket{le=\"1.0\"} 2",
            "ambit_g_bucket{le=\"+Inf\"} 3",
            "istio_build{component=\"ztunnel\",tag=\"1\"} 1",
        ] {
            assert!(text.lines().any(|known| known == line), "{line:?} is missing in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
