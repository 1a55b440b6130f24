//! TLS to endpoints: inside the tunnel to those of the mesh, on plain TCP to those outside it, verified as policies demand.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use ambit_local::Pod;
use ambit_tests::beds::Trials;
use ambit_tests::wait::SOON;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;

use crate::bed::{TLS_PORT, Waypoints};

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("TLS to an endpoint of the mesh is verified", async |bed| simple(bed).await);
    trials.add("TLS begins outside the mesh with a client certificate", async |bed| mutual(bed).await);
    trials.add("a Secret has what TLS to an endpoint needs", async |bed| by_secret(bed).await);
    trials.add("nothing leaves in the clear where TLS can't be spoken", async |bed| unusable(bed).await);
}

/// An authority, with its root in a file.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: tempfile::TempDir,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("root.pem"), issuer.pem()).unwrap();
        Self { issuer, directory }
    }

    /// The file with its root.
    pub(crate) fn root_file(&self) -> String {
        self.file("root.pem").display().to_string()
    }

    /// A BackendTLSPolicy for a ServiceEntry and its host `<name>.example`, with a ConfigMap.
    pub(crate) fn policy(&self, name: &str) -> String {
        let root: String = self.issuer.pem().lines().map(|line| format!("    {line}\n")).collect();
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}, namespace: shop}}\ndata:\n  ca.crt: |\n{root}---\n\
             apiVersion: gateway.networking.k8s.io/v1\nkind: BackendTLSPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{targetRefs: [{{group: networking.istio.io, kind: ServiceEntry, name: {name}}}], \
             validation: {{hostname: {name}.example, caCertificateRefs: [{{group: '', kind: ConfigMap, name: {name}}}]}}}}\n"
        )
    }

    /// What a server answers inside TLS of the client's own; `None` if there is no connection or its certificate is not accepted.
    pub(crate) async fn get(&self, client: &Pod, to: SocketAddr, name: &str) -> Option<String> {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let asked = ServerName::try_from(name.to_owned()).unwrap();
        let talk = async {
            let stream = client.connect(to).await?;
            let mut stream = TlsConnector::from(Arc::new(config)).connect(asked, stream).await?;
            stream.write_all(format!("GET / HTTP/1.1\r\nhost: {name}\r\n\r\n").as_bytes()).await?;
            let mut answer = vec![0; 4096];
            let length = stream.read(&mut answer).await?;
            std::io::Result::Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
        };
        tokio::time::timeout(SOON, talk).await.ok()?.ok()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn issue(&self, name: &str) -> (rcgen::Certificate, KeyPair) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::DnsName(name.try_into().unwrap())];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }

    /// A server with a certificate for a name, which wants one of its clients.
    pub(crate) fn server(&self, name: &str, clients: Option<&Authority>) -> Arc<rustls::ServerConfig> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                roots.add(authority.issuer.der().clone()).unwrap();
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().unwrap())
            }
        };
        let (certificate, key) = self.issue(name);
        let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap();
        let mut config = builder.with_single_cert(vec![certificate.der().clone()], key).unwrap();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Arc::new(config)
    }
}

/// A DestinationRule with this TLS.
async fn demand(bed: &Waypoints, host: &str, tls: &str) {
    let name = host.split('.').next().unwrap();
    bed.apply(&format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{host: {host}, trafficPolicy: {{tls: {tls}}}}}\n"
    ))
    .await;
}

async fn simple(bed: &Waypoints) {
    let authority = Authority::new();
    bed.tls_server("secure", authority.server("secure.example", None)).await;
    let root = authority.file("root.pem");
    let root = root.display();
    let verified = format!("{{mode: SIMPLE, sni: secure.example, caCertificates: {root}}}");
    demand(bed, "secure.shop.svc.cluster.local", &verified).await;
    bed.apply(&format!(
        "apiVersion: v1\nkind: Service\n\
         metadata: {{name: secure, namespace: shop, labels: {{istio.io/use-waypoint: waypoint}}}}\n\
         spec: {{selector: {{app: secure}}, ports: [{{name: http, port: 80, targetPort: {TLS_PORT}}}]}}\n"
    ))
    .await;
    let vip = bed.cluster.service_ips("shop", "secure").into_iter().find(IpAddr::is_ipv4).unwrap();
    let to = SocketAddr::new(vip, 80);
    let answer = bed.eventually(to, "/", "", |answer| answer.status == 200).await;
    assert_eq!(answer.sent("sni"), Some("secure.example"));
    assert_eq!(answer.sent("alpn"), Some("http/1.1"));
    assert_eq!(answer.sent("shown"), Some("0"));
    // The tunnel is there all the same: the endpoint's node has the waypoint's identity.
    let log = bed.cluster.ztunnel(1).unwrap().logs().join("\n");
    assert!(log.contains("sa/waypoint"), "{log}");

    demand(bed, "secure.shop.svc.cluster.local", &verified.replace("secure.example", "other.example")).await;
    let answer = bed.eventually(to, "/", "", |answer| answer.status == 503).await;
    assert_eq!(answer.body, "upstream connect error or reset before headers\n");
    let other = Authority::new();
    let named = format!(
        "{{mode: SIMPLE, sni: other.example, subjectAltNames: [secure.example], caCertificates: {root}}}"
    );
    demand(bed, "secure.shop.svc.cluster.local", &named).await;
    let answer = bed.eventually(to, "/", "", |answer| answer.status == 200).await;
    assert_eq!(answer.sent("sni"), Some("other.example"));
    let foreign = verified.replace(&root.to_string(), &other.file("root.pem").display().to_string());
    demand(bed, "secure.shop.svc.cluster.local", &foreign).await;
    bed.eventually(to, "/", "", |answer| answer.status == 503).await;
}

async fn mutual(bed: &Waypoints) {
    let (authority, clients) = (Authority::new(), Authority::new());
    let address = bed.tls_outside(9443, "bank", authority.server("bank.example", Some(&clients))).await;
    let (chain, key) = clients.issue("waypoint");
    std::fs::write(clients.file("chain.pem"), chain.pem()).unwrap();
    std::fs::write(clients.file("key.pem"), key.serialize_pem()).unwrap();
    bed.apply(&format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n\
         metadata: {{name: bank, namespace: shop, labels: {{istio.io/use-waypoint: waypoint}}}}\n\
         spec: {{hosts: [bank.example], addresses: [240.0.0.91], location: MESH_EXTERNAL, resolution: STATIC, \
         ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 9443}}], endpoints: [{{address: {address}}}]}}\n"
    ))
    .await;
    let root = authority.file("root.pem");
    let simple = format!("{{mode: SIMPLE, caCertificates: {}}}", root.display());
    demand(bed, "bank.example", &simple).await;
    let to = SocketAddr::new("240.0.0.91".parse().unwrap(), 80);
    let answer = bed.eventually(to, "/", "host: bank.example\r\n", |answer| answer.status == 503).await;
    assert!(answer.header("server").is_none(), "{answer:?}");
    let (chain, key) = (clients.file("chain.pem"), clients.file("key.pem"));
    let mutual = format!(
        "{{mode: MUTUAL, caCertificates: {}, clientCertificate: {}, privateKey: {}}}",
        root.display(),
        chain.display(),
        key.display()
    );
    demand(bed, "bank.example", &mutual).await;
    let answer = bed.eventually(to, "/", "host: bank.example\r\n", |answer| answer.status == 200).await;
    // Without a name of its own, the host of the service is asked for.
    assert_eq!(answer.sent("sni"), Some("bank.example"));
    assert_eq!(answer.sent("shown"), Some("1"));
}

/// A Secret of the waypoint's namespace with roots, and with a certificate if there is one.
async fn secret(bed: &Waypoints, name: &str, roots: &Authority, pair: Option<(String, String)>) {
    let (chain, key) = pair.unwrap_or_default();
    let entry = |key: &str, text: &str| {
        let lines: String = text.lines().map(|line| format!("    {line}\n")).collect();
        format!("  {key}: |\n{lines}")
    };
    let entries = [("ca.crt", &roots.issuer.pem()), ("tls.crt", &chain), ("tls.key", &key)];
    let entries: String = entries.map(|(key, text)| entry(key, text)).concat();
    bed.apply(&format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: {name}, namespace: shop}}\n\
         type: kubernetes.io/tls\nstringData:\n{entries}"
    ))
    .await;
}

async fn by_secret(bed: &Waypoints) {
    let (authority, clients) = (Authority::new(), Authority::new());
    let address = bed.tls_outside(9446, "vault", authority.server("vault.example", Some(&clients))).await;
    bed.apply(&format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n\
         metadata: {{name: vault, namespace: shop, labels: {{istio.io/use-waypoint: waypoint}}}}\n\
         spec: {{hosts: [vault.example], addresses: [240.0.0.92], location: MESH_EXTERNAL, resolution: STATIC, \
         ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 9446}}], endpoints: [{{address: {address}}}]}}\n"
    ))
    .await;
    let to = SocketAddr::new("240.0.0.92".parse().unwrap(), 80);
    let answers = async |status: u16| {
        bed.eventually(to, "/", "host: vault.example\r\n", |answer| answer.status == status).await
    };
    demand(bed, "vault.example", "{mode: MUTUAL, credentialName: vault-client}").await;
    // There is no Secret: nothing is sent.
    answers(500).await;
    secret(bed, "vault-client", &authority, None).await;
    // It has no key.
    let findings = async || bed.cluster.findings().await.join("\n");
    ambit_tests::wait::until("the finding", SOON, async || findings().await.contains("vault-client has"))
        .await;
    answers(500).await;
    let issued = |authority: &Authority| {
        let (chain, key) = authority.issue("waypoint");
        Some((chain.pem(), key.serialize_pem()))
    };
    // The server does not know who issued it.
    secret(bed, "vault-client", &authority, issued(&authority)).await;
    answers(503).await;
    secret(bed, "vault-client", &authority, issued(&clients)).await;
    let answer = answers(200).await;
    assert_eq!((answer.server(), answer.sent("shown")), ("vault", Some("1")));
    // Roots of somebody else, and back.
    secret(bed, "vault-client", &clients, issued(&clients)).await;
    answers(503).await;
    secret(bed, "vault-client", &authority, issued(&clients)).await;
    answers(200).await;
    bed.cluster.delete("Secret", "shop", "vault-client").await.unwrap();
    answers(500).await;
    let logs = bed.logs().join("\n");
    assert!(!logs.contains("PRIVATE KEY"), "a key is in the log");
}

async fn unusable(bed: &Waypoints) {
    let to = bed.service("unusable").await;
    demand(bed, "unusable.shop.svc.cluster.local", "{mode: SIMPLE, caCertificates: /nowhere/root.pem}").await;
    bed.eventually(to, "/", "", |answer| answer.status == 500).await;
    demand(bed, "unusable.shop.svc.cluster.local", "{mode: DISABLE}").await;
    bed.eventually(to, "/", "", |answer| answer.status == 200).await;
    // The server speaks no TLS: nothing of the request reaches it.
    demand(bed, "unusable.shop.svc.cluster.local", "{mode: SIMPLE, insecureSkipVerify: true}").await;
    let asked = std::time::Instant::now();
    let answer = bed.eventually(to, "/", "", |answer| answer.status == 503).await;
    assert!(answer.sent("server").is_none() && asked.elapsed() < SOON, "{answer:?}");
}
