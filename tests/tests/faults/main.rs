//! Faults below the mesh: links, peers, disks, readers. Unaffected connections continue, affected ones fail in bounded time or
//! wait, and everything recovers by itself. Needs root; fails without.
//!
//! The lifecycle tests cover shortage of descriptors and reused addresses, those of hostile peers slow handshakes.

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
