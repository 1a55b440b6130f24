//! What the end-to-end tests share: applications inside pods, steady loads, and waiting for conditions.
//!
//! The tests themselves are in `tests/`, the benchmark in `bench/`, the soak in `soak/`. Everything runs over real sockets in the
//! network namespaces of an [`ambit_local`] cluster; nothing here imitates a part of the mesh.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test that cannot go on says where and ends")]

pub mod access;
pub mod apps;
pub mod beds;
pub mod credentials;
pub mod dns;
pub mod frames;
pub mod h2spec;
pub mod http;
pub mod load;
pub mod usage;
pub mod wait;
