//! The node proxy: identity, mutual TLS, policy and balancing at L4.
//!
//! One process a node serves every enrolled pod of it through sockets in the pods' own network
//! namespaces. `main` calls [`config`] and [`app`]; the tests call the same.

pub mod app;
pub mod config;
pub mod destination;
pub mod dns;
pub mod ejections;
pub mod error;
pub mod feed;
pub mod hostnames;
pub mod idle_memory;
pub mod inbound;
pub mod ondemand;
pub mod outbound;
pub mod passthrough;
pub mod pods;
pub mod proxy;
pub mod proxy_protocol;
pub mod report;
pub mod review;
pub mod socks5;
pub mod tunnels;
pub mod upstream;
pub mod zds;
