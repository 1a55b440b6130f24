//! Telemetry: what proxies report of requests beside metrics, and to whom, as its author wrote it.

use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_api::l7;
use http::HeaderName;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::authorization::{PolicyTarget, Selector, TargetRef};
use super::meta::{self, Invalid, Labels, Meta};

/// Most rules of one kind, overrides and tags of a rule.
const MOST: usize = 64;

/// A Telemetry.
#[derive(Clone, Debug, PartialEq)]
pub struct Telemetry {
    /// Name, labels, age and generation.
    pub meta: Meta,
    /// The gateways that it is for by the labels of their pods.
    pub selector: Option<Labels>,
    /// The gateways and services that it is for.
    pub targets: Vec<PolicyTarget>,
    /// Spans.
    pub tracing: Vec<TracingRule>,
    /// The access log.
    pub access_logs: Vec<AccessLogRule>,
    /// Metrics.
    pub metrics: Vec<MetricsRule>,
}

/// Which requests a rule is for, seen from the proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum Mode {
    /// All.
    #[default]
    #[serde(rename = "CLIENT_AND_SERVER", alias = "UNDEFINED")]
    Both,
    /// Those that leave a workload; gateways are such.
    #[serde(rename = "CLIENT")]
    Client,
    /// Those that come to a workload; waypoints are in front of such.
    #[serde(rename = "SERVER")]
    Server,
}

/// How requests are traced. What is not given is as it is farther from the proxy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TracingRule {
    /// Which requests it is for.
    pub mode: Mode,
    /// Who gets the spans; only the first counts.
    pub providers: Vec<Arc<str>>,
    /// How many requests begin a trace, in percent.
    pub sampling: Option<f64>,
    /// Whether there are no spans.
    pub disabled: Option<bool>,
    /// Attributes that spans get.
    pub tags: Option<Vec<l7::CustomTag>>,
    /// Fields that have no effect.
    pub without_effect: Vec<&'static str>,
}

/// What the access log has.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AccessLogRule {
    /// Which requests it is for.
    pub mode: Mode,
    /// The logs that it is for; none: those that are in force.
    pub providers: Vec<Arc<str>>,
    /// Whether nothing is logged.
    pub disabled: bool,
    /// Which requests are logged, in CEL.
    pub filter: Option<Arc<str>>,
}

/// What is counted otherwise than by default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MetricsRule {
    /// Whose metrics it is for; none: everybody's.
    pub providers: Vec<Arc<str>>,
    /// In their order.
    pub overrides: Vec<MetricOverride>,
    /// Whether an interval is given.
    pub has_interval: bool,
}

/// An override of one metric, or of all.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MetricOverride {
    /// Which requests it is for.
    pub mode: Mode,
    /// The metric as Prometheus names its family; none: all.
    pub family: Option<Arc<str>>,
    /// Whether it is not counted.
    pub disabled: Option<bool>,
    /// Labels that are removed.
    pub removed: Vec<Arc<str>>,
    /// Labels that are written.
    pub written: Vec<Arc<str>>,
}

impl Telemetry {
    /// Whether it is for its whole namespace, or for the mesh.
    pub fn is_wide(&self) -> bool {
        self.selector.is_none() && self.targets.is_empty()
    }
}

/// The manifest, strictly.
pub(crate) type Manifest = meta::Manifest<Spec>;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Spec {
    selector: Option<Selector>,
    target_ref: Option<TargetRef>,
    target_refs: Vec<TargetRef>,
    tracing: Vec<RawTracing>,
    access_logging: Vec<RawAccessLog>,
    metrics: Vec<RawMetrics>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProvider {
    name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawMatch {
    mode: Mode,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawTracing {
    r#match: RawMatch,
    providers: Vec<RawProvider>,
    random_sampling_percentage: Option<f64>,
    disable_span_reporting: Option<bool>,
    custom_tags: Option<BTreeMap<String, RawTag>>,
    use_request_id_for_trace_sampling: Option<bool>,
    enable_istio_tags: Option<bool>,
    disable_context_propagation: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
enum RawTag {
    Literal(RawLiteral),
    Environment(RawNamed),
    Header(RawNamed),
    /// Not supported, whatever its value is.
    Formatter(IgnoredAny),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLiteral {
    value: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawNamed {
    name: String,
    #[serde(default)]
    default_value: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawAccessLog {
    r#match: RawMatch,
    providers: Vec<RawProvider>,
    disabled: Option<bool>,
    filter: Option<RawFilter>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawFilter {
    expression: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawMetrics {
    providers: Vec<RawProvider>,
    overrides: Vec<RawOverride>,
    reporting_interval: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawOverride {
    r#match: RawMetricMatch,
    disabled: Option<bool>,
    tag_overrides: BTreeMap<String, RawTagOverride>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawMetricMatch {
    mode: Mode,
    metric: Option<String>,
    custom_metric: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawTagOverride {
    operation: Operation,
    /// What a label would be written with, which is not supported.
    #[serde(rename = "value")]
    _value: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Operation {
    #[default]
    Upsert,
    Remove,
}

impl TryFrom<Manifest> for Telemetry {
    type Error = Invalid;

    fn try_from(manifest: Manifest) -> Result<Telemetry, Invalid> {
        let Manifest { metadata, spec } = manifest;
        let Spec { selector, target_ref, target_refs, tracing, access_logging, metrics } = spec;
        let targets: Vec<TargetRef> = target_ref.into_iter().chain(target_refs).collect();
        if !targets.is_empty() && selector.is_some() {
            return Err(Invalid::new("spec.selector", "cannot be combined with targetRefs"));
        }
        for (field, count) in
            [("tracing", tracing.len()), ("accessLogging", access_logging.len()), ("metrics", metrics.len())]
        {
            bounded(&format!("spec.{field}"), count)?;
        }
        let meta = Meta::read(&metadata)?;
        let tracing = tracing.into_iter().enumerate().map(|(at, rule)| rule.read(at));
        let metrics = metrics.into_iter().enumerate().map(|(at, rule)| rule.read(at));
        Ok(Telemetry {
            selector: selector.and_then(Selector::labels),
            targets: targets.into_iter().map(|target| target.read(&meta.id.namespace)).collect(),
            tracing: tracing.collect::<Result<_, _>>()?,
            access_logs: access_logging.into_iter().map(RawAccessLog::read).collect(),
            metrics: metrics.collect::<Result<_, _>>()?,
            meta,
        })
    }
}

fn bounded(field: &str, count: usize) -> Result<(), Invalid> {
    match count <= MOST {
        true => Ok(()),
        false => Err(Invalid::new(field, format!("has more than {MOST} entries"))),
    }
}

fn names(providers: Vec<RawProvider>) -> Vec<Arc<str>> {
    providers.into_iter().map(|provider| provider.name.into()).collect()
}

impl RawTracing {
    fn read(self, at: usize) -> Result<TracingRule, Invalid> {
        let field = |name: &str| format!("spec.tracing[{at}].{name}");
        let sampling = self.random_sampling_percentage;
        if sampling.is_some_and(|percent| !(0.0..=100.0).contains(&percent)) {
            return Err(Invalid::new(field("randomSamplingPercentage"), "is not from 0 to 100"));
        }
        let mut without_effect = Vec::new();
        let mut note = |is_set: bool, name| {
            if is_set {
                without_effect.push(name);
            }
        };
        note(self.use_request_id_for_trace_sampling == Some(false), "useRequestIdForTraceSampling");
        note(self.enable_istio_tags == Some(false), "enableIstioTags");
        note(self.disable_context_propagation == Some(true), "disableContextPropagation");
        let tags = self.custom_tags.map(|tags| {
            bounded(&field("customTags"), tags.len())?;
            let mut read = Vec::new();
            for (name, tag) in tags {
                match tag.read(name) {
                    Ok(Some(tag)) => read.push(tag),
                    Ok(None) => note(true, "customTags with formatter"),
                    Err(problem) => return Err(Invalid::new(field("customTags"), problem)),
                }
            }
            Ok(read)
        });
        let tags = tags.transpose()?;
        without_effect.dedup();
        Ok(TracingRule {
            mode: self.r#match.mode,
            providers: names(self.providers),
            sampling,
            disabled: self.disable_span_reporting,
            tags,
            without_effect,
        })
    }
}

impl RawTag {
    /// `None` for one of a form that is not supported.
    fn read(self, name: String) -> Result<Option<l7::CustomTag>, String> {
        use l7::custom_tag::Value;
        if name.is_empty() {
            return Err("a tag has no name".to_owned());
        }
        let named = |RawNamed { name, default_value }| l7::NamedValue { name, default_value };
        let value = match self {
            RawTag::Literal(RawLiteral { value }) => Value::Literal(value),
            RawTag::Environment(raw) => Value::Environment(named(raw)),
            RawTag::Header(raw) => {
                HeaderName::try_from(&raw.name).map_err(|_| format!("{:?} is no header", raw.name))?;
                Value::Header(named(raw))
            }
            RawTag::Formatter(_) => return Ok(None),
        };
        Ok(Some(l7::CustomTag { name, value: Some(value) }))
    }
}

impl RawAccessLog {
    fn read(self) -> AccessLogRule {
        let filter = self.filter.map(|filter| filter.expression).filter(|text| !text.is_empty());
        AccessLogRule {
            mode: self.r#match.mode,
            providers: names(self.providers),
            disabled: self.disabled.unwrap_or_default(),
            filter: filter.map(Into::into),
        }
    }
}

impl RawMetrics {
    fn read(self, at: usize) -> Result<MetricsRule, Invalid> {
        let RawMetrics { providers, overrides, reporting_interval } = self;
        bounded(&format!("spec.metrics[{at}].overrides"), overrides.len())?;
        let overrides = overrides.into_iter().map(|raw| {
            raw.read().map_err(|problem| Invalid::new(format!("spec.metrics[{at}].overrides"), problem))
        });
        Ok(MetricsRule {
            providers: names(providers),
            overrides: overrides.collect::<Result<_, _>>()?,
            has_interval: reporting_interval.is_some(),
        })
    }
}

impl RawOverride {
    fn read(self) -> Result<MetricOverride, String> {
        let RawMetricMatch { mode, metric, custom_metric } = self.r#match;
        let family = match (metric.as_deref(), custom_metric) {
            (Some(_), Some(_)) => return Err("a match names metric and customMetric".to_owned()),
            (None | Some("ALL_METRICS"), None) => None,
            (Some(metric), None) => {
                Some(family(metric).ok_or(format!("metric {metric:?} is not known"))?.into())
            }
            (None, Some(custom)) => Some(custom.into()),
        };
        let (mut removed, mut written) = (Vec::new(), Vec::new());
        for (label, RawTagOverride { operation, .. }) in self.tag_overrides {
            match operation {
                Operation::Remove => removed.push(label.into()),
                Operation::Upsert => written.push(label.into()),
            }
        }
        Ok(MetricOverride { mode, family, disabled: self.disabled, removed, written })
    }
}

/// Istio's standard metrics as Prometheus names them.
fn family(metric: &str) -> Option<&'static str> {
    Some(match metric {
        "REQUEST_COUNT" => "istio_requests_total",
        "REQUEST_DURATION" => "istio_request_duration_milliseconds",
        "REQUEST_SIZE" => "istio_request_bytes",
        "RESPONSE_SIZE" => "istio_response_bytes",
        "TCP_OPENED_CONNECTIONS" => "istio_tcp_connections_opened_total",
        "TCP_CLOSED_CONNECTIONS" => "istio_tcp_connections_closed_total",
        "TCP_SENT_BYTES" => "istio_tcp_sent_bytes_total",
        "TCP_RECEIVED_BYTES" => "istio_tcp_received_bytes_total",
        "GRPC_REQUEST_MESSAGES" => "istio_request_messages_total",
        "GRPC_RESPONSE_MESSAGES" => "istio_response_messages_total",
        _ => return None,
    })
}
