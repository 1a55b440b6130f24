//! Real TLS handshakes over loopback: which peers are accepted, and what is negotiated.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use ambit_identity::{
    CipherPreference, PeerCertificate, PeerError, Revocations, SpiffeId, TlsSettings, Trust, Usage,
    WorkloadCertificate,
};
use rustls::{CipherSuite, NamedGroup, ProtocolVersion};
use support::{HOUR, TestCa, Wish, domain, meet, trust_in};

const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";

fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

/// The server accepts the client, and each knows the identity of the other.
async fn assert_meet(client: &WorkloadCertificate, server: &WorkloadCertificate) {
    let expected = [server.identity().clone()];
    let (dialled, accepted) = meet(client.client_tls().expecting(&expected), server.server_config()).await;
    let (dialled, accepted) = (dialled.unwrap(), accepted.unwrap());
    let peer = PeerCertificate::of_client(accepted.get_ref().1).unwrap();
    assert_eq!(peer.identity(), client.identity());
    let peer = PeerCertificate::of_server(dialled.get_ref().1).unwrap();
    assert_eq!(peer.identity(), server.identity());
}

/// The server refuses the client with this alert.
async fn assert_client_refused(client: &WorkloadCertificate, server: &WorkloadCertificate, reason: &str) {
    let (dialled, accepted) =
        meet(client.client_tls().dangerous_expecting_anyone(), server.server_config()).await;
    assert!(dialled.is_err(), "the client got a byte");
    let error = accepted.unwrap_err().to_string();
    assert!(error.contains(reason), "{error:?} does not say {reason:?}");
}

/// The client refuses the server.
async fn assert_server_refused(client: &WorkloadCertificate, server: &WorkloadCertificate, reason: &str) {
    let (dialled, accepted) =
        meet(client.client_tls().dangerous_expecting_anyone(), server.server_config()).await;
    assert!(accepted.is_err(), "the server believes that it was accepted");
    let error = dialled.unwrap_err().to_string();
    assert!(error.contains(reason), "{error:?} does not say {reason:?}");
}

#[tokio::test]
async fn workloads_meet_over_tls_1_3_with_post_quantum_key_exchange() {
    let ca = TestCa::new("root");
    let trust = trust_in(&[&ca]);
    let client = ca.workload(&trust, &Wish::valid(&[CLIENT]));
    let server = ca.workload(&trust, &Wish::valid(&[SERVER]));
    let (dialled, accepted) =
        meet(client.client_tls().dangerous_expecting_anyone(), server.server_config()).await;
    let (dialled, accepted) = (dialled.unwrap(), accepted.unwrap());
    let connection = accepted.get_ref().1;
    assert_eq!(connection.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(connection.alpn_protocol(), Some(b"h2".as_slice()));
    assert_eq!(connection.server_name(), None);
    let suite = connection.negotiated_cipher_suite().map(|suite| suite.suite());
    assert_eq!(suite, Some(CipherSuite::TLS13_AES_128_GCM_SHA256));
    let group = connection.negotiated_key_exchange_group().map(|group| group.name());
    assert_eq!(group, Some(NamedGroup::X25519MLKEM768));
    assert_eq!(PeerCertificate::of_client(connection).unwrap().identity(), &id(CLIENT));
    assert_eq!(PeerCertificate::of_server(dialled.get_ref().1).unwrap().identity(), &id(SERVER));
}

#[tokio::test]
async fn aes_256_is_chosen_when_the_client_prefers_it() {
    let ca = TestCa::new("root");
    let trust = trust_in(&[&ca]);
    let aes_256 = TlsSettings { ciphers: CipherPreference::Aes256First };
    let client = ca.workload_with(&trust, &Wish::valid(&[CLIENT]), aes_256);
    let server = ca.workload(&trust, &Wish::valid(&[SERVER]));
    let (_, accepted) = meet(client.client_tls().dangerous_expecting_anyone(), server.server_config()).await;
    let suite = accepted.unwrap().get_ref().1.negotiated_cipher_suite().map(|suite| suite.suite());
    assert_eq!(suite, Some(CipherSuite::TLS13_AES_256_GCM_SHA384));
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let ca = TestCa::new("root");
    let trust = trust_in(&[&ca]);
    let server = ca.workload(&trust, &Wish::valid(&[SERVER]));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(server.roots()[0].clone()).unwrap();
    let mut anonymous = rustls::ClientConfig::builder_with_provider(TlsSettings::default().provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer))
        .with_no_client_auth();
    anonymous.alpn_protocols = vec![b"h2".to_vec()];
    let (dialled, accepted) = meet(Arc::new(anonymous), server.server_config()).await;
    assert!(dialled.is_err(), "the client got a byte");
    assert!(accepted.unwrap_err().to_string().contains("sent no certificates"));
}

#[tokio::test]
async fn tls_1_2_is_refused() {
    let ca = TestCa::new("root");
    let server = ca.workload(&trust_in(&[&ca]), &Wish::valid(&[SERVER]));
    let old =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS12])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer))
            .with_no_client_auth();
    let (dialled, accepted) = meet(Arc::new(old), server.server_config()).await;
    assert!(dialled.is_err());
    assert!(accepted.is_err());
}

#[tokio::test]
async fn an_expired_client_is_refused_and_an_expired_server_too() {
    let ca = TestCa::new("root");
    let trust = trust_in(&[&ca]);
    let expired =
        |uri: &'static [&'static str]| Wish { not_after: SystemTime::now() - HOUR / 2, ..Wish::valid(uri) };
    let client = ca.workload(&trust, &Wish::valid(&[CLIENT]));
    let server = ca.workload(&trust, &Wish::valid(&[SERVER]));
    assert_client_refused(&ca.workload(&trust, &expired(&[CLIENT])), &server, "Expired").await;
    assert_server_refused(&client, &ca.workload(&trust, &expired(&[SERVER])), "Expired").await;
}

#[tokio::test]
async fn a_certificate_from_the_future_is_refused() {
    let ca = TestCa::new("root");
    let trust = trust_in(&[&ca]);
    let future = Wish { not_before: SystemTime::now() + HOUR / 2, ..Wish::valid(&[CLIENT]) };
    let server = ca.workload(&trust, &Wish::valid(&[SERVER]));
    assert_client_refused(&ca.workload(&trust, &future), &server, "NotValidYet").await;
}

#[tokio::test]
async fn another_trust_domain_is_refused_even_under_our_root() {
    let ca = TestCa::new("root");
    let trust = trust_in(&[&ca]);
    let foreign = ca.workload(&trust, &Wish::valid(&["spiffe://other.example/ns/shop/sa/client"]));
    let server = ca.workload(&trust, &Wish::valid(&[SERVER]));
    assert_client_refused(&foreign, &server, "other.example").await;
    assert_server_refused(&server, &foreign, "other.example").await;
}

#[tokio::test]
async fn an_alias_of_the_trust_domain_is_accepted() {
    let ca = TestCa::new("root");
    let trust = Trust::new(domain("cluster.local"), vec![domain("old.example")]);
    trust.set_roots(ca.pem.as_bytes()).unwrap();
    let alias = ca.workload(&trust, &Wish::valid(&["spiffe://old.example/ns/shop/sa/client"]));
    let server = ca.workload(&trust, &Wish::valid(&[SERVER]));
    assert_meet(&alias, &server).await;
    assert_meet(&server, &alias).await;
}

#[tokio::test]
async fn a_federated_trust_domain_is_believed_under_its_own_root_only() {
    let (ours, theirs) = (TestCa::new("ours"), TestCa::new("theirs"));
    let trust = trust_in(&[&ours]);
    trust.set_federated(domain("other.example"), theirs.pem.as_bytes()).unwrap();
    let server = ours.workload(&trust, &Wish::valid(&[SERVER]));
    let their_trust = Trust::new(domain("other.example"), Vec::new());
    their_trust.set_roots(theirs.pem.as_bytes()).unwrap();
    their_trust.set_federated(domain("cluster.local"), ours.pem.as_bytes()).unwrap();
    let friend = theirs.workload(&their_trust, &Wish::valid(&["spiffe://other.example/ns/a/sa/b"]));
    assert_meet(&friend, &server).await;
    let imposter = theirs.workload(&their_trust, &Wish::valid(&[CLIENT]));
    assert_client_refused(&imposter, &server, "UnknownIssuer").await;
    let confused = ours.workload(&their_trust, &Wish::valid(&["spiffe://other.example/ns/a/sa/b"]));
    assert_client_refused(&confused, &server, "UnknownIssuer").await;
}

#[tokio::test]
async fn a_chain_to_an_unknown_root_is_refused_whatever_it_is_called() {
    let (ca, stranger) = (TestCa::new("root"), TestCa::new("root"));
    let trust = trust_in(&[&ca]);
    let server = ca.workload(&trust, &Wish::valid(&[SERVER]));
    let client = stranger.workload(&trust, &Wish::valid(&[CLIENT]));
    let (_, accepted) = meet(client.client_tls().dangerous_expecting_anyone(), server.server_config()).await;
    assert!(accepted.is_err());
}

#[tokio::test]
async fn with_no_roots_nobody_is_believed() {
    let ca = TestCa::new("root");
    let none = Trust::new(domain("cluster.local"), Vec::new());
    let server = ca.workload(&none, &Wish::valid(&[SERVER]));
    let client = ca.workload(&trust_in(&[&ca]), &Wish::valid(&[CLIENT]));
    assert_client_refused(&client, &server, "UnknownIssuer").await;
}

#[tokio::test]
async fn old_and_new_root_are_valid_side_by_side() {
    let (old, new) = (TestCa::new("old"), TestCa::new("new"));
    let trust = trust_in(&[&old]);
    let client = old.workload(&trust, &Wish::valid(&[CLIENT]));
    let server = new.workload(&trust, &Wish::valid(&[SERVER]));
    assert_server_refused(&client, &server, "UnknownIssuer").await;
    trust.set_roots(format!("{}{}", old.pem, new.pem).as_bytes()).unwrap();
    assert_meet(&client, &server).await;
    assert_meet(&server, &client).await;
    trust.set_roots(new.pem.as_bytes()).unwrap();
    assert_client_refused(&client, &server, "UnknownIssuer").await;
}

#[tokio::test]
async fn a_revoked_certificate_is_refused_on_live_connections_too() {
    let ca = TestCa::new("root");
    let trust = trust_in(&[&ca]);
    let client = ca.workload(&trust, &Wish { serial: 4711, ..Wish::valid(&[CLIENT]) });
    let server = ca.workload(&trust, &Wish { serial: 4712, ..Wish::valid(&[SERVER]) });
    let live = live_peer(&client, &server).await;
    let mut changes = trust.subscribe();
    trust.recheck(&live, SystemTime::now()).unwrap();

    trust.set_revocations(Revocations::from_pem(ca.revoke(&[4711]).as_bytes()).unwrap());
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    assert!(matches!(trust.recheck(&live, SystemTime::now()), Err(PeerError::Revoked { .. })));
    assert_client_refused(&client, &server, "Revoked").await;
    assert_server_refused(&server, &client, "Revoked").await;

    trust.set_revocations(Revocations::from_pem(ca.revoke(&[4799]).as_bytes()).unwrap());
    trust.recheck(&live, SystemTime::now()).unwrap();
    assert_meet(&client, &server).await;
}

#[tokio::test]
async fn a_list_by_another_key_of_the_same_name_revokes_nobody() {
    let (ca, namesake) = (TestCa::new("root"), TestCa::new("root"));
    let trust = trust_in(&[&ca, &namesake]);
    let client = ca.workload(&trust, &Wish { serial: 4711, ..Wish::valid(&[CLIENT]) });
    let server = ca.workload(&trust, &Wish::valid(&[SERVER]));
    trust.set_revocations(Revocations::from_pem(namesake.revoke(&[4711]).as_bytes()).unwrap());
    assert_meet(&client, &server).await;
    let both = format!("{}{}", namesake.revoke(&[4711]), ca.revoke(&[4711]));
    trust.set_revocations(Revocations::from_pem(both.as_bytes()).unwrap());
    assert_client_refused(&client, &server, "Revoked").await;
}

/// RFC 8446 §4.4.2: the client's certificate follows the verification of the server's.
#[tokio::test]
async fn an_unexpected_server_never_sees_our_certificate() {
    let ca = TestCa::new("root");
    let trust = trust_in(&[&ca]);
    let client = ca.workload(&trust, &Wish::valid(&[CLIENT]));
    let server = ca.workload(&trust, &Wish::valid(&[SERVER]));
    let other = id("spiffe://cluster.local/ns/shop/sa/other");
    let (watching, seen) = AnyClient::watching(&ca);

    let tls = client.client_tls().expecting(&[other.clone(), id(SERVER)]);
    let (dialled, _) = meet(tls, Arc::clone(&watching)).await;
    dialled.expect("a server of the second identity is accepted");
    assert_eq!(seen.swap(0, Ordering::SeqCst), 1, "an expected server sees our certificate");

    for expected in [vec![other], vec![]] {
        let (dialled, accepted) = meet(client.client_tls().expecting(&expected), Arc::clone(&watching)).await;
        let error = dialled.unwrap_err();
        match PeerError::of_handshake(&error) {
            Some(PeerError::Unexpected { presented, expected: reported }) => {
                assert_eq!(*presented, id(SERVER));
                assert_eq!(*reported, expected);
            }
            _ => panic!("{error:?}"),
        }
        assert!(accepted.is_err(), "the server completed the handshake");
        assert_eq!(seen.load(Ordering::SeqCst), 0, "an unexpected server saw our certificate");
    }
    assert_meet(&client, &server).await;
}

/// The client's certificate as the server sees it, from a live connection.
async fn live_peer(client: &WorkloadCertificate, server: &WorkloadCertificate) -> PeerCertificate {
    let tls = client.client_tls().expecting(&[server.identity().clone()]);
    let (_, accepted) = meet(tls, server.server_config()).await;
    PeerCertificate::of_client(accepted.unwrap().get_ref().1).unwrap()
}

#[tokio::test]
async fn a_live_peer_is_believed_until_it_expires() {
    let ca = TestCa::new("root");
    let trust = trust_in(&[&ca]);
    let client = ca.workload(&trust, &Wish::valid(&[CLIENT]));
    let server = ca.workload(&trust, &Wish::valid(&[SERVER]));
    let peer = live_peer(&client, &server).await;
    assert_eq!(peer.not_after(), client.not_after());
    trust.recheck(&peer, SystemTime::now()).unwrap();
    trust.recheck(&peer, peer.not_after()).unwrap();
    let error = trust.recheck(&peer, peer.not_after() + Duration::from_secs(1)).unwrap_err();
    assert!(error.is_expiry(), "{error}");
    trust.recheck(&peer, SystemTime::now()).expect("a clock that is set back brings it back");
}

#[tokio::test]
async fn a_live_peer_is_not_believed_when_its_root_is_removed() {
    // Both roots have the same name, as those of our own authority do: names and key identifiers prove nothing.
    let (old, new) = (TestCa::new("root"), TestCa::new("root"));
    let trust = trust_in(&[&old, &new]);
    let client = old.workload(&trust, &Wish::valid(&[CLIENT]));
    let server = new.workload(&trust, &Wish::valid(&[SERVER]));
    let peer = live_peer(&client, &server).await;
    let mut changes = trust.subscribe();
    trust.recheck(&peer, SystemTime::now()).unwrap();

    trust.set_roots(new.pem.as_bytes()).unwrap();
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    for _ in 0..2 {
        let error = trust.recheck(&peer, SystemTime::now()).unwrap_err();
        assert!(matches!(error, PeerError::Chain { .. }) && !error.is_expiry(), "{error}");
    }
    trust.set_roots(format!("{}{}", old.pem, new.pem).as_bytes()).unwrap();
    trust.recheck(&peer, SystemTime::now()).expect("believed again with its root");
}

#[test]
fn a_certificate_without_exactly_one_identity_is_refused() {
    let ca = TestCa::new("root");
    let trust = trust_in(&[&ca]);
    let verify = |uris: &[&str]| {
        let (leaf, _) = ca.raw(&Wish::valid(uris));
        trust.verify(&[leaf], Usage::Client, SystemTime::now())
    };
    assert_eq!(verify(&[CLIENT]).unwrap(), id(CLIENT));
    assert!(matches!(verify(&[]), Err(PeerError::UriNames(0))));
    assert!(matches!(verify(&[CLIENT, SERVER]), Err(PeerError::UriNames(2))));
    assert!(matches!(verify(&["spiffe://cluster.local/workload"]), Err(PeerError::Identity(_))));
    assert!(matches!(trust.verify(&[], Usage::Client, SystemTime::now()), Err(PeerError::NoCertificate)));
    let garbage = rustls::pki_types::CertificateDer::from(vec![0x30, 0x03, 1, 2, 3]);
    assert!(matches!(
        trust.verify(&[garbage], Usage::Client, SystemTime::now()),
        Err(PeerError::Malformed(_))
    ));
}

#[tokio::test]
async fn no_session_outlives_its_handshake() {
    let ca = TestCa::new("root");
    let trust = trust_in(&[&ca]);
    let client = ca.workload(&trust, &Wish::valid(&[CLIENT]));
    let server = ca.workload(&trust, &Wish::valid(&[SERVER]));
    for _ in 0..3 {
        let (dialled, accepted) =
            meet(client.client_tls().dangerous_expecting_anyone(), server.server_config()).await;
        for kind in
            [dialled.unwrap().get_ref().1.handshake_kind(), accepted.unwrap().get_ref().1.handshake_kind()]
        {
            assert_eq!(kind, Some(rustls::HandshakeKind::Full));
        }
    }
}

#[test]
fn a_chain_for_another_name_or_key_is_refused() {
    let ca = TestCa::new("root");
    let trust = trust_in(&[&ca]);
    let request = ambit_identity::CertificateRequest::new(&id(CLIENT)).unwrap();
    let wrong_name = ca.sign_csr(request.csr_pem(), &Wish::valid(&[SERVER]));
    assert!(request.complete(&wrong_name, &trust, TlsSettings::default()).is_err());
    let request = ambit_identity::CertificateRequest::new(&id(CLIENT)).unwrap();
    let wrong_key = ambit_identity::CertificateRequest::new(&id(CLIENT)).unwrap();
    let wrong_key = ca.sign_csr(wrong_key.csr_pem(), &Wish::valid(&[CLIENT]));
    assert!(request.complete(&wrong_key, &trust, TlsSettings::default()).is_err());
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_a_parser_of_what_peers_and_files_hold_panic(bytes in proptest::collection::vec(0u8.., 0..300)) {
        let trust = Trust::new(domain("cluster.local"), Vec::new());
        let leaf = rustls::pki_types::CertificateDer::from(bytes.clone());
        proptest::prop_assert!(PeerCertificate::from_chain(std::slice::from_ref(&leaf), Usage::Client).is_err());
        proptest::prop_assert!(trust.verify(&[leaf], Usage::Client, SystemTime::now()).is_err());
        proptest::prop_assert!(trust.set_roots(&bytes).is_err());
        Revocations::from_pem(&bytes).ok();
    }

    #[test]
    fn a_certificate_with_any_byte_changed_is_refused(position in 0usize..10_000, change in 1u8..) {
        static WORLD: std::sync::LazyLock<(Trust, Vec<u8>)> = std::sync::LazyLock::new(|| {
            let ca = TestCa::new("root");
            (trust_in(&[&ca]), ca.raw(&Wish::valid(&[CLIENT])).0.to_vec())
        });
        let (trust, der) = &*WORLD;
        let mut der = der.clone();
        let position = position % der.len();
        der[position] ^= change;
        let outcome = trust.verify(&[der.into()], Usage::Client, SystemTime::now());
        proptest::prop_assert!(outcome.is_err(), "{outcome:?}");
    }
}

/// Accepts every client and counts the certificates that it sees.
#[derive(Debug)]
struct AnyClient(Arc<AtomicUsize>);

impl AnyClient {
    /// A server as [`SERVER`] with this verifier, and its count.
    fn watching(ca: &TestCa) -> (Arc<rustls::ServerConfig>, Arc<AtomicUsize>) {
        let seen = Arc::new(AtomicUsize::new(0));
        let (chain, key) = ca.raw(&Wish::valid(&[SERVER]));
        let mut config = rustls::ServerConfig::builder_with_provider(TlsSettings::default().provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(Arc::new(AnyClient(Arc::clone(&seen))))
            .with_single_cert(vec![chain], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        (Arc::new(config), seen)
    }
}

impl rustls::server::danger::ClientCertVerifier for AnyClient {
    fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::server::danger::ClientCertVerified, rustls::Error> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(rustls::server::danger::ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![rustls::SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

/// Accepts every server: only for the side of a test that is not under test.
#[derive(Debug)]
struct AnyServer;

impl rustls::client::danger::ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![rustls::SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}
