//! The node agent's library: which pods are enrolled in the mesh, and their redirection.
//!
//! The node's programs and `local` use it through [`Agent`], which knows no Kubernetes API: callers bring pods, as
//! [`kubernetes`] and [`cni`] do in the program `ambit-node`. Invariants: rules are in before anybody is informed that a pod is enrolled; no connection that is older than the rules is cut; a
//! pod that was served stays `enabled` while it is enrolled, so that its peers never fall back to plaintext.
//!
//! - [`mod@enrol`]: the decision which pods are enrolled;
//! - [`redirect`]: what a pod's namespace contains, over [`nft`] and routing netlink;
//! - [`probes`]: the host's rules for kubelet's probes;
//! - [`discovery`]: finding the network namespaces of a node;
//! - [`listeners`]: the pods' listening sockets;
//! - [`zds`]: informing node proxies;
//! - [`registry`]: what survives a restart;
//! - [`capabilities`]: what the node's kernel and the agent's privileges allow;
//! - [`kubernetes`]: pods from the API server, and what is written back;
//! - [`cni`]: the CNI plugin, its installation and the agent's side of it;
//! - [`app`] and [`config`]: the program `ambit-node`.

mod agent;
pub mod app;
pub mod capabilities;
pub mod cni;
pub mod config;
pub mod discovery;
pub mod enrol;
pub mod kubernetes;
pub mod listeners;
pub mod nft;
pub mod probes;
pub mod redirect;
pub mod registry;
pub mod zds;

pub use agent::{
    Agent, AgentConfig, AgentError, ErrorKind, Health, PodSpec, PodState, PodStatus, Reconciled, StatusEvent,
};
