//! Certificate revocation lists: parsed once, looked up per connection by issuer and serial.
//!
//! A list counts for certificates of the issuer that signed it. New connections check the list's signature
//! only if a serial is listed, so the usual case costs one hash look-up per certificate.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, OwnedCertRevocationList, RevocationOptionsBuilder,
    UnknownStatusPolicy, VerifiedPath,
};

use crate::peer::PeerCertificate;
use crate::verify::Usage;

/// Why a revocation list cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RevocationError {
    /// The file is not PEM.
    #[error("revocation list is not PEM: {0}")]
    Pem(#[from] rustls::pki_types::pem::Error),
    /// One list in it cannot be parsed.
    #[error("revocation list number {index} cannot be read: {reason}")]
    Malformed {
        /// Position in the file, from 1.
        index: usize,
        /// What the parser found.
        reason: webpki::Error,
    },
}

/// The revocation lists in force.
#[derive(Default)]
pub struct Revocations {
    lists: Vec<List>,
}

struct List {
    issuer: u64,
    crl: CertRevocationList<'static>,
}

impl Revocations {
    /// Reads `X509 CRL` sections; an input without one revokes nothing.
    ///
    /// # Errors
    /// [`RevocationError`] if the PEM or a list in it is malformed.
    pub fn from_pem(pem: &[u8]) -> Result<Self, RevocationError> {
        let lists = CertificateRevocationListDer::pem_slice_iter(pem)
            .enumerate()
            .map(|(position, der)| {
                let crl = OwnedCertRevocationList::from_der(&der?)
                    .map_err(|reason| RevocationError::Malformed { index: position + 1, reason })?;
                let crl = CertRevocationList::Owned(crl);
                Ok(List { issuer: issuer_key(crl.issuer()), crl })
            })
            .collect::<Result<_, RevocationError>>()?;
        Ok(Self { lists })
    }

    /// How many lists are in force.
    pub fn len(&self) -> usize {
        self.lists.len()
    }

    /// Whether no list is in force.
    pub fn is_empty(&self) -> bool {
        self.lists.is_empty()
    }

    /// Whether a live connection's peer, or an issuer it presented, is listed. The list's signature is not checked.
    pub(crate) fn lists(&self, peer: &PeerCertificate) -> bool {
        peer.links().iter().any(|link| self.listing(link.issuer, &link.serial).next().is_some())
    }

    /// Serial (hexadecimal) of the first revoked certificate in a verified path.
    pub(crate) fn find_in_path(
        &self,
        end_entity: &EndEntityCert<'_>,
        path: &VerifiedPath<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
    ) -> Option<String> {
        if self.lists.is_empty() {
            return None;
        }
        let leaf = (end_entity.issuer(), end_entity.serial());
        std::iter::once(leaf)
            .chain(path.intermediate_certificates().map(|issuer| (issuer.issuer(), issuer.serial())))
            .find(|(issuer, serial)| {
                self.listing(issuer_key(issuer), serial)
                    .any(|list| list.is_confirmed(end_entity, path, intermediates, usage, now))
            })
            .map(|(_, serial)| hex(serial))
    }

    fn listing(&self, issuer: u64, serial: &[u8]) -> impl Iterator<Item = &List> {
        self.lists
            .iter()
            .filter(move |list| list.issuer == issuer && matches!(list.crl.find_serial(serial), Ok(Some(_))))
    }
}

impl List {
    /// Whether this list was signed by the key that issued the listed certificate: two issuers may share a
    /// name, as old and new root do during a rotation. Any other doubt counts as revoked.
    fn is_confirmed(
        &self,
        end_entity: &EndEntityCert<'_>,
        path: &VerifiedPath<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
    ) -> bool {
        let lists = [&self.crl];
        let Ok(options) = RevocationOptionsBuilder::new(&lists) else { return true };
        let options = options.with_status_policy(UnknownStatusPolicy::Allow).build();
        let outcome = end_entity.verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            std::slice::from_ref(path.anchor()),
            intermediates,
            now,
            usage.key_usage(),
            Some(options),
            None,
        );
        !matches!(outcome, Ok(_) | Err(webpki::Error::InvalidCrlSignatureForPublicKey))
    }
}

impl std::fmt::Debug for Revocations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Revocations").field("lists", &self.lists.len()).finish()
    }
}

/// A process-wide key of an issuer's name, so that a connection need not keep the name itself.
pub(crate) fn issuer_key(name: &[u8]) -> u64 {
    static STATE: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    STATE.hash_one(name)
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        write!(text, "{byte:02x}").ok();
        text
    })
}
