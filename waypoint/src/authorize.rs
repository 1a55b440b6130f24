//! Step 5: whether the client may make this request. Decided anew for each.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use ambit_identity::{PeerCertificate, PeerError, Trust};
use ambit_policy::{Content, HttpRequest, Token, Verdict};
use ambit_route::Rule;
use http::request::Parts;
use http::{HeaderMap, Method};

use crate::accept::Inbound;
use crate::client_hello::Opening;
use crate::external::Authorizer;
use crate::failure::Failure;
use crate::proxy::Published;
use crate::sanitise::Sane;
use crate::traffic::{self, RequestView};

/// How long connections of a client that lost its root may go on, as at node proxies.
const FINISH_TIME: Duration = Duration::from_secs(2);

/// Checks that the client is still trusted, as its certificate may have been revoked since its tunnel was opened, that
/// policies allow the request, and that the conditions of those for its destination and its rule hold.
///
/// # Errors
/// [`Failure::Denied`].
pub fn authorize(
    published: &Published,
    inbound: &Inbound,
    sane: &Sane,
    parts: &Parts,
    token: Option<&Token>,
    rule: Option<&Rule>,
) -> Result<(), Failure> {
    decide(published, inbound, Sent::Request(RequestView { sane, head: Head::of(parts), token, rule }))
}

/// Checks what no authorizer changes, before one is asked: the client is still trusted, and no policy denies the request whatever
/// they say.
///
/// # Errors
/// [`Failure::Denied`].
pub fn authorize_asking(
    published: &Published,
    inbound: &Inbound,
    sane: &Sane,
    parts: &Parts,
    token: Option<&Token>,
) -> Result<(), Failure> {
    still_trusted(inbound)?;
    let identity = inbound.identity();
    let request = request(inbound, sane, Head::of(parts), token);
    let (destination, source) = (&inbound.destination, inbound.source.ip());
    match published.policies.denied_whatever_is_changed(destination, identity, source, &request) {
        Some(decision) => Err(Failure::Denied(decision.to_string())),
        None => Ok(()),
    }
}

/// The tunnel was accepted with a certificate that was valid. Expired since, it is good for what the tunnel carries until the
/// client has had time to open another. Clients of a gateway may have none.
fn still_trusted(inbound: &Inbound) -> Result<(), Failure> {
    let Some(certificate) = &inbound.certificate else { return Ok(()) };
    let rechecked = inbound.worker.proxy.trust.recheck_open(certificate, SystemTime::now());
    rechecked.map_err(|error| Failure::Denied(error.to_string()))
}

/// The authorizers that policies ask about the request: those whose answers count, or those of dry-run policies.
pub fn authorizers(
    published: &Published,
    inbound: &Inbound,
    sane: &Sane,
    parts: &Parts,
    token: Option<&Token>,
    dry_run: bool,
) -> Vec<Arc<Authorizer>> {
    let request = request(inbound, sane, Head::of(parts), token);
    let (identity, source) = (inbound.identity(), inbound.source.ip());
    published.policies.authorizers(&inbound.destination, identity, source, &request, dry_run)
}

/// The policies with the action AUDIT that match the request, counted, separated by commas; none where none does.
pub fn audits(
    published: &Published,
    inbound: &Inbound,
    sane: &Sane,
    parts: &Parts,
    token: Option<&Token>,
) -> Option<String> {
    let request = request(inbound, sane, Head::of(parts), token);
    let (identity, source) = (inbound.identity(), inbound.source.ip());
    let mut names = String::new();
    for policy in published.policies.audits(&inbound.destination, identity, source, &request) {
        inbound.worker.proxy.tallies.audited.fetch_add(1, Ordering::Relaxed);
        let separator = if names.is_empty() { "" } else { "," };
        names.push_str(&format!("{separator}{}", policy.name()));
    }
    (!names.is_empty()).then_some(names)
}

/// What of a request's head policies ask for.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    /// The method.
    pub method: &'a Method,
    /// The path.
    pub path: &'a str,
    /// The query.
    pub query: Option<&'a str>,
    /// The headers.
    pub headers: &'a HeaderMap,
}

impl<'a> Head<'a> {
    /// That of a request.
    pub fn of(parts: &'a Parts) -> Self {
        let (path, query) = (parts.uri.path(), parts.uri.query());
        Self { method: &parts.method, path, query, headers: &parts.headers }
    }
}

fn request<'a>(
    inbound: &'a Inbound,
    sane: &'a Sane,
    head: Head<'a>,
    token: Option<&'a Token>,
) -> HttpRequest<'a> {
    HttpRequest {
        authority: &sane.authority,
        host: &sane.host,
        method: head.method.as_str(),
        path: head.path,
        headers: head.headers,
        remote_ip: sane.remote,
        server_name: inbound.server_name.as_deref(),
        token,
    }
}

/// A request as policies were asked about it, before filters changed it.
#[derive(Debug, Clone)]
pub struct AllowedRequest {
    sane: Sane,
    method: Method,
    path: Box<str>,
    query: Option<Box<str>>,
    headers: HeaderMap,
    token: Option<Token>,
    rule: Option<Arc<Rule>>,
}

impl AllowedRequest {
    /// Keeps a request that wants to change to another protocol: its connection may outlive the policies that allowed it.
    pub fn keep(sane: &Sane, parts: &Parts, token: Option<&Token>, rule: Option<&Arc<Rule>>) -> Option<Self> {
        sane.upgrade.as_ref()?;
        let (method, path) = (parts.method.clone(), parts.uri.path().into());
        let (query, headers) = (parts.uri.query().map(Into::into), parts.headers.clone());
        let (token, rule) = (token.cloned(), rule.cloned());
        Some(Self { sane: sane.clone(), method, path, query, headers, token, rule })
    }
}

/// How an open connection began.
#[derive(Debug, Clone, Copy)]
pub enum Began<'a> {
    /// With a request to change the protocol; `None` where that was not kept.
    Upgrade(Option<&'a AllowedRequest>),
    /// It was passed on from the start.
    Passed(&'a Opening),
}

/// What a client sends.
#[derive(Clone, Copy)]
enum Sent<'a> {
    Request(RequestView<'a>),
    /// It is passed on.
    Passed(Content<'a>),
}

/// Waits until an open connection is no longer allowed: policies have changed, or the client is not trusted any more.
pub async fn denied_later(inbound: &Inbound, began: Began<'_>) -> Failure {
    let proxy = &inbound.worker.proxy;
    let (mut policies, mut trust) = (proxy.published.changes(), proxy.trust.subscribe());
    loop {
        // What changed since the first decision is seen here: the changes to come are listened for already.
        let published = proxy.published.load_full();
        let sent = match began {
            Began::Upgrade(Some(AllowedRequest { sane, method, path, query, headers, token, rule })) => {
                let head = Head { method, path, query: query.as_deref(), headers };
                Sent::Request(RequestView { sane, head, token: token.as_ref(), rule: rule.as_deref() })
            }
            Began::Upgrade(None) => Sent::Passed(Content::Unread),
            Began::Passed(opening) => Sent::Passed(opening.content()),
        };
        if let Err(failure) = decide(&published, inbound, sent) {
            return failure;
        }
        drop(published);
        tokio::select! {
            Ok(()) = policies.changed() => {}
            Ok(()) = trust.changed() => {}
            () = open_until(inbound.certificate.as_ref()) => {}
        }
    }
}

/// Waits until what a client has open must be closed because its certificate has expired; without one that never is.
async fn open_until(certificate: Option<&PeerCertificate>) {
    match certificate {
        Some(certificate) => passed(certificate.open_until()).await,
        None => std::future::pending().await,
    }
}

/// Waits until the client's certificate has expired: what is open may finish, and the next request is to come on another
/// connection.
pub async fn expired(certificate: &PeerCertificate) {
    passed(certificate.not_after()).await;
}

/// Waits until nothing that the client has open may stay: its certificate expired and the time to move is over, it was
/// revoked, or its root was taken out and the time to finish is over.
pub async fn distrusted(trust: &Trust, certificate: &PeerCertificate) -> PeerError {
    let mut changes = trust.subscribe();
    loop {
        match trust.recheck_open(certificate, SystemTime::now()) {
            Ok(()) => {}
            Err(error) if error.is_expiry() || matches!(error, PeerError::Revoked { .. }) => return error,
            Err(_) => {
                // The root may be back by then.
                tokio::time::sleep(FINISH_TIME).await;
                if let Err(error) = trust.recheck_open(certificate, SystemTime::now()) {
                    return error;
                }
            }
        }
        tokio::select! {
            Ok(()) = changes.changed() => {}
            () = passed(certificate.open_until()) => {}
        }
    }
}

/// Waits until a second is over: certificates are valid to the end of their last one.
async fn passed(last: SystemTime) {
    let left = last.duration_since(SystemTime::now()).unwrap_or_default();
    tokio::time::sleep(left + Duration::from_secs(1)).await;
}

/// As [`authorize`], for a connection whose bytes are passed on unread. No token is looked for in them, so where tokens are to be
/// verified nothing is passed on: a client could send a request that is not recognised as one.
///
/// # Errors
/// [`Failure::Denied`].
pub fn authorize_connection(
    published: &Published,
    inbound: &Inbound,
    opening: &Opening,
) -> Result<(), Failure> {
    decide(published, inbound, Sent::Passed(opening.content()))
}

fn decide(published: &Published, inbound: &Inbound, sent: Sent<'_>) -> Result<(), Failure> {
    still_trusted(inbound)?;
    let asked = match sent {
        Sent::Request(asked) => Some(asked),
        Sent::Passed(_) => None,
    };
    let request = asked.map(|RequestView { sane, head, token, .. }| request(inbound, sane, head, token));
    let content = match (&request, sent) {
        (Some(request), _) => Content::Request(request),
        (None, Sent::Passed(content)) => content,
        (None, Sent::Request(_)) => Content::Unread,
    };
    if request.is_none() && published.policies.needs_requests(&inbound.destination) {
        return Err(Failure::Denied(
            "a RequestAuthentication applies, and what was sent is not HTTP".to_owned(),
        ));
    }
    let identity = inbound.identity();
    let verdict = published.policies.decide(&inbound.destination, identity, inbound.source.ip(), content);
    note_dry_run(inbound, &verdict);
    if !verdict.allowed() {
        return Err(Failure::Denied(verdict.decision.to_string()));
    }
    traffic::check(published, inbound, asked)
}

fn note_dry_run(inbound: &Inbound, verdict: &Verdict) {
    if verdict.dry_run_differs() {
        inbound.worker.proxy.tallies.dry_run_differs.fetch_add(1, Ordering::Relaxed);
        tracing::info!(
            source = %inbound.source, peer = inbound.identity().map(tracing::field::display), to = %inbound.default_host,
            decision = ?verdict.decision, dry_run = ?verdict.dry_run, "a dry-run policy would decide otherwise"
        );
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::time::Instant;

    use ambit_identity::Usage;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};

    use super::*;

    /// A client whose certificate is valid from `from` to `until`, and what trusts its issuer.
    fn client(from: SystemTime, until: SystemTime) -> (Trust, PeerCertificate) {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let trust = Trust::new("cluster.local".parse().unwrap(), Vec::new());
        trust.set_roots(parameters.self_signed(&key).unwrap().pem().as_bytes()).unwrap();
        let issuer = Issuer::new(parameters, key);
        let mut leaf = CertificateParams::default();
        leaf.subject_alt_names =
            vec![SanType::URI("spiffe://cluster.local/ns/shop/sa/client".try_into().unwrap())];
        (leaf.not_before, leaf.not_after) = (from.into(), until.into());
        let leaf = leaf.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap();
        let peer = PeerCertificate::from_chain(&[leaf.der().clone()], Usage::Client).unwrap();
        (trust, peer)
    }

    #[test]
    fn an_expired_client_keeps_what_is_open_for_one_renewal() {
        let hour = Duration::from_secs(3600);
        let now = SystemTime::now();
        let (trust, peer) = client(now - hour, now + hour);
        let last = peer.not_after();
        assert!(trust.recheck(&peer, last + Duration::from_secs(1)).is_err());
        trust.recheck_open(&peer, last).unwrap();
        trust.recheck_open(&peer, last + Duration::from_secs(1)).unwrap();
        trust.recheck_open(&peer, last + hour).unwrap();
        assert!(trust.recheck_open(&peer, last + hour + Duration::from_secs(1)).unwrap_err().is_expiry());
        // Expiry does not hide that its root was taken out.
        let (others, _) = client(now - hour, now + hour);
        assert!(!others.recheck_open(&peer, last + Duration::from_secs(1)).unwrap_err().is_expiry());
        assert!(!others.recheck_open(&peer, now).unwrap_err().is_expiry());
    }

    #[tokio::test]
    async fn an_expired_client_is_asked_to_leave_before_it_is_cut() {
        let now = SystemTime::now();
        // It expires soon, not at once: making it may take a moment.
        let soon = Duration::from_secs(2);
        let (trust, peer) = client(now - soon, now + soon);
        let asked = async {
            expired(&peer).await;
            Instant::now()
        };
        let cut = async {
            let error = distrusted(&trust, &peer).await;
            (Instant::now(), error)
        };
        let (asked, (cut, error)) = tokio::join!(asked, cut);
        assert!(error.is_expiry(), "{error}");
        assert!(cut.duration_since(asked) > Duration::from_secs(1), "{:?}", cut.duration_since(asked));
        assert!(SystemTime::now() > peer.open_until());
    }

    #[tokio::test]
    async fn a_client_that_lost_its_root_has_time_to_finish() {
        let now = SystemTime::now();
        let hour = Duration::from_secs(3600);
        let (_, peer) = client(now - hour, now + hour);
        let (others, _) = client(now - hour, now + hour);
        let start = Instant::now();
        let error = distrusted(&others, &peer).await;
        assert!(!error.is_expiry(), "{error}");
        assert!(start.elapsed() >= FINISH_TIME);
    }
}
