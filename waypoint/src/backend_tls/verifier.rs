//! Which certificates of endpoints are accepted beside what rustls does by itself: those with one of several names, and any.

use std::sync::Arc;

use ambit_api::l7;
use ambit_api::l7::subject_name::Kind;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use webpki::{CertRevocationList, KeyUsage, RevocationOptionsBuilder};

use super::TlsError;

/// A name that a certificate may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Name {
    /// A DNS name or an address, which a wildcard of the certificate may cover.
    Host(ServerName<'static>),
    /// A wildcard, which the certificate must have as it is.
    Wildcard(String),
    /// Compared letter by letter (X509-SVID, RFC 5280 §4.2.1.6).
    Uri(String),
}

impl Name {
    /// # Errors
    /// [`TlsError::Name`].
    pub(super) fn read(source: &l7::SubjectName) -> Result<Self, TlsError> {
        match &source.kind {
            Some(Kind::Uri(uri)) if !uri.is_empty() => Ok(Self::Uri(uri.clone())),
            Some(Kind::Host(host)) if host.starts_with("*.") => Ok(Self::Wildcard(host.to_ascii_lowercase())),
            Some(Kind::Host(host)) => {
                ServerName::try_from(host.clone()).map(Self::Host).map_err(|_| TlsError::Name(host.clone()))
            }
            Some(Kind::Uri(_)) | None => Err(TlsError::Name(String::new())),
        }
    }

    fn is_of(&self, parsed: &ParsedCertificate<'_>, certificate: &webpki::EndEntityCert<'_>) -> bool {
        match self {
            Self::Host(name) => verify_server_name(parsed, name).is_ok(),
            Self::Wildcard(wildcard) => {
                certificate.valid_dns_names().any(|name| name.eq_ignore_ascii_case(wildcard))
            }
            Self::Uri(uri) => certificate.valid_uri_names().any(|name| name == uri),
        }
    }
}

/// Accepts a certificate with one of these names, whatever name was asked for.
#[derive(Debug)]
pub(super) struct NamedVerifier {
    pub(super) roots: Arc<RootCertStore>,
    pub(super) names: Vec<Name>,
    /// Where there are any, every certificate of a chain must be covered by one, and not be in it.
    pub(super) revoked: Vec<CertRevocationList<'static>>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl NamedVerifier {
    fn check_revocation(
        &self,
        certificate: &webpki::EndEntityCert<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), CertificateError> {
        let lists: Vec<&CertRevocationList<'static>> = self.revoked.iter().collect();
        // There is no list.
        let Ok(options) = RevocationOptionsBuilder::new(&lists) else { return Ok(()) };
        let verified = certificate.verify_for_usage(
            self.algorithms.all,
            &self.roots.roots,
            intermediates,
            now,
            KeyUsage::server_auth(),
            Some(options.build()),
            None,
        );
        match verified {
            Ok(_) => Ok(()),
            Err(webpki::Error::CertRevoked) => Err(CertificateError::Revoked),
            Err(webpki::Error::UnknownRevocationStatus) => Err(CertificateError::UnknownRevocationStatus),
            Err(error) => Err(CertificateError::Other(rustls::OtherError(Arc::new(error)))),
        }
    }
}

/// Accepts any certificate whose key the endpoint has.
#[derive(Debug)]
pub(super) struct AnyVerifier {
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for NamedVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        let certificate =
            webpki::EndEntityCert::try_from(end_entity).map_err(|_| CertificateError::BadEncoding)?;
        self.check_revocation(&certificate, intermediates, now)?;
        match self.names.iter().any(|name| name.is_of(&parsed, &certificate)) {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(CertificateError::NotValidForName.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
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

impl ServerCertVerifier for AnyVerifier {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
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
