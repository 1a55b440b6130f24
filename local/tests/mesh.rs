//! What the cluster itself does for a mesh: agents that restart, tokens that are renewed, labels in manifests.
//!
//! These tests make network namespaces, so they need root, and they start `ambit-control` and `ztunnel`, so those
//! must be built.

#![allow(clippy::expect_used, reason = "a test says what it needs and fails without it")]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ambit_local::{Cluster, Pod, PodOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const LIMIT: Duration = Duration::from_secs(20);
const PORT: u16 = 7000;
const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: echo, namespace: shop}\nspec: {selector: {app: echo}, ports: [{port: 7000}]}\n";

/// Sends back what comes.
async fn echo(pod: &Pod) {
    let listener = pod.listen(SocketAddr::new(IpAddr::from([0, 0, 0, 0]), PORT)).await.expect("a port");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = [0; 1024];
                while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                    if stream.write_all(&buffer[..length]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
}

async fn ask(stream: &mut TcpStream) -> std::io::Result<()> {
    let question = *b"0123456789abcdef";
    let exchange = async {
        stream.write_all(&question).await?;
        let mut answer = [0; 16];
        stream.read_exact(&mut answer).await?;
        if answer == question { Ok(()) } else { Err(std::io::Error::other("another answer")) }
    };
    let silent = |_| std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer");
    tokio::time::timeout(LIMIT, exchange).await.map_err(silent)?
}

async fn connect_and_ask(client: &Pod, target: SocketAddr) -> std::io::Result<()> {
    let mut stream = client.connect_within(target, LIMIT).await?;
    ask(&mut stream).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_restart_is_not_noticed_and_new_pods_are_enrolled() {
    let cluster = Cluster::builder().start().await.expect("root, ambit-control and ztunnel");
    cluster.namespace("shop", true).await.expect("a namespace");
    cluster.apply(SERVICE).await.expect("a service");
    let server = PodOptions::new("shop", "echo").node(1).label("app", "echo").service_account("echo");
    let server = cluster.pod(server).await.expect("a pod");
    echo(&server).await;
    let client = PodOptions::new("shop", "client").node(0).service_account("client");
    let client = cluster.pod(client).await.expect("a pod");
    let target = SocketAddr::new(cluster.service_ips("shop", "echo")[0], PORT);
    let mut kept = client.connect_within(target, LIMIT).await.expect("a connection");
    ask(&mut kept).await.expect("an answer");
    for node in 0..2 {
        cluster.stop_agent(node).await.expect("it stops");
    }
    ask(&mut kept).await.expect("what was open stays open");
    connect_and_ask(&client, target).await.expect("new connections need no agent");
    for node in 0..2 {
        cluster.start_agent(node).await.expect("it starts");
    }
    ask(&mut kept).await.expect("what was open stays open");
    connect_and_ask(&client, target).await.expect("new connections go on");
    assert!(client.is_enrolled() && server.is_enrolled(), "nobody was ever called out of the mesh");
    let late = PodOptions::new("shop", "late").node(0).service_account("late");
    let late = cluster.pod(late).await.expect("a new pod comes in after the restart");
    connect_and_ask(&late, target).await.expect("it is served");
    cluster.delete_pod(&client).await.expect("a pod of before the restart goes");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_renewed_before_they_expire() {
    let lifetime = Duration::from_secs(4);
    let cluster = Cluster::builder().token_lifetime(lifetime).start().await.expect("root and the programs");
    cluster.namespace("shop", true).await.expect("a namespace");
    cluster.apply(SERVICE).await.expect("a service");
    let began = Instant::now();
    cluster
        .wait_until("two lifetimes to pass", LIMIT, async || began.elapsed() > 2 * lifetime)
        .await
        .expect("time passes");
    // Identities that nobody has had yet need certificates now.
    let server = PodOptions::new("shop", "late").node(1).label("app", "echo").service_account("late-server");
    let server = cluster.pod(server).await.expect("a pod");
    echo(&server).await;
    let client = PodOptions::new("shop", "late-client").node(0).service_account("late-client");
    let client = cluster.pod(client).await.expect("a pod");
    let target = SocketAddr::new(IpAddr::V4(server.ip()), PORT);
    let mut stream = client.connect_within(target, LIMIT).await.expect("it connects");
    ask(&mut stream).await.expect("it is answered");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edited_label_enrols_and_unenrols_running_pods() {
    let manifests = tempfile::tempdir().expect("a directory");
    let namespace = |labels: &str| {
        format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{labels}}}}}\n")
    };
    let file = manifests.path().join("namespace.yaml");
    std::fs::write(&file, namespace("")).expect("the file can be written");
    let app = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: app, namespace: shop}\nspec:\n  replicas: 2\n  selector: {matchLabels: {app: a}}\n  template:\n    metadata: {labels: {app: a}}\n    spec: {terminationGracePeriodSeconds: 0, containers: [{name: c, image: any, command: [sleep, '1000']}]}\n";
    std::fs::write(manifests.path().join("app.yaml"), app).expect("the file can be written");
    let cluster = Cluster::builder().manifests(manifests.path()).start().await.expect("it starts");
    cluster.wait_ready("shop", "app", LIMIT).await.expect("it runs");
    let pods = cluster.pods_of("shop", "app", "a");
    assert!(pods.iter().all(|pod| !pod.is_enrolled()));
    let began = Instant::now();
    std::fs::write(&file, namespace("istio.io/dataplane-mode: ambient")).expect("the file can be written");
    for pod in &pods {
        cluster.wait_enrolled(pod).await.expect("it comes in");
    }
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    std::fs::write(&file, namespace("")).expect("the file can be written");
    for pod in &pods {
        cluster.wait_unenrolled(pod).await.expect("it goes out");
        assert_eq!(pod.view().restarts(), 0);
        assert!(pod.is_ready());
    }
    assert_eq!(cluster.pods_of("shop", "app", "a").len(), 2, "the same pods, not others");
    cluster.shutdown().await;
}

/// Needs the demo's program `bookinfo` too.
#[tokio::test(flavor = "multi_thread")]
async fn probes_reach_a_pod_whatever_the_policies_say() {
    let cluster = Cluster::builder().start().await.expect("root, ambit-control and ztunnel");
    cluster.namespace("shop", true).await.expect("a namespace");
    cluster
        .apply(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: nobody, namespace: shop}\nspec: {action: ALLOW}\n---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: shop}\nspec: {mtls: {mode: STRICT}}\n---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: details, namespace: shop}\nspec:\n  selector: {matchLabels: {app: details}}\n  template:\n    metadata: {labels: {app: details}}\n    spec:\n      containers:\n      - name: details\n        image: bookinfo\n        args: [details]\n        readinessProbe: {httpGet: {path: /health, port: 9080}, periodSeconds: 1}\n        startupProbe: {tcpSocket: {port: 9080}, periodSeconds: 1, failureThreshold: 30}\n        livenessProbe: {tcpSocket: {port: 9080}, periodSeconds: 1, failureThreshold: 1}\n",
        )
        .await
        .expect("sound manifests");
    cluster.wait_ready("shop", "details", LIMIT).await.expect("its readiness probe reaches it");
    let details = cluster.pods_of("shop", "app", "details")[0].clone();
    assert!(details.is_enrolled());
    for (namespace, name) in [("shop", "client"), ("elsewhere", "stranger")] {
        let client = cluster.pod(PodOptions::new(namespace, name)).await.expect("a pod");
        let target = SocketAddr::new(IpAddr::V4(details.ip()), 9080);
        let asked = async {
            let mut stream = client.connect_within(target, LIMIT).await?;
            stream.write_all(b"GET /health HTTP/1.1\r\nhost: details\r\n\r\n").await?;
            stream.read(&mut [0; 64]).await
        };
        assert!(matches!(asked.await, Ok(0) | Err(_)), "{name} must not be answered");
    }
    assert_eq!(details.view().restarts(), 0, "its liveness probe reaches it");
    cluster.shutdown().await;
}
