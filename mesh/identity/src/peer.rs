//! Who is at the other end of an established connection.
//!
//! Called right after a handshake, before the first byte is sent or believed. A [`PeerCertificate`] is what a
//! connection keeps so that it can be checked again when the revocation list changes.

use std::sync::Arc;

use rustls::CommonState;
use rustls::pki_types::CertificateDer;

use crate::revocation::{hex, issuer_key};
use crate::spiffe::SpiffeId;
use crate::verify::{PeerError, identity_of};

/// One certificate of a chain as revocation lists name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) issuer: u64,
    pub(crate) serial: Box<[u8]>,
}

/// The authenticated peer of a connection: its identity and the serials by which it can be revoked.
#[derive(Debug, Clone)]
pub struct PeerCertificate {
    identity: SpiffeId,
    links: Arc<[Link]>,
}

impl PeerCertificate {
    /// The peer of a connection whose handshake is complete (and so verified the chain).
    ///
    /// # Errors
    /// [`PeerError`] if the peer presented no certificate or one without an identity.
    pub fn from_connection(connection: &CommonState) -> Result<Self, PeerError> {
        Self::from_chain(connection.peer_certificates().unwrap_or_default())
    }

    /// The peer of a chain that was verified, leaf first.
    ///
    /// # Errors
    /// [`PeerError`] if the chain is empty, cannot be read, or names no identity.
    pub fn from_chain(chain: &[CertificateDer<'_>]) -> Result<Self, PeerError> {
        let leaf = chain.first().ok_or(PeerError::NoCertificate)?;
        let identity = {
            let leaf = webpki::EndEntityCert::try_from(leaf).map_err(PeerError::Malformed)?;
            identity_of(&leaf)?
        };
        let links = chain
            .iter()
            .map(|der| {
                let certificate = webpki::EndEntityCert::try_from(der).map_err(PeerError::Malformed)?;
                Ok(Link { issuer: issuer_key(certificate.issuer()), serial: certificate.serial().into() })
            })
            .collect::<Result<_, PeerError>>()?;
        Ok(Self { identity, links })
    }

    /// Who the peer is.
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// The leaf's serial number, hexadecimal.
    pub fn serial(&self) -> String {
        self.links.first().map(|link| hex(&link.serial)).unwrap_or_default()
    }

    pub(crate) fn links(&self) -> &[Link] {
        &self.links
    }
}

/// Checks that the server that answered is one of those that the destination may be (contracts.md §2).
///
/// Call it when the handshake is complete and before anything is sent.
///
/// # Errors
/// [`PeerError::Unexpected`] if it is somebody else (always, when `expected` is empty); other variants as
/// [`PeerCertificate::from_connection`].
pub fn verify_server(connection: &CommonState, expected: &[SpiffeId]) -> Result<PeerCertificate, PeerError> {
    let peer = PeerCertificate::from_connection(connection)?;
    if expected.contains(peer.identity()) {
        return Ok(peer);
    }
    Err(PeerError::Unexpected { presented: peer.identity, expected: expected.to_vec() })
}
