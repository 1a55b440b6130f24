//! Step 5: whether the client may make this request. Decided anew for each.

use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use ambit_policy::{HttpRequest, Token, Verdict};
use http::HeaderMap;
use http::request::Parts;

use crate::accept::Inbound;
use crate::failure::Failure;
use crate::proxy::Published;
use crate::sanitise::Sane;

/// Checks that the client is still trusted, as its certificate may have been revoked since its tunnel was opened, and that
/// policies allow the request.
///
/// # Errors
/// [`Failure::Denied`].
pub fn authorize(
    published: &Published,
    inbound: &Inbound,
    sane: &Sane,
    parts: &Parts,
    token: Option<&Token>,
) -> Result<(), Failure> {
    let request = HttpRequest {
        authority: &sane.authority,
        host: &sane.host,
        method: parts.method.as_str(),
        path: parts.uri.path(),
        headers: &parts.headers,
        remote_ip: remote_ip(inbound.source.ip(), inbound.trusted_forwarder, &parts.headers),
        server_name: None,
        token,
    };
    decide(published, inbound, Some(&request))
}

/// The same for a connection whose bytes are passed on unread.
///
/// # Errors
/// [`Failure::Denied`].
pub fn authorize_connection(published: &Published, inbound: &Inbound) -> Result<(), Failure> {
    decide(published, inbound, None)
}

fn decide(
    published: &Published,
    inbound: &Inbound,
    request: Option<&HttpRequest<'_>>,
) -> Result<(), Failure> {
    let proxy = &inbound.worker.proxy;
    let rechecked = proxy.trust.recheck(&inbound.certificate, SystemTime::now());
    rechecked.map_err(|error| Failure::Denied(error.to_string()))?;
    let identity = inbound.certificate.identity();
    let verdict = published.policies.decide(&inbound.destination, identity, inbound.source.ip(), request);
    note_dry_run(inbound, &verdict);
    if verdict.allowed() { Ok(()) } else { Err(Failure::Denied(verdict.decision.to_string())) }
}

fn note_dry_run(inbound: &Inbound, verdict: &Verdict) {
    if verdict.dry_run_differs() {
        inbound.worker.proxy.tallies.dry_run_differs.fetch_add(1, Ordering::Relaxed);
        tracing::info!(
            source = %inbound.source, peer = %inbound.certificate.identity(), to = %inbound.default_host,
            decision = ?verdict.decision, dry_run = ?verdict.dry_run, "a dry-run policy would decide otherwise"
        );
    }
}

/// The address of the first client: the peer's own, or what a trusted forwarder says of it in the entry of `X-Forwarded-For`
/// before the one that stands for the forwarder itself. `None` where that can't be read.
fn remote_ip(client: IpAddr, is_trusted_forwarder: bool, headers: &HeaderMap) -> Option<IpAddr> {
    if !is_trusted_forwarder {
        return Some(client);
    }
    // Sanitising leaves one line, whose last entry is the forwarder.
    let chain = headers.get("x-forwarded-for")?.to_str().ok()?;
    match chain.rsplit(',').nth(1) {
        Some(entry) => entry.trim().parse().ok(),
        None => Some(client),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forwarders_claim_counts_only_if_it_is_trusted() {
        let client = IpAddr::from([10, 0, 0, 1]);
        for (trusted, chain, remote) in [
            (false, "203.0.113.7, 10.0.0.1", Some(client)),
            (true, "203.0.113.7, 10.0.0.1", Some(IpAddr::from([203, 0, 113, 7]))),
            (true, "198.51.100.1, 203.0.113.7, 10.0.0.1", Some(IpAddr::from([203, 0, 113, 7]))),
            (true, "10.0.0.1", Some(client)),
            (true, "unknown, 10.0.0.1", None),
        ] {
            let headers = HeaderMap::from_iter([(
                http::HeaderName::from_static("x-forwarded-for"),
                http::HeaderValue::from_static(chain),
            )]);
            assert_eq!(remote_ip(client, trusted, &headers), remote, "{trusted} {chain}");
        }
    }
}
