//! The agent with real namespaces and proxies that speak ZDS over its real socket. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use ambit_api::workload::zds::workload_request::Payload;
use ambit_api::workload::zds::{
    Ack, AddWorkload, Version, WorkloadRequest, WorkloadResponse, ZdsHello, workload_response,
};
use ambit_net::seqpacket::SeqPacket;
use ambit_net::{Netns, PROXY_MARK, SocketStock, connect};
use ambit_node::redirect::{self, FormerSettings, Options, Stage, plan};
use ambit_node::zds::MAX_PACKET;
use ambit_node::{Agent, AgentConfig, AgentError, PodSpec, PodState};
use common::{Host, eventually, pair};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

const SOON: Duration = Duration::from_secs(5);

/// An agent with a directory of its own.
struct Running {
    agent: Agent,
    driver: JoinHandle<()>,
    directory: tempfile::TempDir,
}

impl Running {
    async fn start(tune: impl FnOnce(&mut AgentConfig)) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), tune).await
    }

    async fn start_in(directory: tempfile::TempDir, tune: impl FnOnce(&mut AgentConfig)) -> Self {
        let mut config =
            AgentConfig::new(directory.path().join("ztunnel.sock"), directory.path().join("pods"));
        config.leave_grace = Duration::ZERO;
        tune(&mut config);
        let (agent, driver) = Agent::start(config).await.unwrap();
        Self { agent, driver: tokio::spawn(driver), directory }
    }

    /// Ends the agent as a crash would; its directory stays.
    async fn stop(self) -> tempfile::TempDir {
        self.driver.abort();
        assert!(self.driver.await.unwrap_err().is_cancelled());
        self.directory
    }

    async fn proxy(&self, takes_listeners: bool) -> Proxy {
        let socket = SeqPacket::connect(self.directory.path().join("ztunnel.sock")).unwrap();
        let hello = ZdsHello { version: Version::V1.into(), takes_listeners };
        socket.send(&hello.encode_to_vec(), &[]).await.unwrap();
        Proxy { socket, pods: HashMap::new() }
    }
}

/// A node proxy's side of ZDS.
struct Proxy {
    socket: SeqPacket,
    pods: HashMap<String, (AddWorkload, Vec<OwnedFd>)>,
}

impl Proxy {
    async fn receive(&mut self) -> (Payload, Vec<OwnedFd>) {
        let mut buffer = [0; MAX_PACKET];
        let received = tokio::time::timeout(SOON, self.socket.recv(&mut buffer)).await;
        let received = received.expect("a packet within 5 s").unwrap();
        let request = WorkloadRequest::decode(&buffer[..received.len]).unwrap();
        (request.payload.unwrap(), received.descriptors)
    }

    async fn ack(&self, error: &str) {
        let payload = workload_response::Payload::Ack(Ack { error: error.into() });
        let response = WorkloadResponse { payload: Some(payload) };
        self.socket.send(&response.encode_to_vec(), &[]).await.unwrap();
    }

    /// Takes an order, does it and says so.
    async fn obey(&mut self) -> Payload {
        let (payload, descriptors) = self.receive().await;
        match &payload {
            Payload::Add(add) => {
                self.pods.insert(add.uid.clone(), (add.clone(), descriptors));
            }
            Payload::Del(del) => drop(self.pods.remove(&del.uid)),
            Payload::Keep(_) | Payload::SnapshotSent(_) => {}
        }
        self.ack("").await;
        payload
    }

    async fn obey_add(&mut self, uid: &str) {
        match self.obey().await {
            Payload::Add(add) => assert_eq!(add.uid, uid),
            other => panic!("{other:?} instead of an add"),
        }
    }

    async fn obey_snapshot(&mut self) {
        while !matches!(self.obey().await, Payload::SnapshotSent(_)) {}
    }

    /// A passed TCP listener, IPv4.
    fn listener(&self, uid: &str, port: u32) -> TcpListener {
        let (add, descriptors) = &self.pods[uid];
        let at = add.listeners.iter().position(|l| l.port == port && !l.udp && !l.ipv6).unwrap();
        let socket = descriptors[at + 1].try_clone().unwrap();
        TcpListener::from_std(socket.into()).unwrap()
    }

    /// Nothing comes for a while: the agent has nothing to say.
    async fn hears_nothing(&self) {
        let mut buffer = [0; MAX_PACKET];
        let heard = tokio::time::timeout(Duration::from_millis(300), self.socket.recv(&mut buffer)).await;
        assert!(heard.is_err(), "{heard:?}");
    }
}

fn spec(uid: &str, pod: &Host) -> PodSpec {
    PodSpec {
        uid: uid.into(),
        name: format!("reviews-{uid}"),
        namespace: "shop".into(),
        service_account: "reviews".into(),
        ips: pod.addresses().to_vec(),
        netns: pod.netns.clone(),
        netns_path: None,
        options: Options::default(),
    }
}

async fn dial(from: &Netns, to: SocketAddr) -> std::io::Result<TcpStream> {
    connect(&SocketStock::new(from.clone(), None), to, SOON).await.map_err(std::io::Error::other)
}

async fn state(agent: &Agent, uid: &str) -> Option<PodState> {
    agent.status(uid).map(|status| status.state)
}

#[tokio::test]
async fn a_pod_is_pending_with_rules_in_until_a_proxy_serves_it() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let mut events = running.agent.events();
    running.agent.pod_up(spec("a", &pod)).await.unwrap();
    let wanted = plan(&Options::default(), Stage::In);
    assert_eq!(redirect::verify(&pod.netns, &wanted).await.unwrap(), []);
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Pending));

    let mut proxy = running.proxy(true).await;
    proxy.obey_add("a").await;
    assert!(matches!(proxy.obey().await, Payload::SnapshotSent(_)));
    assert!(running.agent.wait_enabled("a", SOON).await);
    let seen: Vec<_> =
        [events.recv().await.unwrap(), events.recv().await.unwrap()].map(|event| event.status.state).into();
    assert_eq!(seen, [PodState::Pending, PodState::Enabled]);

    let (add, descriptors) = &proxy.pods["a"];
    let info = add.workload_info.clone().unwrap();
    assert_eq!(
        (info.name, info.namespace, info.service_account),
        ("reviews-a".into(), "shop".into(), "reviews".into())
    );
    assert_eq!(add.listeners.len() + 1, descriptors.len());
    let netns = Netns::from_fd(descriptors[0].try_clone().unwrap()).unwrap();
    assert_eq!(netns.id(), pod.netns.id());
}

#[tokio::test]
async fn passed_listeners_accept_what_was_redirected() {
    let (outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    running.agent.pod_up(spec("a", &pod)).await.unwrap();
    proxy.obey_add("a").await;
    let to = SocketAddr::new(outside.v4.into(), 9080);
    let mut app = dial(&pod.netns, to).await.unwrap();
    let (mut taken, _) = proxy.listener("a", 15001).accept().await.unwrap();
    assert_eq!(ambit_net::original_dst(&taken).unwrap(), to);
    app.write_all(b"x").await.unwrap();
    assert_eq!(taken.read_u8().await.unwrap(), b'x');
}

#[tokio::test]
async fn a_running_pods_new_connections_never_fail_while_it_is_brought_in_and_out() {
    let (outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    let to = SocketAddr::new(outside.v4.into(), 9080);
    let server = ambit_net::listen::listen_tcp(&outside.netns, to, Default::default()).await.unwrap();
    let server = TcpListener::from_std(server).unwrap();
    let direct = tokio::spawn(async move {
        let mut taken = Vec::new();
        while let Ok((stream, _)) = server.accept().await {
            taken.push(stream);
        }
    });
    let netns = pod.netns.clone();
    let (stop, mut stopped) = tokio::sync::oneshot::channel();
    let (count, counted) = tokio::sync::watch::channel(0);
    let dialling = tokio::spawn(async move {
        while stopped.try_recv().is_err() {
            let start = Instant::now();
            dial(&netns, to).await.expect("a connection during the change");
            // tcp(7): a lost first packet is sent again after a second.
            assert!(start.elapsed() < Duration::from_millis(900), "a packet was lost");
            count.send_modify(|dialled| *dialled += 1);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    for _ in 0..3 {
        running.agent.pod_up(spec("a", &pod)).await.unwrap();
        let (Payload::Add(add), descriptors) = proxy.receive().await else { panic!("no add") };
        // A proxy that takes its time: connections wait for it.
        let before = *counted.borrow();
        eventually("connections that wait for the proxy", async || *counted.borrow() >= before + 20).await;
        proxy.pods.insert("a".into(), (add, descriptors));
        proxy.ack("").await;
        let listener = proxy.listener("a", 15001);
        let served = tokio::spawn(async move { while listener.accept().await.is_ok() {} });
        running.agent.unenrol("a").await.unwrap();
        while !matches!(proxy.obey().await, Payload::Del(_)) {}
        served.abort();
        eventually("the pod is out", async || state(&running.agent, "a").await.is_none()).await;
    }
    stop.send(()).unwrap();
    dialling.await.unwrap();
    direct.abort();
}

#[tokio::test]
async fn connections_wait_for_the_next_proxy_and_are_refused_after_hold_for() {
    let (outside, pod) = pair().await;
    let running = Running::start(|config| config.hold_for = Duration::from_secs(2)).await;
    running.agent.pod_up(spec("a", &pod)).await.unwrap();
    let mut first = running.proxy(true).await;
    first.obey_snapshot().await;
    assert!(running.agent.wait_enabled("a", SOON).await);
    drop(first);
    eventually("the proxy is missed", async || running.agent.proxies() == 0).await;

    let to = SocketAddr::new(outside.v4.into(), 9080);
    let mut waiting = dial(&pod.netns, to).await.expect("held, not refused");
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Enabled));
    let mut second = running.proxy(true).await;
    second.obey_snapshot().await;
    let (mut taken, _) = second.listener("a", 15001).accept().await.unwrap();
    waiting.write_all(b"x").await.unwrap();
    assert_eq!(taken.read_u8().await.unwrap(), b'x');
    drop(second);

    eventually("connections are refused", async || dial(&pod.netns, to).await.is_err()).await;
    // Bound again for the next proxy.
    let mut third = running.proxy(true).await;
    third.obey_snapshot().await;
    dial(&pod.netns, to).await.expect("accepted again");
}

#[tokio::test]
async fn of_two_proxies_the_newest_gets_adds_and_both_get_dels() {
    let (_outside, pod) = pair().await;
    let (_outside2, pod2) = pair().await;
    let running = Running::start(|_| {}).await;
    running.agent.pod_up(spec("a", &pod)).await.unwrap();
    let mut old = running.proxy(true).await;
    old.obey_snapshot().await;
    let mut new = running.proxy(true).await;
    new.obey_snapshot().await;
    running.agent.pod_up(spec("b", &pod2)).await.unwrap();
    new.obey_add("b").await;
    old.hears_nothing().await;
    // Both accept from one queue.
    let inode = |proxy: &Proxy| {
        let listener = proxy.listener("a", 15008);
        std::os::unix::fs::MetadataExt::ino(
            &std::fs::File::from(OwnedFd::from(listener.into_std().unwrap())).metadata().unwrap(),
        )
    };
    assert_eq!(inode(&old), inode(&new));
    running.agent.pod_down("a").await.unwrap();
    for proxy in [&mut old, &mut new] {
        assert!(matches!(proxy.obey().await, Payload::Del(del) if del.uid == "a"));
    }
    drop(new);
    old.obey_add("b").await;
}

#[tokio::test]
async fn a_proxy_that_takes_no_listeners_gets_the_namespace_alone_and_free_ports() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    running.agent.pod_up(spec("a", &pod)).await.unwrap();
    let mut ours = running.proxy(true).await;
    ours.obey_snapshot().await;
    drop(ours);
    let mut foreign = running.proxy(false).await;
    foreign.obey_snapshot().await;
    let (add, descriptors) = &foreign.pods["a"];
    assert_eq!((add.listeners.len(), descriptors.len()), (0, 1));
    let options = ambit_net::listen::Options::marked(PROXY_MARK);
    for port in [15001, 15006, 15008] {
        let at = SocketAddr::new("0.0.0.0".parse().unwrap(), port);
        ambit_net::listen::listen_tcp(&pod.netns, at, options).await.expect("the port is free");
    }
}

#[tokio::test]
async fn a_pod_that_a_proxy_refuses_stays_pending_with_the_reason_until_it_is_served() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    running.agent.pod_up(spec("a", &pod)).await.unwrap();
    assert!(matches!(proxy.receive().await.0, Payload::Add(_)));
    proxy.ack("no certificate").await;
    eventually("the reason is known", async || {
        running.agent.status("a").is_some_and(|s| s.reason.as_deref() == Some("no certificate"))
    })
    .await;
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Pending));
    proxy.obey_add("a").await;
    assert!(running.agent.wait_enabled("a", SOON).await);
    assert_eq!(running.agent.status("a").unwrap().reason, None);
}

#[tokio::test]
async fn leaving_ends_redirection_at_once_and_the_rest_with_the_last_connection() {
    let (outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    running.agent.pod_up(spec("a", &pod)).await.unwrap();
    proxy.obey_add("a").await;
    let to = SocketAddr::new(outside.v4.into(), 9080);
    let mut app = dial(&pod.netns, to).await.unwrap();
    let (mut taken, _) = proxy.listener("a", 15001).accept().await.unwrap();

    running.agent.unenrol("a").await.unwrap();
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Leaving));
    let server = ambit_net::listen::listen_tcp(&outside.netns, to, Default::default()).await.unwrap();
    let server = TcpListener::from_std(server).unwrap();
    dial(&pod.netns, to).await.unwrap();
    tokio::time::timeout(SOON, server.accept()).await.expect("a direct connection").unwrap();
    // The tunnelled connection goes on, and the proxy is told nothing yet.
    proxy.hears_nothing().await;
    app.write_all(b"x").await.unwrap();
    assert_eq!(taken.read_u8().await.unwrap(), b'x');

    drop((app, taken));
    assert!(matches!(proxy.obey().await, Payload::Del(del) if del.uid == "a"));
    eventually("the pod is out", async || state(&running.agent, "a").await.is_none()).await;
    assert_eq!(ambit_node::nft::tables(&pod.netns).await.unwrap(), [] as [&str; 0]);
    assert_eq!(std::fs::read_dir(running.directory.path().join("pods")).unwrap().count(), 0);
    // And in again.
    running.agent.pod_up(spec("a", &pod)).await.unwrap();
    proxy.obey_add("a").await;
    assert!(running.agent.wait_enabled("a", SOON).await);
}

#[tokio::test]
async fn a_leaving_pod_is_served_for_its_grace_also_without_connections() {
    let (outside, pod) = pair().await;
    let running = Running::start(|config| config.leave_grace = Duration::from_secs(1)).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    running.agent.pod_up(spec("a", &pod)).await.unwrap();
    proxy.obey_add("a").await;
    running.agent.unenrol("a").await.unwrap();
    proxy.hears_nothing().await;
    // A peer that has not heard of it yet still tunnels.
    let peer = dial(&outside.netns, SocketAddr::new(pod.v4.into(), 15008)).await.unwrap();
    drop((proxy.listener("a", 15008).accept().await.unwrap(), peer));
    assert!(matches!(proxy.obey().await, Payload::Del(_)));
}

#[tokio::test]
async fn a_connection_that_never_ends_is_cut_at_the_leave_timeout() {
    let (outside, pod) = pair().await;
    let running = Running::start(|config| config.leave_timeout = Duration::from_millis(500)).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    running.agent.pod_up(spec("a", &pod)).await.unwrap();
    proxy.obey_add("a").await;
    let _app = dial(&pod.netns, SocketAddr::new(outside.v4.into(), 9080)).await.unwrap();
    let _taken = proxy.listener("a", 15001).accept().await.unwrap();
    running.agent.unenrol("a").await.unwrap();
    assert!(matches!(proxy.obey().await, Payload::Del(_)));
    eventually("the pod is out", async || state(&running.agent, "a").await.is_none()).await;
}

#[tokio::test]
async fn a_pod_that_comes_back_while_it_leaves_stays() {
    let (outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    running.agent.pod_up(spec("a", &pod)).await.unwrap();
    proxy.obey_add("a").await;
    assert!(running.agent.wait_enabled("a", SOON).await);
    let to = SocketAddr::new(outside.v4.into(), 9080);
    let app = dial(&pod.netns, to).await.unwrap();
    let taken = proxy.listener("a", 15001).accept().await.unwrap();
    running.agent.unenrol("a").await.unwrap();
    running.agent.pod_up(spec("a", &pod)).await.unwrap();
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Enabled));
    drop((app, taken));
    proxy.hears_nothing().await;
    dial(&pod.netns, to).await.unwrap();
    proxy.listener("a", 15001).accept().await.unwrap();
}

#[tokio::test]
async fn the_wrong_namespace_is_given_no_identity() {
    let (outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let swapped = PodSpec { netns: outside.netns.clone(), ..spec("a", &pod) };
    let error = running.agent.pod_up(swapped).await.unwrap_err();
    assert!(
        matches!(&error, AgentError::WrongNamespace { missing, .. } if *missing == pod.addresses()),
        "{error}"
    );
    let nameless = PodSpec { ips: vec![], ..spec("a", &pod) };
    assert!(matches!(running.agent.pod_up(nameless).await, Err(AgentError::WrongNamespace { .. })));
    let own = PodSpec { netns: Netns::current().unwrap(), ..spec("a", &pod) };
    assert!(matches!(running.agent.pod_up(own).await, Err(AgentError::HostNetwork { .. })));
    assert_eq!(running.agent.statuses().len(), 0);
    assert_eq!(ambit_node::nft::tables(&pod.netns).await.unwrap(), [] as [&str; 0]);
}

#[tokio::test]
async fn older_connections_are_counted_until_they_end() {
    let (outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let to = SocketAddr::new(outside.v4.into(), 9080);
    let server = ambit_net::listen::listen_tcp(&outside.netns, to, Default::default()).await.unwrap();
    let server = TcpListener::from_std(server).unwrap();
    let kept = dial(&pod.netns, to).await.unwrap();
    let accepted = server.accept().await.unwrap();
    running.agent.pod_up(spec("a", &pod)).await.unwrap();
    assert_eq!(running.agent.status("a").unwrap().older_connections, 1);
    drop(accepted);
    drop(kept);
    eventually("none is left", async || {
        assert_eq!(running.agent.repair().await, []);
        running.agent.status("a").unwrap().older_connections == 0
    })
    .await;
}

#[tokio::test]
async fn tampering_is_repaired_by_the_agent_itself() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|config| config.repair_interval = Duration::from_millis(100)).await;
    running.agent.pod_up(spec("a", &pod)).await.unwrap();
    redirect::remove(&pod.netns, &FormerSettings::default()).await.unwrap();
    let wanted = plan(&Options::default(), Stage::In);
    eventually("it is repaired", async || redirect::verify(&pod.netns, &wanted).await.unwrap().is_empty())
        .await;
}

#[tokio::test]
async fn a_restarted_agent_knows_its_pods_and_takes_their_listeners_back() {
    let (outside, pod) = pair().await;
    let (_outside2, lost) = pair().await;
    let running = Running::start(|_| {}).await;
    // A namespace of a path that lasts: this test's thread holds it open by descriptor.
    let fd = std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(&pod.netns));
    let path = format!("/proc/{}/fd/{fd}", std::process::id());
    let found = PodSpec { netns_path: Some(path.into()), ..spec("a", &pod) };
    running.agent.pod_up(found).await.unwrap();
    running.agent.pod_up(spec("b", &lost)).await.unwrap();
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    for uid in ["a", "b"] {
        assert!(running.agent.wait_enabled(uid, SOON).await);
    }
    let directory = running.stop().await;
    // The proxy goes on without an agent, and holds the listeners alone.
    let to = SocketAddr::new(outside.v4.into(), 9080);
    dial(&pod.netns, to).await.expect("still served");
    proxy.listener("a", 15001).accept().await.unwrap();

    let running = Running::start_in(directory, |_| {}).await;
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Enabled), "it never stopped being served");
    let listeners = proxy.pods.remove("a").unwrap();
    let mut again = running.proxy(true).await;
    again.obey_add("a").await;
    assert!(matches!(again.obey().await, Payload::Keep(keep) if keep.uid == "b"));
    assert!(matches!(again.obey().await, Payload::SnapshotSent(_)));
    drop(listeners);
    // Only the agent's and the new connection's copies are left; both are the same queue as before.
    dial(&pod.netns, to).await.expect("the listener was taken back");
    again.listener("a", 15001).accept().await.unwrap();
}

#[tokio::test]
async fn a_hostile_or_confused_proxy_is_turned_away_and_others_are_served() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    running.agent.pod_up(spec("a", &pod)).await.unwrap();
    let path = running.directory.path().join("ztunnel.sock");
    for hello in
        [&[0xff; 16][..], &[0; 2000], &ZdsHello { version: 7, takes_listeners: true }.encode_to_vec()]
    {
        let socket = SeqPacket::connect(&path).unwrap();
        socket.send(hello, &[]).await.unwrap();
        let mut buffer = [0; MAX_PACKET];
        let ended = tokio::time::timeout(SOON, socket.recv(&mut buffer)).await.expect("an end within 5 s");
        assert!(ended.map_or(0, |received| received.len) == 0);
    }
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    assert!(proxy.pods.contains_key("a"));
}
