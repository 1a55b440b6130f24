//! The work of a kubelet for a pod: its containers as processes, their probes, restarts and status.
//!
//! The cluster makes a pod's namespaces and decides when it starts and stops; from then on one task a pod, here,
//! runs it and publishes what it sees.

pub(crate) mod configuration;
pub(crate) mod container;
pub(crate) mod lifecycle;
pub(crate) mod plan;
pub(crate) mod probe;
pub(crate) mod status;
pub(crate) mod volumes;
