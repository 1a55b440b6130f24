//! The tunnel: HTTP/2 CONNECT over mutual TLS, client, server and pool (HBONE contract).
//!
//! - [`Pool`]: a worker's connections to other proxies; [`Pool::open`] yields a [`Tunnel`];
//! - [`Server`]: the other end, which hands each CONNECT to a handler as [`Incoming`];
//! - [`relay`]: the bytes between a socket and a tunnel;
//! - [`Tunnel::into_transport`] and [`client::open_within`]: a tunnel inside a tunnel;
//! - [`Authority`], [`Baggage`], [`Forwarded`], [`TraceParent`], [`ConnectRequest`]: the content of a CONNECT.
//!
//! Pool, connection tasks and stream tasks are meant to share one single-threaded runtime; the types
//! are `Send` nevertheless. This crate authenticates peers through `ambit-identity`. Policy, the choice of endpoints and
//! retries are left to its callers.

mod baggage;
pub mod client;
mod driver;
mod error;
mod forwarded;
mod keepalive;
mod load;
mod overhead;
mod paced;
mod pool;
mod relay;
mod request;
mod server;
mod settings;
mod traceparent;
mod tunnel;
mod windows;

pub use ambit_api::{Authority, AuthorityError};
pub use baggage::{Baggage, WorkloadKind};
pub use error::{Fault, OpenError, ServeError};
pub use forwarded::Forwarded;
pub use pool::{Count, InFlight, Key, Pool, PoolCounters, Reserved};
pub use relay::relay;
pub use request::{ConnectRequest, RequestError};
pub use server::{Accepted, Endpoints, Incoming, NotAnswered, Peer, Server};
pub use settings::{ClientSettings, ConnectionSettings, PoolSettings, ServerSettings};
pub use traceparent::TraceParent;
pub use tunnel::{Tunnel, TunnelStream, TunnelTransport};
pub use windows::{WindowBudget, WindowShare};
