//! Handshakes with servers of one certificate or another, over sockets.

use std::path::PathBuf;

use ambit_api::l7::subject_name::Kind;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, RevokedCertParams, SanType,
};
use rustls::ServerConfig;
use rustls::server::WebPkiClientVerifier;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::*;

/// An authority, and certificates of it.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Chain and key in PEM.
    fn issue(&self, names: &[SanType]) -> (String, String) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names.to_vec();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    /// Chain and key of `a`, with this serial number.
    fn issue_numbered(&self, serial: u64) -> (String, String) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![dns("a")];
        params.serial_number = Some(serial.into());
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    /// A revocation list with the certificate of this number.
    fn revoking(&self, serial: u64) -> String {
        let now = std::time::SystemTime::now();
        let revoked = RevokedCertParams {
            serial_number: serial.into(),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + std::time::Duration::from_secs(3600)).into(),
            crl_number: 1.into(),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.0).unwrap().pem().unwrap()
    }

    fn roots(&self) -> Roots {
        Roots::Pem(self.0.pem().into_bytes().into())
    }

    fn store(&self) -> Arc<RootCertStore> {
        Arc::new(root_store(self.0.pem().as_bytes(), "the test").unwrap())
    }
}

fn dns(name: &str) -> SanType {
    SanType::DnsName(name.try_into().unwrap())
}

fn uri(name: &str) -> SanType {
    SanType::URI(name.try_into().unwrap())
}

fn host(name: &str) -> l7::SubjectName {
    l7::SubjectName { kind: Some(Kind::Host(name.to_owned())) }
}

fn demanded(roots: Roots, names: &[l7::SubjectName]) -> l7::BackendTls {
    l7::BackendTls {
        mode: l7::TlsMode::Tls.into(),
        roots: Some(roots),
        names: names.to_vec(),
        ..l7::BackendTls::default()
    }
}

/// A server with this certificate, and whether it wants one of the client; it says nothing and closes.
async fn server((chain, key): (String, String), clients: Option<Arc<RootCertStore>>, alpn: &[&[u8]]) -> u16 {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
    let builder = match clients {
        Some(roots) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build().unwrap();
            builder.unwrap().with_client_cert_verifier(verifier)
        }
        None => builder.unwrap().with_no_client_auth(),
    };
    let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<_, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let mut config = builder.with_single_cert(chain, key).unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // What becomes of it is the client's to say.
            drop(acceptor.accept(stream).await);
        }
    });
    port
}

fn compiled(source: &l7::BackendTls) -> Arc<BackendTls> {
    TlsClients::new(None).unwrap().get(source).unwrap()
}

/// Whether TLS with the server, asked for by this name, is what the policy demands.
async fn connects(tls: &Arc<BackendTls>, name: &str, port: u16, alpn: Alpn) -> Result<(), Failure> {
    let client = tls.client()?.expect("no TLS of the mesh");
    let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let io = begin(client.config(alpn), name, Endpoint::Plain(stream), alpn).await?;
    // With TLS 1.3 a server refuses the client's certificate after the client's part is done.
    let Endpoint::Tls(mut stream) = io else { panic!("no TLS") };
    match stream.read_u8().await {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(Failure::Connect(error.to_string())),
        _ => Ok(()),
    }
}

#[tokio::test]
async fn the_certificate_must_have_the_name_that_is_asked_for() {
    let authority = Authority::new();
    let port = server(authority.issue(&[dns("api.example.com")]), None, &[]).await;
    let tls = compiled(&demanded(authority.roots(), &[]));
    connects(&tls, "api.example.com", port, Alpn::None).await.unwrap();
    assert!(connects(&tls, "other.example.com", port, Alpn::None).await.is_err());
    let foreign = compiled(&demanded(Authority::new().roots(), &[]));
    assert!(connects(&foreign, "api.example.com", port, Alpn::None).await.is_err());
    let public = compiled(&demanded(Roots::System(true), &[]));
    assert!(connects(&public, "api.example.com", port, Alpn::None).await.is_err());
    let any = compiled(&demanded(Roots::DangerousAny(true), &[]));
    connects(&any, "other.example.com", port, Alpn::None).await.unwrap();
}

#[tokio::test]
async fn names_of_the_policy_count_in_place_of_the_one_asked_for() {
    let authority = Authority::new();
    let workload = "spiffe://other.org/ns/a/sa/b";
    let port = server(authority.issue(&[dns("*.example.com"), uri(workload)]), None, &[]).await;
    let by_uri = |text: &str| l7::SubjectName { kind: Some(Kind::Uri(text.to_owned())) };
    let cases = [
        (vec![host("api.example.com")], true),
        (vec![host("*.example.com")], true),
        (vec![host("example.com")], false),
        (vec![by_uri(workload)], true),
        (vec![by_uri("spiffe://other.org/ns/a/sa/c"), host("api.example.org")], false),
        (vec![by_uri("spiffe://other.org/ns/a/sa/c"), host("api.example.com")], true),
    ];
    for (names, accepted) in cases {
        let tls = compiled(&demanded(authority.roots(), &names));
        let connected = connects(&tls, "elsewhere", port, Alpn::None).await;
        assert_eq!(connected.is_ok(), accepted, "{names:?}: {connected:?}");
        // The chain counts all the same.
        let foreign = compiled(&demanded(Authority::new().roots(), &names));
        assert!(connects(&foreign, "elsewhere", port, Alpn::None).await.is_err(), "{names:?}");
    }
}

#[tokio::test]
async fn http2_needs_a_server_that_agrees() {
    let authority = Authority::new();
    let tls = compiled(&demanded(authority.roots(), &[]));
    let certificate = || authority.issue(&[dns("a")]);
    let both = server(certificate(), None, &[b"h2", b"http/1.1"]).await;
    let older = server(certificate(), None, &[b"http/1.1"]).await;
    let oldest = server(certificate(), None, &[]).await;
    connects(&tls, "a", both, Alpn::Http2).await.unwrap();
    for port in [older, oldest] {
        assert!(connects(&tls, "a", port, Alpn::Http2).await.is_err());
        connects(&tls, "a", port, Alpn::Http1).await.unwrap();
    }
}

fn written(directory: &tempfile::TempDir, name: &str, text: &str) -> (PathBuf, String) {
    let path = directory.path().join(name);
    std::fs::write(&path, text).unwrap();
    (path.clone(), path.display().to_string())
}

#[tokio::test]
async fn a_client_certificate_is_shown_and_read_again() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let port = server(authority.issue(&[dns("a")]), Some(clients.store()), &[]).await;
    assert!(connects(&compiled(&demanded(authority.roots(), &[])), "a", port, Alpn::None).await.is_err());

    let directory = tempfile::tempdir().unwrap();
    let (foreign_chain, foreign_key) = Authority::new().issue(&[dns("c")]);
    let (chain_path, chain_file) = written(&directory, "chain.pem", &foreign_chain);
    let (key_path, key_file) = written(&directory, "key.pem", &foreign_key);
    let certificate = l7::ClientCertificate { chain_file, key_file, ..l7::ClientCertificate::default() };
    let source = l7::BackendTls { certificate: Some(certificate), ..demanded(authority.roots(), &[]) };
    let all = TlsClients::new(None).unwrap();
    let tls = all.get(&source).unwrap();
    assert!(connects(&tls, "a", port, Alpn::None).await.is_err());

    let (chain, key) = clients.issue(&[dns("c")]);
    std::fs::write(&chain_path, chain).unwrap();
    // Chain and key don't fit: the last pair stays.
    let before = tls.client().unwrap().unwrap().id;
    all.reload();
    assert_eq!(tls.client().unwrap().unwrap().id, before);
    std::fs::write(&key_path, key).unwrap();
    all.reload();
    connects(&tls, "a", port, Alpn::None).await.unwrap();
    // What is gone does not take away what could be read.
    std::fs::remove_file(&key_path).unwrap();
    all.reload();
    connects(&tls, "a", port, Alpn::None).await.unwrap();
}

#[tokio::test]
async fn a_certificate_that_is_revoked_is_refused_and_one_without_a_list_too() {
    let authority = Authority::new();
    let (good, bad) = (authority.issue_numbered(1), authority.issue_numbered(2));
    let good = server(good, None, &[]).await;
    let bad = server(bad, None, &[]).await;
    let revoking = |authority: &Authority, names: &[l7::SubjectName]| l7::BackendTls {
        revoked: authority.revoking(2).into_bytes().into(),
        ..demanded(authority.roots(), names)
    };
    for names in [vec![], vec![host("a")]] {
        let tls = compiled(&revoking(&authority, &names));
        connects(&tls, "a", good, Alpn::None).await.unwrap();
        let refused = connects(&tls, "a", bad, Alpn::None).await.unwrap_err().to_string();
        assert!(refused.contains("Revoked") || refused.contains("revoked"), "{refused}");
        // The list is another authority's: nobody knows.
        let revoked = Authority::new().revoking(2).into_bytes().into();
        let tls = compiled(&l7::BackendTls { revoked, ..demanded(authority.roots(), &names) });
        assert!(connects(&tls, "a", good, Alpn::None).await.is_err());
    }
    let directory = tempfile::tempdir().unwrap();
    let (path, revoked_file) = written(&directory, "crl.pem", &authority.revoking(1));
    let all = TlsClients::new(None).unwrap();
    let tls = all.get(&l7::BackendTls { revoked_file, ..demanded(authority.roots(), &[]) }).unwrap();
    assert!(connects(&tls, "a", good, Alpn::None).await.is_err());
    std::fs::write(&path, authority.revoking(2)).unwrap();
    all.reload();
    connects(&tls, "a", good, Alpn::None).await.unwrap();
    // A file without a list does not take away the last one, and one that never had any is not "nothing is revoked".
    std::fs::write(&path, "").unwrap();
    all.reload();
    connects(&tls, "a", good, Alpn::None).await.unwrap();
    let revoked_file = path.display().to_string();
    for source in [
        l7::BackendTls { revoked_file, ..demanded(authority.roots(), &[]) },
        l7::BackendTls { revoked: "nothing".into(), ..demanded(authority.roots(), &[]) },
    ] {
        assert!(matches!(compiled(&source).client(), Err(Failure::InvalidPolicy(_))), "{source:?}");
    }
}

#[test]
fn keys_are_not_shown() {
    let key = "SECRET".to_owned().into_bytes().into();
    let certificate = l7::ClientCertificate { key, ..l7::ClientCertificate::default() };
    let source = l7::BackendTls { certificate: Some(certificate), ..demanded(Roots::System(true), &[]) };
    let shown = format!("{:?}", compiled(&source));
    assert!(!shown.contains("SECRET") && !shown.contains(&format!("{:?}", b"SECRET")), "{shown}");
}

#[test]
fn equal_settings_share_a_client_while_it_is_used() {
    let all = TlsClients::new(None).unwrap();
    let source = demanded(Roots::System(true), &[]);
    let (one, other) = (all.get(&source).unwrap(), all.get(&source).unwrap());
    assert!(Arc::ptr_eq(&one, &other));
    drop((one, other));
    assert!(all.get(&demanded(Roots::System(true), &[host("a")])).is_some());
    assert_eq!(all.known.lock().len(), 1);
    assert!(all.get(&l7::BackendTls::default()).is_none());
}

#[test]
fn what_can_not_be_used_is_refused() {
    let bad = [
        demanded(Roots::Pem(Vec::new().into()), &[]),
        demanded(Roots::File("/nowhere".to_owned()), &[]),
        demanded(Roots::File("/dev/zero".to_owned()), &[]),
        demanded(Roots::System(true), &[host("a b")]),
        demanded(Roots::System(false), &[]),
        l7::BackendTls { roots: None, ..demanded(Roots::System(true), &[]) },
        l7::BackendTls { mode: 99, ..demanded(Roots::System(true), &[]) },
        l7::BackendTls {
            certificate: Some(l7::ClientCertificate::default()),
            ..demanded(Roots::System(true), &[])
        },
    ];
    for source in bad {
        assert!(matches!(compiled(&source).client(), Err(Failure::InvalidPolicy(_))), "{source:?}");
    }
}
