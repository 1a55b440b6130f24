//! One issued certificate of a workload, ready for use: chain, key and the two TLS configurations.
//!
//! Also the key and signing request that precede it. Built by the certificate store and by tests; never renewed
//! in place: a new certificate is a new [`WorkloadCertificate`].

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::revocation::hex;
use crate::spiffe::SpiffeId;
use crate::tls::{ClientTls, TlsSettings, server_config};
use crate::trust::Trust;
use crate::verify::{PeerError, identity_of};

/// Certificates in an issued chain, roots included; more is refused.
const MAX_CHAIN: usize = 64;

/// Why key, request or issued chain cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateMaterialError {
    /// The key or the request could not be made.
    #[error("cannot make key and signing request for {identity}: {reason}")]
    Request {
        /// The identity.
        identity: SpiffeId,
        /// What the library said.
        reason: rcgen::Error,
    },
    /// The chain is not PEM.
    #[error("issued chain is not PEM: {0}")]
    Pem(#[from] rustls::pki_types::pem::Error),
    /// The chain holds no certificate.
    #[error("issued chain is empty")]
    Empty,
    /// The chain is implausibly long.
    #[error("issued chain of {0} certificates is longer than {MAX_CHAIN}")]
    TooLong(usize),
    /// A certificate in the chain cannot be parsed.
    #[error("certificate number {index} of the issued chain cannot be read: {reason}")]
    Malformed {
        /// Position, from 1.
        index: usize,
        /// What the parser found.
        reason: String,
    },
    /// The leaf has no identity, or not the requested one.
    #[error("issued certificate is for {issued}, asked for {asked}")]
    Identity {
        /// Who was asked for.
        asked: SpiffeId,
        /// The identity in the certificate.
        issued: String,
    },
    /// The leaf cannot be read as an identity.
    #[error("issued certificate would not be accepted: {0}")]
    Peer(#[from] PeerError),
    /// TLS refuses the pair, e.g. because the certificate is for another key.
    #[error("issued certificate and key cannot be used for TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// A fresh private key and the signing request for it.
pub struct CertificateRequest {
    identity: SpiffeId,
    key: PrivatePkcs8KeyDer<'static>,
    csr_pem: String,
}

impl CertificateRequest {
    /// Makes an ECDSA P-256 key and a request with empty subject and one URI SAN (certificate contract).
    ///
    /// # Errors
    /// [`CertificateMaterialError::Request`] if the cryptography fails.
    pub fn new(identity: &SpiffeId) -> Result<Self, CertificateMaterialError> {
        let failed = |reason| CertificateMaterialError::Request { identity: identity.clone(), reason };
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let mut parameters = rcgen::CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        let name = identity.as_str().try_into().map_err(failed)?;
        parameters.subject_alt_names = vec![rcgen::SanType::URI(name)];
        let csr_pem = parameters.serialize_request(&key).and_then(|csr| csr.pem()).map_err(failed)?;
        Ok(Self { identity: identity.clone(), key: key.into(), csr_pem })
    }

    /// The signing request, PEM.
    pub fn csr_pem(&self) -> &str {
        &self.csr_pem
    }

    /// Joins the key with the chain that was issued for it (PEM; leaf first, roots last) and builds the TLS
    /// configurations, whose verifiers read `trust` at each handshake.
    ///
    /// # Errors
    /// [`CertificateMaterialError`] saying what is wrong with the chain.
    pub fn complete(
        self,
        chain: &[impl AsRef<str>],
        trust: &Trust,
        settings: TlsSettings,
    ) -> Result<WorkloadCertificate, CertificateMaterialError> {
        let Self { identity, key, csr_pem: _ } = self;
        WorkloadCertificate::new(&identity, key.into(), chain, trust, settings)
    }
}

/// Summary of a certificate for dumps and logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateInfo {
    /// Whose it is.
    pub identity: SpiffeId,
    /// Serial number of the leaf, hexadecimal.
    pub serial: String,
    /// Beginning of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// Name of the issuer of the leaf.
    pub issuer: String,
    /// Certificates presented in handshakes, leaf included.
    pub chain_length: usize,
}

/// A certificate with its key. Immutable; share it by `Arc`.
pub struct WorkloadCertificate {
    info: CertificateInfo,
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    server: Arc<ServerConfig>,
    client: Arc<ClientTls>,
}

impl WorkloadCertificate {
    /// Joins key and chain; see [`CertificateRequest::complete`].
    ///
    /// # Errors
    /// [`CertificateMaterialError`] saying what is wrong with the pair.
    pub fn new(
        identity: &SpiffeId,
        key: PrivateKeyDer<'static>,
        chain: &[impl AsRef<str>],
        trust: &Trust,
        settings: TlsSettings,
    ) -> Result<Self, CertificateMaterialError> {
        let Parsed { chain, roots, info } = parse(identity, chain)?;
        let server = server_config(settings, trust, chain.clone(), key.clone_key())?;
        let client = ClientTls::new(settings, trust, chain.clone(), key)?;
        Ok(Self { info, chain, roots, server: Arc::new(server), client: Arc::new(client) })
    }

    /// Whose certificate it is.
    pub fn identity(&self) -> &SpiffeId {
        &self.info.identity
    }

    /// Beginning of validity (backdated by the CA).
    pub fn not_before(&self) -> SystemTime {
        self.info.not_before
    }

    /// End of validity.
    pub fn not_after(&self) -> SystemTime {
        self.info.not_after
    }

    /// Whether it has not expired at `now`.
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        now < self.info.not_after
    }

    /// How long it is still valid at `now`; zero when expired.
    pub fn remaining(&self, now: SystemTime) -> Duration {
        self.info.not_after.duration_since(now).unwrap_or_default()
    }

    /// Its summary for dumps and logs.
    pub fn info(&self) -> &CertificateInfo {
        &self.info
    }

    /// The chain that is presented: leaf, then intermediates.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The roots that came with it.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// For accepting connections: TLS 1.3, client certificate required, ALPN `h2`.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// For dialling; see [`ClientTls::expecting`].
    pub fn client_tls(&self) -> Arc<ClientTls> {
        Arc::clone(&self.client)
    }
}

impl std::fmt::Debug for WorkloadCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.info.fmt(f)
    }
}

struct Parsed {
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    info: CertificateInfo,
}

fn parse(identity: &SpiffeId, pems: &[impl AsRef<str>]) -> Result<Parsed, CertificateMaterialError> {
    let mut chain = Vec::new();
    let mut roots: Vec<CertificateDer<'static>> = Vec::new();
    let mut info = None;
    let mut count = 0;
    for (element, pem) in pems.iter().enumerate() {
        // Certificate contract: roots come last; during a rotation there are several, in one element.
        let is_roots = element > 0 && element + 1 == pems.len();
        for der in CertificateDer::pem_slice_iter(pem.as_ref().as_bytes()) {
            let der = der?;
            count += 1;
            if count > MAX_CHAIN {
                return Err(CertificateMaterialError::TooLong(count));
            }
            let malformed = |reason: String| CertificateMaterialError::Malformed { index: count, reason };
            let (_, certificate) =
                X509Certificate::from_der(&der).map_err(|error| malformed(error.to_string()))?;
            if info.is_none() {
                info = Some(leaf_info(identity, &der, &certificate)?);
                chain.push(der);
            } else if !is_roots && certificate.subject() != certificate.issuer() {
                chain.push(der);
            } else if !roots.contains(&der) {
                // RFC 8446 §4.4.2: the root may be left out of what is presented, as the peer must have it.
                roots.push(der);
            }
        }
    }
    let mut info = info.ok_or(CertificateMaterialError::Empty)?;
    info.chain_length = chain.len();
    Ok(Parsed { chain, roots, info })
}

fn leaf_info(
    asked: &SpiffeId,
    der: &CertificateDer<'static>,
    certificate: &X509Certificate<'_>,
) -> Result<CertificateInfo, CertificateMaterialError> {
    let identity = {
        let parsed = webpki::EndEntityCert::try_from(der).map_err(PeerError::Malformed)?;
        identity_of(&parsed)?
    };
    if identity != *asked {
        return Err(CertificateMaterialError::Identity {
            asked: asked.clone(),
            issued: identity.to_string(),
        });
    }
    let validity = certificate.validity();
    Ok(CertificateInfo {
        identity,
        serial: hex(certificate.raw_serial()),
        not_before: system_time(validity.not_before.timestamp()),
        not_after: system_time(validity.not_after.timestamp()),
        issuer: certificate.issuer().to_string(),
        chain_length: 0,
    })
}

fn system_time(timestamp: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(timestamp).unwrap_or_default())
}
