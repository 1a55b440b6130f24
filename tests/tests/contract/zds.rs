//! The node agent's socket, by hand, from both sides.

use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use ambit_net::Netns;
use ambit_net::seqpacket::{SeqPacket, SeqPacketListener};
use serde_json::{Value, json};

use crate::grpc::{Call, DISCOVERY, SOON};
use crate::istiod::{Istiod, VERSION, Ztunnel, opening, send, workload};
use crate::wire::{decode, encode};
use crate::{ADDRESS, AUTHORIZATION};

/// The agent's end of the socket.
pub(crate) struct Agent(SeqPacketListener);

/// A proxy that has dialled.
pub(crate) struct Proxy(SeqPacket);

impl Agent {
    pub(crate) fn listen(path: &Path) -> Self {
        Self(SeqPacketListener::bind(path).unwrap())
    }

    pub(crate) async fn accept(&self) -> Proxy {
        let proxy = tokio::time::timeout(SOON, self.0.accept()).await.expect("the proxy dials").unwrap();
        let proxy = Proxy(proxy);
        let hello = proxy.receive("ZdsHello").await;
        assert_eq!(hello["version"], "V1");
        proxy
    }
}

impl Proxy {
    async fn receive(&self, message: &str) -> Value {
        let mut buffer = [0; 2048];
        let received = tokio::time::timeout(SOON, self.0.recv(&mut buffer)).await.expect("a packet").unwrap();
        decode(message, &buffer[..received.len])
    }

    /// Sends one request with at most one descriptor; returns the error of the answer, empty for success.
    pub(crate) async fn request(&self, request: &Value, netns: Option<&Netns>) -> String {
        let descriptors: Vec<_> = netns.iter().map(|netns| netns.as_fd()).collect();
        self.request_with(request, descriptors).await
    }

    /// As [`Proxy::request`], with any descriptors.
    pub(crate) async fn request_with(&self, request: &Value, descriptors: Vec<BorrowedFd<'_>>) -> String {
        let packet = encode("WorkloadRequest", request);
        assert!(packet.len() <= 1024);
        self.0.send(&packet, &descriptors).await.unwrap();
        let answer = self.receive("WorkloadResponse").await;
        answer["ack"]["error"].as_str().unwrap_or_default().to_owned()
    }

    pub(crate) async fn snapshot_sent(&self) {
        assert_eq!(self.request(&json!({ "snapshot_sent": {} }), None).await, "");
    }
}

pub(crate) fn add(uid: &str, name: &str) -> Value {
    json!({ "add": { "uid": uid, "workload_info": { "name": name, "namespace": "shop", "service_account": name } } })
}

/// `uid`s of the pods that the proxy serves.
fn pods(dump: &Value) -> Vec<&str> {
    dump["pods"].as_array().into_iter().flatten().filter_map(|pod| pod["uid"].as_str()).collect()
}

/// Our node proxy under a control plane by hand, which knows one pod, and an agent that it dials.
pub(crate) struct Bed {
    pub(crate) istiod: Istiod,
    pub(crate) agent: Agent,
    pub(crate) ztunnel: Ztunnel,
    _stream: Call,
}

impl Bed {
    pub(crate) async fn start() -> Self {
        Self::with(&[], vec![]).await
    }

    /// With further settings and workloads.
    pub(crate) async fn with(variables: &[(&str, &str)], mut workloads: Vec<Value>) -> Self {
        let mut istiod = Istiod::start().await;
        let agent = Agent::listen(&istiod.path("zds.sock"));
        let ztunnel = Ztunnel::of(&istiod, variables);
        let mut stream = istiod.server.accept(DISCOVERY).await;
        opening(&mut stream).await;
        send(&mut stream, AUTHORIZATION, VERSION, &[], &[]);
        workloads.push(workload("web", [10, 0, 0, 7], &[]));
        send(&mut stream, ADDRESS, VERSION, &workloads, &[]);
        Self { istiod, agent, ztunnel, _stream: stream }
    }
}

/// The proxy's listeners, as an agent that binds them passes them; those for other pods at `address`.
pub(crate) fn bind_listeners(netns: &Netns, address: Ipv4Addr) -> Vec<(OwnedFd, Value)> {
    let bind = move || {
        let tcp = |address, port| Ok::<_, std::io::Error>(OwnedFd::from(TcpListener::bind((address, port))?));
        let loopback = Ipv4Addr::LOCALHOST;
        let dns = OwnedFd::from(UdpSocket::bind((loopback, 15053))?);
        Ok::<_, std::io::Error>(vec![
            (tcp(loopback, 15001)?, json!({ "port": 15001 })),
            (tcp(address, 15006)?, json!({ "port": 15006 })),
            (tcp(address, 15008)?, json!({ "port": 15008 })),
            (tcp(loopback, 15053)?, json!({ "port": 15053 })),
            (dns, json!({ "port": 15053, "udp": true })),
            (tcp(loopback, 15080)?, json!({ "port": 15080 })),
        ])
    };
    netns.run_blocking(bind).unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_istio_adds_keeps_and_deletes_pods() {
    let bed = Bed::start().await;
    let (first, second) = (Netns::create().unwrap(), Netns::create().unwrap());
    let proxy = bed.agent.accept().await;
    assert_eq!(proxy.request(&add("u1", "web"), Some(&first)).await, "");
    assert_eq!(proxy.request(&add("u2", "other"), Some(&second)).await, "");
    assert!(!proxy.request(&add("u3", "none"), None).await.is_empty(), "an add needs the namespace");
    assert!(
        !proxy.request(&json!({ "keep": { "uid": "unknown" } }), None).await.is_empty(),
        "nothing to keep"
    );
    proxy.snapshot_sent().await;
    let dump = bed.ztunnel.until("both pods", |dump| pods(dump).len() == 2).await;
    // A node proxy finds its own pods by the uid of the control plane.
    assert!(dump["pods"].to_string().contains("Kubernetes//Pod/shop/web"), "{:#}", dump["pods"]);
    assert_eq!(proxy.request(&json!({ "del": { "uid": "u2" } }), None).await, "");
    bed.ztunnel.until("one pod", |dump| pods(dump) == ["u1"]).await;

    // The agent starts anew and has lost its descriptors; pods are served in the meantime.
    drop(proxy);
    assert_eq!(pods(&bed.ztunnel.dump().await), ["u1"]);
    let proxy = bed.agent.accept().await;
    assert_eq!(proxy.request(&json!({ "keep": { "uid": "u1" } }), None).await, "");
    proxy.snapshot_sent().await;
    assert_eq!(pods(&bed.ztunnel.dump().await), ["u1"]);
    // What a snapshot does not list is dropped.
    drop(proxy);
    let proxy = bed.agent.accept().await;
    proxy.snapshot_sent().await;
    bed.ztunnel.until("no pod", |dump| pods(dump).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_certificate_is_requested_by_impersonation() {
    let mut bed = Bed::start().await;
    let netns = Netns::create().unwrap();
    let proxy = bed.agent.accept().await;
    assert_eq!(proxy.request(&add("u1", "web"), Some(&netns)).await, "");
    let request = bed.istiod.sign().await;
    assert_eq!(request["validity_duration"], Duration::from_secs(24 * 3600).as_secs());
    let identity = &request["metadata"]["fields"]["ImpersonatedIdentity"]["string_value"];
    assert_eq!(identity, "spiffe://cluster.local/ns/shop/sa/web");
    let dump =
        bed.ztunnel.until("the certificate", |dump| dump["certificates"][0]["state"] == "Available").await;
    let leaf = &dump["certificates"][0]["certChain"][0];
    assert!(leaf["serialNumber"].as_str().unwrap().bytes().all(|byte| byte.is_ascii_digit()), "{leaf}");
    assert!(leaf["expirationTime"].as_str().unwrap().ends_with('Z'), "{leaf}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_namespace_under_a_known_uid_replaces_the_pod() {
    let bed = Bed::start().await;
    let (first, second) = (Netns::create().unwrap(), Netns::create().unwrap());
    let proxy = bed.agent.accept().await;
    assert_eq!(proxy.request(&add("u1", "web"), Some(&first)).await, "");
    proxy.snapshot_sent().await;
    assert!(listens(&first, 15008) && listens(&first, 15001), "a proxy that is passed none binds its own");
    assert_eq!(proxy.request(&add("u1", "web"), Some(&second)).await, "");
    assert_eq!(pods(&bed.ztunnel.dump().await), ["u1"]);
    assert!(listens(&second, 15008));
    let deadline = tokio::time::Instant::now() + SOON;
    while listens(&first, 15008) {
        assert!(tokio::time::Instant::now() < deadline, "the former namespace is still served");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Whether a socket of the namespace listens on a port, as the kernel lists them.
fn listens(netns: &Netns, port: u16) -> bool {
    let wanted = format!(":{port:04X} ");
    let read = || {
        let mut text = std::fs::read_to_string("/proc/thread-self/net/tcp")?;
        text.push_str(&std::fs::read_to_string("/proc/thread-self/net/tcp6").unwrap_or_default());
        Ok::<_, std::io::Error>(text)
    };
    let table = netns.run_blocking(read).unwrap().unwrap();
    // The fourth column is the state: 0A is LISTEN.
    table.lines().any(|line| line.contains(&wanted) && line.split_whitespace().nth(3) == Some("0A"))
}

#[tokio::test(flavor = "multi_thread")]
async fn passed_listeners_are_taken_instead_of_own_ones() {
    let bed = Bed::start().await;
    let netns = Netns::create().unwrap();
    let bound = bind_listeners(&netns, Ipv4Addr::UNSPECIFIED);
    let mut request = add("u1", "web");
    request["add"]["listeners"] = bound.iter().map(|(_, named)| named.clone()).collect();
    let descriptors = std::iter::once(netns.as_fd()).chain(bound.iter().map(|(socket, _)| socket.as_fd()));
    let proxy = bed.agent.accept().await;
    // Sockets of its own could not be bound beside these.
    assert_eq!(proxy.request_with(&request, descriptors.collect()).await, "");
    proxy.snapshot_sent().await;
    assert_eq!(pods(&bed.ztunnel.dump().await), ["u1"]);
    drop(bound);
    assert!(listens(&netns, 15008), "the proxy holds them");
    assert_eq!(proxy.request(&json!({ "del": { "uid": "u1" } }), None).await, "");
    bed.ztunnel.until("no pod", |dump| pods(dump).is_empty()).await;
}

/// The namespace's port is held by a process of the pod at first.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_is_reported_and_tried_again() {
    let bed = Bed::start().await;
    let netns = Netns::create().unwrap();
    let held = netns.run_blocking(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 15008))).unwrap().unwrap();
    let proxy = bed.agent.accept().await;
    assert!(!proxy.request(&add("u1", "web"), Some(&netns)).await.is_empty(), "the start fails");
    drop(held);
    proxy.snapshot_sent().await;
    bed.ztunnel.until("the pod, without another add", |dump| pods(dump) == ["u1"]).await;
    let deadline = tokio::time::Instant::now() + SOON;
    while !listens(&netns, 15008) {
        assert!(tokio::time::Instant::now() < deadline, "never tried again\n{}", bed.ztunnel.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
