//! A real two-node Kubernetes on this machine: etcd, API server, controllers, scheduler, and nodes with containerd,
//! kubelet and kube-proxy, each node in network, mount, process-id and host-name namespaces of its own.
//!
//! The tests in `tests/` and `make cluster` stand on it. [`Cluster::start`] builds what is missing, starts the
//! program `ambit-cluster` as the cluster's *supervisor* and talks to it. The supervisor holds every namespace and every
//! process; when it ends, however it ends, the kernel ends the rest. It needs root, Go and the Debian packages of
//! `tests/packages.sh`, and no container registry.

pub mod cgroup;
pub mod cluster;
pub mod conformance;
mod error;
pub mod image;
pub mod kubectl;
pub mod layout;
pub mod mesh;
pub mod node;
pub mod pki;
pub mod plan;
pub mod programs;
pub mod request;
pub mod supervisor;
pub mod wait;

pub use cluster::{Cluster, Options};
pub use error::{Error, Result};
pub use kubectl::Kubectl;
