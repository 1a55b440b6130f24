//! The file with the settings of the mesh that Istio calls MeshConfig, of which are read: extension providers (external authorizers,
//! and who takes spans and log records) and the topology of gateways.
//!
//! A provider of a kind that has no effect is only remembered as such; policies that name one as their authorizer deny. Unknown
//! fields are errors.

mod service;
mod telemetry;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ambit_api::l7;
use ambit_api::security::{StringMatch, string_match::MatchType};
use http::header::{HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use serde::Deserialize;
use serde_json::Value;

pub use self::telemetry::{OWN_LOG, Provider, TelemetryProviders};
use crate::object::{GatewayTopology, Topology};

/// How long an authorizer may take where nothing else is said.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);
/// The largest part of a body that authorizers see.
const MAX_BODY: u32 = 1 << 20;

/// Whom policies may ask, by name.
pub type Authorizers = BTreeMap<Arc<str>, l7::ExternalAuthorizer>;

/// What is followed of the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MeshSettings {
    /// Whom policies may ask.
    pub authorizers: Authorizers,
    /// Who takes spans and log records.
    pub telemetry: TelemetryProviders,
    /// The proxies in front of every gateway.
    pub gateway_topology: Topology,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct MeshConfig {
    extension_providers: Vec<BTreeMap<String, Value>>,
    default_config: DefaultConfig,
    default_providers: DefaultProviders,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct DefaultConfig {
    gateway_topology: GatewayTopology,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct DefaultProviders {
    tracing: Vec<String>,
    access_logging: Option<Vec<String>>,
    metrics: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct GrpcProvider {
    service: String,
    port: u16,
    timeout: Option<String>,
    fail_open: bool,
    clear_route_cache: bool,
    status_on_error: Option<String>,
    include_request_body_in_check: Option<Body>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct HttpProvider {
    service: String,
    port: u16,
    timeout: Option<String>,
    fail_open: bool,
    clear_route_cache: bool,
    status_on_error: Option<String>,
    include_request_body_in_check: Option<Body>,
    path_prefix: String,
    include_headers_in_check: Vec<String>,
    include_request_headers_in_check: Vec<String>,
    include_additional_headers_in_check: BTreeMap<String, String>,
    headers_to_upstream_on_allow: Vec<String>,
    headers_to_downstream_on_deny: Vec<String>,
    headers_to_downstream_on_allow: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Body {
    max_request_bytes: u32,
    allow_partial_message: bool,
    pack_as_bytes: bool,
}

/// Reads the file.
///
/// # Errors
/// What can't be read or understood.
pub(crate) fn read(path: &Path) -> Result<MeshSettings, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    parse(&text)
}

/// Reads the text of the file.
///
/// # Errors
/// What can't be understood.
pub fn parse(text: &str) -> Result<MeshSettings, String> {
    let config: Option<MeshConfig> =
        serde_saphyr::from_str(text).map_err(|error| error.without_snippet().to_string())?;
    let MeshConfig { extension_providers, default_config, default_providers } = config.unwrap_or_default();
    let gateway_topology = default_config.gateway_topology.read();
    let gateway_topology = gateway_topology.map_err(|problem| format!("gatewayTopology: {problem}"))?;
    let mut settings = MeshSettings { gateway_topology, ..MeshSettings::default() };
    for mut provider in extension_providers {
        let name = provider.remove("name").and_then(|name| name.as_str().map(str::to_owned));
        let name = name.filter(|name| !name.is_empty()).ok_or("an extension provider has no name")?;
        let in_provider = |problem: String| format!("extension provider {name}: {problem}");
        let mut kinds = provider.into_iter();
        let (Some((kind, value)), None) = (kinds.next(), kinds.next()) else {
            return Err(in_provider("it must be of one kind".to_owned()));
        };
        let authorizer = match kind.as_str() {
            "envoyExtAuthzGrpc" => grpc(value),
            "envoyExtAuthzHttp" => http(value),
            kind => {
                settings.telemetry.add(&name, kind, value).map_err(in_provider)?;
                continue;
            }
        };
        let authorizer = authorizer.map_err(in_provider)?;
        let authorizer = l7::ExternalAuthorizer { provider: name.clone(), ..authorizer };
        if settings.authorizers.insert(name.as_str().into(), authorizer).is_some() {
            return Err(in_provider("it is there twice".to_owned()));
        }
    }
    defaults(&mut settings.telemetry, default_providers)?;
    Ok(settings)
}

/// Who counts where no Telemetry says otherwise. Metrics are always counted.
fn defaults(telemetry: &mut TelemetryProviders, defaults: DefaultProviders) -> Result<(), String> {
    let DefaultProviders { tracing, access_logging, metrics } = defaults;
    let named = tracing.iter().chain(access_logging.iter().flatten()).chain(&metrics);
    for name in named {
        if telemetry.get(name).is_none() {
            return Err(format!("defaultProviders: there is no extension provider {name}"));
        }
    }
    if tracing.len() > 1 {
        return Err("defaultProviders.tracing: spans go to one provider".to_owned());
    }
    telemetry.default_tracing = tracing.into_iter().next().map(Into::into);
    telemetry.default_access_logs = access_logging.map(|all| all.into_iter().map(Into::into).collect());
    Ok(())
}

fn grpc(value: Value) -> Result<l7::ExternalAuthorizer, String> {
    let GrpcProvider {
        service,
        port,
        timeout,
        fail_open,
        clear_route_cache,
        status_on_error,
        include_request_body_in_check: body,
    } = serde_json::from_value(value).map_err(|error| error.to_string())?;
    common(&service, port, timeout.as_deref(), fail_open, clear_route_cache, status_on_error.as_deref(), body)
}

fn http(value: Value) -> Result<l7::ExternalAuthorizer, String> {
    let provider: HttpProvider = serde_json::from_value(value).map_err(|error| error.to_string())?;
    if !provider.path_prefix.is_empty() {
        let prefix = PathAndQuery::try_from(&provider.path_prefix).ok();
        prefix
            .filter(|prefix| prefix.query().is_none() && provider.path_prefix.starts_with('/'))
            .ok_or("pathPrefix is no path")?;
    }
    for (name, value) in &provider.include_additional_headers_in_check {
        if HeaderName::try_from(name).is_err() || HeaderValue::try_from(value).is_err() {
            return Err(format!("includeAdditionalHeadersInCheck: {name} can be no header"));
        }
    }
    // The older name of the field is followed by the newer one.
    let mut include = provider.include_request_headers_in_check;
    if include.is_empty() {
        include = provider.include_headers_in_check;
    }
    let check = l7::HttpCheck {
        path_prefix: provider.path_prefix,
        include: patterns(&include),
        additional: provider.include_additional_headers_in_check,
        to_upstream: patterns(&provider.headers_to_upstream_on_allow),
        to_downstream_on_deny: patterns(&provider.headers_to_downstream_on_deny),
        to_downstream_on_allow: patterns(&provider.headers_to_downstream_on_allow),
    };
    let common = common(
        &provider.service,
        provider.port,
        provider.timeout.as_deref(),
        provider.fail_open,
        provider.clear_route_cache,
        provider.status_on_error.as_deref(),
        provider.include_request_body_in_check,
    )?;
    Ok(l7::ExternalAuthorizer { http: Some(check), ..common })
}

fn common(
    service: &str,
    port: u16,
    timeout: Option<&str>,
    fail_open: bool,
    clear_route_cache: bool,
    status_on_error: Option<&str>,
    body: Option<Body>,
) -> Result<l7::ExternalAuthorizer, String> {
    let (namespace, hostname) = service::read(service, port)?;
    if clear_route_cache {
        return Err("clearRouteCache is not supported: routes are chosen before".to_owned());
    }
    let timeout = timeout.map_or(Ok(0), crate::object::istio_duration)?;
    let status = match status_on_error {
        None | Some("") => 0,
        Some(text) => text
            .parse()
            .ok()
            .filter(|status| (200..600).contains(status))
            .ok_or_else(|| format!("statusOnError {text:?} is no status"))?,
    };
    let body = body.map(|body| {
        let Body { max_request_bytes, allow_partial_message, pack_as_bytes } = body;
        match (1..=MAX_BODY).contains(&max_request_bytes) {
            true => Ok(l7::CheckedBody {
                max_bytes: max_request_bytes,
                allow_partial: allow_partial_message,
                as_bytes: pack_as_bytes,
            }),
            false => Err(format!("maxRequestBytes is not between 1 and {MAX_BODY}")),
        }
    });
    Ok(l7::ExternalAuthorizer {
        provider: String::new(),
        namespace,
        hostname,
        port: port.into(),
        timeout_nanos: match timeout {
            0 => u64::try_from(TIMEOUT.as_nanos()).unwrap_or(u64::MAX),
            nanos => nanos,
        },
        fail_open,
        status_on_error: status,
        body: body.transpose()?,
        http: None,
        include: Vec::new(),
    })
}

/// Names of fields, in lower case; `*` at one end stands for anything.
fn patterns(texts: &[String]) -> Vec<StringMatch> {
    let pattern = |text: &String| {
        let text = text.to_ascii_lowercase();
        let kind = match (text.strip_prefix('*'), text.strip_suffix('*')) {
            (Some(""), _) => MatchType::Presence(()),
            (Some(suffix), _) => MatchType::Suffix(suffix.to_owned()),
            (None, Some(prefix)) => MatchType::Prefix(prefix.to_owned()),
            (None, None) => MatchType::Exact(text),
        };
        StringMatch { match_type: Some(kind) }
    };
    texts.iter().map(pattern).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn providers_are_read_as_istio_names_their_fields() {
        let read = parse(
            "extensionProviders:\n\
             - name: opa\n  envoyExtAuthzGrpc: {service: shop/opa.example, port: 9000, timeout: 500ms, failOpen: true}\n\
             - name: http\n  envoyExtAuthzHttp:\n    service: Opa.shop.svc.cluster.local\n    port: 8000\n    pathPrefix: /check\n    \
             statusOnError: '503'\n    includeRequestHeadersInCheck: [X-A, x-b*]\n    \
             includeRequestBodyInCheck: {maxRequestBytes: 10, allowPartialMessage: true}\n\
             - {name: traces, zipkin: {service: z, port: 1}}\n",
        )
        .unwrap()
        .authorizers;
        assert_eq!(read.len(), 2);
        let opa = &read["opa"];
        assert_eq!((opa.namespace.as_str(), opa.hostname.as_str(), opa.port), ("shop", "opa.example", 9000));
        assert_eq!((opa.timeout_nanos, opa.fail_open, opa.status_on_error), (500_000_000, true, 0));
        let http = &read["http"];
        assert_eq!(http.namespace, "shop");
        assert_eq!((http.hostname.as_str(), http.status_on_error), ("opa.shop.svc.cluster.local", 503));
        assert_eq!(http.timeout_nanos, 10_000_000_000);
        let check = http.http.as_ref().unwrap();
        assert_eq!((check.path_prefix.as_str(), check.include.len()), ("/check", 2));
        assert!(http.body.as_ref().unwrap().allow_partial);
        assert_eq!(parse("").unwrap(), MeshSettings::default());
    }

    #[test]
    fn the_topology_of_gateways_is_read() {
        let read =
            parse("defaultConfig: {gatewayTopology: {numTrustedProxies: 1, proxyProtocol: {}}}").unwrap();
        assert_eq!((read.gateway_topology.hops, read.gateway_topology.proxy_protocol), (Some(1), true));
        assert!(parse("defaultConfig: {gatewayTopology: {numTrustedProxy: 1}}").is_err());
        assert!(parse("defaultConfig: {concurrency: 1}").is_err());
    }

    #[test]
    fn what_cannot_be_followed_is_an_error() {
        for text in [
            "extensionProviders: [{name: a, envoyExtAuthzGrpc: {service: a/x}}]",
            "extensionProviders: [{envoyExtAuthzGrpc: {service: a/x, port: 1}}]",
            "extensionProviders: [{name: a}]",
            "extensionProviders: [{name: a, envoyExtAuthzGrpc: {service: a/x, port: 1, failopen: true}}]",
            "extensionProviders: [{name: a, envoyExtAuthzGrpc: {service: a/x, port: 1, timeout: soon}}]",
            "extensionProviders: [{name: a, envoyExtAuthzGrpc: {service: a/x, port: 1, statusOnError: '99'}}]",
            "extensionProviders: [{name: a, envoyExtAuthzGrpc: {service: a/x, port: 1, clearRouteCache: true}}]",
            "extensionProviders: [{name: a, envoyExtAuthzHttp: {service: a/x, port: 1, pathPrefix: check}}]",
            "extensionProviders: [{name: a, envoyExtAuthzGrpc: {service: login.example.com, port: 1}}]",
            "accessLogFile: /dev/stdout",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
