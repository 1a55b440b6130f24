//! From a service account token to a certificate and a mutual handshake, through the real service over TLS.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use ambit_ca::{
    Authenticator, Authority, AuthorityConfig, CertificateService, Credentials, IssuanceMetrics,
    IssuancePolicy, JwtAuthenticator, JwtConfig, NodePods,
};
use ambit_identity::{
    CertificateStore, ControlPlane, ControlPlaneConfig, GrpcIssuer, IssueError, Issuer, PeerCertificate,
    SpiffeId, StoreConfig, Trust, TrustConfig, TrustDomain, unnamed_server,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::stream;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use rcgen::{KeyPair, PublicKeyData};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const SERVER_NAME: &str = ControlPlaneConfig::DEFAULT_SERVER_NAME;
const NODE: &str = "node-a";

fn domain() -> TrustDomain {
    TrustDomain::new("cluster.local").unwrap()
}

fn shop(account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", account).unwrap()
}

/// Pods of namespace `shop` run on the node of the tests.
struct Pods;

impl NodePods for Pods {
    fn runs(&self, node: &str, identity: &SpiffeId) -> bool {
        node == NODE && identity.namespace() == "shop"
    }
}

/// The API server's part: a signing key and its public half as a key set.
struct TokenSigner {
    key: EncodingKey,
    jwk: Value,
}

impl TokenSigner {
    fn new(id: &str) -> Self {
        let pair = KeyPair::generate().unwrap();
        let point = pair.der_bytes();
        let jwk = json!({
            "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": id,
            "x": URL_SAFE_NO_PAD.encode(&point[1..33]), "y": URL_SAFE_NO_PAD.encode(&point[33..65]),
        });
        Self { key: EncodingKey::from_ec_der(&pair.serialize_der()), jwk }
    }

    fn sign(&self, claims: &Value) -> String {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = self.jwk["kid"].as_str().map(str::to_owned);
        encode(&header, claims, &self.key).unwrap()
    }
}

fn claims(namespace: &str, account: &str, node: &str) -> Value {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    json!({
        "aud": ["istio-ca"], "iss": "https://kubernetes.default.svc", "iat": now, "nbf": now, "exp": now + 600,
        "sub": format!("system:serviceaccount:{namespace}:{account}"),
        "kubernetes.io": {
            "namespace": namespace, "serviceaccount": {"name": account, "uid": "u1"},
            "pod": {"name": "ztunnel-abc", "uid": "u2"}, "node": {"name": node, "uid": "u3"},
        },
    })
}

struct World {
    directory: tempfile::TempDir,
    signer: TokenSigner,
    address: String,
    metrics: Arc<IssuanceMetrics>,
}

impl World {
    async fn start() -> Self {
        Self::with(|_| ()).await
    }

    async fn with(change: impl FnOnce(&mut AuthorityConfig)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let signer = TokenSigner::new("k1");
        write_jwks(directory.path(), &[&signer]);
        let mut config = AuthorityConfig::new(domain(), directory.path().join("ca"));
        change(&mut config);
        let (authority, driver) = Authority::open(config).await.unwrap();
        tokio::spawn(driver);
        std::fs::write(directory.path().join("root-cert.pem"), &*authority.roots_pem()).unwrap();
        let (authenticator, driver) = JwtAuthenticator::open(jwt_config(directory.path())).await.unwrap();
        tokio::spawn(driver);
        let (tls, driver) = authority.serving(vec![SERVER_NAME.to_owned(), "127.0.0.1".to_owned()]).unwrap();
        tokio::spawn(driver);
        let service = CertificateService::new(
            authority,
            Arc::new(authenticator),
            Arc::new(Pods),
            IssuancePolicy::default(),
        );
        let metrics = service.metrics();
        let address = serve(service, tls).await;
        Self { directory, signer, address, metrics }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write_token(&self, claims: &Value) {
        std::fs::write(self.path("token"), self.signer.sign(claims)).unwrap();
    }

    fn control_plane(&self) -> ControlPlane {
        ControlPlane::new(self.control_plane_config()).unwrap()
    }

    fn control_plane_config(&self) -> ControlPlaneConfig {
        ControlPlaneConfig {
            address: self.address.clone(),
            root_file: self.path("root-cert.pem"),
            server_name: SERVER_NAME.to_owned(),
            token_file: Some(self.path("token")),
            cluster_id: "Kubernetes".to_owned(),
        }
    }

    async fn ask(&self, identity: &SpiffeId) -> Result<Vec<String>, IssueError> {
        let request = ambit_identity::CertificateRequest::new(identity).unwrap();
        let issuer = GrpcIssuer::impersonating(self.control_plane());
        issuer.issue(identity, request.csr_pem(), Duration::from_secs(3600)).await
    }
}

fn jwt_config(directory: &Path) -> JwtConfig {
    JwtConfig {
        jwks: directory.join("jwks.json"),
        audiences: vec!["istio-ca".to_owned()],
        issuers: Vec::new(),
        trust_domain: domain(),
        cluster_id: Some("Kubernetes".to_owned()),
    }
}

fn write_jwks(directory: &Path, signers: &[&TokenSigner]) {
    let keys: Vec<_> = signers.iter().map(|signer| signer.jwk.clone()).collect();
    let beside = directory.join("jwks.new");
    std::fs::write(&beside, json!({ "keys": keys }).to_string()).unwrap();
    std::fs::rename(beside, directory.join("jwks.json")).unwrap();
}

/// Serves over TLS on loopback.
async fn serve(service: CertificateService, tls: Arc<rustls::ServerConfig>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let accepted = stream::unfold((listener, TlsAcceptor::from(tls)), async |(listener, tls)| {
        let (socket, _) = listener.accept().await.ok()?;
        let (mut inside, outside) = tokio::io::duplex(1 << 16);
        let handshake = tls.accept(socket);
        tokio::spawn(async move { tokio::io::copy_bidirectional(&mut handshake.await?, &mut inside).await });
        Some((Ok::<_, Infallible>(outside), (listener, tls)))
    });
    let server = tonic::transport::Server::builder().add_service(service.into_server());
    tokio::spawn(server.serve_with_incoming(accepted));
    address
}

#[tokio::test]
async fn a_node_proxy_fetches_certificates_of_its_pods() {
    let world = World::start().await;
    world.write_token(&claims("ambit-system", "ztunnel", NODE));
    let trust = TrustConfig {
        trust_domain: domain(),
        aliases: Vec::new(),
        roots: Some(world.path("root-cert.pem")),
        revocations: None,
    };
    let (trust, driver) = Trust::from_files(trust).await.unwrap();
    tokio::spawn(driver);
    let issuer = Arc::new(GrpcIssuer::impersonating(world.control_plane()));
    let (store, driver) = CertificateStore::new(StoreConfig::default(), issuer, trust);
    tokio::spawn(driver);
    store.prefetch(&shop("client")).unwrap();
    let client = store.certificate(&shop("client")).await.unwrap();
    let server = store.certificate(&shop("server")).await.unwrap();

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let dial = async {
        let socket = TcpStream::connect(address).await.unwrap();
        TlsConnector::from(client.client_tls().expecting(&[shop("server")]))
            .connect(unnamed_server(), socket)
            .await
            .unwrap()
    };
    let accept = async {
        let (socket, _) = listener.accept().await.unwrap();
        TlsAcceptor::from(server.server_config()).accept(socket).await.unwrap()
    };
    let (dialled, accepted) = tokio::join!(dial, accept);
    let peer = PeerCertificate::of_server(dialled.get_ref().1).unwrap();
    assert_eq!(peer.identity(), &shop("server"));
    let peer = PeerCertificate::of_client(accepted.get_ref().1).unwrap();
    assert_eq!(peer.identity(), &shop("client"));
    assert_eq!(world.metrics.issued.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn foreign_identities_and_unknown_callers_are_denied() {
    let world = World::start().await;
    let denied = async |identity: &SpiffeId| match world.ask(identity).await {
        Err(IssueError::Denied { reason, .. }) => reason,
        outcome => panic!("{outcome:?}"),
    };
    world.write_token(&claims("ambit-system", "ztunnel", NODE));
    let elsewhere = SpiffeId::new("cluster.local", "bank", "vault").unwrap();
    assert!(denied(&elsewhere).await.contains("no live pod"));
    let foreign = SpiffeId::new("other.example", "shop", "client").unwrap();
    assert!(denied(&foreign).await.contains("trust domain"));
    world.write_token(&claims("ambit-system", "ztunnel", "node-b"));
    assert!(denied(&shop("client")).await.contains("node-b"));
    world.write_token(&claims("shop", "ztunnel", NODE));
    assert!(denied(&shop("client")).await.contains("not a trusted node proxy"));
    assert_eq!(world.metrics.denied.load(Ordering::Relaxed), 4);
    assert_eq!(world.metrics.issued.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_caller_that_impersonates_nobody_gets_its_own_identity() {
    let world = World::start().await;
    world.write_token(&claims("shop", "waypoint", NODE));
    let own = shop("waypoint");
    let request = ambit_identity::CertificateRequest::new(&own).unwrap();
    let issuer = GrpcIssuer::own_identity(world.control_plane());
    let chain = issuer.issue(&own, request.csr_pem(), Duration::from_secs(3600)).await.unwrap();
    let trust = Trust::new(domain(), Vec::new());
    trust.set_roots(&std::fs::read(world.path("root-cert.pem")).unwrap()).unwrap();
    let certificate = request.complete(&chain, &trust, <_>::default()).unwrap();
    assert_eq!(certificate.identity(), &own);
}

#[tokio::test]
async fn forged_expired_and_misdirected_tokens_are_refused() {
    let world = World::start().await;
    let refused = async |token: &str| {
        std::fs::write(world.path("token"), token).unwrap();
        match world.ask(&shop("client")).await {
            Err(IssueError::Denied { reason, .. }) => reason,
            outcome => panic!("{outcome:?}"),
        }
    };
    let good = claims("ambit-system", "ztunnel", NODE);
    let with = |name: &str, value: Value| {
        let mut claims = good.clone();
        claims[name] = value;
        world.signer.sign(&claims)
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    assert!(refused(&with("exp", json!(now - 60))).await.contains("ExpiredSignature"));
    assert!(refused(&with("nbf", json!(now + 600))).await.contains("ImmatureSignature"));
    assert!(refused(&with("aud", json!(["other"]))).await.contains("InvalidAudience"));
    assert!(
        refused(&with("sub", json!("system:serviceaccount:kube-system:admin"))).await.contains("contradicts")
    );
    assert!(refused(&with("sub", json!("somebody"))).await.contains("no identity"));
    assert!(refused(&TokenSigner::new("k1").sign(&good)).await.contains("InvalidSignature"));
    assert!(refused(&TokenSigner::new("k2").sign(&good)).await.contains("not known"));
    assert!(refused("not.a.token").await.contains("token refused"));
    // RFC 8725 §3.1: neither no signature nor one made with the public key as a shared secret.
    let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"none","typ":"JWT"}"#);
    let unsigned = format!("{header}.{}.", URL_SAFE_NO_PAD.encode(good.to_string()));
    assert!(refused(&unsigned).await.contains("token refused"));
    let mut symmetric = Header::new(Algorithm::HS256);
    symmetric.kid = Some("k1".to_owned());
    let secret = EncodingKey::from_secret(world.signer.jwk["x"].as_str().unwrap().as_bytes());
    assert!(refused(&encode(&symmetric, &good, &secret).unwrap()).await.contains("not known"));
    assert_eq!(world.metrics.unauthenticated.load(Ordering::Relaxed), 10);
    world.write_token(&good);
    world.ask(&shop("client")).await.unwrap();
}

#[tokio::test]
async fn without_token_or_from_another_cluster_nobody_gets_anything() {
    let world = World::start().await;
    world.write_token(&claims("ambit-system", "ztunnel", NODE));
    for config in [
        ControlPlaneConfig { token_file: None, ..world.control_plane_config() },
        ControlPlaneConfig { cluster_id: "other".to_owned(), ..world.control_plane_config() },
    ] {
        let request = ambit_identity::CertificateRequest::new(&shop("client")).unwrap();
        let issuer = GrpcIssuer::impersonating(ControlPlane::new(config).unwrap());
        let outcome = issuer.issue(&shop("client"), request.csr_pem(), Duration::ZERO).await;
        assert!(matches!(outcome, Err(IssueError::Denied { .. })), "{outcome:?}");
    }
}

#[tokio::test]
async fn a_control_plane_that_is_not_verified_gets_no_token() {
    let world = World::start().await;
    world.write_token(&claims("ambit-system", "ztunnel", NODE));
    let ask = async |config: ControlPlaneConfig| {
        let request = ambit_identity::CertificateRequest::new(&shop("client")).unwrap();
        let issuer = GrpcIssuer::impersonating(ControlPlane::new(config).unwrap());
        match issuer.issue(&shop("client"), request.csr_pem(), Duration::ZERO).await {
            Err(IssueError::Unavailable { reason, .. }) => reason,
            outcome => panic!("{outcome:?}"),
        }
    };
    let other_name =
        ControlPlaneConfig { server_name: "evil.example".into(), ..world.control_plane_config() };
    let reason = ask(other_name).await;
    assert!(reason.contains("not valid for name") || reason.contains("NotValidForName"), "{reason}");
    let other = tempfile::tempdir().unwrap();
    let config = AuthorityConfig::new(domain(), other.path().join("ca"));
    let (stranger, _driver) = Authority::open(config).await.unwrap();
    std::fs::write(other.path().join("root"), &*stranger.roots_pem()).unwrap();
    let other_root =
        ControlPlaneConfig { root_file: other.path().join("root"), ..world.control_plane_config() };
    let reason = ask(other_root).await;
    assert!(reason.contains("invalid peer certificate"), "{reason}");
    assert_eq!(world.metrics.unauthenticated.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_replaced_root_file_counts_for_the_next_connection() {
    let world = World::start().await;
    world.write_token(&claims("ambit-system", "ztunnel", NODE));
    let good = std::fs::read(world.path("root-cert.pem")).unwrap();
    std::fs::remove_file(world.path("root-cert.pem")).unwrap();
    let issuer = GrpcIssuer::impersonating(world.control_plane());
    let request = ambit_identity::CertificateRequest::new(&shop("client")).unwrap();
    let failed = issuer.issue(&shop("client"), request.csr_pem(), Duration::ZERO).await.unwrap_err();
    assert!(failed.to_string().contains("root-cert.pem"), "{failed}");
    std::fs::write(world.path("root-cert.pem"), good).unwrap();
    issuer.issue(&shop("client"), request.csr_pem(), Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn the_ports_own_certificate_is_replaced_in_time() {
    let lifetime = Duration::from_secs(3);
    let world = World::with(|config| config.max_lifetime = lifetime).await;
    let first_ends = SystemTime::now() + lifetime;
    world.write_token(&claims("ambit-system", "ztunnel", NODE));
    while SystemTime::now() < first_ends + Duration::from_secs(1) {
        world.ask(&shop("client")).await.expect("a caller finds a valid certificate");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_key_set_that_changes_is_followed_and_a_broken_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (TokenSigner::new("k1"), TokenSigner::new("k2"));
    write_jwks(directory.path(), &[&old]);
    let (authenticator, driver) = JwtAuthenticator::open(jwt_config(directory.path())).await.unwrap();
    tokio::spawn(driver);
    let good = claims("ambit-system", "ztunnel", NODE);
    let is_believed = async |signer: &TokenSigner| {
        let credentials = Credentials::new(&signer.sign(&good), "Kubernetes").unwrap();
        authenticator.authenticate(&credentials).await.is_ok()
    };
    assert!(is_believed(&old).await && !is_believed(&new).await);
    std::fs::write(directory.path().join("jwks.json"), "{").unwrap();
    write_jwks(directory.path(), &[&old, &new]);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(15);
    while !is_believed(&new).await {
        assert!(tokio::time::Instant::now() < deadline, "the new key is not believed within 15 s");
        assert!(is_believed(&old).await);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_key_set_of_symmetric_keys_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let set = json!({ "keys": [{ "kty": "oct", "kid": "k1", "k": "c2VjcmV0" }] });
    std::fs::write(directory.path().join("jwks.json"), set.to_string()).unwrap();
    assert!(JwtAuthenticator::open(jwt_config(directory.path())).await.is_err());
}
