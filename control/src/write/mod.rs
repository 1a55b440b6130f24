//! What the control plane writes to the API server, by one replica: the holder of the [`lease`]. [`roots`] are written to
//! every namespace and, by `trust_bundle`, to the cluster, `status` to objects; `classes` and [`deployments`] make the classes
//! of waypoints and what runs for a waypoint's Gateway, `ingress` the Gateways that serve Ingresses.
//!
//! Everything is planned by pure functions from what should be and what is, so that nothing is written that is right
//! already, and a replica that takes the lease over puts everything right.

mod allocation;
mod ancestors;
pub(crate) mod classes;
mod conditions;
pub mod deployments;
pub(crate) mod ingress;
pub mod lease;
pub mod leftovers;
mod pending_requests;
pub(crate) mod pod_certificates;
mod pod_request;
pub(crate) mod queue;
mod retries;
pub mod roots;
mod routes;
pub(crate) mod status;
pub(crate) mod trust_bundle;
mod write_backoff;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Counters of writes.
#[derive(Debug, Default)]
pub struct WriteMetrics {
    /// 1 while this replica holds the lease.
    pub(crate) leads: AtomicU64,
    /// Objects written.
    pub(crate) written: AtomicU64,
    /// Writes that failed.
    pub(crate) failed: AtomicU64,
    /// Certificates signed for PodCertificateRequests.
    pub(crate) certificates_issued: AtomicU64,
    /// PodCertificateRequests denied or failed.
    pub(crate) certificates_refused: AtomicU64,
    /// Of objects that others change back.
    pub(crate) backoffs: Arc<write_backoff::WriteBackoffMetrics>,
}
