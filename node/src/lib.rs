//! The node agent's library: which pods are in the mesh, and how they are kept in.
//!
//! The node's programs and `local` use it through [`Agent`]. It knows no Kubernetes API: callers bring
//! pods. Invariants: rules are in before anybody is told that a pod is in; nothing here cuts a
//! connection that is older than the rules; a pod that was served is never called unserved while it is
//! in, so that its peers never fall back to plaintext.
//!
//! - [`enrol`]: the decision who is in;
//! - [`redirect`]: what a pod's namespace contains, over [`nft`] and routing netlink;
//! - [`listeners`]: the pods' listening sockets;
//! - [`zds`]: telling node proxies;
//! - [`registry`]: what survives a restart.

mod agent;
pub mod enrol;
pub mod listeners;
pub mod nft;
pub mod ports;
pub mod redirect;
pub mod registry;
pub mod zds;

pub use agent::{Agent, AgentConfig, AgentError, PodSpec, PodState, PodStatus, StatusEvent};
