//! The mesh while it changes, under the load of quality.md: 200 requests a second on new and kept connections.
//!
//! Namespaces are labelled and unlabelled, node proxies killed, replaced, starved and missing, endpoints die and
//! addresses change hands, the control plane goes away, certificates are renewed. Needs root; fails without.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that can't go on says so and ends"
)]

mod addresses;
mod bed;
mod control;
mod endpoints;
mod enrolment;
mod proxies;
