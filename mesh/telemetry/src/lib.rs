//! Metrics, access log, program log and the servers that show them.
//!
//! Programs make a [`Registry`], resolve label sets to handles once ([`TcpMetrics`]), write one
//! [`access::Entry`] per connection and serve [`admin::Admin`], metrics and [`Readiness`]. Nothing here
//! ever blocks the data path: counters are atomics, lines go through bounded queues that drop and count.

pub mod access;
pub mod admin;
pub mod heap;
pub mod http;
pub mod logging;
mod readiness;
mod registry;
mod requests;
mod sink;
pub mod tcp;

pub use access::AccessLog;
pub use admin::Admin;
pub use logging::{LevelError, LevelHandle};
pub use readiness::{Readiness, ReadinessTask};
pub use registry::{Counter, Gauge, Registry};
pub use requests::{Outcome, RequestMetrics, RequestSeries};
pub use sink::{LogWriter, Target};
pub use tcp::TcpMetrics;
