//! Settings that every proxy program has.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The access log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AccessLog {
    /// Whether a line is written for each connection that ended.
    pub enabled: bool,
    /// Shape of a line.
    pub format: LogFormat,
    /// File to append to; none: standard output.
    pub path: Option<PathBuf>,
}

/// Shape of a line of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people; the access log as fields separated by tabs, `key=value`.
    Text,
    /// One JSON object a line.
    Json,
}

/// The preferred TLS 1.3 cipher suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Cipher {
    /// AES-128-GCM: a tenth less CPU a byte.
    #[serde(rename = "aes128")]
    Aes128,
    /// AES-256-GCM.
    #[serde(rename = "aes256")]
    Aes256,
}

impl Default for AccessLog {
    fn default() -> Self {
        Self { enabled: true, format: LogFormat::Text, path: None }
    }
}
