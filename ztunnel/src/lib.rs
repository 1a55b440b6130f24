//! The node proxy: identity, mutual TLS, policy and balancing at L4.
//!
//! One process a node serves every enrolled pod of it through sockets in the pods' own network
//! namespaces. `main` calls [`config`] and [`app`]; the tests call the same.

pub mod app;
pub mod config;
pub mod connection;
pub mod directory;
pub mod dns;
pub mod explain;
pub mod inbound;
pub mod outbound;
pub mod pods;
pub mod proxy;
pub mod zds;
