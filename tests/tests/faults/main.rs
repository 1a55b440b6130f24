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
mod halves;
mod links;
mod peers;
mod readers;
