//! What is reported of requests beside metrics, and to whom: what Telemetry objects come to at this waypoint, compiled.
//!
//! [`trace`] decides whether a request is traced and carries its trace on, [`collector`] exports. Nothing here delays a request.

pub mod collector;
pub mod context;
pub mod logs;
pub mod trace;

use std::collections::HashMap;
use std::sync::Arc;

use ambit_api::l7;
use ambit_directory::NamespacedHost;
use http::HeaderName;

pub use self::collector::{Collector, Exports};
use self::logs::Logs;
use crate::accept::Destination;

/// Longest text of URLs and tags in spans where nothing else is said (Envoy's default).
const MAX_TAG_LENGTH: usize = 256;
/// Requests are drawn by parts of ten thousand, as Envoy does.
const DRAW: u32 = 10_000;

/// What is reported, by what requests are for. Immutable; built anew when it changes.
#[derive(Debug, Default)]
pub struct TelemetryTable {
    everywhere: Option<Arc<Telemetry>>,
    services: HashMap<NamespacedHost, Arc<Telemetry>>,
}

/// What is reported of a request.
#[derive(Debug, Default)]
pub struct Telemetry {
    /// Spans; none: there are no spans.
    pub tracing: Option<Arc<Tracing>>,
    /// The logs that they are in.
    pub logs: Logs,
    /// Whether they are not counted.
    pub uncounted: bool,
}

/// How requests are traced.
#[derive(Debug)]
pub struct Tracing {
    /// Who takes the spans.
    pub collector: Arc<Collector>,
    /// Of [`DRAW`] requests that belong to no trace so far, how many begin one.
    sampled: u32,
    /// Attributes that spans get.
    tags: Vec<Tag>,
    /// Longest text of a tag, in bytes.
    max_tag_length: usize,
}

/// An attribute of spans.
#[derive(Debug, PartialEq)]
struct Tag {
    name: Box<str>,
    value: TagValue,
}

#[derive(Debug, PartialEq)]
enum TagValue {
    Text(Box<str>),
    Header(HeaderName, Option<Box<str>>),
}

impl TelemetryTable {
    /// Compiles what the control plane says of this waypoint. A collector that is as it was in `before` keeps what waits for it.
    pub fn new<'g>(
        gateways: impl IntoIterator<Item = &'g l7::Gateway>,
        before: &Self,
        exports: &Exports,
    ) -> Self {
        let mut known: Vec<Arc<Collector>> = before.collectors().collect();
        let mut table = Self::default();
        for gateway in gateways {
            if let Some(telemetry) = &gateway.telemetry {
                table.everywhere = Some(Arc::new(Telemetry::new(telemetry, &mut known, exports)));
            }
            for l7::ServiceTelemetry { namespace, hostname, telemetry } in &gateway.service_telemetries {
                let hostname = hostname.to_ascii_lowercase().into();
                let host = NamespacedHost { namespace: namespace.as_str().into(), hostname };
                let telemetry = telemetry.clone().unwrap_or_default();
                table.services.insert(host, Arc::new(Telemetry::new(&telemetry, &mut known, exports)));
            }
        }
        table
    }

    /// What is reported of requests to a destination; `None`: what is reported by default.
    pub fn of(&self, destination: &Destination) -> Option<&Arc<Telemetry>> {
        if self.services.is_empty() {
            return self.everywhere.as_ref();
        }
        let of_service = destination.service().and_then(|service| self.services.get(&service.host));
        of_service.or(self.everywhere.as_ref())
    }

    /// The collectors, each once or more.
    pub fn collectors(&self) -> impl Iterator<Item = Arc<Collector>> {
        let all = self.everywhere.iter().chain(self.services.values());
        all.flat_map(|telemetry| {
            let of_spans = telemetry.tracing.iter().map(|tracing| &tracing.collector);
            of_spans.chain(telemetry.logs.collectors()).cloned()
        })
    }
}

impl Telemetry {
    fn new(source: &l7::Telemetry, known: &mut Vec<Arc<Collector>>, exports: &Exports) -> Self {
        let tracing = source.tracing.as_ref().and_then(|tracing| Tracing::new(tracing, known, exports));
        Self {
            tracing: tracing.map(Arc::new),
            logs: Logs::new(&source.access_logs, known, exports),
            uncounted: source.metrics.iter().any(|change| change.family.is_empty() && change.disabled),
        }
    }
}

impl Tracing {
    /// `None` where nobody takes the spans.
    fn new(source: &l7::Tracing, known: &mut Vec<Arc<Collector>>, exports: &Exports) -> Option<Self> {
        let collector = collector(source.collector.as_ref()?, known, exports);
        let max_tag_length = match source.max_tag_length {
            0 => MAX_TAG_LENGTH,
            most => usize::try_from(most).unwrap_or(MAX_TAG_LENGTH),
        };
        let tags = source.tags.iter().filter_map(|tag| Tag::new(tag, |name| std::env::var(name).ok()));
        Some(Self { collector, sampled: parts(source.sampling), tags: tags.collect(), max_tag_length })
    }
}

/// The collector, as it was where nothing of it has changed.
fn collector(source: &l7::Collector, known: &mut Vec<Arc<Collector>>, exports: &Exports) -> Arc<Collector> {
    if let Some(same) = known.iter().find(|it| it.source() == source) {
        return same.clone();
    }
    let new = Arc::new(Collector::new(source, exports));
    known.push(new.clone());
    new
}

/// A share in percent as parts of [`DRAW`].
fn parts(percent: f64) -> u32 {
    let percent = if percent.is_nan() { 0.0 } else { percent.clamp(0.0, 100.0) };
    (percent / 100.0 * f64::from(DRAW)).round() as u32
}

impl Tag {
    /// `None` for what can have no value.
    fn new(source: &l7::CustomTag, environment: impl Fn(&str) -> Option<String>) -> Option<Self> {
        use l7::custom_tag::Value;
        let default = |value: &l7::NamedValue| {
            Some(value.default_value.as_str()).filter(|text| !text.is_empty()).map(Box::<str>::from)
        };
        let value = match source.value.as_ref()? {
            Value::Literal(text) => TagValue::Text(text.as_str().into()),
            Value::Environment(named) => {
                let value = environment(&named.name).filter(|value| !value.is_empty());
                TagValue::Text(value.map(Into::into).or_else(|| default(named))?)
            }
            Value::Header(named) => TagValue::Header(HeaderName::try_from(&named.name).ok()?, default(named)),
        };
        Some(Self { name: source.name.as_str().into(), value })
    }

    /// Its value for a request, if it has one.
    fn value<'t>(&'t self, headers: &'t http::HeaderMap) -> Option<&'t str> {
        match &self.value {
            TagValue::Text(text) => Some(text),
            TagValue::Header(name, default) => {
                let value = headers.get(name).and_then(|value| value.to_str().ok());
                value.or(default.as_deref())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue};
    use l7::custom_tag::Value;

    use super::*;

    #[test]
    fn shares_are_parts_of_ten_thousand() {
        for (percent, wanted) in
            [(0.0, 0), (1.0, 100), (0.01, 1), (99.999, 10_000), (100.0, 10_000), (-3.0, 0), (f64::NAN, 0)]
        {
            assert_eq!(parts(percent), wanted, "{percent}");
        }
    }

    #[test]
    fn tags_have_their_value_or_a_default_or_are_none() {
        let headers =
            HeaderMap::from_iter([(HeaderName::from_static("x-user"), HeaderValue::from_static("anna"))]);
        let named = |name: &str, default: &str| l7::NamedValue {
            name: name.to_owned(),
            default_value: default.to_owned(),
        };
        for (value, wanted) in [
            (Value::Literal("a".to_owned()), Some("a")),
            (Value::Environment(named("POD", "x")), Some("web-1")),
            (Value::Environment(named("NONE", "x")), Some("x")),
            (Value::Environment(named("NONE", "")), None),
            (Value::Header(named("X-User", "x")), Some("anna")),
            (Value::Header(named("x-other", "x")), Some("x")),
            (Value::Header(named("x-other", "")), None),
            (Value::Header(named("no header", "x")), None),
        ] {
            let source = l7::CustomTag { name: "t".to_owned(), value: Some(value) };
            let tag = Tag::new(&source, |name| (name == "POD").then(|| "web-1".to_owned()));
            assert_eq!(tag.as_ref().and_then(|tag| tag.value(&headers)), wanted, "{source:?}");
        }
    }

    #[test]
    fn a_collector_that_did_not_change_keeps_its_queue() {
        let exports = Exports::new(2);
        let gateway = |port, sampling| {
            let collector = l7::Collector { hostname: "otel".to_owned(), port, ..l7::Collector::default() };
            let tracing = l7::Tracing { collector: Some(collector), sampling, ..l7::Tracing::default() };
            let telemetry = l7::Telemetry { tracing: Some(tracing), ..l7::Telemetry::default() };
            [l7::Gateway { telemetry: Some(telemetry), ..l7::Gateway::default() }]
        };
        let first = TelemetryTable::new(&gateway(4317, 1.0), &TelemetryTable::default(), &exports);
        let of = |table: &TelemetryTable| table.collectors().next().unwrap();
        let same = TelemetryTable::new(&gateway(4317, 2.0), &first, &exports);
        assert!(Arc::ptr_eq(&of(&first), &of(&same)));
        let other = TelemetryTable::new(&gateway(4318, 2.0), &same, &exports);
        assert!(!Arc::ptr_eq(&of(&same), &of(&other)));
        assert!(
            TelemetryTable::new(&[l7::Gateway::default()], &other, &exports).collectors().next().is_none()
        );
    }
}
