//! The waypoint: terminates HBONE for the services and workloads bound to it, decides each request, and opens HBONE to the
//! endpoint that it chose. As a gateway it takes its clients' connections from outside the mesh instead ([`gateway`]).
//!
//! A request takes nine steps, each a module, in this order: [`accept`], [`protocol`], [`sanitise`], [`matching`],
//! [`authorize`] (after [`authenticate`] and [`external`]; then the conditions of [`traffic`]), [`filters`] (with its rate limits), [`balance`], [`attempt`] (or [`pass_through`]), [`answer`];
//! [`exchange`] leads it through them. Datagrams come to a gateway alone ([`datagrams`]).

pub mod accept;
pub mod activity;
pub mod answer;
pub mod app;
pub mod attempt;
pub mod authenticate;
pub mod authorize;
pub mod backend_policies;
pub mod backend_tls;
pub mod balance;
pub mod balancers;
pub mod body;
pub mod certificates;
pub mod client;
pub mod client_hello;
pub mod client_stream;
pub mod client_verifier;
pub mod clients;
pub mod config;
pub mod datagrams;
pub mod dump;
pub mod exchange;
pub mod explain;
pub mod external;
pub mod failure;
pub mod feed;
pub mod filters;
pub mod gateway;
pub mod io;
pub mod listeners;
pub mod matching;
pub mod messages;
pub mod mirror;
pub mod names;
pub mod pass_through;
pub mod policies;
pub mod protocol;
pub mod proxy;
pub mod proxy_protocol;
pub mod report;
pub mod sanitise;
pub mod session;
pub mod telemetry;
pub mod traffic;
pub mod trailers;
pub mod trusted_proxies;
pub mod upgrade;
pub mod upstream;
