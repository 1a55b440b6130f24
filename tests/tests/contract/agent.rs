//! A node proxy at our node agent's socket, by hand (ZDS contract).

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use ambit_api::workload::zds::WorkloadInfo;
use ambit_net::seqpacket::SeqPacket;
use ambit_net::{Netns, NetnsId};
use ambit_node::listeners::ListenerHolder;
use ambit_node::redirect::Options;
use ambit_node::zds::{ServedPod, ServedPods, Server, Times};
use serde_json::{Value, json};
use socket2::Socket;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::grpc::SOON;
use crate::wire::{decode, encode};

/// A moment in which a packet that must not come would have come.
const MOMENT: Duration = Duration::from_millis(150);

/// Our agent's side: the socket and the pods that it serves.
struct Agent {
    directory: TempDir,
    pods: ServedPods,
    tasks: JoinSet<()>,
    _open: watch::Sender<bool>,
}

impl Agent {
    fn start(hold_for: Duration) -> Agent {
        let directory = tempfile::tempdir().unwrap();
        let (listeners, hold) = ListenerHolder::new();
        let (events, mut seen) = mpsc::channel(16);
        let times = Times { hold_for, handover: Duration::from_secs(10) };
        let server = Server::bind(&directory.path().join("zds.sock"), listeners, times, events).unwrap();
        let pods = server.pods();
        let (open, is_open) = watch::channel(true);
        let mut tasks = JoinSet::new();
        tasks.spawn(hold);
        tasks.spawn(server.run(is_open));
        tasks.spawn(async move { while seen.recv().await.is_some() {} });
        Agent { directory, pods, tasks, _open: open }
    }

    fn serve(&self, uid: &str, netns: Option<&Netns>) {
        let info =
            WorkloadInfo { name: uid.into(), namespace: "shop".into(), service_account: "reviews".into() };
        let options = Options { socks5: true, ..Options::default() };
        self.pods.upsert(uid, ServedPod { info, netns: netns.cloned(), options });
    }

    async fn proxy(&self, hello: Value) -> Proxy {
        let path: PathBuf = self.directory.path().join("zds.sock");
        let proxy = Proxy(SeqPacket::connect(path).unwrap());
        proxy.0.send(&encode("ZdsHello", &hello), &[]).await.unwrap();
        proxy
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.tasks.abort_all();
    }
}

/// A node proxy that has dialled the agent.
struct Proxy(SeqPacket);

impl Proxy {
    /// The next request and its descriptors.
    async fn receive(&self) -> (Value, Vec<OwnedFd>) {
        let mut buffer = [0; 4096];
        let received = tokio::time::timeout(SOON, self.0.recv(&mut buffer)).await.expect("a packet").unwrap();
        assert!(received.len <= 1024, "messages to the proxy are at most 1,024 bytes");
        (decode("WorkloadRequest", &buffer[..received.len]), received.descriptors)
    }

    async fn answer(&self, error: &str) {
        let ack = json!({ "ack": { "error": error } });
        self.0.send(&encode("WorkloadResponse", &ack), &[]).await.unwrap();
    }

    /// Takes a request and acknowledges it.
    async fn obey(&self) -> (Value, Vec<OwnedFd>) {
        let received = self.receive().await;
        self.answer("").await;
        received
    }

    async fn assert_silent(&self) {
        let mut buffer = [0; 4096];
        let heard = tokio::time::timeout(MOMENT, self.0.recv(&mut buffer)).await;
        assert!(heard.is_err(), "a packet before the last one was acknowledged");
    }
}

fn id(descriptor: OwnedFd) -> NetnsId {
    Netns::from_fd(descriptor).unwrap().id()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_sent_one_acknowledged_packet_at_a_time() {
    let agent = Agent::start(SOON);
    let netns = Netns::create().unwrap();
    agent.serve("u1", Some(&netns));
    agent.pods.keep("u2");
    let proxy = agent.proxy(json!({ "version": "V1" })).await;
    let (mut adds, mut keeps) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let (request, mut descriptors) = proxy.receive().await;
        proxy.assert_silent().await;
        proxy.answer("").await;
        match request["add"].is_object() {
            true => {
                assert_eq!(descriptors.len(), 1, "exactly one: the pod's network namespace");
                assert_eq!(id(descriptors.remove(0)), netns.id());
                adds.push(request["add"].clone());
            }
            false => {
                assert!(descriptors.is_empty());
                keeps.push(request["keep"]["uid"].clone());
            }
        }
    }
    let info = json!({ "name": "u1", "namespace": "shop", "service_account": "reviews" });
    assert_eq!(adds, [json!({ "uid": "u1", "workload_info": info })]);
    assert_eq!(keeps, ["u2"], "whose descriptor is lost");
    assert!(proxy.obey().await.0["snapshot_sent"].is_object());
    agent.pods.delete("u1");
    assert_eq!(proxy.obey().await.0, json!({ "del": { "uid": "u1" } }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_namespace_under_a_known_uid_is_added_anew() {
    let agent = Agent::start(SOON);
    let (first, second) = (Netns::create().unwrap(), Netns::create().unwrap());
    agent.serve("u1", Some(&first));
    let proxy = agent.proxy(json!({ "version": "V1" })).await;
    let (_, mut descriptors) = proxy.obey().await;
    assert_eq!(id(descriptors.remove(0)), first.id());
    assert!(proxy.obey().await.0["snapshot_sent"].is_object());
    agent.serve("u1", Some(&second));
    let (request, mut descriptors) = proxy.obey().await;
    assert_eq!((&request["add"]["uid"], id(descriptors.remove(0))), (&json!("u1"), second.id()));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_proxies_the_newest_gets_adds_and_both_get_dels() {
    let agent = Agent::start(SOON);
    let netns = Netns::create().unwrap();
    agent.serve("u1", Some(&netns));
    let older = agent.proxy(json!({ "version": "V1" })).await;
    older.obey().await;
    assert!(older.obey().await.0["snapshot_sent"].is_object());
    let newest = agent.proxy(json!({ "version": "V1" })).await;
    newest.obey().await;
    assert!(newest.obey().await.0["snapshot_sent"].is_object());
    agent.serve("u2", Some(&Netns::create().unwrap()));
    assert_eq!(newest.obey().await.0["add"]["uid"], "u2");
    older.assert_silent().await;
    agent.pods.delete("u1");
    for proxy in [&older, &newest] {
        assert_eq!(proxy.obey().await.0, json!({ "del": { "uid": "u1" } }));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn listeners_are_passed_in_the_order_of_their_names() {
    let agent = Agent::start(SOON);
    let netns = Netns::create().unwrap();
    agent.serve("u1", Some(&netns));
    let proxy = agent.proxy(json!({ "version": "V1", "takes_listeners": true })).await;
    let (request, descriptors) = proxy.obey().await;
    let named = request["add"]["listeners"].as_array().unwrap();
    assert_eq!(descriptors.len(), 1 + named.len());
    let mut descriptors = descriptors.into_iter();
    assert_eq!(id(descriptors.next().unwrap()), netns.id(), "the namespace comes first");
    let mut ports = Vec::new();
    for (named, descriptor) in named.iter().zip(descriptors) {
        let socket = Socket::from(descriptor);
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        let is_udp = socket.r#type().unwrap() == socket2::Type::DGRAM;
        assert_eq!(named["port"], address.port(), "{request}");
        assert_eq!(named["udp"].as_bool().unwrap_or_default(), is_udp, "{request}");
        assert_eq!(named["ipv6"].as_bool().unwrap_or_default(), address.is_ipv6(), "{request}");
        ports.push((address.port(), is_udp));
    }
    ports.sort_unstable();
    ports.dedup();
    let tcp = |port: u16| (port, false);
    assert_eq!(ports, [tcp(15001), tcp(15006), tcp(15008), tcp(15053), (15053, true), tcp(15080)]);
}

/// Whether something listens on a port of the namespace's loopback.
fn is_open(netns: &Netns, port: u16) -> bool {
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let connect = move || TcpStream::connect_timeout(&address, Duration::from_secs(1));
    netns.run_blocking(move || connect().is_ok()).unwrap()
}

async fn until_closed(netns: &Netns, port: u16) {
    let deadline = tokio::time::Instant::now() + SOON;
    while is_open(netns, port) {
        assert!(tokio::time::Instant::now() < deadline, "{port} stays open");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A namespace whose loopback interface is up.
fn namespace() -> Netns {
    let netns = Netns::create().unwrap();
    let up = || std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
    assert!(netns.run_blocking(up).unwrap().unwrap().success());
    netns
}

#[tokio::test(flavor = "multi_thread")]
async fn listeners_close_when_no_proxy_comes() {
    let agent = Agent::start(Duration::from_millis(500));
    let netns = namespace();
    agent.serve("u1", Some(&netns));
    let proxy = agent.proxy(json!({ "version": "V1", "takes_listeners": true })).await;
    // The proxy's own copies are dropped at once: what is open is held by the agent.
    while proxy.obey().await.0["snapshot_sent"].is_null() {}
    assert!(is_open(&netns, 15008));
    drop(proxy);
    until_closed(&netns, 15008).await;
}
