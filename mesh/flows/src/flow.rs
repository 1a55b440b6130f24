//! A row of the table as the admin server shows it and commands read it.

use serde::{Deserialize, Serialize};

/// What was observed, and by which kind of proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Kind {
    /// Connections that a node proxy let in or refused; what decides about access to a workload.
    Inbound,
    /// Connections from a pod of the node.
    Outbound,
    /// Connections that a waypoint passed on unread or refused.
    WaypointConnection,
    /// Requests at a waypoint or gateway.
    Request,
}

/// One end.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Side {
    /// Namespace; empty if it is not known.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub namespace: Box<str>,
    /// What the pod belongs to, such as its Deployment; empty if it is not known.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub workload: Box<str>,
    /// SPIFFE id that it proved; empty if it proved none.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub identity: Box<str>,
}

/// A service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceName {
    /// Its namespace.
    pub namespace: Box<str>,
    /// Its host name.
    pub host: Box<str>,
}

/// Connections or requests that have all of this in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// What was observed.
    pub kind: Kind,
    /// The client.
    pub source: Side,
    /// The server; at a waypoint empty for what is dialled as a service.
    pub destination: Side,
    /// The service that was dialled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
    /// Port of the workload at a node proxy, of the service at a waypoint.
    pub port: u16,
    /// Method of requests; empty for connections.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub method: Box<str>,
    /// Path of requests, in which `{*}` stands for a segment that varies and `{**}` for anything; empty for connections.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub path: Box<str>,
    /// Path of one of them, cut to a length.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub example_path: Box<str>,
    /// Host of one of them.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub example_host: Box<str>,
    /// How many policy did not deny.
    pub allowed: u64,
    /// How many policy denied.
    pub denied: u64,
    /// How many of those that were not denied failed.
    pub failed: u64,
    /// When the first one was counted, in seconds since the epoch.
    pub first_seen: u64,
    /// When the last one was counted.
    pub last_seen: u64,
}

/// What a table could not count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Lost {
    /// Observations of which there were too many at once.
    pub queue: u64,
    /// Observations for which there was no room for a row.
    pub full: u64,
}

/// A proxy's table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Whether flows are observed at all.
    pub enabled: bool,
    /// Since when, in seconds since the epoch.
    pub since: u64,
    /// How long a row is kept after it was last seen, in seconds.
    pub keep: u64,
    /// Bytes that rows take and may take.
    pub bytes: u64,
    /// The most that they may take.
    pub limit: u64,
    /// What could not be counted.
    pub lost: Lost,
    /// The rows, sorted.
    pub flows: Vec<Flow>,
}
