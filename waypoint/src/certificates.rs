//! Certificates that a gateway shows to its clients: which one for which name.

use std::sync::Arc;

use ambit_api::l7;
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;

use crate::client_verifier;

/// What is spoken after the handshake of an HTTPS listener, the preferred one first.
const HTTP: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// The TLS of a listener with these key pairs; `None` if none of them can be used, or no root that clients are to be verified by.
pub fn server_config<'a>(
    pairs: impl IntoIterator<Item = (&'a str, &'a l7::KeyPair)>,
    is_http: bool,
    validation: Option<&l7::ClientValidation>,
) -> Option<Arc<ServerConfig>> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut certificates = Certificates::default();
    for (name, pair) in pairs {
        match read(pair, &provider) {
            Ok(certificate) => certificates.0.push(certificate),
            Err(error) => tracing::error!(name, %error, "a certificate can't be used"),
        }
    }
    if certificates.0.is_empty() {
        return None;
    }
    let verifier = validation.map(|validation| client_verifier::of(validation, &provider)).transpose();
    let verifier = verifier.inspect_err(|error| tracing::error!(%error, "clients can't be verified")).ok()?;
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.inspect_err(|error| tracing::error!(%error, "TLS can't be set up")).ok()?;
    let builder =
        builder.with_client_cert_verifier(verifier.unwrap_or_else(WebPkiClientVerifier::no_client_auth));
    let mut config = builder.with_cert_resolver(Arc::new(certificates));
    if is_http {
        config.alpn_protocols = HTTP.map(<[u8]>::to_vec).to_vec();
    }
    Some(Arc::new(config))
}

/// Why a key pair can't be used.
#[derive(Debug, thiserror::Error)]
enum KeyPairError {
    #[error("it can't be read as PEM: {0}")]
    Pem(rustls::pki_types::pem::Error),
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    #[error("its names can't be read: {0}")]
    Names(webpki::Error),
    #[error("it has no certificate")]
    Empty,
}

/// A certificate and its names in lower case.
type Named = (Vec<Box<str>>, Arc<CertifiedKey>);

fn read(pair: &l7::KeyPair, provider: &CryptoProvider) -> Result<Named, KeyPairError> {
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&pair.certificates)
        .collect::<Result<_, _>>()
        .map_err(KeyPairError::Pem)?;
    let key = PrivateKeyDer::from_pem_slice(&pair.private_key).map_err(KeyPairError::Pem)?;
    let leaf = chain.first().ok_or(KeyPairError::Empty)?;
    let names = webpki::EndEntityCert::try_from(leaf).map_err(KeyPairError::Names)?;
    let names = names.valid_dns_names().map(|name| name.to_ascii_lowercase().into()).collect();
    Ok((names, Arc::new(CertifiedKey::from_der(chain, key, provider)?)))
}

/// Certificates in the order of the listener.
#[derive(Debug, Default)]
struct Certificates(Vec<Named>);

impl Certificates {
    /// The first with this very name, else the first with a wildcard for it, else the first.
    fn find(&self, server_name: Option<&str>) -> Option<&Arc<CertifiedKey>> {
        let server_name = server_name.map(str::to_ascii_lowercase);
        let by = |is_wanted: &dyn Fn(&str) -> bool| {
            self.0.iter().find(|(names, _)| names.iter().any(|name| is_wanted(name)))
        };
        // RFC 9525 §6.3: a wildcard stands for one label.
        let parent = server_name.as_deref().and_then(|name| name.split_once('.')).map(|(_, parent)| parent);
        let exact = server_name.as_deref().and_then(|wanted| by(&|name| name == wanted));
        let wild = || parent.and_then(|parent| by(&|name| name.strip_prefix("*.") == Some(parent)));
        exact.or_else(wild).or_else(|| self.0.first()).map(|(_, certificate)| certificate)
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.find(hello.server_name()).cloned()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn pair(names: &[&str]) -> l7::KeyPair {
        let key = rcgen::KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let certificate = rcgen::CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
        l7::KeyPair {
            certificates: certificate.pem().into_bytes().into(),
            private_key: key.serialize_pem().into_bytes().into(),
            ..l7::KeyPair::default()
        }
    }

    #[test]
    fn the_certificate_with_the_most_exact_name_is_shown() {
        let provider = aws_lc_rs::default_provider();
        let pairs = [&["first.shop.example"][..], &["*.shop.example", "b.other"], &["a.shop.example"]];
        let certificates =
            Certificates(pairs.iter().map(|names| read(&pair(names), &provider).unwrap()).collect());
        let shown = |name: Option<&str>| {
            let found = certificates.find(name).unwrap();
            certificates.0.iter().position(|(_, known)| Arc::ptr_eq(known, found)).unwrap()
        };
        for (name, wanted) in [
            (None, 0),
            (Some("first.shop.example"), 0),
            (Some("A.shop.example"), 2),
            (Some("b.shop.example"), 1),
            (Some("b.a.shop.example"), 0),
            (Some("shop.example"), 0),
            (Some("b.other"), 1),
        ] {
            assert_eq!(shown(name), wanted, "{name:?}");
        }
    }

    #[test]
    fn a_pair_that_cannot_be_used_is_left_out() {
        let (one, other) = (pair(&["a.example"]), pair(&["b.example"]));
        let mixed = l7::KeyPair { private_key: other.private_key, ..one.clone() };
        let empty = l7::KeyPair::default();
        assert!(server_config([("mixed", &mixed), ("empty", &empty)], true, None).is_none());
        let config = server_config([("mixed", &mixed), ("one", &one)], true, None).unwrap();
        assert_eq!(config.alpn_protocols, HTTP);
    }
}
