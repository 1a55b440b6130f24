//! Which certificates of clients outside the mesh a gateway accepts (Gateway API, `FrontendTLSValidation`).

use std::sync::Arc;

use ambit_api::l7;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme,
    client::danger::HandshakeSignatureValid,
};

/// Why clients can't be verified.
#[derive(Debug, thiserror::Error)]
pub enum ClientVerifierError {
    /// The roots are no PEM.
    #[error("the roots can't be read: {0}")]
    Pem(rustls::pki_types::pem::Error),
    /// A root is no certificate.
    #[error("a root can't be used: {0}")]
    Root(#[from] rustls::Error),
    /// There is no root.
    #[error(transparent)]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// The verifier that a listener asks for.
///
/// # Errors
/// When there is no root that can be used.
pub fn of(
    source: &l7::ClientValidation,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, ClientVerifierError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&source.roots) {
        roots.add(certificate.map_err(ClientVerifierError::Pem)?)?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    let strict = builder.build()?;
    Ok(match source.allow_insecure_fallback {
        false => strict,
        true => Arc::new(DangerousFallback { strict }),
    })
}

/// Asks for a certificate and accepts any, and none. Who shows one still proves that it has the key.
#[derive(Debug)]
struct DangerousFallback {
    /// Its hints and algorithms; what it makes of certificates does not count.
    strict: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for DangerousFallback {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.strict.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.strict.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.strict.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.strict.supported_verify_schemes()
    }
}
