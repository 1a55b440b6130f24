//! Delta xDS, client and server.
//!
//! Both ends are cores without I/O ([`client`]'s session, [`server`]'s subscription) driven by a page
//! of async code each. Proxies use [`Client`]; the control plane uses [`Table`] and [`Server`].
//! What a resource means is the business of the crates that hand in handlers and resources.
//!
//! One convention goes beyond the protocol, in a field that it keeps for debugging:
//! `system_version_info` ends with `+` when more answers of the same state follow, so that a client
//! knows when a snapshot cut into small answers is complete. Servers that never say so are understood as
//! sending each state in one answer.

mod backoff;
pub mod client;
#[cfg(test)]
mod pair_tests;
pub mod server;

pub use backoff::Backoff;
pub use client::{
    BoxError, Client, ClientBuilder, ClientConfig, ClientMetrics, Connector, DemandError, Demanded, Driver,
    Found, Handler, Rejected, Update, ztunnel_node,
};
pub use server::{
    Admission, Applied, Change, Publisher, Resource, Server, ServerConfig, ServerMetrics, Table, TableConfig,
};

/// Ends `system_version_info` when more answers of the same state follow.
const MORE: char = '+';
/// The name that stands for every resource of a type.
const WILDCARD: &str = "*";
