//! Client and server over real sockets.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation fails the test")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ambit_api::discovery::DeltaDiscoveryRequest;
use ambit_api::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use ambit_api::security::Authorization;
use ambit_api::workload::{Address, Workload, address};
use ambit_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use ambit_xds::{
    Admission, BoxError, Change, Client, ClientConfig, Found, PARTIAL_STATE, Rejected, Resource, Server,
    ServerConfig, Store, StoreConfig, Subscriber as Caller, Update, View, ztunnel_node,
};
use futures_util::future::BoxFuture;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

const PATIENCE: Duration = Duration::from_secs(20);

type Held = BTreeMap<String, Workload>;

fn workload(name: &str, namespace: &str) -> Address {
    let workload = Workload { name: name.into(), namespace: namespace.into(), ..Workload::default() };
    Address { r#type: Some(address::Type::Workload(workload)) }
}

fn upsert(name: &str, namespace: &str) -> Change {
    Change::Upsert(Resource::new(name, &workload(name, namespace)))
}

fn new_store(config: StoreConfig) -> Store {
    let (store, publisher) = Store::new(&[AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL], config);
    tokio::spawn(publisher.run());
    store
}

/// A server that can be stopped and started on the same port.
struct Running {
    addr: SocketAddr,
    server: Server,
    task: JoinHandle<()>,
}

impl Running {
    async fn start(addr: SocketAddr, server: Server) -> Self {
        let listener = TcpListener::bind(addr).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let service = server.clone();
        let task = tokio::spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming)
                .await
                .unwrap();
        });
        Self { addr, server, task }
    }

    async fn stop(self) {
        self.server.drain();
        self.task.abort();
        self.task.await.unwrap_err();
    }
}

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// A client that keeps what it was given.
struct Subscriber {
    client: Client,
    held: watch::Receiver<Held>,
}

fn config() -> ClientConfig {
    let mut config = ClientConfig::new(ztunnel_node([127, 0, 0, 1].into(), "test", "ns", BTreeMap::new()));
    config.min_delay = Duration::from_millis(20);
    config.max_delay = Duration::from_millis(100);
    config
}

fn subscribe(addr: SocketAddr, on_demand: bool) -> Subscriber {
    let (sender, held) = watch::channel(Held::new());
    let handler = move |batch: &mut dyn Iterator<Item = Update<Address>>| {
        let mut rejected = Vec::new();
        sender.send_modify(|held| {
            for update in batch {
                match update {
                    Update::Remove { name } => drop(held.remove(&name)),
                    Update::Upsert {
                        name,
                        resource: Address { r#type: Some(address::Type::Workload(workload)) },
                    } => {
                        held.insert(name, workload);
                    }
                    Update::Upsert { name, .. } => {
                        let type_url = ADDRESS_TYPE_URL.to_owned();
                        rejected.push(Rejected { type_url, name, reason: "no workload".into() });
                    }
                }
            }
        });
        rejected
    };
    let builder = Client::builder(config(), handler);
    let builder = if on_demand {
        builder.on_demand(ADDRESS_TYPE_URL, |update: Update<Address>| update)
    } else {
        builder.wildcard(ADDRESS_TYPE_URL, |update: Update<Address>| update)
    };
    let (client, driver) = builder.build(move || connect(addr));
    tokio::spawn(driver.run());
    Subscriber { client, held }
}

async fn connect(addr: SocketAddr) -> Result<Channel, BoxError> {
    Ok(Endpoint::from_shared(format!("http://{addr}"))?.connect().await?)
}

impl Subscriber {
    async fn until(&mut self, what: &str, condition: impl FnMut(&Held) -> bool) {
        let waited = tokio::time::timeout(PATIENCE, self.held.wait_for(condition)).await.is_ok();
        assert!(waited, "{what} did not happen; {} held", self.held.borrow().len());
    }

    async fn ready(&self) {
        assert!(
            tokio::time::timeout(PATIENCE, self.client.ready()).await.expect("the client must get ready")
        );
    }
}

#[tokio::test]
async fn a_snapshot_changes_and_removals_reach_the_client() {
    let store = new_store(StoreConfig::default());
    store.apply(ADDRESS_TYPE_URL, (0..5_000).map(|number| upsert(&format!("w{number}"), "a")).collect());
    let server = Server::new(store.clone(), ServerConfig::default());
    let metrics = Arc::clone(server.metrics());
    let running = Running::start(loopback(), server).await;
    let mut subscriber = subscribe(running.addr, false);
    subscriber.ready().await;
    assert_eq!(subscriber.held.borrow().len(), 5_000);
    assert!(metrics.answers.load(Ordering::Relaxed) > 3, "a large snapshot takes several answers");

    store.apply(ADDRESS_TYPE_URL, vec![upsert("w7", "b")]);
    subscriber.until("the change", |held| held["w7"].namespace == "b").await;
    store.apply(ADDRESS_TYPE_URL, vec![Change::Remove("w8".into())]);
    subscriber.until("the removal", |held| !held.contains_key("w8")).await;
    assert_eq!(metrics.subscribers.load(Ordering::Relaxed), 1);
    drop(subscriber);
    let gone = async {
        while metrics.subscribers.load(Ordering::Relaxed) > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("the place of a client that left is free again");
}

#[tokio::test]
async fn after_a_server_restart_only_differences_are_sent() {
    let first = new_store(StoreConfig::default());
    first.apply(ADDRESS_TYPE_URL, (0..1_000).map(|number| upsert(&format!("w{number}"), "a")).collect());
    let running = Running::start(loopback(), Server::new(first, ServerConfig::default())).await;
    let addr = running.addr;
    let mut subscriber = subscribe(addr, false);
    subscriber.ready().await;
    running.stop().await;

    // Another control plane with its own history: one changed, one gone, one new.
    let second = new_store(StoreConfig::default());
    second.apply(ADDRESS_TYPE_URL, (0..999).rev().map(|number| upsert(&format!("w{number}"), "a")).collect());
    second.apply(ADDRESS_TYPE_URL, vec![upsert("w5", "b"), upsert("new", "a")]);
    let server = Server::new(second, ServerConfig::default());
    let metrics = Arc::clone(server.metrics());
    let _running = Running::start(addr, server).await;
    subscriber
        .until("the difference", |held| {
            held["w5"].namespace == "b" && held.contains_key("new") && !held.contains_key("w999")
        })
        .await;
    assert_eq!(metrics.resources.load(Ordering::Relaxed), 2);
    assert_eq!(metrics.removals.load(Ordering::Relaxed), 1);
    assert!(subscriber.client.is_ready());
}

#[tokio::test]
async fn a_demand_is_answered_with_what_is_there_and_what_is_not() {
    let store = new_store(StoreConfig::default());
    let pod = Resource::new("pod", &workload("pod", "a")).alias("net/10.0.0.1").parent("a/svc");
    store.apply(
        ADDRESS_TYPE_URL,
        vec![
            Change::Upsert(pod),
            Change::Upsert(Resource::new("a/svc", &workload("svc", "a")).alias("net/10.1.0.1")),
            upsert("other", "a"),
        ],
    );
    let running = Running::start(loopback(), Server::new(store.clone(), ServerConfig::default())).await;
    let mut subscriber = subscribe(running.addr, true);
    subscriber.ready().await;
    assert!(subscriber.held.borrow().is_empty());
    let ask = |name: &'static str| {
        let client = subscriber.client.clone();
        async move { tokio::time::timeout(PATIENCE, client.demand(ADDRESS_TYPE_URL, name)).await.unwrap() }
    };
    assert_eq!(ask("net/10.1.0.1").await, Ok(Found::Present));
    assert_eq!(subscriber.held.borrow().keys().collect::<Vec<_>>(), ["a/svc", "pod"]);
    assert_eq!(ask("net/10.9.9.9").await, Ok(Found::Absent));
    let late = Resource::new("late", &workload("late", "a")).parent("a/svc");
    store.apply(ADDRESS_TYPE_URL, vec![Change::Upsert(late)]);
    subscriber.until("a workload that joins the service", |held| held.contains_key("late")).await;
    store.apply(
        ADDRESS_TYPE_URL,
        vec![Change::Upsert(Resource::new("nine", &workload("nine", "a")).alias("net/10.9.9.9"))],
    );
    subscriber.until("a name that was absent appears", |held| held.contains_key("nine")).await;
    assert!(!subscriber.held.borrow().contains_key("other"));
}

#[tokio::test]
async fn a_resource_that_the_handler_rejects_does_not_stop_the_others() {
    let store = new_store(StoreConfig::default());
    store.apply(
        ADDRESS_TYPE_URL,
        vec![Change::Upsert(Resource::new("empty", &Address::default())), upsert("good", "a")],
    );
    let server = Server::new(store, ServerConfig::default());
    let metrics = Arc::clone(server.metrics());
    let running = Running::start(loopback(), server).await;
    let mut subscriber = subscribe(running.addr, false);
    subscriber.until("the good one", |held| held.contains_key("good")).await;
    subscriber.ready().await;
    let nacked = async {
        while metrics.nacks.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, nacked).await.expect("the server gets the nack");
    assert_eq!(subscriber.client.metrics().rejected.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn changes_that_follow_at_once_come_in_one_answer() {
    let store = new_store(StoreConfig { batch: Duration::from_millis(300), ..StoreConfig::default() });
    let server = Server::new(store.clone(), ServerConfig::default());
    let metrics = Arc::clone(server.metrics());
    let running = Running::start(loopback(), server).await;
    let mut subscriber = subscribe(running.addr, false);
    subscriber.ready().await;
    let before = metrics.answers.load(Ordering::Relaxed);
    store.apply(ADDRESS_TYPE_URL, vec![upsert("first", "a")]);
    subscriber.until("the first", |held| held.contains_key("first")).await;
    for number in 0..100 {
        store.apply(ADDRESS_TYPE_URL, vec![upsert(&format!("w{number}"), "a")]);
    }
    subscriber.until("the batch", |held| held.len() == 101).await;
    assert_eq!(metrics.answers.load(Ordering::Relaxed) - before, 2);
}

/// Everyone sees what is below `root`.
struct BelowRoot;

impl Admission for BelowRoot {
    fn admit(&self, _: &MetadataMap, _: &http::Extensions) -> BoxFuture<'static, Result<Caller, Status>> {
        let view = View::below("root", [ADDRESS_TYPE_URL]);
        Box::pin(async { Ok(Caller { identity: "w".into(), view, permit: None }) })
    }
}

#[tokio::test]
async fn a_view_holds_what_is_below_its_root_and_nothing_else() {
    let below = |name: &str, parents: &[&str]| {
        let resource = Resource::new(name, &workload(name, "a"));
        Change::Upsert(parents.iter().fold(resource, |resource, parent| resource.parent(*parent)))
    };
    let store = new_store(StoreConfig::default());
    store.apply(
        ADDRESS_TYPE_URL,
        vec![below("service", &["root"]), below("pod", &["service"]), below("other", &[])],
    );
    let server = Server::with_admission(store.clone(), ServerConfig::default(), Arc::new(BelowRoot));
    let running = Running::start(loopback(), server).await;
    let mut subscriber = subscribe(running.addr, false);
    let names = |held: &Held| held.keys().cloned().collect::<Vec<_>>();
    subscriber.until("what is below the root", |held| names(held) == ["pod", "service"]).await;
    // Out of the view, with what it brought along; something else comes in.
    store.apply(ADDRESS_TYPE_URL, vec![below("service", &[]), below("other", &["root"])]);
    subscriber.until("the other one alone", |held| names(held) == ["other"]).await;
    store.apply(ADDRESS_TYPE_URL, vec![below("pod", &["other"])]);
    subscriber.until("its pod", |held| names(held) == ["other", "pod"]).await;
    store.apply(ADDRESS_TYPE_URL, vec![Change::Remove("other".into())]);
    subscriber.until("nothing", |held| held.is_empty()).await;
}

/// A bare gRPC stream, for requests that our client never sends.
async fn raw(
    addr: SocketAddr,
) -> (
    mpsc::Sender<DeltaDiscoveryRequest>,
    Result<tonic::Streaming<ambit_api::discovery::DeltaDiscoveryResponse>, Status>,
) {
    let (requests, queue) = mpsc::channel(16);
    let mut client = AggregatedDiscoveryServiceClient::new(connect(addr).await.unwrap());
    let stream = client.delta_aggregated_resources(ReceiverStream::new(queue)).await;
    (requests, stream.map(tonic::Response::into_inner))
}

#[tokio::test]
async fn a_type_that_is_not_served_is_answered_once_and_empty() {
    let running =
        Running::start(loopback(), Server::new(new_store(StoreConfig::default()), ServerConfig::default()))
            .await;
    let (requests, stream) = raw(running.addr).await;
    let mut stream = stream.unwrap();
    let ask = DeltaDiscoveryRequest { type_url: "type.example/T".into(), ..Default::default() };
    requests.send(ask).await.unwrap();
    let answer = tokio::time::timeout(PATIENCE, stream.message()).await.unwrap().unwrap().unwrap();
    assert_eq!(answer.type_url, "type.example/T");
    assert!(answer.resources.is_empty());
}

#[tokio::test]
async fn a_silent_stream_is_closed() {
    let config = ServerConfig { first_request: Duration::from_millis(50), ..ServerConfig::default() };
    let running = Running::start(loopback(), Server::new(new_store(StoreConfig::default()), config)).await;
    let (_requests, stream) = raw(running.addr).await;
    let ended = tokio::time::timeout(PATIENCE, stream.unwrap().message()).await.unwrap();
    assert_eq!(ended.unwrap_err().code(), Code::DeadlineExceeded);
}

#[tokio::test]
async fn a_stream_too_many_is_refused() {
    let config = ServerConfig { max_subscribers: 1, ..ServerConfig::default() };
    let running = Running::start(loopback(), Server::new(new_store(StoreConfig::default()), config)).await;
    let (_requests, first) = raw(running.addr).await;
    first.unwrap();
    let (_requests, second) = raw(running.addr).await;
    assert_eq!(second.unwrap_err().code(), Code::ResourceExhausted);
}

struct OnlyWithToken;

impl Admission for OnlyWithToken {
    fn admit(
        &self,
        metadata: &MetadataMap,
        _: &http::Extensions,
    ) -> BoxFuture<'static, Result<Caller, Status>> {
        let view = match metadata.get("authorization").and_then(|value| value.to_str().ok()) {
            Some("Bearer all") => Some(View::everything()),
            Some("Bearer policies") => Some(View::of_types([AUTHORIZATION_TYPE_URL])),
            _ => None,
        };
        let caller = view.map(|view| Caller { identity: "known".into(), view, permit: None });
        Box::pin(std::future::ready(caller.ok_or_else(|| Status::unauthenticated("no token"))))
    }
}

#[tokio::test]
async fn a_caller_without_credentials_is_refused() {
    let server = Server::with_admission(
        new_store(StoreConfig::default()),
        ServerConfig::default(),
        Arc::new(OnlyWithToken),
    );
    let running = Running::start(loopback(), server).await;
    let (_requests, stream) = raw(running.addr).await;
    assert_eq!(stream.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_slow_subscriber_gets_no_more_answers_than_its_window_takes() {
    let store = new_store(StoreConfig::default());
    store.apply(
        ADDRESS_TYPE_URL,
        (0..50_000).map(|number| upsert(&format!("workload-{number:060}"), "namespace")).collect(),
    );
    let server = Server::new(store, ServerConfig::default());
    let metrics = Arc::clone(server.metrics());
    let running = Running::start(loopback(), server).await;
    let (requests, stream) = raw(running.addr).await;
    let _unread = stream.unwrap();
    let node = Some(config().node);
    let ask = DeltaDiscoveryRequest { node, type_url: ADDRESS_TYPE_URL.into(), ..Default::default() };
    requests.send(ask).await.unwrap();
    let started = async {
        while metrics.answers.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, started).await.unwrap();
    // Another subscriber is served completely in the meantime.
    let other = subscribe(running.addr, false);
    other.ready().await;
    let total = metrics.bytes.load(Ordering::Relaxed);
    let others = other.client.metrics().resources.load(Ordering::Relaxed);
    let unread = metrics.resources.load(Ordering::Relaxed) - others;
    assert!(
        unread < 25_000,
        "{unread} resources of {total} bytes in all were encoded for a subscriber that does not read"
    );
}

async fn next(
    stream: &mut tonic::Streaming<ambit_api::discovery::DeltaDiscoveryResponse>,
) -> ambit_api::discovery::DeltaDiscoveryResponse {
    tokio::time::timeout(PATIENCE, stream.message()).await.unwrap().unwrap().unwrap()
}

#[tokio::test]
async fn an_identity_sees_only_its_view() {
    let store = new_store(StoreConfig::default());
    store.apply(ADDRESS_TYPE_URL, vec![upsert("secret", "a")]);
    let server = Server::with_admission(store, ServerConfig::default(), Arc::new(OnlyWithToken));
    let running = Running::start(loopback(), server).await;
    for (token, expected) in [("Bearer policies", 0), ("Bearer all", 1)] {
        let mut client = AggregatedDiscoveryServiceClient::new(connect(running.addr).await.unwrap());
        let ask = DeltaDiscoveryRequest { type_url: ADDRESS_TYPE_URL.into(), ..Default::default() };
        let requests =
            futures_util::StreamExt::chain(tokio_stream::iter([ask]), futures_util::stream::pending());
        let mut request = tonic::Request::new(requests);
        request.metadata_mut().insert("authorization", token.parse().unwrap());
        let mut stream = client.delta_aggregated_resources(request).await.unwrap().into_inner();
        assert_eq!(next(&mut stream).await.resources.len(), expected, "{token}");
    }
}

#[tokio::test]
async fn the_opening_state_is_one_answer_unless_parts_are_announced() {
    let store = new_store(StoreConfig::default());
    store.apply(ADDRESS_TYPE_URL, (0..5_000).map(|number| upsert(&format!("w{number}"), "a")).collect());
    let running = Running::start(loopback(), Server::new(store, ServerConfig::default())).await;
    let mut node = config().node;
    for announces in [false, true] {
        let fields = &mut node.metadata.as_mut().unwrap().fields;
        if !announces {
            fields.remove(PARTIAL_STATE);
        } else {
            *fields = config().node.metadata.unwrap().fields;
        }
        let (requests, stream) = raw(running.addr).await;
        let node = Some(node.clone());
        let ask = DeltaDiscoveryRequest { node, type_url: ADDRESS_TYPE_URL.into(), ..Default::default() };
        requests.send(ask).await.unwrap();
        let first = next(&mut stream.unwrap()).await;
        assert_eq!(first.resources.len() == 5_000, !announces, "{} resources", first.resources.len());
        assert_eq!(first.system_version_info.ends_with('+'), announces);
    }
}

#[tokio::test]
async fn too_many_names_in_one_request_end_the_stream() {
    let config = ServerConfig { max_names: 4, ..ServerConfig::default() };
    let running = Running::start(loopback(), Server::new(new_store(StoreConfig::default()), config)).await;
    let (requests, stream) = raw(running.addr).await;
    let resource_names_subscribe = vec!["same".to_owned(); 5];
    let ask = DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE_URL.into(),
        resource_names_subscribe,
        ..Default::default()
    };
    requests.send(ask).await.unwrap();
    let ended = tokio::time::timeout(PATIENCE, stream.unwrap().message()).await.unwrap();
    assert_eq!(ended.unwrap_err().code(), Code::ResourceExhausted);
}

#[tokio::test]
async fn a_batch_over_two_types_is_applied_at_once() {
    let policy = |name: &str| Change::Upsert(Resource::new(name, &Authorization::default()));
    let store = new_store(StoreConfig::default());
    store.apply_batch([
        (AUTHORIZATION_TYPE_URL, vec![policy("ns/old")]),
        (ADDRESS_TYPE_URL, vec![upsert("pod", "lists-old")]),
    ]);
    let running = Running::start(loopback(), Server::new(store.clone(), ServerConfig::default())).await;
    let (sender, mut log) = watch::channel(Vec::<Vec<String>>::new());
    let handler = move |batch: &mut dyn Iterator<Item = String>| {
        let batch = batch.collect();
        sender.send_modify(|log| log.push(batch));
        Vec::new()
    };
    let note = |there: &str, name: &str| format!("{there}{name}");
    let (client, driver) = Client::builder(config(), handler)
        .wildcard(AUTHORIZATION_TYPE_URL, move |update: Update<Authorization>| match update {
            Update::Upsert { name, .. } => note("+", &name),
            Update::Remove { name } => note("-", &name),
        })
        .wildcard(ADDRESS_TYPE_URL, move |update: Update<Address>| match update {
            Update::Upsert { name, .. } => note("+", &name),
            Update::Remove { name } => note("-", &name),
        })
        .build(move || connect(running.addr));
    tokio::spawn(driver.run());
    assert!(tokio::time::timeout(PATIENCE, client.ready()).await.unwrap());
    store.apply_batch([
        (AUTHORIZATION_TYPE_URL, vec![policy("ns/new"), Change::Remove("ns/old".into())]),
        (ADDRESS_TYPE_URL, vec![upsert("pod", "lists-new")]),
    ]);
    let complete = log.wait_for(|log| log.iter().flatten().any(|entry| entry == "-ns/old"));
    let log = tokio::time::timeout(PATIENCE, complete).await.unwrap().unwrap().clone();
    // Policies first and removals last, all in one call.
    assert_eq!(log.last().unwrap(), &["+ns/new", "+pod", "-ns/old"]);
}
