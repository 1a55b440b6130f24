//! Settings that several programs have.

use std::io;
use std::path::PathBuf;

use ambit_telemetry::{LogWriter, Target, access, logging};
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

impl AccessLog {
    /// Opens the log, and the writer whose end flushes it; there is none for a log that is off.
    ///
    /// # Errors
    /// The file can't be opened.
    pub fn open(&self) -> io::Result<(access::AccessLog, Option<LogWriter>)> {
        if !self.enabled {
            return Ok((access::AccessLog::disabled(), None));
        }
        let (log, writer) = access::AccessLog::start(access::Config {
            format: match self.format {
                LogFormat::Text => access::Format::Tab,
                LogFormat::Json => access::Format::Json,
            },
            target: self.path.clone().map_or(Target::Stdout, Target::File),
            ..access::Config::default()
        })?;
        Ok((log, Some(writer)))
    }
}

impl From<LogFormat> for logging::LogFormat {
    fn from(format: LogFormat) -> Self {
        match format {
            LogFormat::Text => Self::Text,
            LogFormat::Json => Self::Json,
        }
    }
}
