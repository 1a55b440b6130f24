//! The control plane from the outside: its binary, a directory, real sockets, real tokens.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod gateways;
mod port;
mod world;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ambit_api::security::Authorization;
use ambit_api::workload::{Address, Service, Workload, address};
use ambit_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use ambit_identity::{CertificateRequest, ControlPlane, GrpcIssuer, IssueError, Issuer, SpiffeId};
use ambit_xds::{Client, ClientConfig, Found, Update, ztunnel_node};
use parking_lot::Mutex;
use tokio::sync::watch;
use tonic::service::interceptor::InterceptedService;

use world::{DEADLINE, World};

const NAMESPACE: &str = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n";

fn pod(name: &str, node: &str, address: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: shop\n  labels: {{app: reviews}}\n  \
         annotations: {{ambient.istio.io/redirection: enabled}}\nspec:\n  nodeName: {node}\n  serviceAccountName: reviews\n  \
         containers:\n  - name: app\n    ports:\n    - {{name: http, containerPort: 8080}}\nstatus:\n  phase: Running\n  \
         podIP: {address}\n  podIPs: [{{ip: {address}}}]\n  conditions:\n  - {{type: Ready, status: \"True\"}}\n"
    )
}

fn service(port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: reviews\n  namespace: shop\nspec:\n  clusterIP: 10.96.0.7\n  \
         selector: {{app: reviews}}\n  ports:\n  - {{name: http, port: {port}, targetPort: http}}\n"
    )
}

const POLICY: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: only-web\n  namespace: shop\n\
                      spec:\n  selector:\n    matchLabels: {app: reviews}\n  rules:\n  - from:\n    - source:\n        \
                      principals: [cluster.local/ns/shop/sa/web]\n";

/// What a subscriber holds.
#[derive(Clone, Default)]
struct Held {
    addresses: Arc<Mutex<BTreeMap<String, Address>>>,
    policies: Arc<Mutex<BTreeMap<String, Authorization>>>,
    changed: watch::Sender<()>,
}

impl Held {
    /// A handler that applies what its decoders did while the batch was read.
    fn handler(
        &self,
    ) -> impl FnMut(&mut dyn Iterator<Item = ()>) -> Vec<ambit_xds::Rejected> + Send + 'static {
        let changed = self.changed.clone();
        move |batch| {
            batch.for_each(drop);
            changed.send_replace(());
            Vec::new()
        }
    }

    fn keep<M: Send + 'static>(
        held: &Arc<Mutex<BTreeMap<String, M>>>,
    ) -> impl Fn(Update<M>) + Send + 'static {
        let held = held.clone();
        move |update| match update {
            Update::Upsert { name, resource } => drop(held.lock().insert(name, resource)),
            Update::Remove { name } => drop(held.lock().remove(&name)),
        }
    }

    /// Waits until something holds and returns how long that took.
    async fn until(&self, what: &str, holds: impl Fn(&Held) -> bool) -> Duration {
        let started = Instant::now();
        let mut changes = self.changed.subscribe();
        let wait = async {
            while !holds(self) {
                changes.changed().await.unwrap();
            }
        };
        let in_time = tokio::time::timeout(DEADLINE, wait).await;
        assert!(in_time.is_ok(), "{what}: {:#?}", self.addresses.lock());
        started.elapsed()
    }

    fn workload(&self, name: &str) -> Option<Workload> {
        match self.addresses.lock().get(&format!("Kubernetes//Pod/shop/{name}"))?.r#type.clone()? {
            address::Type::Workload(workload) => Some(workload),
            address::Type::Service(_) => None,
        }
    }

    fn service(&self) -> Option<Service> {
        match self.addresses.lock().get("shop/reviews.shop.svc.cluster.local")?.r#type.clone()? {
            address::Type::Service(service) => Some(service),
            address::Type::Workload(_) => None,
        }
    }

    fn port(&self) -> Option<u32> {
        Some(self.service()?.ports.first()?.service_port)
    }
}

fn connector(
    caller: ControlPlane,
) -> impl FnMut() -> std::future::Ready<
    Result<InterceptedService<tonic::transport::Channel, ambit_identity::Credentials>, ambit_xds::BoxError>,
> + Send
+ 'static {
    move || std::future::ready(Ok(InterceptedService::new(caller.channel(), caller.credentials())))
}

fn node() -> ClientConfig {
    ClientConfig::new(ztunnel_node("10.0.0.2".parse().unwrap(), "ztunnel-a", "ambit-system", BTreeMap::new()))
}

/// Subscribes to everything; the client must be held for the stream to go on.
fn subscribe(caller: ControlPlane) -> (Client, Held) {
    let held = Held::default();
    let (client, driver) = Client::builder(node(), held.handler())
        .wildcard::<Authorization>(AUTHORIZATION_TYPE_URL, Held::keep(&held.policies))
        .wildcard::<Address>(ADDRESS_TYPE_URL, Held::keep(&held.addresses))
        .build(connector(caller));
    tokio::spawn(driver.run());
    (client, held)
}

fn start() -> World {
    start_with(&[])
}

fn start_with(arguments: &[&str]) -> World {
    let objects = format!("{NAMESPACE}{}", pod("reviews-1", "node-a", "10.0.0.7"));
    let files = [("pods.yaml", &*objects), ("service.yaml", &service(9080)), ("policy.yaml", POLICY)];
    World::start_with(&files, arguments)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_proxy_gets_workloads_services_and_policies() {
    let world = start();
    let (_client, held) = subscribe(world.node_proxy("node-a"));
    held.until("first state", |held| held.workload("reviews-1").is_some() && held.service().is_some()).await;
    let workload = held.workload("reviews-1").unwrap();
    assert_eq!(&*workload.addresses[0], [10, 0, 0, 7]);
    assert_eq!(workload.service_account, "reviews");
    let ports = &workload.services["shop/reviews.shop.svc.cluster.local"].ports;
    assert_eq!((ports[0].service_port, ports[0].target_port), (9080, 8080));
    assert_eq!(workload.authorization_policies, ["shop/only-web"]);
    assert!(held.policies.lock().contains_key("shop/only-web"));
    assert_eq!(&*held.service().unwrap().addresses[0].address, [10, 96, 0, 7]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_arrives_within_a_tenth_of_a_second() {
    let world = start();
    let (_client, held) = subscribe(world.node_proxy("node-a"));
    held.until("first state", |held| held.port() == Some(9080)).await;
    let mut times = Vec::new();
    for port in 9081..9101 {
        // In place, as `tee` and most editors' scripts do, and put in place by rename, in turn.
        match port % 2 {
            0 => world.replace("service.yaml", &service(port)),
            _ => std::fs::write(world.object_file("service.yaml"), service(port)).unwrap(),
        }
        times.push(held.until("the edit", |held| held.port() == Some(port.into())).await);
    }
    times.sort();
    // The machine may stall one edit; the typical one must be in time.
    println!("edits arrived after {times:?}");
    assert!(times[times.len() / 2] < Duration::from_millis(100), "{times:?}");
    std::fs::remove_file(world.object_file("pods.yaml")).unwrap();
    held.until("the removal", |held| held.workload("reviews-1").is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_service_is_absent_and_reported_with_its_line() {
    let world = start();
    let (_client, held) = subscribe(world.node_proxy("node-a"));
    held.until("first state", |held| held.port() == Some(9080)).await;
    world.replace("service.yaml", &service(9081).replace("port: 9081", "port: many"));
    let line = world.log_line(|line| line["file"].as_str().is_some_and(|f| f.ends_with("service.yaml")));
    assert_eq!(
        (line["line"].as_u64(), line["field"].as_str()),
        (Some(10), Some("spec.ports[0].port")),
        "{line}"
    );
    assert_eq!(world.metric("ambit_control_source_malformed_total"), 1.0);
    assert_eq!(world.metric("ambit_control_source_problems"), 1.0);
    // What follows in another file arrives, so the malformed one was passed over and not waited for.
    world.replace("other.yaml", &pod("reviews-2", "node-b", "10.0.1.7"));
    held.until("the other file", |held| held.workload("reviews-2").is_some()).await;
    held.until("the removal", |held| held.port().is_none()).await;
    world.replace("service.yaml", &service(9082));
    held.until("the repair", |held| held.port() == Some(9082)).await;
    assert_eq!(world.metric("ambit_control_source_problems"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demand_for_a_service_brings_the_workloads_behind_it() {
    let world = start();
    let held = Held::default();
    let (client, driver) = Client::builder(node(), held.handler())
        .on_demand::<Address>(ADDRESS_TYPE_URL, Held::keep(&held.addresses))
        .build(connector(world.node_proxy("node-a")));
    tokio::spawn(driver.run());
    let found = client.demand(ADDRESS_TYPE_URL, "/10.96.0.7").await.unwrap();
    assert!(matches!(found, Found::Present), "{found:?}");
    held.until("the workload", |held| held.service().is_some() && held.workload("reviews-1").is_some()).await;
    let missing = client.demand(ADDRESS_TYPE_URL, "/10.9.9.9").await.unwrap();
    assert!(!matches!(missing, Found::Present), "{missing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_without_a_valid_token_gets_nothing() {
    let world = start();
    let (_client, held) = subscribe(world.caller("not.a.token"));
    let deadline = Instant::now() + DEADLINE;
    while world.metric("ambit_control_xds_unauthenticated_total") < 1.0 {
        assert!(Instant::now() < deadline, "no refusal was counted");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(held.addresses.lock().is_empty());
}

async fn ask(caller: ControlPlane, account: &str) -> Result<Vec<String>, IssueError> {
    let identity = SpiffeId::new("cluster.local", "shop", account).unwrap();
    let request = CertificateRequest::new(&identity).unwrap();
    GrpcIssuer::impersonating(caller).issue(&identity, request.csr_pem(), Duration::from_secs(3600)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_signed_for_pods_of_the_callers_node_only() {
    let world = start();
    let chain = ask(world.node_proxy("node-a"), "reviews").await.unwrap();
    let root = std::fs::read_to_string(world.directory.path().join("root-cert.pem")).unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!(chain[1].trim(), root.trim());
    for (caller, account) in [
        (world.node_proxy("node-b"), "reviews"),
        (world.node_proxy("node-a"), "ratings"),
        (world.caller(&world.signer.token("shop", "web", "node-a")), "reviews"),
    ] {
        let refused = ask(caller, account).await.unwrap_err();
        assert!(refused.to_string().contains("PermissionDenied"), "{account}: {refused}");
    }
    assert_eq!(world.metric("ambit_control_ca_denied_total"), 3.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_moves_takes_the_right_to_its_certificate_along() {
    let world = start();
    let (_client, held) = subscribe(world.node_proxy("node-b"));
    held.until("first state", |held| held.workload("reviews-1").is_some()).await;
    world.replace("pods.yaml", &format!("{NAMESPACE}{}", pod("reviews-1", "node-b", "10.0.1.7")));
    held.until("the move", |held| held.workload("reviews-1").is_some_and(|w| w.node == "node-b")).await;
    ask(world.node_proxy("node-b"), "reviews").await.unwrap();
    ask(world.node_proxy("node-a"), "reviews").await.unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_and_findings_are_shown() {
    let world = start();
    assert!(world.readiness().starts_with("HTTP/1.1 200"), "{}", world.readiness());
    assert_eq!(world.config_dump("resources"), serde_json::json!({ "policies": 2, "addresses": 2 }));
    let findings = world.config_dump("findings");
    assert_eq!(findings[0]["kind"], "AuthorizationPolicy");
    assert_eq!(findings[0]["conditions"][0]["type"], "ZtunnelAccepted");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_ends_on_a_signal_while_streams_are_open() {
    let world = start();
    let (_client, held) = subscribe(world.node_proxy("node-a"));
    held.until("first state", |held| held.port() == Some(9080)).await;
    let started = Instant::now();
    assert!(world.terminate().success());
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
}
