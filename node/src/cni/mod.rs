//! The CNI plugin `ambit-cni`: the program that container runtimes call, its installation on the host, and the agent's
//! side of their conversation.
//!
//! The plugin decides nothing about pods. It reports each sandbox to the agent over a socket and fails when the agent
//! cannot answer, so that no pod of the mesh starts without its redirection. The one decision that it makes alone is
//! which pods never wait for the agent: those of the excluded namespaces, which its configuration on the host names.
//! Ambit's own pods are among them. That holds after a reboot too, when neither agent nor API server is there.
//!
//! - [`spec`]: what the CNI specification says about configurations, results and errors;
//! - [`plugin`]: the program;
//! - [`message`]: requests of the plugin and answers of the agent;
//! - [`server`]: the agent's socket;
//! - [`conflist`]: the plugin's entry in a network configuration list;
//! - [`install`]: the plugin and its entry on the host.

pub mod conflist;
pub mod install;
pub mod message;
pub mod plugin;
pub mod server;
pub mod spec;

/// The plugin's type, which is the name of its program.
pub const PLUGIN: &str = "ambit-cni";
