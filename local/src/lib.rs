//! A cluster on one machine: nodes and pods as network namespaces.
//!
//! `ambit up` and the end-to-end tests use this crate. It builds nodes, links and pods over netlink, runs the workloads of a
//! directory of manifests as processes, replaces the API server, the controllers, the kubelets and kube-proxy as far as a mesh
//! depends on them, and starts `ambit-control` and one `ztunnel` for each node. It is not Kubernetes: it pulls no images, does
//! not isolate file systems, and stores nothing permanently.

pub mod addresses;
mod agent;
mod capture;
mod cluster;
mod dns;
mod error;
mod fabric;
mod http;
pub mod isolate;
mod kubelet;
pub mod link;
mod manifest;
mod metrics;
mod pod;
mod process;
mod rollout;
mod sandbox;
mod services;
pub mod token;
mod vip;

pub use addresses::Addresses;
pub use capture::{Capture, Captured, DEFAULT_LIMIT, Packet};
pub use cluster::{CLUSTER_ID, Cluster, ClusterBuilder, PATIENCE, Program, SYSTEM_NAMESPACE, Ztunnel};
pub use error::{Error, Result};
pub use http::Stream;
pub use kubelet::container::exit_code;
pub use kubelet::status::{ContainerView, PodView, Redirection, State};
pub use manifest::Key;
pub use metrics::{Metrics, Sample};
pub use pod::{DATAPLANE_MODE, Pod, PodOptions, REDIRECTION};
pub use process::{Command, Process, die_with_parent};
pub use sandbox::Sandbox;
