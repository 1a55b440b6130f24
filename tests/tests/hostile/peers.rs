//! Peers that cannot be authenticated: without a certificate, or with a wrong, expired or revoked one.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ambit_identity::TlsSettings;
use ambit_tests::add_trials;
use ambit_tests::beds::Trials;
use ambit_tests::wait;
use http::StatusCode;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::{FRIEND, Hostile, requests};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Accepts any server.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        TlsSettings::default().provider().signature_verification_algorithms.supported_schemes()
    }
}

/// A forged certificate.
struct Forged {
    names: Vec<String>,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl Forged {
    /// Right in every respect; tests change one.
    fn new() -> Self {
        let now = SystemTime::now();
        Self { names: vec![FRIEND.to_owned()], not_before: now - DAY, not_after: now + DAY }
    }

    fn named(mut self, names: &[&str]) -> Self {
        self.names = names.iter().map(ToString::to_string).collect();
        self
    }

    /// The TLS of a client that shows it, signed with `issuer`.
    fn client(self, issuer: &Issuer<'_, KeyPair>) -> Arc<ClientConfig> {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = DistinguishedName::new();
        let names = self.names.iter().map(|name| SanType::URI(name.as_str().try_into().unwrap()));
        parameters.subject_alt_names = names.collect();
        parameters.not_before = OffsetDateTime::from(self.not_before);
        parameters.not_after = OffsetDateTime::from(self.not_after);
        parameters.is_ca = IsCa::ExplicitNoCa;
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, issuer).unwrap();
        let config = anybodys().with_client_auth_cert(vec![certificate.into()], key.into()).unwrap();
        speaking_h2(config)
    }
}

fn anybodys() -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    ClientConfig::builder_with_provider(TlsSettings::default().provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
}

fn speaking_h2(mut config: ClientConfig) -> Arc<ClientConfig> {
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// The cluster's own authority, by its key.
fn own_root(bed: &Hostile) -> Issuer<'static, KeyPair> {
    let read = |name: &str| std::fs::read_to_string(bed.cluster.ca_dir().join(name)).unwrap();
    let key = KeyPair::from_pem(&read("ca-key.pem")).unwrap();
    Issuer::from_ca_cert_pem(&read("ca-cert.pem"), key).unwrap()
}

/// A root that looks like the cluster's, with a key that is not.
fn other_root(bed: &Hostile) -> Issuer<'static, KeyPair> {
    let key = KeyPair::generate().unwrap();
    let real = std::fs::read_to_string(bed.cluster.ca_dir().join("ca-cert.pem")).unwrap();
    Issuer::from_ca_cert_pem(&real, key).unwrap()
}

/// The server's verdict on our certificate: accepted, or the alert.
async fn verdict(stream: &mut TlsStream<TcpStream>) -> Result<(), String> {
    let mut first = [0; 1];
    match tokio::time::timeout(wait::SOON, stream.read(&mut first)).await.expect("a verdict in time") {
        Ok(0) => Err("closed without a word".to_owned()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// A client with this configuration is refused with `alert`. The failure is counted and logged with `reason`, and others are
/// not affected.
async fn is_refused(bed: &Hostile, tls: Arc<ClientConfig>, alert: &str, reason: &str) {
    let before = bed.failures("TLS_FAILURE").await;
    let (from, mut stream) = bed.approach(tls).await;
    let said = verdict(&mut stream).await.expect_err("it was let in");
    assert!(said.contains(alert), "{said:?} is not {alert}");
    let line = bed.logged(from).await;
    let error = line["error"].as_str().unwrap_or_default();
    assert!(error.contains(reason), "{reason:?} is not why: {line}");
    bed.counted("TLS_FAILURE", before).await;
    bed.goes_on().await;
}

async fn a_right_certificate_is_let_in(bed: &Hostile) {
    let (_, mut stream) = bed.approach(Forged::new().client(&own_root(bed))).await;
    verdict(&mut stream).await.expect("what the other tests vary is let in as it is");
}

async fn a_peer_without_a_certificate_is_refused(bed: &Hostile) {
    let tls = speaking_h2(anybodys().with_no_client_auth());
    is_refused(bed, tls, "CertificateRequired", "no certificate").await;
}

async fn a_peer_of_another_trust_domain_is_refused_even_if_our_root_signed_it(bed: &Hostile) {
    let tls = Forged::new().named(&["spiffe://elsewhere.local/ns/shop/sa/friend"]).client(&own_root(bed));
    is_refused(bed, tls, "alert", "elsewhere.local").await;
}

async fn a_peer_whose_certificate_has_expired_is_refused(bed: &Hostile) {
    let mut forged = Forged::new();
    forged.not_after = SystemTime::now() - Duration::from_secs(5);
    is_refused(bed, forged.client(&own_root(bed)), "CertificateExpired", "xpired").await;
}

async fn a_peer_whose_certificate_is_not_valid_yet_is_refused(bed: &Hostile) {
    let mut forged = Forged::new();
    forged.not_before = SystemTime::now() + Duration::from_secs(3600);
    is_refused(bed, forged.client(&own_root(bed)), "alert", "alid").await;
}

async fn a_peer_with_a_certificate_of_a_root_that_is_not_ours_is_refused(bed: &Hostile) {
    is_refused(bed, Forged::new().client(&other_root(bed)), "alert", "").await;
}

async fn a_peer_whose_certificate_names_nobody_is_refused(bed: &Hostile) {
    is_refused(bed, Forged::new().named(&[]).client(&own_root(bed)), "alert", "0 URI names").await;
}

async fn a_peer_whose_certificate_names_two_is_refused(bed: &Hostile) {
    let tls = Forged::new().named(&[FRIEND, "spiffe://cluster.local/ns/shop/sa/server"]);
    is_refused(bed, tls.client(&own_root(bed)), "alert", "2 URI names").await;
}

async fn a_revoked_peer_loses_its_open_connection_and_gets_no_new_one(bed: &Hostile) {
    let (kept, lost) = (bed.credentials.certificate(FRIEND), bed.credentials.certificate(FRIEND));
    let mut kept =
        requests::tunnel(bed, kept.client_tls().dangerous_expecting_anyone(), bed.application()).await;
    let mut open =
        requests::tunnel(bed, lost.client_tls().dangerous_expecting_anyone(), bed.application()).await;
    open.echoes(b"while it is good").await;
    bed.credentials.revoke(&lost);
    open.is_cut().await;
    let line = bed.logged(open.from).await;
    assert!(line["error"].as_str().unwrap_or_default().contains("revoked"), "{line}");
    kept.echoes(b"of another certificate").await;
    is_refused(bed, lost.client_tls().dangerous_expecting_anyone(), "CertificateRevoked", "evoked").await;
}

/// A client of our root whose certificate is valid for so many seconds more, half of which it has to renew.
fn expiring(bed: &Hostile, seconds: u64) -> (Arc<ClientConfig>, SystemTime) {
    let mut forged = Forged::new();
    forged.not_before = SystemTime::now();
    let end = SystemTime::now() + Duration::from_secs(seconds);
    forged.not_after = end;
    (forged.client(&own_root(bed)), end)
}

async fn a_peer_that_expires_keeps_nothing(bed: &Hostile) {
    let (tls, end) = expiring(bed, 4);
    let mut other = requests::Session::open(bed, tls.clone()).await;
    assert_eq!(other.connect(&bed.application().to_string()).await, StatusCode::OK);
    let mut open = requests::tunnel(bed, tls, bed.application()).await;
    open.echoes(b"while it is good").await;
    let expired = async || SystemTime::now() > end + Duration::from_secs(1);
    wait::until("it has expired", wait::SOON, expired).await;
    open.echoes(b"it has time to renew").await;
    assert!(!other.is_let_in(bed.application()).await, "a new CONNECT of an expired peer");
    open.is_cut().await;
    let line = bed.logged(open.from).await;
    assert!(line["error"].as_str().unwrap_or_default().contains("expired"), "{line}");
    bed.goes_on().await;
}

/// Sends `words` to the tunnel port. The connection is refused and logged.
async fn speaks_in_the_clear(bed: &Hostile, words: &[u8]) {
    let before = bed.failures("TLS_FAILURE").await;
    let mut stream = bed.stranger.connect_within(bed.tunnel_port(), wait::SOON).await.unwrap();
    let from = stream.local_addr().unwrap();
    stream.write_all(words).await.unwrap();
    let mut answer = Vec::new();
    let ended = tokio::time::timeout(wait::SOON, stream.read_to_end(&mut answer)).await;
    // A TLS alert at most, and then the end, orderly or not.
    let _how = ended.expect("an end in time");
    assert!(answer.len() <= 7 && !answer.starts_with(b"HTTP"), "answered with {answer:?}");
    let line = bed.logged(from).await;
    assert!(!line["error"].as_str().unwrap_or_default().is_empty(), "{line}");
    bed.counted("TLS_FAILURE", before).await;
    bed.goes_on().await;
}

async fn plaintext_http_to_the_tunnel_port_is_refused(bed: &Hostile) {
    speaks_in_the_clear(bed, b"GET / HTTP/1.1\r\nhost: server\r\n\r\n").await;
}

async fn plaintext_http2_to_the_tunnel_port_is_refused(bed: &Hostile) {
    speaks_in_the_clear(bed, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
}

async fn a_tls_record_of_nonsense_to_the_tunnel_port_is_refused(bed: &Hostile) {
    speaks_in_the_clear(bed, &[b"\x16\x03\x01\x40\x00".as_slice(), &[0xa5; 0x4000]].concat()).await;
}

pub(crate) fn add(trials: &mut Trials<Hostile>) {
    add_trials!(
        trials, "peers":
        a_right_certificate_is_let_in,
        a_peer_without_a_certificate_is_refused,
        a_peer_of_another_trust_domain_is_refused_even_if_our_root_signed_it,
        a_peer_whose_certificate_has_expired_is_refused,
        a_peer_whose_certificate_is_not_valid_yet_is_refused,
        a_peer_with_a_certificate_of_a_root_that_is_not_ours_is_refused,
        a_peer_whose_certificate_names_nobody_is_refused,
        a_peer_whose_certificate_names_two_is_refused,
        a_revoked_peer_loses_its_open_connection_and_gets_no_new_one,
        a_peer_that_expires_keeps_nothing,
        plaintext_http_to_the_tunnel_port_is_refused,
        plaintext_http2_to_the_tunnel_port_is_refused,
        a_tls_record_of_nonsense_to_the_tunnel_port_is_refused,
    );
}
