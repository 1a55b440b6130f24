//! The tunnel over real sockets and real certificates.

mod double;
mod ends;
#[allow(unreachable_pub, reason = "shared by the modules of this program")]
mod harness;
mod hostile;
mod open;
mod pool;
