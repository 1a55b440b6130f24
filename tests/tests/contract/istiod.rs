//! istiod at our node proxy.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, IsCa, KeyPair,
    SanType,
};
use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::grpc::{CERTIFICATES, Call, DISCOVERY, SOON, Server};
use crate::wire::resource;
use crate::{ADDRESS, AUTHORIZATION, program};

pub(crate) const NAME: &str = "istiod.istio-system.svc";

/// The control plane, by hand.
pub(crate) struct Istiod {
    pub(crate) directory: TempDir,
    pub(crate) server: Server,
    root: CertifiedIssuer<'static, KeyPair>,
}

impl Istiod {
    pub(crate) async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec![NAME.to_owned()]).unwrap().signed_by(&key, &root).unwrap();
        std::fs::write(directory.path().join("root-cert.pem"), root.pem()).unwrap();
        std::fs::write(directory.path().join("istio-token"), "a token").unwrap();
        let server = Server::start(vec![leaf.der().clone()], key.serialize_der()).await;
        Self { directory, server, root }
    }

    /// The root's certificate.
    pub(crate) fn root_der(&self) -> Vec<u8> {
        self.root.der().to_vec()
    }

    /// A certificate of a service account of namespace `shop`, with its key.
    pub(crate) fn workload_certificate(&self, account: &str) -> (Vec<CertificateDer<'static>>, Vec<u8>) {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::default();
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{account}");
        parameters.subject_alt_names = vec![SanType::URI(identity.as_str().try_into().unwrap())];
        parameters.extended_key_usages =
            vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = parameters.signed_by(&key, &self.root).unwrap();
        (vec![certificate.der().clone()], key.serialize_der())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Answers one request for a certificate, and returns it.
    pub(crate) async fn sign(&mut self) -> Value {
        self.sign_for(Duration::from_secs(120), Duration::from_secs(3600)).await
    }

    /// Refuses one request for a certificate, as a control plane in trouble.
    pub(crate) async fn refuse(&mut self) {
        self.server.accept(CERTIFICATES).await.fail("14");
    }

    /// As [`Istiod::sign`], with a certificate that began this long ago and lasts so long.
    pub(crate) async fn sign_for(&mut self, began: Duration, lifetime: Duration) -> Value {
        let mut call = self.server.accept(CERTIFICATES).await;
        assert_eq!(call.headers["authorization"], "Bearer a token");
        let request = call.receive("IstioCertificateRequest").await.unwrap();
        let mut csr = CertificateSigningRequestParams::from_pem(request["csr"].as_str().unwrap()).unwrap();
        let identity = &request["metadata"]["fields"]["ImpersonatedIdentity"]["string_value"];
        let name = SanType::URI(identity.as_str().unwrap().try_into().unwrap());
        assert_eq!(csr.params.subject_alt_names, [name], "one URI SAN: the identity that is asked for");
        assert_eq!(csr.params.distinguished_name.iter().count(), 0, "an empty subject");
        assert_eq!(csr.public_key.algorithm(), &rcgen::PKCS_ECDSA_P256_SHA256);
        csr.params.is_ca = IsCa::NoCa;
        csr.params.extended_key_usages =
            vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let now = time::OffsetDateTime::now_utc();
        csr.params.not_before = now - began;
        csr.params.not_after = now + lifetime;
        let chain = [csr.signed_by(&self.root).unwrap().pem(), self.root.pem()];
        call.send("IstioCertificateResponse", &json!({ "cert_chain": chain }));
        call.finish();
        request
    }
}

/// Our node proxy.
pub(crate) struct Ztunnel {
    _child: Child,
    admin: SocketAddr,
    metrics: SocketAddr,
    readiness: SocketAddr,
    log: PathBuf,
}

impl Ztunnel {
    /// Starts the program under a control plane with further settings by their environment variables.
    pub(crate) fn start(istiod: &Istiod, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let held = [(); 3].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let [admin, metrics, readiness] = held.each_ref().map(|listener| listener.local_addr().unwrap());
        drop(held);
        let log = istiod.path(&format!("log-{}", admin.port()));
        let child = Command::new(program("ztunnel"))
            .args(arguments)
            .env_clear()
            .env("ZTUNNEL_ADMIN_ADDRESS", admin.to_string())
            .env("ZTUNNEL_METRICS_ADDRESS", metrics.to_string())
            .env("ZTUNNEL_READINESS_ADDRESS", readiness.to_string())
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self { _child: child, admin, metrics, readiness, log }
    }

    /// With Ambit's own settings.
    pub(crate) fn of(istiod: &Istiod, variables: &[(&str, &str)]) -> Self {
        let address = istiod.server.address().to_string();
        let path = |name: &str| istiod.path(name).display().to_string();
        let (root, token, socket) = (path("root-cert.pem"), path("istio-token"), path("zds.sock"));
        let own = [
            ("ZTUNNEL_NODE", "node-1"),
            ("ZTUNNEL_CONTROL_PLANE", address.as_str()),
            ("ZTUNNEL_CONTROL_PLANE_ROOT", root.as_str()),
            ("ZTUNNEL_CONTROL_PLANE_SERVER_NAME", NAME),
            ("ZTUNNEL_TOKEN_FILE", token.as_str()),
            ("ZTUNNEL_ZDS_SOCKET", socket.as_str()),
            ("ZTUNNEL_POD_NAME", "ztunnel-a"),
            ("ZTUNNEL_POD_NAMESPACE", "istio-system"),
            ("ZTUNNEL_INSTANCE_IP", "10.0.0.9"),
            ("ZTUNNEL_WORKERS", "1"),
        ];
        let all: Vec<_> = own.iter().chain(variables).copied().collect();
        Self::start(istiod, &[], &all)
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) async fn dump(&self) -> Value {
        let answer = get(self.admin, "/config_dump").await;
        answer
            .split_once("\r\n\r\n")
            .and_then(|(_, body)| serde_json::from_str(body).ok())
            .unwrap_or_default()
    }

    pub(crate) async fn metrics(&self) -> String {
        get(self.metrics, "/metrics").await
    }

    pub(crate) async fn is_ready(&self) -> bool {
        get(self.readiness, "/healthz/ready").await.starts_with("HTTP/1.1 200")
    }

    /// Waits until the configuration dump is as wanted.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = tokio::time::Instant::now() + SOON;
        loop {
            let dump = self.dump().await;
            if wanted(&dump) {
                return dump;
            }
            assert!(tokio::time::Instant::now() < deadline, "never: {what}\n{dump:#}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

pub(crate) async fn get(address: SocketAddr, path: &str) -> String {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        let head = format!("GET {path} HTTP/1.1\r\nhost: ztunnel\r\nconnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    exchange.await.unwrap_or_default()
}

/// The first request of both types, in the order in which they come.
pub(crate) async fn opening(stream: &mut Call) -> [Value; 2] {
    [
        stream.receive("DeltaDiscoveryRequest").await.unwrap(),
        stream.receive("DeltaDiscoveryRequest").await.unwrap(),
    ]
}

/// istiod's form of a version.
pub(crate) const VERSION: &str = "2026-11-27T21:00:00Z/7";

pub(crate) fn send(stream: &mut Call, type_url: &str, version: &str, resources: &[Value], removed: &[&str]) {
    let nonce = format!("{}-{version}", type_url.rsplit('.').next().unwrap());
    stream.send(
        "DeltaDiscoveryResponse",
        &json!({
            "system_version_info": version, "type_url": type_url, "nonce": nonce,
            "resources": resources, "removed_resources": removed,
        }),
    );
}

pub(crate) fn workload(name: &str, ip: [u8; 4], policies: &[&str]) -> Value {
    let uid = format!("Kubernetes//Pod/shop/{name}");
    let value = json!({ "workload": {
        "uid": uid, "name": name, "namespace": "shop", "addresses": [crate::wire::hex(&ip)], "tunnel_protocol": "HBONE",
        "trust_domain": "cluster.local", "service_account": name, "node": "node-1", "canonical_name": name,
        "canonical_revision": "latest", "workload_name": name, "cluster_id": "Kubernetes", "status": "HEALTHY",
        "authorization_policies": policies,
        "services": { "shop/web.shop.svc.cluster.local": { "ports": [{ "service_port": 80, "target_port": 8080 }] } },
    } });
    resource("Address", ADDRESS, &uid, "1", &value)
}

pub(crate) fn policy(scope: &str) -> Value {
    let principal = json!([{ "exact": "cluster.local/ns/shop/sa/enemy" }]);
    let clause = json!({ "matches": [{ "principals": principal, "destination_ports": [8080] }] });
    let value = json!({
        "name": "guard", "namespace": "shop", "scope": scope, "action": "DENY", "rules": [{ "clauses": [clause] }],
    });
    resource("Authorization", AUTHORIZATION, "shop/guard", "1", &value)
}

async fn acknowledgement(stream: &mut Call, nonce: &str) -> Value {
    stream.until("DeltaDiscoveryRequest", |it| it["response_nonce"] == nonce).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_opens_with_node_credentials_and_wildcards() {
    let mut istiod = Istiod::start().await;
    let _ztunnel = Ztunnel::of(&istiod, &[]);
    let mut stream = istiod.server.accept(DISCOVERY).await;
    assert_eq!(stream.headers["authorization"], "Bearer a token");
    assert_eq!(stream.headers["clusterid"], "Kubernetes");
    let requests = opening(&mut stream).await;
    assert_eq!(
        requests[0]["node"]["id"],
        "ztunnel~10.0.0.9~ztunnel-a.istio-system~istio-system.svc.cluster.local"
    );
    assert_eq!(requests[0]["node"]["metadata"]["fields"]["AMBIT_PARTIAL_STATE"]["string_value"], "true");
    let types = requests.each_ref().map(|it| it["type_url"].as_str().unwrap());
    assert_eq!(types, [AUTHORIZATION, ADDRESS], "policies first");
    for request in &requests {
        assert!(
            request["resource_names_subscribe"].is_null() && request["response_nonce"].is_null(),
            "{request}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn on_demand_opens_with_both_wildcards() {
    let mut istiod = Istiod::start().await;
    let _ztunnel = Ztunnel::of(&istiod, &[("ZTUNNEL_XDS_ON_DEMAND", "true")]);
    let mut stream = istiod.server.accept(DISCOVERY).await;
    let [policies, addresses] = opening(&mut stream).await;
    assert!(policies["resource_names_subscribe"].is_null(), "policies are never on demand: {policies}");
    assert_eq!(addresses["resource_names_subscribe"], json!(["*"]));
    assert_eq!(addresses["resource_names_unsubscribe"], json!(["*"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_istiod_sends_is_understood_and_acknowledged() {
    let mut istiod = Istiod::start().await;
    let ztunnel = Ztunnel::of(&istiod, &[]);
    let mut stream = istiod.server.accept(DISCOVERY).await;
    opening(&mut stream).await;
    send(&mut stream, AUTHORIZATION, VERSION, &[policy("NAMESPACE")], &[]);
    let bad = resource(
        "Address",
        ADDRESS,
        "Kubernetes//Pod/shop/bad",
        "1",
        &json!({ "workload": { "uid": "bad", "addresses": ["0a"] } }),
    );
    send(&mut stream, ADDRESS, VERSION, &[bad, workload("web", [10, 0, 0, 7], &[])], &[]);
    let nack = acknowledgement(&mut stream, &format!("Address-{VERSION}")).await;
    let message = nack["error_detail"]["message"].as_str().expect("the bad one is rejected");
    assert!(message.contains("//Pod/shop/bad") && !message.contains("/web"), "{message}");
    let ack = acknowledgement(&mut stream, &format!("Authorization-{VERSION}")).await;
    assert!(ack["error_detail"].is_null(), "{ack}");
    assert!(ztunnel.metrics().await.contains("ambit_xds_rejected_total 1"));
    let dump =
        ztunnel.until("the workload", |dump| dump["workloads"][0]["uid"] == "Kubernetes//Pod/shop/web").await;
    // As `istioctl ztunnel-config` reads it.
    let workload = &dump["workloads"][0];
    assert_eq!(workload["workloadIps"], json!(["10.0.0.7"]));
    assert_eq!((&workload["serviceAccount"], &workload["protocol"]), (&json!("web"), &json!("HBONE")));
    let shown = &dump["policies"][0];
    let one = &shown["rules"][0][0][0];
    assert_eq!(one["principals"], json!([{ "Exact": "cluster.local/ns/shop/sa/enemy" }]), "{shown}");
    assert_eq!((&shown["name"], &one["destinationPorts"]), (&json!("guard"), &json!([8080])), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reconnect_names_the_versions_held() {
    let mut istiod = Istiod::start().await;
    let ztunnel = Ztunnel::of(&istiod, &[]);
    let mut stream = istiod.server.accept(DISCOVERY).await;
    opening(&mut stream).await;
    send(&mut stream, AUTHORIZATION, VERSION, &[policy("NAMESPACE")], &[]);
    send(&mut stream, ADDRESS, VERSION, &[workload("web", [10, 0, 0, 7], &[])], &[]);
    acknowledgement(&mut stream, &format!("Address-{VERSION}")).await;
    stream.finish();
    let mut stream = istiod.server.accept(DISCOVERY).await;
    let [policies, addresses] = opening(&mut stream).await;
    assert_eq!(policies["initial_resource_versions"], json!({ "shop/guard": "1" }));
    assert_eq!(addresses["initial_resource_versions"], json!({ "Kubernetes//Pod/shop/web": "1" }));
    let dump = ztunnel.dump().await;
    assert_eq!(dump["workloads"].as_array().map(Vec::len), Some(1), "what is held stays: {dump:#}");
}

/// A DENY goes from its namespace to a selector: the narrower form must not hold before the workload lists it.
#[tokio::test(flavor = "multi_thread")]
async fn a_narrowed_deny_leaves_no_moment_without_policy() {
    let mut istiod = Istiod::start().await;
    let ztunnel = Ztunnel::of(&istiod, &[]);
    let mut stream = istiod.server.accept(DISCOVERY).await;
    opening(&mut stream).await;
    send(&mut stream, AUTHORIZATION, "1", &[policy("NAMESPACE")], &[]);
    send(&mut stream, ADDRESS, "1", &[workload("web", [10, 0, 0, 7], &[])], &[]);
    ztunnel.until("the workload", |dump| dump["workloads"][0]["name"] == "web").await;
    send(&mut stream, AUTHORIZATION, "2+", &[policy("WORKLOAD_SELECTOR")], &[]);
    // Requests are handled in order: when this one is answered, the policy before it was too.
    let unknown = "type.googleapis.com/nobody.Knows";
    send(&mut stream, unknown, "2", &[], &[]);
    acknowledgement(&mut stream, "Knows-2").await;
    let scope = |dump: &Value| dump["policies"].to_string().to_uppercase();
    let before = ztunnel.dump().await;
    assert!(
        scope(&before).contains("NAMESPACE\"") && !scope(&before).contains("SELECTOR"),
        "{:#}",
        before["policies"]
    );
    send(&mut stream, ADDRESS, "2", &[workload("web", [10, 0, 0, 7], &["shop/guard"])], &[]);
    let after = ztunnel.until("the batch", |dump| scope(dump).contains("SELECTOR")).await;
    assert!(after["workloads"][0].to_string().contains("shop/guard"), "both at once: {after:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_answer_of_each_type_makes_ready() {
    let mut istiod = Istiod::start().await;
    let ztunnel = Ztunnel::of(&istiod, &[]);
    let socket = crate::zds::Agent::listen(&istiod.path("zds.sock"));
    let mut stream = istiod.server.accept(DISCOVERY).await;
    opening(&mut stream).await;
    let agent = socket.accept().await;
    agent.snapshot_sent().await;
    send(&mut stream, AUTHORIZATION, VERSION, &[], &[]);
    acknowledgement(&mut stream, &format!("Authorization-{VERSION}")).await;
    assert!(!ztunnel.is_ready().await, "addresses were not sent yet");
    send(&mut stream, ADDRESS, VERSION, &[], &[]);
    let deadline = tokio::time::Instant::now() + SOON;
    while !ztunnel.is_ready().await {
        assert!(tokio::time::Instant::now() < deadline, "never ready\n{}", ztunnel.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
