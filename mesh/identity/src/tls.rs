//! The mesh's TLS: which versions, suites and groups, and the two configurations of a certificate.
//!
//! Configurations are built once when a certificate arrives. A connection that we dial gets a copy that shares
//! everything but the expected identity. The verifiers inside read the current [`Trust`], so a change of roots or
//! revocations needs no new configuration.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, LazyLock};

use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ServerConfig};

use crate::spiffe::SpiffeId;
use crate::trust::Trust;
use crate::verify::{ClientVerifier, ExpectedServer, ServerVerifier};

/// ALPN of the tunnel (HBONE contract).
const ALPN_H2: &[u8] = b"h2";

/// Which AES key length is offered first; both are always accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CipherPreference {
    /// AES-128-GCM first: the cheaper one per byte.
    #[default]
    Aes128First,
    /// AES-256-GCM first.
    Aes256First,
}

/// Settings of the mesh's TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TlsSettings {
    /// Order of the two cipher suites.
    pub ciphers: CipherPreference,
}

impl TlsSettings {
    /// The cryptography that these settings allow: TLS 1.3 suites and groups of the HBONE contract, nothing else.
    pub fn provider(self) -> Arc<CryptoProvider> {
        static AES_128_FIRST: LazyLock<Arc<CryptoProvider>> =
            LazyLock::new(|| provider(CipherPreference::Aes128First));
        static AES_256_FIRST: LazyLock<Arc<CryptoProvider>> =
            LazyLock::new(|| provider(CipherPreference::Aes256First));
        let TlsSettings { ciphers } = self;
        match ciphers {
            CipherPreference::Aes128First => Arc::clone(&AES_128_FIRST),
            CipherPreference::Aes256First => Arc::clone(&AES_256_FIRST),
        }
    }
}

fn provider(ciphers: CipherPreference) -> Arc<CryptoProvider> {
    use aws_lc_rs::cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384};
    use aws_lc_rs::kx_group::{SECP256R1, SECP384R1, X25519, X25519MLKEM768};

    let cipher_suites = match ciphers {
        CipherPreference::Aes128First => vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384],
        CipherPreference::Aes256First => vec![TLS13_AES_256_GCM_SHA384, TLS13_AES_128_GCM_SHA256],
    };
    Arc::new(CryptoProvider {
        cipher_suites,
        kx_groups: vec![X25519MLKEM768, X25519, SECP256R1, SECP384R1],
        ..aws_lc_rs::default_provider()
    })
}

/// The name given to rustls when dialling a workload: the mesh sends no SNI and identifies peers by URI SAN.
pub fn unnamed_server() -> ServerName<'static> {
    ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into())
}

/// The accepting side's configuration: a client certificate is required.
pub(crate) fn server_config(
    settings: TlsSettings,
    trust: &Trust,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, rustls::Error> {
    let provider = settings.provider();
    let verifier = Arc::new(ClientVerifier::new(trust.clone(), &provider));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    // Without tickets no session outlives the certificate it was authenticated with.
    config.send_tls13_tickets = 0;
    // `ambit-tls` processes the records itself and needs the secrets.
    config.enable_secret_extraction = true;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(config)
}

/// The dialling side's TLS of one certificate: TLS 1.3, presents that certificate, ALPN `h2`, no SNI.
///
/// A configuration always says which identities may answer: [`ClientTls::expecting`] returns the one for a destination. The
/// server's identity is checked inside the handshake, before our certificate is sent.
#[derive(Debug)]
pub struct ClientTls {
    base: ClientConfig,
    trust: Trust,
}

impl ClientTls {
    pub(crate) fn new(
        settings: TlsSettings,
        trust: &Trust,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, rustls::Error> {
        let provider = settings.provider();
        let nobody = ExpectedServer::OneOf(Arc::default());
        let verifier = Arc::new(ServerVerifier::new(trust.clone(), &provider, nobody));
        let mut base = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(chain, key)?;
        base.alpn_protocols = vec![ALPN_H2.to_vec()];
        base.enable_sni = false;
        base.enable_secret_extraction = true;
        base.resumption = rustls::client::Resumption::disabled();
        Ok(Self { base, trust: trust.clone() })
    }

    /// For a connection to one of these identities. All others are refused; with an empty list, every server is.
    ///
    /// Cheap enough for every connection: key, chain and settings are shared, only the verifier is new.
    pub fn expecting(&self, identities: &[SpiffeId]) -> Arc<ClientConfig> {
        self.with_expected(ExpectedServer::OneOf(identities.into()))
    }

    /// For a connection whose peer may have any trusted identity. Our certificate is shown to any of them, so this is for tools
    /// and tests.
    pub fn dangerous_expecting_anyone(&self) -> Arc<ClientConfig> {
        self.with_expected(ExpectedServer::Anyone)
    }

    fn with_expected(&self, expected: ExpectedServer) -> Arc<ClientConfig> {
        let mut config = self.base.clone();
        let verifier = ServerVerifier::new(self.trust.clone(), config.crypto_provider(), expected);
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        Arc::new(config)
    }
}
