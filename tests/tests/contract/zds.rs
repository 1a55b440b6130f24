//! The node agent's socket, by hand, from both sides.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use ambit_net::Netns;
use ambit_net::seqpacket::{SeqPacket, SeqPacketListener};
use serde_json::{Value, json};

use crate::grpc::{DISCOVERY, SOON};
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
    async fn request(&self, request: &Value, netns: Option<&Netns>) -> String {
        let packet = encode("WorkloadRequest", request);
        assert!(packet.len() <= 1024);
        let descriptors: Vec<_> = netns.iter().map(|netns| netns.as_fd()).collect();
        self.0.send(&packet, &descriptors).await.unwrap();
        let answer = self.receive("WorkloadResponse").await;
        answer["ack"]["error"].as_str().unwrap_or_default().to_owned()
    }

    pub(crate) async fn snapshot_sent(&self) {
        assert_eq!(self.request(&json!({ "snapshot_sent": {} }), None).await, "");
    }
}

fn add(uid: &str, name: &str) -> Value {
    json!({ "add": { "uid": uid, "workload_info": { "name": name, "namespace": "shop", "service_account": name } } })
}

/// `uid`s of the pods that the proxy serves.
fn pods(dump: &Value) -> Vec<&str> {
    dump["pods"].as_array().into_iter().flatten().filter_map(|pod| pod["uid"].as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_istio_adds_keeps_and_deletes_pods() {
    let mut istiod = Istiod::start().await;
    let agent = Agent::listen(&istiod.path("zds.sock"));
    let ztunnel = Ztunnel::of(&istiod, &[]);
    let mut stream = istiod.server.accept(DISCOVERY).await;
    opening(&mut stream).await;
    send(&mut stream, AUTHORIZATION, VERSION, &[], &[]);
    send(&mut stream, ADDRESS, VERSION, &[workload("web", [10, 0, 0, 7], &[])], &[]);
    let (first, second) = (Netns::create().unwrap(), Netns::create().unwrap());
    let proxy = agent.accept().await;
    assert_eq!(proxy.request(&add("u1", "web"), Some(&first)).await, "");
    assert_eq!(proxy.request(&add("u2", "other"), Some(&second)).await, "");
    assert!(!proxy.request(&add("u3", "none"), None).await.is_empty(), "an add needs the namespace");
    assert!(
        !proxy.request(&json!({ "keep": { "uid": "unknown" } }), None).await.is_empty(),
        "nothing to keep"
    );
    proxy.snapshot_sent().await;
    let dump = ztunnel.until("both pods", |dump| pods(dump).len() == 2).await;
    // A node proxy finds its own pods by the uid of the control plane.
    assert!(dump["pods"].to_string().contains("Kubernetes//Pod/shop/web"), "{:#}", dump["pods"]);
    assert_eq!(proxy.request(&json!({ "del": { "uid": "u2" } }), None).await, "");
    ztunnel.until("one pod", |dump| pods(dump) == ["u1"]).await;

    // The agent starts anew and has lost its descriptors; pods are served in the meantime.
    drop(proxy);
    assert_eq!(pods(&ztunnel.dump().await), ["u1"]);
    let proxy = agent.accept().await;
    assert_eq!(proxy.request(&json!({ "keep": { "uid": "u1" } }), None).await, "");
    proxy.snapshot_sent().await;
    assert_eq!(pods(&ztunnel.dump().await), ["u1"]);
    // What a snapshot does not list is dropped.
    drop(proxy);
    let proxy = agent.accept().await;
    proxy.snapshot_sent().await;
    ztunnel.until("no pod", |dump| pods(dump).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_certificate_is_requested_by_impersonation() {
    let mut istiod = Istiod::start().await;
    let agent = Agent::listen(&istiod.path("zds.sock"));
    let ztunnel = Ztunnel::of(&istiod, &[]);
    let mut stream = istiod.server.accept(DISCOVERY).await;
    opening(&mut stream).await;
    send(&mut stream, AUTHORIZATION, VERSION, &[], &[]);
    send(&mut stream, ADDRESS, VERSION, &[workload("web", [10, 0, 0, 7], &[])], &[]);
    let netns = Netns::create().unwrap();
    let proxy = agent.accept().await;
    assert_eq!(proxy.request(&add("u1", "web"), Some(&netns)).await, "");
    let request = istiod.sign().await;
    assert_eq!(request["validity_duration"], Duration::from_secs(24 * 3600).as_secs());
    let identity = &request["metadata"]["fields"]["ImpersonatedIdentity"]["string_value"];
    assert_eq!(identity, "spiffe://cluster.local/ns/shop/sa/web");
    let dump = ztunnel.until("the certificate", |dump| dump["certificates"][0]["state"] == "Available").await;
    let leaf = &dump["certificates"][0]["certChain"][0];
    assert!(leaf["serialNumber"].as_str().unwrap().bytes().all(|byte| byte.is_ascii_digit()), "{leaf}");
    assert!(leaf["expirationTime"].as_str().unwrap().ends_with('Z'), "{leaf}");
}
