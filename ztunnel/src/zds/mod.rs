//! The node agent's side channel: which pods to serve, their namespaces and listeners.
//!
//! [`session`] says what packets mean; [`client`] dials, receives and answers.

pub mod client;
pub mod session;
