//! The node proxy: identity, mutual TLS, policy and balancing at L4.
//!
//! One process a node serves every enrolled pod of it through sockets in the pods' own network
//! namespaces. `main` calls `config` and `app`; the tests call the same.

pub mod config;
pub mod proxy_protocol;
pub mod socks5;
pub mod workers;
pub mod zds;
