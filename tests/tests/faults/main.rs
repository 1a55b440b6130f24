//! Faults of what lies below the mesh: links, peers, disks, readers. What is not concerned goes on unharmed, what
//! is concerned fails in bounded time or waits, everything recovers by itself. Needs root; fails without.
//!
//! Beside these: descriptors run out and addresses change hands in the lifecycle tests, thousands of slow handshakes
//! in those of hostile peers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that can't go on says so and ends"
)]

#[path = "../lifecycle/bed.rs"]
#[allow(dead_code, reason = "the rest of it serves the lifecycle tests")]
mod bed;

mod clocks;
mod disk;
mod links;
mod peers;
mod readers;

use ambit_local::Ztunnel;

/// Open descriptors of a node proxy.
fn descriptors(ztunnel: &Ztunnel) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", ztunnel.pid().unwrap())).unwrap().count()
}

/// Resident memory of a node proxy, bytes.
fn resident(ztunnel: &Ztunnel) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/statm", ztunnel.pid().unwrap())).unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
