//! Verification of a peer: chain against the roots of its trust domain, one SPIFFE URI SAN, revocations.
//!
//! Called by rustls during handshakes through [`ServerVerifier`] and [`ClientVerifier`], and by
//! [`Trust::recheck`] for established connections. Verifies who the peer is; never what it may do.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};

use crate::spiffe::{SpiffeId, SpiffeIdError, TrustDomain};
use crate::trust::{Trust, TrustState};

/// Intermediates that a peer may present; more are refused before any signature is checked.
const MAX_INTERMEDIATES: usize = 8;

/// For which side of a handshake a certificate is presented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    /// The peer dialled us.
    Client,
    /// We dialled the peer.
    Server,
}

impl Usage {
    pub(crate) fn key_usage(self) -> webpki::KeyUsage {
        match self {
            Usage::Client => webpki::KeyUsage::client_auth(),
            Usage::Server => webpki::KeyUsage::server_auth(),
        }
    }
}

/// Why a peer's certificate is not accepted. The peer is to blame in every case but [`PeerError::NoRoots`].
#[derive(Debug, Clone, thiserror::Error)]
pub enum PeerError {
    /// The peer presented no certificate.
    #[error("peer presented no certificate")]
    NoCertificate,
    /// The certificate cannot be read.
    #[error("peer certificate cannot be read: {0}")]
    Malformed(webpki::Error),
    /// More intermediates than accepted.
    #[error("peer presented {0} intermediate certificates, more than {MAX_INTERMEDIATES}")]
    TooManyIntermediates(usize),
    /// Not exactly one URI SAN (X509-SVID §2: exactly one).
    #[error("peer certificate has {0} URI names instead of one")]
    UriNames(usize),
    /// The URI SAN is no identity.
    #[error("peer certificate names no identity: {0}")]
    Identity(#[from] SpiffeIdError),
    /// The identity belongs to a trust domain that is neither ours nor an alias.
    #[error("peer {identity} is of trust domain {presented}, trusted are {trusted:?}", presented = identity.trust_domain())]
    TrustDomain {
        /// Who the peer says it is.
        identity: SpiffeId,
        /// Ours, its aliases and federated domains.
        trusted: Vec<TrustDomain>,
    },
    /// No root is known (not yet loaded), so nobody can be verified.
    #[error("no root certificate is known to verify peer {0}")]
    NoRoots(SpiffeId),
    /// The chain does not lead to a root, is expired, or is malformed.
    #[error("certificate chain of peer {identity} is not valid: {reason}")]
    Chain {
        /// Who the peer says it is.
        identity: SpiffeId,
        /// What the verifier found.
        reason: webpki::Error,
    },
    /// The certificate or one of its issuers is revoked.
    #[error("certificate of peer {identity} is revoked (serial {serial})")]
    Revoked {
        /// Who the peer says it is.
        identity: SpiffeId,
        /// Serial of the revoked certificate, hexadecimal.
        serial: String,
    },
    /// The server is somebody else than the destination must be.
    #[error("destination answered as {presented}, expected one of {expected:?}")]
    Unexpected {
        /// Who answered.
        presented: SpiffeId,
        /// Who may answer.
        expected: Vec<SpiffeId>,
    },
}

impl PeerError {
    /// The error of our verifier inside the error of a failed handshake, if there is one.
    ///
    /// Expiry, revocation and unknown issuers have errors of rustls' own and are not found here.
    pub fn of_handshake(error: &std::io::Error) -> Option<&PeerError> {
        match error.get_ref()?.downcast_ref::<rustls::Error>()? {
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(source))) => {
                source.downcast_ref()
            }
            _ => None,
        }
    }

    /// Whether the certificate is refused only because its time is over.
    pub fn is_expiry(&self) -> bool {
        matches!(self, PeerError::Chain { reason: webpki::Error::CertExpired { .. }, .. })
    }
}

impl From<PeerError> for rustls::Error {
    /// Chooses the TLS alert: expiry, unknown issuer and revocation have their own (RFC 8446 §6.2).
    fn from(error: PeerError) -> Self {
        let certificate = match &error {
            PeerError::NoCertificate => return rustls::Error::NoCertificatesPresented,
            PeerError::Malformed(_) => CertificateError::BadEncoding,
            PeerError::Revoked { .. } => CertificateError::Revoked,
            PeerError::Chain { reason: webpki::Error::CertExpired { .. }, .. } => CertificateError::Expired,
            PeerError::Chain { reason: webpki::Error::CertNotValidYet { .. }, .. } => {
                CertificateError::NotValidYet
            }
            PeerError::Chain { reason: webpki::Error::UnknownIssuer, .. } | PeerError::NoRoots(_) => {
                CertificateError::UnknownIssuer
            }
            PeerError::TooManyIntermediates(_)
            | PeerError::UriNames(_)
            | PeerError::Identity(_)
            | PeerError::TrustDomain { .. }
            | PeerError::Chain { .. }
            | PeerError::Unexpected { .. } => CertificateError::Other(OtherError(Arc::new(error))),
        };
        rustls::Error::InvalidCertificate(certificate)
    }
}

/// The one identity in the URI SANs of a parsed certificate.
pub(crate) fn identity_of(certificate: &webpki::Cert<'_>) -> Result<SpiffeId, PeerError> {
    let mut names = certificate.valid_uri_names();
    match (names.next(), names.next()) {
        (Some(uri), None) => Ok(uri.parse()?),
        (None, _) => Err(PeerError::UriNames(0)),
        (Some(_), Some(_)) => Err(PeerError::UriNames(2 + names.count())),
    }
}

/// Verifies a presented chain at `now`.
pub(crate) fn verify_chain(
    state: &TrustState,
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    usage: Usage,
    now: UnixTime,
) -> Result<SpiffeId, PeerError> {
    if intermediates.len() > MAX_INTERMEDIATES {
        return Err(PeerError::TooManyIntermediates(intermediates.len()));
    }
    let certificate = webpki::EndEntityCert::try_from(end_entity).map_err(PeerError::Malformed)?;
    let identity = identity_of(&certificate)?;
    let Some(anchors) = state.anchors(identity.trust_domain()) else {
        return Err(PeerError::TrustDomain { identity, trusted: state.trust_domains() });
    };
    if anchors.is_empty() {
        return Err(PeerError::NoRoots(identity));
    }
    let path = match certificate.verify_for_usage(
        webpki::ALL_VERIFICATION_ALGS,
        anchors,
        intermediates,
        now,
        usage.key_usage(),
        None,
        None,
    ) {
        Ok(path) => path,
        Err(reason) => return Err(PeerError::Chain { identity, reason }),
    };
    let revoked = state.revocations().find_in_path(&certificate, &path, intermediates, usage, now);
    match revoked {
        Some(serial) => Err(PeerError::Revoked { identity, serial }),
        None => Ok(identity),
    }
}

/// Which servers a handshake accepts.
#[derive(Debug, Clone)]
pub(crate) enum ExpectedServer {
    /// Exactly these identities.
    OneOf(Arc<[SpiffeId]>),
    /// Every identity that trust accepts.
    Anyone,
}

impl ExpectedServer {
    fn check(&self, presented: SpiffeId) -> Result<(), PeerError> {
        match self {
            ExpectedServer::Anyone => Ok(()),
            ExpectedServer::OneOf(expected) if expected.contains(&presented) => Ok(()),
            ExpectedServer::OneOf(expected) => {
                Err(PeerError::Unexpected { presented, expected: expected.to_vec() })
            }
        }
    }
}

/// Verifies servers that we dial, the expected identity included; reads the current trust at each handshake.
///
/// RFC 8446 §4.4.2: a client sends its certificate after it has verified the server's, so an unexpected server
/// never sees ours.
#[derive(Debug)]
pub(crate) struct ServerVerifier {
    trust: Trust,
    algorithms: WebPkiSupportedAlgorithms,
    expected: ExpectedServer,
}

impl ServerVerifier {
    pub(crate) fn new(trust: Trust, provider: &CryptoProvider, expected: ExpectedServer) -> Self {
        Self { trust, algorithms: provider.signature_verification_algorithms, expected }
    }
}

/// Verifies clients that dial us; reads the current trust at each handshake.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    trust: Trust,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientVerifier {
    pub(crate) fn new(trust: Trust, provider: &CryptoProvider) -> Self {
        Self { trust, algorithms: provider.signature_verification_algorithms }
    }
}

/// TLS 1.2 is never negotiated, so its signatures are refused rather than checked.
fn no_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(rustls::Error::General("TLS 1.2 is not spoken in the mesh".to_owned()))
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let identity = verify_chain(&self.trust.state(), end_entity, intermediates, Usage::Server, now)?;
        self.expected.check(identity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // RFC 8446 §4.2.4: hints are optional; workloads have one certificate and need none.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        verify_chain(&self.trust.state(), end_entity, intermediates, Usage::Client, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
