//! The contracts with other implementations. The tests act as istiod to our node proxy, and as Istio's node proxy to our control
//! plane. They encode and decode with the field numbers of the contract, independently of the types of the programs.
//!
//! Needs root for the namespaces of pods; fails without.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that can't go on says so by panicking")]

mod agent;
mod authority;
mod control;
mod drop_in;
mod grpc;
mod hbone;
mod istiod;
mod wire;
mod zds;

pub(crate) const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
pub(crate) const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";

/// A program beside this test's executable.
pub(crate) fn program(name: &str) -> std::path::PathBuf {
    let executable = std::env::current_exe().unwrap();
    let path = executable.parent().unwrap().parent().unwrap().join(name);
    assert!(path.exists(), "{} is not built", path.display());
    path
}
