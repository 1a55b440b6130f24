//! Settings of the flows that a proxy remembers.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ConfigError, Span};

/// The flows that the proxy remembers: who talked to whom, for `ambit authz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct FlowSettings {
    /// Whether connections and requests are counted by source and destination in memory, as `/flows` of the admin server shows them.
    pub enabled: bool,
    /// How long a flow is remembered after it was last seen: one minute to 30 days.
    pub keep: Span,
    /// Bytes that they may take, 65536 to 1073741824; new flows that do not fit are counted as lost.
    pub memory: usize,
}

impl Default for FlowSettings {
    fn default() -> Self {
        Self { enabled: true, keep: Span::from_secs(24 * 3600), memory: 4 << 20 }
    }
}

impl FlowSettings {
    /// Checks what types alone can't say.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key whose value can't work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(60..=30 * 24 * 3600).contains(&self.keep.get().as_secs()) {
            return Err(ConfigError::value("flows.keep", "is not between one minute and 30 days"));
        }
        if !(64 << 10..=1 << 30).contains(&self.memory) {
            return Err(ConfigError::value("flows.memory", "is not between 65536 and 1073741824"));
        }
        Ok(())
    }
}
