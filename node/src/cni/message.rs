//! Requests of the plugin and answers of the agent: one JSON packet each, over a `SOCK_SEQPACKET` socket.
//!
//! The plugin on the host and the agent may be of different versions during an upgrade: fields that one of them does not
//! know are ignored, and missing ones have defaults.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Bytes that a packet has at most. The kernel's default for a socket's buffer is 208 KiB.
pub const MAX_PACKET: usize = 128 * 1024;

/// The pod of a sandbox, as the container runtime names it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodRef {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid; empty if the runtime does not say it.
    pub uid: String,
}

/// A sandbox and its network namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// The pod.
    pub pod: PodRef,
    /// The path of its network namespace, as the host sees it.
    pub netns_path: Option<PathBuf>,
    /// The addresses that the plugins before gave it; empty if there was none before.
    pub ips: Vec<IpAddr>,
}

/// A request of the plugin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "command")]
pub enum Request {
    /// A sandbox starts. The packet carries the descriptor of its network namespace.
    Add(Sandbox),
    /// Is the sandbox's pod as it should be? The packet carries the descriptor.
    Check(Sandbox),
    /// A sandbox has ended.
    Del(Sandbox),
    /// All sandboxes that have not ended.
    Gc {
        /// Their ids.
        valid: Vec<String>,
    },
}

/// The agent's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "answer")]
pub enum Answer {
    /// It is done, or there is nothing to do.
    Done,
    /// It cannot be done now.
    TryAgain {
        /// Why.
        reason: String,
    },
    /// The pod is not as it should be.
    NotAsPlanned {
        /// What is not.
        reason: String,
    },
}
