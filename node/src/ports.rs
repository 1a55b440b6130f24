//! The ports of a mesh pod (contracts.md, section 1).

/// Outbound capture: every TCP connection of the pod.
pub const OUTBOUND: u16 = 15001;
/// Inbound plaintext capture: anything that is not [`INBOUND_HBONE`].
pub const INBOUND_PLAINTEXT: u16 = 15006;
/// Inbound HBONE.
pub const INBOUND_HBONE: u16 = 15008;
/// The DNS proxy, UDP and TCP, on loopback.
pub const DNS: u16 = 15053;
/// SOCKS5 outbound, on loopback, off by default.
pub const SOCKS5: u16 = 15080;
