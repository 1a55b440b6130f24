//! Extension providers that take spans and log records, and which of them count where no Telemetry says otherwise.

use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_api::l7;
use http::header::{HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use serde::Deserialize;
use serde_json::Value;

use super::service;

/// The proxy's own log, which every mesh has without saying so.
pub const OWN_LOG: &str = "envoy";
/// The proxy's metrics.
const METRICS: &str = "prometheus";

/// Providers by name, and the defaults among them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TelemetryProviders {
    /// By name, without the built-in ones.
    named: BTreeMap<Arc<str>, Provider>,
    /// Who gets spans.
    pub default_tracing: Option<Arc<str>>,
    /// Which logs there are; `None`: the proxy's own.
    pub default_access_logs: Option<Vec<Arc<str>>>,
}

/// What a provider takes.
#[derive(Clone, Debug, PartialEq)]
pub enum Provider {
    /// Spans.
    Spans {
        /// Where they go.
        collector: l7::Collector,
        /// Longest text of a tag, in bytes; 0 where nothing is said.
        max_tag_length: u32,
    },
    /// Lines of the proxy's own access log.
    OwnLog,
    /// Log records.
    Logs {
        /// Where they go.
        collector: l7::Collector,
        /// The log's name.
        log_name: String,
    },
    /// Metrics.
    Metrics,
    /// Something that no proxy of this mesh speaks to.
    Unsupported(Box<str>),
}

impl Provider {
    /// The service that it is, if it is one.
    pub fn collector(&self) -> Option<&l7::Collector> {
        match self {
            Provider::Spans { collector, .. } | Provider::Logs { collector, .. } => Some(collector),
            Provider::OwnLog | Provider::Metrics | Provider::Unsupported(_) => None,
        }
    }
}

impl TelemetryProviders {
    /// A provider.
    pub fn get(&self, name: &str) -> Option<&Provider> {
        self.named.get(name).or(match name {
            OWN_LOG => Some(&Provider::OwnLog),
            METRICS => Some(&Provider::Metrics),
            _ => None,
        })
    }

    /// The services that take something.
    pub fn collectors(&self) -> impl Iterator<Item = &l7::Collector> {
        self.named.values().filter_map(Provider::collector)
    }

    /// Adds a provider of a kind.
    ///
    /// # Errors
    /// What of it can't be understood.
    pub(super) fn add(&mut self, name: &str, kind: &str, value: Value) -> Result<(), String> {
        let provider = match kind {
            "opentelemetry" => spans(name, value)?,
            "envoyOtelAls" => logs(name, value)?,
            "envoyFileAccessLog" => own_log(name, value)?,
            "prometheus" => Provider::Metrics,
            _ => {
                tracing::warn!(name, kind, "an extension provider of this kind has no effect");
                Provider::Unsupported(kind.into())
            }
        };
        match self.named.insert(name.into(), provider) {
            None => Ok(()),
            Some(_) => Err("it is there twice".to_owned()),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct OpenTelemetry {
    service: String,
    port: u16,
    max_tag_length: u32,
    http: Option<Http>,
    grpc: Option<Grpc>,
    resource_detectors: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Http {
    path: String,
    timeout: Option<String>,
    headers: Vec<Header>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Grpc {
    timeout: Option<String>,
    initial_metadata: Vec<Header>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Header {
    name: String,
    value: Option<String>,
    env_name: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct OtelAls {
    service: String,
    port: u16,
    log_name: String,
    log_format: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct FileLog {
    path: String,
    log_format: Option<Value>,
    omit_empty_values: Option<bool>,
}

fn spans(name: &str, value: Value) -> Result<Provider, String> {
    let OpenTelemetry { service, port, max_tag_length, http, grpc, resource_detectors } =
        serde_json::from_value(value).map_err(|error| error.to_string())?;
    if resource_detectors.is_some() {
        tracing::warn!(name, "resourceDetectors of an extension provider has no effect");
    }
    let (namespace, hostname) = service::read(&service, port)?;
    let timeout = |text: Option<&str>| text.map_or(Ok(0), crate::object::istio_duration);
    let mut collector = l7::Collector {
        provider: name.to_owned(),
        namespace,
        hostname,
        port: port.into(),
        ..l7::Collector::default()
    };
    match (http, grpc) {
        (Some(_), Some(_)) => return Err("it has both http and grpc".to_owned()),
        (Some(Http { path, timeout: limit, headers }), None) => {
            let read = PathAndQuery::try_from(&path).ok().filter(|_| path.starts_with('/'));
            read.ok_or_else(|| format!("http.path {path:?} is no path"))?;
            collector.timeout_nanos = timeout(limit.as_deref())?;
            collector.http = Some(l7::HttpExport { path, headers: fields(headers)? });
        }
        (None, grpc) => {
            let Grpc { timeout: limit, initial_metadata } = grpc.unwrap_or_default();
            collector.timeout_nanos = timeout(limit.as_deref())?;
            collector.metadata = fields(initial_metadata)?;
        }
    }
    Ok(Provider::Spans { collector, max_tag_length })
}

fn fields(headers: Vec<Header>) -> Result<Vec<l7::ExportHeader>, String> {
    use l7::export_header::Source;
    let field = |Header { name, value, env_name }: Header| {
        HeaderName::try_from(&name).map_err(|_| format!("{name:?} is no header"))?;
        let source = match (value, env_name) {
            (Some(value), None) => {
                HeaderValue::try_from(&value)
                    .map_err(|_| format!("the value of header {name} can be none"))?;
                Source::Value(value)
            }
            (None, Some(variable)) => Source::Environment(variable),
            _ => return Err(format!("header {name} needs one of value and envName")),
        };
        Ok(l7::ExportHeader { name, source: Some(source) })
    };
    headers.into_iter().map(field).collect()
}

fn logs(name: &str, value: Value) -> Result<Provider, String> {
    let OtelAls { service, port, log_name, log_format } =
        serde_json::from_value(value).map_err(|error| error.to_string())?;
    if log_format.is_some() {
        tracing::warn!(
            name,
            "logFormat of an extension provider has no effect: records have the fields of the access log"
        );
    }
    let (namespace, hostname) = service::read(&service, port)?;
    let collector = l7::Collector {
        provider: name.to_owned(),
        namespace,
        hostname,
        port: port.into(),
        ..l7::Collector::default()
    };
    Ok(Provider::Logs { collector, log_name })
}

fn own_log(name: &str, value: Value) -> Result<Provider, String> {
    let FileLog { path, log_format, omit_empty_values } =
        serde_json::from_value(value).map_err(|error| error.to_string())?;
    if log_format.is_some() || omit_empty_values.is_some() {
        tracing::warn!(
            name,
            "the format of an extension provider has no effect: accessLog.format of the proxy counts"
        );
    }
    match path.as_str() {
        "/dev/stdout" | "/dev/stderr" => Ok(Provider::OwnLog),
        _ => Err(format!(
            "path {path:?} is not supported: the access log goes where accessLog.target of the proxy says"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    #[test]
    fn providers_of_telemetry_are_read_as_istio_names_their_fields() {
        let read = parse(
            "extensionProviders:\n\
             - {name: grpc, opentelemetry: {service: otel.obs.svc.cluster.local, port: 4317, maxTagLength: 64, grpc: {timeout: 3s, initialMetadata: [{name: x-key, envName: KEY}]}}}\n\
             - {name: http, opentelemetry: {service: obs/Otel.example, port: 4318, http: {path: /v1/traces, timeout: 1s, headers: [{name: x-key, value: a}]}}}\n\
             - {name: als, envoyOtelAls: {service: otel.obs.svc, port: 4317, logName: mesh}}\n\
             - {name: file, envoyFileAccessLog: {path: /dev/stdout}}\n\
             - {name: zipkin, zipkin: {service: z, port: 1}}\n\
             defaultProviders: {tracing: [grpc], accessLogging: [als, envoy], metrics: [prometheus]}\n",
        )
        .unwrap()
        .telemetry;
        let Some(Provider::Spans { collector: grpc, max_tag_length: 64 }) = read.get("grpc") else {
            panic!("{read:?}")
        };
        assert_eq!(
            (grpc.namespace.as_str(), grpc.hostname.as_str(), grpc.port),
            ("obs", "otel.obs.svc.cluster.local", 4317)
        );
        assert_eq!((grpc.timeout_nanos, grpc.metadata.len(), &grpc.http), (3_000_000_000, 1, &None));
        let Some(Provider::Spans { collector: http, .. }) = read.get("http") else { panic!("{read:?}") };
        assert_eq!(http.hostname, "otel.example");
        assert_eq!(http.http.as_ref().unwrap().path, "/v1/traces");
        assert!(matches!(read.get("als"), Some(Provider::Logs { log_name, .. }) if log_name == "mesh"));
        assert_eq!(read.get("file"), Some(&Provider::OwnLog));
        assert_eq!(read.get("envoy"), Some(&Provider::OwnLog));
        assert_eq!(read.get("prometheus"), Some(&Provider::Metrics));
        assert_eq!(read.get("zipkin"), Some(&Provider::Unsupported("zipkin".into())));
        assert_eq!(read.get("other"), None);
        assert_eq!(read.default_tracing.as_deref(), Some("grpc"));
        assert_eq!(read.default_access_logs.as_ref().map(Vec::len), Some(2));
        assert_eq!(read.collectors().count(), 3);
    }

    #[test]
    fn providers_of_telemetry_that_cannot_be_followed_are_errors() {
        for text in [
            "extensionProviders: [{name: a, opentelemetry: {service: a/x}}]",
            "extensionProviders: [{name: a, opentelemetry: {service: x.example, port: 1}}]",
            "extensionProviders: [{name: a, opentelemetry: {service: a/x, port: 1, http: {path: v1}}}]",
            "extensionProviders: [{name: a, opentelemetry: {service: a/x, port: 1, http: {path: /v1}, grpc: {}}}]",
            "extensionProviders: [{name: a, opentelemetry: {service: a/x, port: 1, http: {path: /v1, headers: [{name: x}]}}}]",
            "extensionProviders: [{name: a, opentelemetry: {service: a/x, port: 1, htpp: {}}}]",
            "extensionProviders: [{name: a, envoyFileAccessLog: {path: /var/log/a}}]",
            "extensionProviders: [{name: a, prometheus: {}}, {name: a, prometheus: {}}]",
            "defaultProviders: {tracing: [a, b]}",
            "defaultProviders: {tracing: [none]}",
            "defaultProviders: {accessLogging: [none]}",
            "defaultProviders: {logging: [envoy]}",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
