//! The ports of the mesh. Other implementations use the same, so none is a setting of a pod.

/// Outbound capture in a pod: every TCP connection that it opens.
pub const OUTBOUND: u16 = 15001;
/// Inbound plaintext capture in a pod: anything that is not [`INBOUND_HBONE`].
pub const INBOUND_PLAINTEXT: u16 = 15006;
/// Inbound HBONE: of pods, waypoints and gateways.
pub const INBOUND_HBONE: u16 = 15008;
/// The DNS proxy of a pod, UDP and TCP, on loopback.
pub const DNS: u16 = 15053;
/// SOCKS5 outbound, on a pod's loopback, off by default.
pub const SOCKS5: u16 = 15080;
/// The control plane: xDS and certificates.
pub const CONTROL_PLANE: u16 = 15012;
/// The admin interface of a program, on loopback.
pub const ADMIN: u16 = 15000;
/// Metrics of a program.
pub const METRICS: u16 = 15020;
/// Readiness of a program.
pub const READINESS: u16 = 15021;
