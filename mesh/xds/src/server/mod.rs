//! The delta server: the control plane applies changes to tables, subscribers get what differs.
//!
//! [`Table`] holds one type's resources, encoded once and shared, with a log of changes that is
//! compacted by name. A subscriber holds positions in that log, not a copy of what it was sent; only
//! on-demand subscribers also hold the names they were sent. [`Server`] is the gRPC service.
//!
//! Tables must hold their first complete state before the service is offered: to a subscriber that
//! reconnects, a resource that is not there is a resource that was removed.

pub(crate) mod answer;
mod batch;
mod bell;
mod metrics;
mod service;
pub(crate) mod state;
pub(crate) mod subscription;
pub(crate) mod table;

pub use metrics::ServerMetrics;
pub use service::{Admission, Server, ServerConfig};
pub use table::{Applied, Change, Publisher, Resource, Table, TableConfig};
