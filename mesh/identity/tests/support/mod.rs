//! A small certificate authority for tests: real keys and certificates, with any defect that a test asks for.

#![allow(dead_code, reason = "each test program uses its part")]

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ambit_identity::{SpiffeId, TlsSettings, Trust, TrustDomain, WorkloadCertificate, unnamed_server};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

pub(crate) struct TestCa {
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// Properties of a certificate to be issued by the test CA.
pub(crate) struct Wish<'a> {
    pub(crate) uris: &'a [&'a str],
    pub(crate) serial: u64,
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
}

impl<'a> Wish<'a> {
    pub(crate) fn valid(uris: &'a [&'a str]) -> Self {
        let now = SystemTime::now();
        Self { uris, serial: rand::random(), not_before: now - HOUR, not_after: now + HOUR }
    }
}

impl TestCa {
    pub(crate) fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = DistinguishedName::new();
        parameters.distinguished_name.push(DnType::CommonName, name);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pem = parameters.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(parameters, key) }
    }

    /// A leaf for `public_key`, PEM.
    pub(crate) fn sign(&self, public_key: &impl rcgen::PublicKeyData, wish: &Wish<'_>) -> String {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = DistinguishedName::new();
        parameters.not_before = wish.not_before.into();
        parameters.not_after = wish.not_after.into();
        parameters.serial_number = Some(SerialNumber::from(wish.serial));
        parameters.subject_alt_names =
            wish.uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        parameters.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        parameters.signed_by(public_key, &self.issuer).unwrap().pem()
    }

    pub(crate) fn sign_csr(&self, csr_pem: &str, wish: &Wish<'_>) -> Vec<String> {
        let csr = rcgen::CertificateSigningRequestParams::from_pem(csr_pem).unwrap();
        vec![self.sign(&csr.public_key, wish), self.pem.clone()]
    }

    /// Chain and key as they are presented.
    pub(crate) fn raw(&self, wish: &Wish<'_>) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateDer::from_pem_slice(self.sign(&key, wish).as_bytes()).unwrap();
        (leaf, key.into())
    }

    pub(crate) fn workload(&self, trust: &Trust, wish: &Wish<'_>) -> WorkloadCertificate {
        self.workload_with(trust, wish, TlsSettings::default())
    }

    pub(crate) fn workload_with(
        &self,
        trust: &Trust,
        wish: &Wish<'_>,
        tls: TlsSettings,
    ) -> WorkloadCertificate {
        let key = KeyPair::generate().unwrap();
        let identity: SpiffeId = wish.uris[0].parse().unwrap();
        let chain = [self.sign(&key, wish), self.pem.clone()];
        WorkloadCertificate::new(&identity, key.into(), &chain, trust, tls).unwrap()
    }

    pub(crate) fn revoke(&self, serials: &[u64]) -> String {
        let now = SystemTime::now();
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + HOUR).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

pub(crate) fn domain(name: &str) -> TrustDomain {
    TrustDomain::new(name).unwrap()
}

/// Trust of `cluster.local` in some authorities.
pub(crate) fn trust_in(authorities: &[&TestCa]) -> Trust {
    let trust = Trust::new(domain("cluster.local"), Vec::new());
    let pem: String = authorities.iter().map(|ca| ca.pem.as_str()).collect();
    trust.set_roots(pem.as_bytes()).unwrap();
    trust
}

pub(crate) type ClientStream = tokio_rustls::client::TlsStream<TcpStream>;
pub(crate) type ServerStream = tokio_rustls::server::TlsStream<TcpStream>;

/// Both ends of a TLS connection over loopback. The client's end also waits for the server's verdict on its
/// certificate, which in TLS 1.3 comes after its own handshake is complete.
pub(crate) async fn meet(
    client: Arc<rustls::ClientConfig>,
    server: Arc<rustls::ServerConfig>,
) -> (std::io::Result<ClientStream>, std::io::Result<ServerStream>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let dial = async {
        let socket = TcpStream::connect(address).await?;
        let mut stream = TlsConnector::from(client).connect(unnamed_server(), socket).await?;
        stream.read_u8().await?;
        Ok(stream)
    };
    let accept = async {
        let (socket, _) = listener.accept().await?;
        let mut stream = TlsAcceptor::from(server).accept(socket).await?;
        stream.write_u8(1).await?;
        Ok(stream)
    };
    let both = async { tokio::join!(dial, accept) };
    tokio::time::timeout(Duration::from_secs(10), both).await.expect("handshake within ten seconds")
}
