//! An agent, and a node proxy's side of ZDS.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

pub(crate) use ambit_api::workload::zds::workload_request::Payload;
use ambit_api::workload::zds::{
    Ack, AddWorkload, Version, WorkloadRequest, WorkloadResponse, ZdsHello, workload_response,
};
use ambit_net::seqpacket::SeqPacket;
use ambit_net::{Netns, SocketStock, connect};
use ambit_node::zds::MAX_PACKET;
use ambit_node::{Agent, AgentConfig, PodSpec, PodState, Reconciled};
use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::common::{Host, eventually, spec};

pub(crate) const SOON: Duration = Duration::from_secs(5);

/// An agent with a directory of its own.
pub(crate) struct Running {
    pub(crate) agent: Agent,
    driver: JoinHandle<()>,
    pub(crate) directory: tempfile::TempDir,
}

impl Running {
    /// One that serves proxies at once.
    pub(crate) async fn start(tune: impl FnOnce(&mut AgentConfig)) -> Self {
        let running = Self::start_in(tempfile::tempdir().unwrap(), tune).await;
        running.reconcile(vec![]).await;
        running
    }

    pub(crate) async fn reconcile(&self, desired: Vec<PodSpec>) -> Reconciled {
        self.agent.reconcile(desired, &HashSet::new(), Instant::now()).await
    }

    pub(crate) async fn start_in(directory: tempfile::TempDir, tune: impl FnOnce(&mut AgentConfig)) -> Self {
        let mut config =
            AgentConfig::new(directory.path().join("ztunnel.sock"), directory.path().join("pods"));
        config.leave_grace = Duration::ZERO;
        tune(&mut config);
        let (agent, driver) = Agent::start(config).await.unwrap();
        Self { agent, driver: tokio::spawn(driver), directory }
    }

    /// Ends the agent as a crash would; its directory stays.
    pub(crate) async fn stop(self) -> tempfile::TempDir {
        self.driver.abort();
        assert!(self.driver.await.unwrap_err().is_cancelled());
        self.directory
    }

    pub(crate) async fn proxy(&self, takes_listeners: bool) -> Proxy {
        let socket = SeqPacket::connect(self.directory.path().join("ztunnel.sock")).unwrap();
        let hello = ZdsHello { version: Version::V1.into(), takes_listeners };
        socket.send(&hello.encode_to_vec(), &[]).await.unwrap();
        Proxy { socket, pods: HashMap::new() }
    }
}

/// A node proxy's side of ZDS.
pub(crate) struct Proxy {
    socket: SeqPacket,
    pub(crate) pods: HashMap<String, (AddWorkload, Vec<OwnedFd>)>,
}

impl Proxy {
    pub(crate) async fn receive(&mut self) -> (Payload, Vec<OwnedFd>) {
        let mut buffer = [0; MAX_PACKET];
        let received = tokio::time::timeout(SOON, self.socket.recv(&mut buffer)).await;
        let received = received.expect("a packet within 5 s").unwrap();
        let request = WorkloadRequest::decode(&buffer[..received.len]).unwrap();
        (request.payload.unwrap(), received.descriptors)
    }

    pub(crate) async fn ack(&self, error: &str) {
        let payload = workload_response::Payload::Ack(Ack { error: error.into() });
        let response = WorkloadResponse { payload: Some(payload) };
        self.socket.send(&response.encode_to_vec(), &[]).await.unwrap();
    }

    /// Takes an order, does it and says so.
    pub(crate) async fn obey(&mut self) -> Payload {
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

    pub(crate) async fn obey_add(&mut self, uid: &str) {
        match self.obey().await {
            Payload::Add(add) => assert_eq!(add.uid, uid),
            other => panic!("{other:?} instead of an add"),
        }
    }

    pub(crate) async fn obey_snapshot(&mut self) {
        while !matches!(self.obey().await, Payload::SnapshotSent(_)) {}
    }

    /// A passed TCP listener, IPv4.
    pub(crate) fn listener(&self, uid: &str, port: u32) -> TcpListener {
        let (add, descriptors) = &self.pods[uid];
        let at = add.listeners.iter().position(|l| l.port == port && !l.udp && !l.ipv6).unwrap();
        let socket = descriptors[at + 1].try_clone().unwrap();
        TcpListener::from_std(socket.into()).unwrap()
    }

    /// Nothing comes for a while: the agent has nothing to say.
    pub(crate) async fn hears_nothing(&self) {
        let mut buffer = [0; MAX_PACKET];
        let heard = tokio::time::timeout(Duration::from_millis(300), self.socket.recv(&mut buffer)).await;
        assert!(heard.is_err(), "{heard:?}");
    }
}

/// Has pods that only have an address enrolled, all at once, and served. `seen` is called after each.
pub(crate) async fn enrol_all(running: &Running, proxy: &mut Proxy, pods: &[Host], mut seen: impl FnMut()) {
    let desired = pods.iter().enumerate().map(|(index, pod)| {
        let ips = vec![pod.v4.into()];
        PodSpec { ips, ..spec(&format!("pod-{index}"), pod) }
    });
    let (done, ()) = tokio::join!(running.reconcile(desired.collect()), async {
        for _ in pods {
            assert!(matches!(proxy.obey().await, Payload::Add(_)));
            seen();
        }
    });
    assert_eq!((done.enrolled, done.failed.len()), (pods.len(), 0));
    eventually("all are enabled", async || {
        running.agent.statuses().values().all(|status| status.state == PodState::Enabled)
    })
    .await;
}

pub(crate) async fn dial(from: &Netns, to: SocketAddr) -> std::io::Result<TcpStream> {
    connect(&SocketStock::new(from.clone(), None), to, SOON).await.map_err(std::io::Error::other)
}

pub(crate) async fn state(agent: &Agent, uid: &str) -> Option<PodState> {
    agent.status(uid).map(|status| status.state)
}

/// A path of a namespace that lasts as long as this process holds it.
pub(crate) fn lasting_path(netns: &Netns) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), netns.as_fd().as_raw_fd()).into()
}
