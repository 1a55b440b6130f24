//! The mesh while it changes, under load: 200 requests a second on new and kept connections.
//!
//! Namespaces are labelled and unlabelled, node proxies killed, replaced, starved and missing, agents stopped and
//! nodes rebooted, endpoints die and addresses change hands, the control plane is stopped, certificates and roots are
//! renewed. Needs root; fails without.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that can't go on says so and ends"
)]

mod addresses;
mod agents;
mod bed;
mod bypass;
mod control;
mod endpoints;
mod enrolment;
mod hold;
mod latency;
mod proxies;
mod roots;
mod wire;
