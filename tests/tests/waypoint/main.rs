//! Requests through a client's ztunnel, a waypoint and a server's ztunnel, each with its certificate.
//!
//! All tests share one cluster of two nodes and one waypoint; each has services of its own. Needs root; fails without.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that can't go on says so and ends"
)]

mod authorization;
mod backend_tls;
mod bed;
mod canary;
mod collector;
mod connects;
mod drain;
mod egress;
mod external;
mod h2spec;
mod hardening;
mod http2;
mod limits;
mod policy;
mod programs;
mod required;
mod resilience;
mod routing;
mod sessions;
mod streams;
mod tasks;
mod telemetry;
mod thin;
mod traffic;
mod tutorials;
mod wire;

use std::process::ExitCode;

use ambit_tests::beds::Trials;
use ambit_tests::http;

fn main() -> ExitCode {
    let mut trials = Trials::new();
    thin::add(&mut trials);
    routing::add(&mut trials);
    sessions::add(&mut trials);
    hardening::add(&mut trials);
    policy::add(&mut trials);
    traffic::add(&mut trials);
    telemetry::add(&mut trials);
    collector::add(&mut trials);
    tutorials::add(&mut trials);
    authorization::add(&mut trials);
    required::add(&mut trials);
    external::add(&mut trials);
    resilience::add(&mut trials);
    connects::add(&mut trials);
    canary::add(&mut trials);
    streams::add(&mut trials);
    backend_tls::add(&mut trials);
    egress::add(&mut trials);
    tasks::add(&mut trials);
    limits::add(&mut trials);
    http2::add(&mut trials);
    h2spec::add(&mut trials);
    wire::add(&mut trials);
    programs::add(&mut trials);
    drain::add(&mut trials);
    trials.run()
}
