//! Everything that reads bytes from outside, as functions of bytes: the targets of the fuzzer.
//!
//! A target takes any bytes, and panics if what it tries does not hold what it promises: that what was read is
//! written as it was meant, that a decision is the naive one, that nobody is let in without proof. The fuzzer
//! (`make fuzz`) looks for such bytes; those that it found, and a small set that reaches what it reached, are in
//! `corpus/<target>/` and are tried again by the test `replay`. Netlink messages are not here: the kernel is no
//! stranger.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a target that can't go on has found something")]

mod config;
mod credentials;
mod directory;
mod discovery;
mod dns;
mod identity;
mod objects;
pub mod pieces;
mod proxy_protocol;
mod request_token;
mod requests;
mod socks5;
mod tls;
mod traffic;
mod tunnel;
mod waypoint;
mod zds;

/// A function of bytes that panics when something does not hold.
pub type Target = fn(&[u8]);

/// Every target, by name; `corpus/` has a directory for each.
pub fn targets() -> &'static [(&'static str, Target)] {
    &[
        ("admin-query", config::admin_query),
        ("authorizer-answer", waypoint::authorizer_answer),
        ("baggage", tunnel::baggage),
        ("certificate", identity::certificate),
        ("certificate-request", credentials::certificate_request),
        ("client-hello", waypoint::client_hello),
        ("connect", tunnel::connect),
        ("directory", directory::directory),
        ("dns-answer", dns::answer),
        ("dns-question", dns::question),
        ("forwarded", tunnel::forwarded),
        ("http-path", requests::path),
        ("http-policy", requests::policy),
        ("http-request", requests::request),
        ("http-route", requests::route),
        ("http-sniff", requests::sniff),
        ("issuer-keys", request_token::issuer_keys),
        ("objects", objects::objects),
        ("proxy-header", waypoint::proxy_header),
        ("proxy-protocol", proxy_protocol::header),
        ("request-token", request_token::request_token),
        ("resolv-conf", dns::resolv_conf),
        ("revocations", identity::revocations),
        ("socks5", socks5::handshake),
        ("spiffe", identity::spiffe),
        ("tls-record", tls::record),
        ("token", credentials::token),
        ("token-claims", credentials::claims),
        ("token-keys", credentials::key_set),
        ("traceparent", tunnel::traceparent),
        ("traffic-expression", traffic::expression),
        ("trust-roots", identity::roots),
        ("waypoint-config", waypoint::config),
        ("xds-client", discovery::client),
        ("xds-server", discovery::server),
        ("zds-agent", zds::agent),
        ("zds-proxy", zds::proxy),
        ("ztunnel-config", config::ztunnel),
    ]
}

/// The target of a name.
pub fn target(name: &str) -> Option<Target> {
    targets().iter().find(|(known, _)| *known == name).map(|(_, target)| *target)
}
