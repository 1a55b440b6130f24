//! Delta xDS, client and server.
//!
//! Both ends are cores without I/O ([`client`]'s session, [`server`]'s subscription) driven by a page
//! of async code each. Proxies use [`Client`]; the control plane uses [`Store`] and [`Server`].
//! The meaning of resources is left to the crates that provide handlers and resources.
//!
//! One convention goes beyond the protocol, in a field that it keeps for debugging: `system_version_info` carries the
//! number of the batch that an answer belongs to, and ends with `+` when more answers of that batch follow, of any type. A
//! client applies a batch at once, so that a workload and the policies that it lists become visible together. Servers that
//! write another form are understood as sending each state in one answer.

mod backoff;
mod batch_mark;
pub mod client;
#[cfg(test)]
mod pair_tests;
pub mod server;

pub use backoff::Backoff;
pub use client::{
    BoxError, Client, ClientBuilder, ClientConfig, ClientMetrics, Connector, DemandError, Demanded, Driver,
    Found, Handler, PARTIAL_STATE, Rejected, Termination, Update, waypoint_node, ztunnel_node,
};
pub use server::{
    Admission, Applied, Change, Convergence, Permit, Publisher, Resource, Server, ServerConfig,
    ServerMetrics, Store, StoreConfig, StreamStatus, Streams, Subscriber, View,
};

/// The name that stands for every resource of a type.
const WILDCARD: &str = "*";
