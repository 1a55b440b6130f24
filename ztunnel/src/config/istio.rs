//! The environment that Istio's chart gives its node proxy, as settings of ours.
//!
//! These variables override the file and are overridden by Ambit's own. What has no effect here is collected, to be
//! named in one warning at start.

use super::load::ConfigError;

/// Variables and the settings that they are, in order: of several for one setting the first that is given counts.
const SETTINGS: &[(&str, &str)] = &[
    ("NODE_NAME", "node"),
    ("POD_NAME", "podName"),
    ("POD_NAMESPACE", "podNamespace"),
    ("INSTANCE_IP", "instanceIp"),
    ("CLUSTER_ID", "clusterId"),
    ("ISTIO_META_CLUSTER_ID", "clusterId"),
    ("NETWORK", "network"),
    ("CLUSTER_DOMAIN", "dns.clusterDomain"),
    ("XDS_ROOT_CA", "controlPlaneRoot"),
    ("AUTH_TOKEN", "tokenFile"),
    ("INPOD_UDS", "zdsSocket"),
    ("CONNECTION_TERMINATION_DEADLINE", "drainTimeout"),
    ("RUST_LOG", "logLevel"),
    ("LOG_FORMAT", "logFormat"),
    ("LOG_FORMAT", "accessLog.format"),
    ("SECRET_TTL", "certificates.lifetime"),
    ("XDS_ON_DEMAND", "xds.onDemand"),
    ("DNS_CAPTURE", "dns.enabled"),
    ("CRL_PATH", "crlFile"),
    ("ALT_XDS_HOSTNAME", "controlPlaneServerName"),
    ("POOL_UNUSED_RELEASE_TIMEOUT", "limits.poolIdle"),
];

/// Variables that say a number of processors, in order.
const PROCESSORS: &[&str] = &["ZTUNNEL_WORKER_THREADS", "ZTUNNEL_CPU_LIMIT", "ZTUNNEL_RESOURCE_CPU_LIMIT"];

/// Variables without a counterpart.
const WITHOUT_EFFECT: &[&str] = &[
    "ENABLE_ORIG_SRC",
    "ENABLE_RESPONSE_BAGGAGE",
    "LOCALHOST_APP_TUNNEL",
    "PACKET_MARK",
    "POOL_MAX_STREAMS_PER_CONNECTION",
    "PREFERED_SERVICE_NAMESPACE",
    "ZTUNNEL_RESOURCE_CPU_REQUEST",
];

/// Metadata of the node beyond what settings say.
const METADATA: &str = "ISTIO_META_";

/// What the environment holds.
#[derive(Debug, Default)]
pub(super) struct Environment {
    /// Settings with their values as text, and the variable that gave each.
    pub(super) settings: Vec<(&'static str, String, &'static str)>,
    /// Names without [`METADATA`], and values.
    pub(super) metadata: Vec<(String, String)>,
    /// Variables without effect, with their reason.
    pub(super) without_effect: Vec<String>,
}

/// Reads an environment.
///
/// # Errors
/// [`ConfigError::Value`], naming the variable.
pub(super) fn read(variables: &[(String, String)]) -> Result<Environment, ConfigError> {
    let get = |name: &str| variables.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
    let mut read = Environment::default();
    for (variable, key) in SETTINGS {
        let known = read.settings.iter().any(|(known, _, _)| known == key);
        if let Some(value) = get(variable).filter(|value| !known && !value.is_empty()) {
            read.settings.push((key, value_of(variable, value), variable));
        }
    }
    control_plane(&get, &mut read);
    authority(&get, &mut read);
    if let Some((variable, workers)) = workers(&get)? {
        read.settings.push(("workers", workers, variable));
    }
    if let Some(grace) =
        get("TERMINATION_GRACE_PERIOD_SECONDS").filter(|_| get("CONNECTION_TERMINATION_DEADLINE").is_none())
    {
        let seconds: u64 =
            grace.parse().map_err(|_| wrong("TERMINATION_GRACE_PERIOD_SECONDS", grace, "a number"))?;
        // Time is left to close what is still open.
        let drain = format!("{}s", seconds.saturating_sub(2).max(1));
        read.settings.push(("drainTimeout", drain, "TERMINATION_GRACE_PERIOD_SECONDS"));
    }
    for (name, value) in variables {
        let is_known = SETTINGS.iter().any(|(known, _)| known == name);
        if let Some(key) = name.strip_prefix(METADATA).filter(|_| !is_known) {
            read.metadata.push((key.to_owned(), value.clone()));
        }
        if WITHOUT_EFFECT.contains(&name.as_str()) || name.starts_with("KEEPALIVE_") {
            read.without_effect.push(name.clone());
        }
    }
    read.without_effect.sort();
    Ok(read)
}

/// Our form of a value.
fn value_of(variable: &str, value: &str) -> String {
    match variable {
        // Istio's proxy writes plain text for everything but `json`.
        "LOG_FORMAT" if value != "json" => "text".to_owned(),
        _ => value.to_owned(),
    }
}

/// Where discovery is; the name on its certificate is that of the address unless another is given. An empty address is
/// that of no control plane.
fn control_plane<'a>(get: &impl Fn(&str) -> Option<&'a str>, read: &mut Environment) {
    let local = get("LOCAL_XDS_PATH").filter(|path| !path.is_empty());
    let address = get("XDS_ADDRESS").map(plain);
    if let Some(address) = address {
        read.settings.push(("controlPlane", address.to_owned(), "XDS_ADDRESS"));
        let is_named = read.settings.iter().any(|(key, _, _)| *key == "controlPlaneServerName");
        if !is_named && !address.is_empty() {
            read.settings.push(("controlPlaneServerName", host(address).to_owned(), "XDS_ADDRESS"));
        }
    }
    match (local, address) {
        (Some(path), Some("")) => read.settings.push(("xds.localFile", path.to_owned(), "LOCAL_XDS_PATH")),
        (Some(_), _) => read.without_effect.push("LOCAL_XDS_PATH (there is a control plane)".to_owned()),
        (None, _) => {}
    }
}

/// Where certificates come from, if that is not the control plane.
fn authority<'a>(get: &impl Fn(&str) -> Option<&'a str>, read: &mut Environment) {
    let given = |name: &str| get(name).filter(|value| !value.is_empty());
    let Some(address) = given("CA_ADDRESS").map(plain) else { return };
    let (root, name) = (given("CA_ROOT_CA"), given("ALT_CA_HOSTNAME"));
    let is_that_of_xds = get("XDS_ADDRESS").map(plain) == Some(address)
        && (root.is_none() || root == given("XDS_ROOT_CA"))
        && (name.is_none() || name == given("ALT_XDS_HOSTNAME"));
    if is_that_of_xds {
        return;
    }
    read.settings.push(("certificates.authority", address.to_owned(), "CA_ADDRESS"));
    for (key, value, variable) in [
        ("certificates.authorityRoot", root, "CA_ROOT_CA"),
        ("certificates.authorityServerName", name, "ALT_CA_HOSTNAME"),
    ] {
        if let Some(value) = value {
            read.settings.push((key, value.to_owned(), variable));
        }
    }
}

/// An address without a scheme.
fn plain(address: &str) -> &str {
    address.trim_start_matches("https://")
}

fn host(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _)| host)
}

/// The number of workers: as many as processors, or a share of them in per cent.
fn workers<'a>(
    get: &impl Fn(&str) -> Option<&'a str>,
) -> Result<Option<(&'static str, String)>, ConfigError> {
    let Some((variable, value)) = PROCESSORS.iter().find_map(|name| Some((*name, get(name)?))) else {
        return Ok(None);
    };
    let number = |variable: &str, value: &str| {
        value.parse::<u64>().map_err(|_| wrong(variable, value, "a number, or one followed by %"))
    };
    let workers = match value.strip_suffix('%') {
        None => number(variable, value)?,
        Some(share) => {
            let limit = match get("ZTUNNEL_CPU_LIMIT") {
                Some(limit) => number("ZTUNNEL_CPU_LIMIT", limit)?,
                None => std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64),
            };
            limit.saturating_mul(number(variable, share)?).div_ceil(100)
        }
    };
    // A node's limit may be that of a large machine.
    Ok(Some((variable, workers.clamp(1, 16).to_string())))
}

fn wrong(variable: &str, value: &str, what: &str) -> ConfigError {
    ConfigError::Value { key: variable.to_owned(), reason: format!("is `{value}`, not {what}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(variables: &[(&str, &str)]) -> Result<Environment, ConfigError> {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        read(&variables.iter().map(owned).collect::<Vec<_>>())
    }

    fn setting(environment: &Environment, key: &str) -> Option<String> {
        environment.settings.iter().find(|(known, _, _)| *known == key).map(|(_, value, _)| value.clone())
    }

    #[test]
    fn the_charts_variables_become_settings() {
        let read = read_all(&[
            ("XDS_ADDRESS", "https://istiod.istio-system.svc:15012"),
            ("CA_ADDRESS", "istiod.istio-system.svc:15012"),
            ("LOG_FORMAT", "json"),
            ("ISTIO_META_CLUSTER_ID", "c1"),
            ("ISTIO_META_ENABLE_HBONE", "true"),
            ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
            ("ZTUNNEL_CPU_LIMIT", "96"),
            ("NETWORK", ""),
        ])
        .unwrap();
        for (key, value) in [
            ("controlPlane", "istiod.istio-system.svc:15012"),
            ("controlPlaneServerName", "istiod.istio-system.svc"),
            ("logFormat", "json"),
            ("accessLog.format", "json"),
            ("clusterId", "c1"),
            ("drainTimeout", "28s"),
            ("workers", "16"),
        ] {
            assert_eq!(setting(&read, key).as_deref(), Some(value), "{key}");
        }
        assert_eq!(setting(&read, "network"), None, "empty is not given");
        assert_eq!(read.metadata, [("ENABLE_HBONE".to_owned(), "true".to_owned())]);
        assert!(read.without_effect.is_empty(), "{:?}", read.without_effect);
    }

    #[test]
    fn variables_without_effect_are_collected() {
        let read = read_all(&[
            ("XDS_ADDRESS", "a:1"),
            ("LOCAL_XDS_PATH", "/local.yaml"),
            ("KEEPALIVE_TIME", "10s"),
            ("PACKET_MARK", "1"),
        ])
        .unwrap();
        let names: Vec<&str> = read.without_effect.iter().map(|it| it.split(' ').next().unwrap()).collect();
        assert_eq!(names, ["KEEPALIVE_TIME", "LOCAL_XDS_PATH", "PACKET_MARK"]);
    }

    #[test]
    fn an_empty_address_is_no_control_plane() {
        let read = read_all(&[("XDS_ADDRESS", ""), ("LOCAL_XDS_PATH", "/local.yaml")]).unwrap();
        assert_eq!(setting(&read, "controlPlane").as_deref(), Some(""));
        assert_eq!(setting(&read, "controlPlaneServerName"), None);
        assert_eq!(setting(&read, "xds.localFile").as_deref(), Some("/local.yaml"));
        assert_eq!(setting(&read, "certificates.authority"), None);
    }

    #[test]
    fn certificates_may_come_from_elsewhere() {
        let same = [
            ("XDS_ADDRESS", "https://a:1"),
            ("CA_ADDRESS", "a:1"),
            ("CA_ROOT_CA", "/ca.pem"),
            ("XDS_ROOT_CA", "/ca.pem"),
        ];
        assert_eq!(setting(&read_all(&same).unwrap(), "certificates.authority"), None);
        for xds in ["", "a:1"] {
            let read = read_all(&[
                ("XDS_ADDRESS", xds),
                ("CA_ADDRESS", "https://b:1"),
                ("CA_ROOT_CA", "/ca.pem"),
                ("ALT_CA_HOSTNAME", "ca.example"),
            ]);
            let read = read.unwrap();
            for (key, value) in [("", "b:1"), ("Root", "/ca.pem"), ("ServerName", "ca.example")] {
                assert_eq!(setting(&read, &format!("certificates.authority{key}")).as_deref(), Some(value));
            }
        }
    }

    #[test]
    fn workers_are_a_number_or_a_share() {
        let read = read_all(&[("ZTUNNEL_WORKER_THREADS", "50%"), ("ZTUNNEL_CPU_LIMIT", "8")]).unwrap();
        assert_eq!(setting(&read, "workers").as_deref(), Some("4"));
        assert!(matches!(read_all(&[("ZTUNNEL_WORKER_THREADS", "many")]), Err(ConfigError::Value { .. })));
    }
}
