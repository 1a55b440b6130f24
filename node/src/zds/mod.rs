//! The ZDS server: tells node proxies which pods to serve (contracts.md, section 3).
//!
//! [`hub`] decides what each proxy is to be told, without I/O; [`Server`] talks. The agent changes pods
//! through [`Pods`].

pub mod hub;
mod message;
mod server;

pub use message::{MAX_PACKET, MessageError, Request, decode_hello, decode_response, encode_request};
pub use server::{Pods, ServedPod, Server, ZdsError, ZdsEvent};
