//! Inputs that were reported against other meshes, through real node proxies: who owns an address or a host, which port a
//! name means, what policies say that L4 cannot see, and who serves while pods leave.
//!
//! All tests share one cluster of two nodes; each has servers of its own. Needs root; fails without.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that can't go on says so and ends"
)]

mod addresses;
mod bed;
mod entries;
mod leaving;
mod policies;

use std::process::ExitCode;

use ambit_tests::beds::Trials;

fn main() -> ExitCode {
    let mut trials = Trials::new();
    addresses::add(&mut trials);
    entries::add(&mut trials);
    leaving::add(&mut trials);
    policies::add(&mut trials);
    trials.run()
}
