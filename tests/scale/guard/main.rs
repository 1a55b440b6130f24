//! `ambit-guard NAME`: runs one hot function a fixed number of times, for callgrind to count.
//!
//! Called by `tests/guard.rs` under `valgrind --tool=callgrind --toggle-collect`, which counts within the functions whose names begin with
//! `guarded_` and nowhere else: what they work on is made before. Everything is the same in every run, but for the seeds of hash maps.

#![allow(missing_docs, reason = "a program; its modules document themselves")]

mod access;
mod decide;
mod encode;
mod records;
mod resolve;
mod waypoint;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("resolve-by-vip") => resolve::by_vip(),
        Some("resolve-by-vip-near") => resolve::by_vip_near(),
        Some("resolve-by-address") => resolve::by_address(),
        Some("apply-change") => resolve::apply_change(),
        Some("decide-by-namespace") => decide::by_namespace(),
        Some("decide-by-name") => decide::by_name(),
        Some("records-bulk") => records::bulk(),
        Some("records-small") => records::small(),
        Some("xds-encode") => encode::resources(),
        Some("xds-push") => encode::push(),
        Some("waypoint-match") => waypoint::matching(),
        Some("waypoint-change") => waypoint::change(),
        Some("waypoint-compile") => waypoint::compile(),
        Some("waypoint-decide") => waypoint::decide(),
        Some("waypoint-sanitise") => waypoint::sanitised(),
        Some("waypoint-fields") => waypoint::fields(),
        Some("access-line") => access::line(),
        other => bail!("no such function: {other:?}"),
    }
}
