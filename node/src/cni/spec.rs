//! The CNI specification's parts that a chained plugin needs: versions, arguments, results and errors.
//!
//! Results of other plugins are passed on as they came, so they stay JSON values: a type would lose fields that it does
//! not know.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// The versions of the specification that the plugin speaks, oldest first.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The version of answers to requests that name none.
pub const NEWEST: &str = "1.1.0";

/// The key of a configuration list's entries.
pub const PLUGINS: &str = "plugins";
/// The key of the version.
pub const VERSION: &str = "cniVersion";

/// An error as the runtime reads it from the plugin's standard output.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}: {details}")]
pub struct CniError {
    /// What kind of error.
    pub code: ErrorCode,
    /// What failed, in short.
    pub message: String,
    /// Why.
    pub details: String,
}

/// The specification's error codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorCode {
    /// The plugin does not speak the configuration's version.
    IncompatibleVersion,
    /// An environment variable is missing or not valid.
    InvalidEnvironment,
    /// Reading or writing failed.
    Io,
    /// The configuration is no JSON, or has a value of another type.
    Decode,
    /// The configuration lacks something.
    InvalidConfig,
    /// The namespace of `CNI_NETNS` is none.
    InvalidNetns,
    /// The same call may succeed later.
    TryAgain,
    /// The check found the pod in another state than planned.
    NotAsPlanned,
}

impl ErrorCode {
    /// Its number. Codes from 100 on are the plugin's own.
    pub fn number(self) -> u32 {
        match self {
            Self::IncompatibleVersion => 1,
            Self::InvalidEnvironment => 4,
            Self::Io => 5,
            Self::Decode => 6,
            Self::InvalidConfig => 7,
            Self::InvalidNetns => 8,
            Self::TryAgain => 11,
            Self::NotAsPlanned => 100,
        }
    }
}

impl CniError {
    /// An error with its reason.
    pub fn new(
        code: ErrorCode,
        message: impl Into<String>,
        details: impl Into<Box<dyn std::error::Error>>,
    ) -> Self {
        Self { code, message: message.into(), details: details.into().to_string() }
    }

    /// As the runtime reads it.
    pub fn to_json(&self, version: &str) -> Value {
        json!({ VERSION: version, "code": self.code.number(), "msg": self.message, "details": self.details })
    }
}

/// The plugin's configuration, as the runtime passes it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PluginConfig {
    /// The version of the specification.
    #[serde(default)]
    pub cni_version: String,
    /// The agent's socket.
    #[serde(default = "default_socket")]
    pub socket: String,
    /// Namespaces whose pods are never enrolled and never wait for the agent.
    #[serde(default)]
    pub excluded_namespaces: Vec<String>,
    /// The result of the plugins before this one.
    pub prev_result: Option<Value>,
    /// GC: the attachments that are still in use.
    #[serde(rename = "cni.dev/valid-attachments")]
    pub valid_attachments: Option<Vec<Attachment>>,
}

fn default_socket() -> String {
    "/var/run/ambit/cni.sock".into()
}

/// One container on one network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// The container; for pods, their sandbox.
    #[serde(rename = "containerID")]
    pub container_id: String,
}

impl PluginConfig {
    /// Reads a configuration of any version.
    ///
    /// # Errors
    /// [`ErrorCode::Decode`].
    pub fn parse(text: &str) -> Result<Self, CniError> {
        serde_json::from_str(text)
            .map_err(|e| CniError::new(ErrorCode::Decode, "the network configuration cannot be read", e))
    }

    /// Checks that the plugin speaks the configuration's version.
    ///
    /// # Errors
    /// [`ErrorCode::IncompatibleVersion`] for a version that is not in [`VERSIONS`].
    pub fn check_version(&self) -> Result<(), CniError> {
        if VERSIONS.contains(&self.cni_version.as_str()) {
            return Ok(());
        }
        Err(CniError::new(
            ErrorCode::IncompatibleVersion,
            format!("version {:?} of the specification is not supported", self.cni_version),
            format!("supported: {}", VERSIONS.join(", ")),
        ))
    }

    /// What ADD answers: the result of the plugins before this one, else one without interfaces.
    pub fn result(&self) -> Value {
        let mut result = match &self.prev_result {
            Some(Value::Object(result)) => result.clone(),
            _ => Map::new(),
        };
        result.insert(VERSION.into(), self.cni_version.clone().into());
        Value::Object(result)
    }

    /// The addresses that the plugins before this one gave the pod. Those of the host's interfaces are left out.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let Some(result) = &self.prev_result else { return Vec::new() };
        let interfaces = result.get("interfaces").and_then(Value::as_array);
        let in_sandbox = |index: &Value| {
            let index = index.as_u64().and_then(|index| usize::try_from(index).ok());
            let interface = index.and_then(|index| interfaces?.get(index));
            interface.is_none_or(|interface| {
                interface.get("sandbox").and_then(Value::as_str).is_some_and(|sandbox| !sandbox.is_empty())
            })
        };
        let ips = result.get("ips").and_then(Value::as_array).into_iter().flatten();
        ips.filter(|ip| ip.get("interface").is_none_or(in_sandbox))
            .filter_map(|ip| ip.get("address")?.as_str()?.parse::<IpNet>().ok())
            .map(|network| network.addr())
            .collect()
    }
}

/// The value of `name` in `CNI_ARGS`, which has the form `A=1;B=2`.
pub fn argument<'a>(arguments: &'a str, name: &str) -> Option<&'a str> {
    let value = arguments.split(';').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name);
    value.map(|(_, value)| value).filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(prev_result: &Value) -> PluginConfig {
        let text =
            json!({ "cniVersion": "1.0.0", "name": "net", "type": "ambit-cni", "prevResult": prev_result });
        PluginConfig::parse(&text.to_string()).unwrap()
    }

    #[test]
    fn the_previous_result_is_passed_on_with_unknown_fields() {
        let previous = json!({ "cniVersion": "1.0.0", "ips": [], "dns": {}, "vendor": { "a": 1 } });
        assert_eq!(config(&previous).result(), previous);
        let none = PluginConfig::parse(r#"{ "cniVersion": "0.3.1" }"#).unwrap();
        assert_eq!(none.result(), json!({ "cniVersion": "0.3.1" }));
    }

    #[test]
    fn addresses_of_the_sandboxs_interfaces_are_the_pods() {
        let previous = json!({
            "interfaces": [{ "name": "cni0" }, { "name": "eth0", "sandbox": "/run/netns/a" }],
            "ips": [
                { "address": "10.0.0.1/24", "interface": 0 },
                { "address": "10.0.0.5/24", "interface": 1 },
                { "address": "fd00::5/64" },
                { "address": "nonsense" },
            ],
        });
        let wanted: Vec<IpAddr> = ["10.0.0.5", "fd00::5"].map(|ip| ip.parse().unwrap()).into();
        assert_eq!(config(&previous).addresses(), wanted);
    }

    #[test]
    fn an_unknown_version_is_refused_by_its_code() {
        for version in ["0.2.0", "2.0.0", ""] {
            let text = json!({ "cniVersion": version }).to_string();
            let config = PluginConfig::parse(&text).unwrap();
            assert_eq!(config.check_version().unwrap_err().code, ErrorCode::IncompatibleVersion);
        }
        assert_eq!(PluginConfig::parse("{").unwrap_err().code, ErrorCode::Decode);
    }

    #[test]
    fn arguments_are_read_by_name() {
        let arguments = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_UID=;K8S_POD_NAME=a=b";
        assert_eq!(argument(arguments, "K8S_POD_NAMESPACE"), Some("shop"));
        assert_eq!(argument(arguments, "K8S_POD_NAME"), Some("a=b"));
        assert_eq!(argument(arguments, "K8S_POD_UID"), None);
        assert_eq!(argument(arguments, "POD_NAME"), None);
    }
}
