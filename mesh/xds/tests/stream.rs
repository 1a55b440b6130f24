//! Client and server over real sockets.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation fails the test")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ambit_api::core::Node;
use ambit_api::discovery::DeltaDiscoveryRequest;
use ambit_api::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use ambit_api::security::Authorization;
use ambit_api::workload::{Address, Workload, address};
use ambit_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use ambit_xds::{
    Admission, BoxError, Change, Client, ClientConfig, Found, Rejected, Resource, Server, ServerConfig,
    Table, TableConfig, Update,
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

fn new_table(config: TableConfig) -> Table {
    let (table, publisher) = Table::new(ADDRESS_TYPE_URL, config);
    tokio::spawn(publisher.run());
    table
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
    let mut config = ClientConfig::new(Node { id: "test".into(), ..Node::default() });
    config.min_delay = Duration::from_millis(20);
    config.max_delay = Duration::from_millis(100);
    config
}

fn subscribe(addr: SocketAddr, on_demand: bool) -> Subscriber {
    let (sender, held) = watch::channel(Held::new());
    let handler = move |updates: Vec<Update<Address>>| {
        let mut rejected = Vec::new();
        sender.send_modify(|held| {
            for update in updates {
                match update {
                    Update::Remove { name } => drop(held.remove(&name)),
                    Update::Upsert {
                        name,
                        resource: Address { r#type: Some(address::Type::Workload(workload)) },
                    } => {
                        held.insert(name, workload);
                    }
                    Update::Upsert { name, .. } => {
                        rejected.push(Rejected { name, reason: "no workload".into() });
                    }
                }
            }
        });
        rejected
    };
    let builder = Client::builder(config());
    let builder = if on_demand {
        builder.on_demand::<Address>(ADDRESS_TYPE_URL, handler)
    } else {
        builder.wildcard::<Address>(ADDRESS_TYPE_URL, handler)
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
    let table = new_table(TableConfig::default());
    table.apply((0..5_000).map(|number| upsert(&format!("w{number}"), "a")).collect());
    let server = Server::new(vec![table.clone()], ServerConfig::default());
    let metrics = Arc::clone(server.metrics());
    let running = Running::start(loopback(), server).await;
    let mut subscriber = subscribe(running.addr, false);
    subscriber.ready().await;
    assert_eq!(subscriber.held.borrow().len(), 5_000);
    assert!(metrics.answers.load(Ordering::Relaxed) > 3, "a large snapshot takes several answers");

    table.apply(vec![upsert("w7", "b")]);
    subscriber.until("the change", |held| held["w7"].namespace == "b").await;
    table.apply(vec![Change::Remove("w8".into())]);
    subscriber.until("the removal", |held| !held.contains_key("w8")).await;
    assert_eq!(metrics.subscribers.load(Ordering::Relaxed), 1);
    drop(subscriber);
    let gone = async {
        while metrics.subscribers.load(Ordering::Relaxed) > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("the seat of a client that left is free again");
}

#[tokio::test]
async fn a_client_survives_a_restart_of_the_server_and_is_sent_only_what_differs() {
    let first = new_table(TableConfig::default());
    first.apply((0..1_000).map(|number| upsert(&format!("w{number}"), "a")).collect());
    let running = Running::start(loopback(), Server::new(vec![first], ServerConfig::default())).await;
    let addr = running.addr;
    let mut subscriber = subscribe(addr, false);
    subscriber.ready().await;
    running.stop().await;

    // Another control plane with its own history: one changed, one gone, one new.
    let second = new_table(TableConfig::default());
    second.apply((0..999).rev().map(|number| upsert(&format!("w{number}"), "a")).collect());
    second.apply(vec![upsert("w5", "b"), upsert("new", "a")]);
    let server = Server::new(vec![second], ServerConfig::default());
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
    let table = new_table(TableConfig::default());
    let pod = Resource::new("pod", &workload("pod", "a")).alias("net/10.0.0.1").parent("a/svc");
    table.apply(vec![
        Change::Upsert(pod),
        Change::Upsert(Resource::new("a/svc", &workload("svc", "a")).alias("net/10.1.0.1")),
        upsert("other", "a"),
    ]);
    let running = Running::start(loopback(), Server::new(vec![table.clone()], ServerConfig::default())).await;
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
    table.apply(vec![Change::Upsert(late)]);
    subscriber.until("a workload that joins the service", |held| held.contains_key("late")).await;
    table.apply(vec![Change::Upsert(Resource::new("nine", &workload("nine", "a")).alias("net/10.9.9.9"))]);
    subscriber.until("a name that was absent appears", |held| held.contains_key("nine")).await;
    assert!(!subscriber.held.borrow().contains_key("other"));
}

#[tokio::test]
async fn a_resource_that_the_handler_rejects_does_not_stop_the_others() {
    let table = new_table(TableConfig::default());
    table.apply(vec![Change::Upsert(Resource::new("empty", &Address::default())), upsert("good", "a")]);
    let server = Server::new(vec![table], ServerConfig::default());
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
    tokio::time::timeout(PATIENCE, nacked).await.expect("the server hears of the rejected one");
    assert_eq!(subscriber.client.metrics().rejected.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn changes_that_follow_at_once_come_in_one_answer() {
    let table = new_table(TableConfig { batch: Duration::from_millis(300), ..TableConfig::default() });
    let server = Server::new(vec![table.clone()], ServerConfig::default());
    let metrics = Arc::clone(server.metrics());
    let running = Running::start(loopback(), server).await;
    let mut subscriber = subscribe(running.addr, false);
    subscriber.ready().await;
    let before = metrics.answers.load(Ordering::Relaxed);
    table.apply(vec![upsert("first", "a")]);
    subscriber.until("the first", |held| held.contains_key("first")).await;
    for number in 0..100 {
        table.apply(vec![upsert(&format!("w{number}"), "a")]);
    }
    subscriber.until("the batch", |held| held.len() == 101).await;
    assert_eq!(metrics.answers.load(Ordering::Relaxed) - before, 2);
}

/// A bare gRPC stream, for what our client would never do.
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
    let running = Running::start(
        loopback(),
        Server::new(vec![new_table(TableConfig::default())], ServerConfig::default()),
    )
    .await;
    let (requests, stream) = raw(running.addr).await;
    let mut stream = stream.unwrap();
    let ask = DeltaDiscoveryRequest { type_url: AUTHORIZATION_TYPE_URL.into(), ..Default::default() };
    requests.send(ask).await.unwrap();
    let answer = tokio::time::timeout(PATIENCE, stream.message()).await.unwrap().unwrap().unwrap();
    assert_eq!(answer.type_url, AUTHORIZATION_TYPE_URL);
    assert!(answer.resources.is_empty());
}

#[tokio::test]
async fn a_silent_stream_is_closed() {
    let config = ServerConfig { first_request: Duration::from_millis(50), ..ServerConfig::default() };
    let running =
        Running::start(loopback(), Server::new(vec![new_table(TableConfig::default())], config)).await;
    let (_requests, stream) = raw(running.addr).await;
    let ended = tokio::time::timeout(PATIENCE, stream.unwrap().message()).await.unwrap();
    assert_eq!(ended.unwrap_err().code(), Code::DeadlineExceeded);
}

#[tokio::test]
async fn a_stream_too_many_is_refused() {
    let config = ServerConfig { max_subscribers: 1, ..ServerConfig::default() };
    let running =
        Running::start(loopback(), Server::new(vec![new_table(TableConfig::default())], config)).await;
    let (_requests, first) = raw(running.addr).await;
    first.unwrap();
    let (_requests, second) = raw(running.addr).await;
    assert_eq!(second.unwrap_err().code(), Code::ResourceExhausted);
}

struct OnlyWithToken;

impl Admission for OnlyWithToken {
    fn admit(&self, metadata: &MetadataMap) -> BoxFuture<'static, Result<(), Status>> {
        let known = metadata.get("authorization").is_some_and(|value| value == "Bearer good");
        Box::pin(async move { if known { Ok(()) } else { Err(Status::unauthenticated("no token")) } })
    }
}

#[tokio::test]
async fn a_caller_without_credentials_is_refused() {
    let server = Server::new(vec![new_table(TableConfig::default())], ServerConfig::default())
        .with_admission(Arc::new(OnlyWithToken));
    let running = Running::start(loopback(), server).await;
    let (_requests, stream) = raw(running.addr).await;
    assert_eq!(stream.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_subscriber_that_does_not_read_is_made_no_more_answers_than_its_window_takes() {
    let table = new_table(TableConfig::default());
    table.apply((0..50_000).map(|number| upsert(&format!("workload-{number:060}"), "namespace")).collect());
    let server = Server::new(vec![table], ServerConfig::default());
    let metrics = Arc::clone(server.metrics());
    let running = Running::start(loopback(), server).await;
    let (requests, stream) = raw(running.addr).await;
    let _unread = stream.unwrap();
    let ask = DeltaDiscoveryRequest { type_url: ADDRESS_TYPE_URL.into(), ..Default::default() };
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
        "{unread} resources of {total} bytes in all were made for one who does not read"
    );
}

/// What a client was told, in order, over both types.
async fn told(server: Server, ready: &mut dyn FnMut(), last: &str) -> Vec<String> {
    let running = Running::start(loopback(), server).await;
    let (sender, mut log) = watch::channel(Vec::<String>::new());
    let noted = Arc::new(sender);
    let note = |noted: &Arc<watch::Sender<Vec<String>>>| {
        let noted = Arc::clone(noted);
        move |name: String, there: bool| {
            noted.send_modify(|log| log.push(format!("{}{name}", if there { '+' } else { '-' })));
        }
    };
    let (on_policy, on_address) = (note(&noted), note(&noted));
    let (client, driver) = Client::builder(config())
        .wildcard::<Authorization>(AUTHORIZATION_TYPE_URL, move |updates: Vec<Update<Authorization>>| {
            for update in updates {
                match update {
                    Update::Upsert { name, .. } => on_policy(name, true),
                    Update::Remove { name } => on_policy(name, false),
                }
            }
            Vec::new()
        })
        .wildcard::<Address>(ADDRESS_TYPE_URL, move |updates: Vec<Update<Address>>| {
            for update in updates {
                match update {
                    Update::Upsert { name, .. } => on_address(name, true),
                    Update::Remove { name } => on_address(name, false),
                }
            }
            Vec::new()
        })
        .build(move || connect(running.addr));
    tokio::spawn(driver.run());
    assert!(tokio::time::timeout(PATIENCE, client.ready()).await.unwrap());
    noted.send_modify(Vec::clear);
    ready();
    let complete = log.wait_for(|log| log.iter().any(|entry| entry == last));
    tokio::time::timeout(PATIENCE, complete).await.unwrap().unwrap().clone()
}

#[tokio::test]
async fn a_policy_is_there_before_a_workload_lists_it_and_until_none_does() {
    let policy = |name: &str| Change::Upsert(Resource::new(name, &Authorization::default()));
    let (policies, publisher) = Table::new(AUTHORIZATION_TYPE_URL, TableConfig::default());
    tokio::spawn(publisher.run());
    let addresses = new_table(TableConfig::default());
    policies.apply(vec![policy("ns/old")]);
    // Nothing is quiet: what is not urgent waits for its batch.
    addresses.apply(vec![upsert("pod", "lists-old")]);
    let server = Server::new(vec![policies.clone(), addresses.clone()], ServerConfig::default());
    let mut replace = || {
        policies.apply(vec![policy("ns/first-after-quiet")]);
        addresses.apply(vec![upsert("other", "first-after-quiet")]);
        policies.apply(vec![policy("ns/new")]);
        addresses.apply(vec![upsert("pod", "lists-new")]);
        policies.apply(vec![Change::Remove("ns/old".into())]);
    };
    let told = told(server, &mut replace, "-ns/old").await;
    let at = |entry: &str| told.iter().position(|told| told == entry).unwrap();
    assert!(at("+ns/new") < at("+pod") && at("+pod") < at("-ns/old"), "{told:?}");
}
