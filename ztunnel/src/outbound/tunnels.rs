//! What tunnel connections are shared by, and their settings.

use std::net::SocketAddr;
use std::sync::Arc;

use ambit_hbone::{ClientSettings, ConnectionSettings, PoolSettings, ServerSettings};
use ambit_identity::SpiffeId;
use ambit_net::NetnsId;

use crate::config::Config;

/// What a pooled connection may be shared by: the connections of one pod to one workload at one address. An address that
/// is used again by another workload has another key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// Uid of the source pod. Pods of one identity do not share connections: each leaves from its own
    /// namespace and address, and goes with it.
    pub origin: Arc<str>,
    /// The source pod's network namespace. A restarted sandbox keeps the uid, and its old connections are dead.
    pub netns: NetnsId,
    /// The identity that our side presents.
    pub source: SpiffeId,
    /// Uid of the destination workload, or of the waypoint or gateway.
    pub destination: Arc<str>,
    /// Where its proxy listens.
    pub address: SocketAddr,
}

/// Settings of the pools.
pub(crate) fn pool_settings(config: &Config) -> PoolSettings {
    let client = ClientSettings {
        connection: connection_settings(config),
        handshake_timeout: config.limits.handshake_timeout.get(),
        // One attempt of several: a proxy that does not answer must leave time for another one.
        connect_timeout: config.limits.attempt_timeout.get(),
        ..ClientSettings::default()
    };
    PoolSettings { client, ..PoolSettings::default() }
}

/// Settings of the inbound side.
pub(crate) fn server_settings(config: &Config) -> ServerSettings {
    ServerSettings {
        connection: connection_settings(config),
        handshake_timeout: config.limits.handshake_timeout.get(),
        connect_timeout: config.limits.attempt_timeout.get(),
        ..ServerSettings::default()
    }
}

fn connection_settings(config: &Config) -> ConnectionSettings {
    ConnectionSettings {
        idle_timeout: config.limits.pool_idle.get(),
        drain_idle: config.proxy.drain_idle.get(),
        ..ConnectionSettings::default()
    }
}
