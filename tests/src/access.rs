//! The node proxies' access log, written as JSON to a file.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::wait;

/// The access log of one node proxy.
#[derive(Debug, Clone)]
pub struct AccessLog(PathBuf);

impl AccessLog {
    /// The log of a node in `directory`.
    pub fn of(directory: &Path, node: usize) -> Self {
        Self(directory.join(format!("access-{node}.json")))
    }

    /// What key `accessLog` of the node proxy's configuration must be for it to write here.
    pub fn config(&self) -> Value {
        json!({ "format": "json", "path": self.0 })
    }

    /// All lines so far.
    pub fn lines(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.0).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for a line; gives the first.
    ///
    /// # Panics
    /// When none comes; `what` says which.
    pub async fn wait_for(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let found = || async { self.lines().into_iter().find(&is_it).ok_or("no such line") };
        wait::for_ok(&format!("access log of {what}"), wait::SOON, found).await
    }
}
