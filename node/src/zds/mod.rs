//! The ZDS server: sends node proxies the pods to serve (ZDS contract).
//!
//! [`hub`] decides what to send to each proxy, without I/O; [`Server`] sends it. The agent changes pods through
//! [`ServedPods`].

pub mod hub;
mod message;
mod server;

pub use message::{MAX_PACKET, MessageError, Request, decode_hello, decode_response, encode_request};
pub use server::{ServedPod, ServedPods, Server, Times, ZdsError, ZdsEvent};
