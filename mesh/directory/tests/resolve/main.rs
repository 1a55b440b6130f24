//! Where connections go: tables of what the control plane says, what is dialled, and the way that must come out.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod choice;
mod claims;
#[path = "../common/mod.rs"]
mod common;
mod endpoints;
mod names;
