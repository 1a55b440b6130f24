//! The agent with real namespaces and proxies that speak ZDS over its real socket. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod bed;
#[path = "../common/mod.rs"]
mod common;
mod failures;
mod probes;
mod reconciling;
mod restarts;
mod serving;
