//! Clients outside the mesh reach services in it through a gateway.
//!
//! All tests share one cluster of two nodes; each has a Gateway or hosts of its own. Needs root; fails without.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that can't go on says so and ends"
)]

mod bed;
mod client_certificates;
mod datagrams;
mod drain;
mod edge;
mod filters;
mod h2spec;
mod hops;
mod hostile;
mod hostile_http2;
mod ingress;
mod limits;
mod sets;
mod thin;
mod tls;
mod traffic;
mod waypoints;

use std::process::ExitCode;

use ambit_tests::beds::Trials;

fn main() -> ExitCode {
    let mut trials = Trials::new();
    thin::add(&mut trials);
    tls::add(&mut trials);
    traffic::add(&mut trials);
    client_certificates::add(&mut trials);
    sets::add(&mut trials);
    hostile::add(&mut trials);
    hostile_http2::add(&mut trials);
    drain::add(&mut trials);
    h2spec::add(&mut trials);
    hops::add(&mut trials);
    limits::add(&mut trials);
    waypoints::add(&mut trials);
    ingress::add(&mut trials);
    datagrams::add(&mut trials);
    filters::add(&mut trials);
    trials.run()
}
