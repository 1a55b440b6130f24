//! Who is at the other end of an established connection.
//!
//! Created right after a handshake. A [`PeerCertificate`] is what a connection keeps of its peer, so that
//! [`Trust::recheck`](crate::Trust::recheck) can say later whether a new handshake would still succeed.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use rustls::CommonState;
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::revocation::{hex, issuer_key};
use crate::spiffe::SpiffeId;
use crate::verify::{PeerError, Usage, identity_of};

/// One certificate of a chain as revocation lists name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) issuer: u64,
    pub(crate) serial: Box<[u8]>,
    /// First and last second of validity, of the Unix epoch.
    not_before: u64,
    not_after: u64,
}

/// The authenticated peer of a connection. Clones share it.
#[derive(Debug, Clone)]
pub struct PeerCertificate(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    identity: SpiffeId,
    usage: Usage,
    /// As presented, leaf first: changed roots are compared with the chain itself, not with names in it.
    chain: Box<[CertificateDer<'static>]>,
    links: Box<[Link]>,
    /// The last verification after the handshake. Locked for a comparison or an assignment.
    verified: Mutex<Option<Verified>>,
}

/// A verification that need not be repeated.
#[derive(Debug, Clone, Copy)]
struct Verified {
    /// The set of roots that it was made against.
    roots: u64,
    /// Its last second, of the Unix epoch.
    until: u64,
}

impl PeerCertificate {
    /// The client of a connection that we accepted, whose handshake is complete (and so verified the chain).
    ///
    /// # Errors
    /// [`PeerError`] if the peer presented no certificate or one without an identity.
    pub fn of_client(connection: &CommonState) -> Result<Self, PeerError> {
        Self::from_chain(connection.peer_certificates().unwrap_or_default(), Usage::Client)
    }

    /// The server of a connection that we dialled, whose handshake is complete (and so verified chain and identity).
    ///
    /// # Errors
    /// [`PeerError`] if the peer presented no certificate or one without an identity.
    pub fn of_server(connection: &CommonState) -> Result<Self, PeerError> {
        Self::from_chain(connection.peer_certificates().unwrap_or_default(), Usage::Server)
    }

    /// The peer of a chain that was verified for `usage`, leaf first.
    ///
    /// # Errors
    /// [`PeerError`] if the chain is empty, cannot be read, or names no identity.
    pub fn from_chain(chain: &[CertificateDer<'_>], usage: Usage) -> Result<Self, PeerError> {
        let leaf = chain.first().ok_or(PeerError::NoCertificate)?;
        let identity = {
            let leaf = webpki::EndEntityCert::try_from(leaf).map_err(PeerError::Malformed)?;
            identity_of(&leaf)?
        };
        let links = chain.iter().map(link).collect::<Result<_, _>>()?;
        Ok(Self(Arc::new(Inner {
            identity,
            usage,
            chain: chain.iter().map(|der| der.clone().into_owned()).collect(),
            links,
            verified: Mutex::new(None),
        })))
    }

    /// Who the peer is.
    pub fn identity(&self) -> &SpiffeId {
        &self.0.identity
    }

    /// The leaf's serial number, hexadecimal.
    pub fn serial(&self) -> String {
        self.0.links.first().map(|link| hex(&link.serial)).unwrap_or_default()
    }

    /// The last second of validity of the peer's own certificate.
    pub fn not_after(&self) -> SystemTime {
        let end = self.0.links.first().map_or(0, |link| link.not_after);
        SystemTime::UNIX_EPOCH + Duration::from_secs(end)
    }

    /// How long after its issue the peer's own certificate is renewed: half of its lifetime.
    pub fn renewal_time(&self) -> Duration {
        let lifetime = self.0.links.first().map_or(0, |link| link.not_after.saturating_sub(link.not_before));
        Duration::from_secs(lifetime / 2)
    }

    /// How long connections that are open may stay: an expired peer has the time of one renewal to move them to a
    /// connection with its new certificate.
    pub fn open_until(&self) -> SystemTime {
        self.not_after() + self.renewal_time()
    }

    pub(crate) fn usage(&self) -> Usage {
        self.0.usage
    }

    pub(crate) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.0.chain
    }

    pub(crate) fn links(&self) -> &[Link] {
        &self.0.links
    }

    /// Whether the chain was verified against this set of roots, with a result that holds at `now` (seconds).
    pub(crate) fn is_verified_under(&self, roots: u64, now: u64) -> bool {
        self.0.verified.lock().is_some_and(|verified| verified.roots == roots && now <= verified.until)
    }

    /// Notes that the chain was verified against this set of roots at `now` (seconds).
    pub(crate) fn set_verified_under(&self, roots: u64, now: u64) {
        // Certificates that had expired already are not part of the path that was verified.
        let until = self.0.links.iter().map(|link| link.not_after).filter(|end| now <= *end).min();
        *self.0.verified.lock() = until.map(|until| Verified { roots, until });
    }
}

fn link(der: &CertificateDer<'_>) -> Result<Link, PeerError> {
    let certificate = webpki::EndEntityCert::try_from(der).map_err(PeerError::Malformed)?;
    let (_, parsed) =
        X509Certificate::from_der(der).map_err(|_| PeerError::Malformed(webpki::Error::BadDer))?;
    Ok(Link {
        issuer: issuer_key(certificate.issuer()),
        serial: certificate.serial().into(),
        not_before: u64::try_from(parsed.validity().not_before.timestamp()).unwrap_or_default(),
        not_after: u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or_default(),
    })
}
