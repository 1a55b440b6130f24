//! L4 authorization: policies compiled when they arrive, and their evaluation for a connection.
//!
//! [`Policy`] is one compiled `istio.security.Authorization`; [`PolicySet`] holds all of them, indexed so that a
//! decision costs about the same with ten policies as with ten thousand. The set is persistent: cloning it is cheap and a
//! clone never changes. The directory keeps it in its snapshots; ztunnel asks for a [`Verdict`] per connection and compares
//! [`Stamp`]s to learn whose live connections must be decided again. Never does I/O, never allocates for a decision.

mod compile;
mod index;
mod matcher;
mod name;
mod request;
mod set;

pub use compile::{Action, CompileError, Field, Policy, Scope};
pub use name::{PolicyList, PolicyName};
pub use request::{Decision, Peer, Request, Verdict, evaluate};
pub use set::{PolicySet, Stamp};
