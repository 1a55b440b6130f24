//! The tunnel over real sockets and real certificates.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on must fail")]

mod double;
mod ends;
mod floods;
#[allow(unreachable_pub, reason = "shared by the modules of this program")]
mod harness;
mod hostile;
mod open;
mod pool;
mod shares;
mod trust;
