//! The delta server: the control plane applies changes to a store, subscribers get what differs.
//!
//! [`Store`] holds resources by type, encoded once and shared, with a log of changes that is
//! compacted by name. A subscriber holds positions in that log, not a copy of what it was sent; only
//! on-demand subscribers also hold the names they were sent. [`Server`] is the gRPC service.
//!
//! A store must hold its first complete state before the service is offered: to a subscriber that
//! reconnects, a resource that is not there is a resource that was removed.

mod admission;
pub(crate) mod answer;
mod batch;
mod metrics;
mod observed;
mod request;
mod service;
pub(crate) mod shared;
pub(crate) mod state;
pub(crate) mod store;
mod stream;
pub(crate) mod subscription;
mod wakeup;

pub use admission::{Admission, Permit, Subscriber, View};
pub use metrics::ServerMetrics;
pub use observed::{Convergence, StreamStatus, Streams};
pub use service::{Server, ServerConfig};
pub use store::{Applied, Change, Publisher, Resource, Store, StoreConfig};
