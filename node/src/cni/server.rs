//! The agent's socket for the CNI plugin: what becomes of each sandbox.
//!
//! An added pod of the mesh is answered for when its rules are in and a node proxy serves it; anything in doubt is "try
//! again", so that no such pod starts in the clear.

use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ambit_net::Netns;
use ambit_net::seqpacket::{SeqPacket, SeqPacketListener};
use ambit_telemetry::{Counter, Registry};
use prometheus_client::metrics::family::Family;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::message::{Answer, MAX_PACKET, Request, Sandbox};
use crate::kubernetes::{PodSource, Verdict, WantedPod};
use crate::redirect::{self, Stage, plan};
use crate::{Agent, PodSpec, PodState, discovery};

/// Calls of the plugin that are worked on at a time; more wait.
const MAX_CALLS: usize = 256;
/// How long a plugin may take to send its request.
const REQUEST: Duration = Duration::from_secs(5);
/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answered calls by command and answer.
type Calls = Family<[(&'static str, &'static str); 2], Counter>;

/// The server; [`run`](Self::run) drives it.
#[derive(Debug)]
pub struct Server<S> {
    listener: SeqPacketListener,
    shared: Arc<Shared<S>>,
}

#[derive(Debug)]
struct Shared<S> {
    agent: Agent,
    source: S,
    /// How long a new pod waits for a node proxy that serves it.
    served_within: Duration,
    calls: Calls,
}

impl<S: PodSource> Server<S> {
    /// Listens at `path`. The socket replaces that of a dead predecessor and belongs to root alone. A new pod of the mesh
    /// has to be served within `served_within`.
    pub fn bind(path: &Path, agent: Agent, source: S, served_within: Duration) -> io::Result<Self> {
        let listener = SeqPacketListener::bind(path)?;
        let shared = Shared { agent, source, served_within, calls: Calls::default() };
        Ok(Self { listener, shared: Arc::new(shared) })
    }

    /// Registers the server's metrics.
    pub fn register_metrics(&self, registry: &Registry) {
        let calls = self.shared.calls.clone();
        registry.register("ambit_node_cni_calls", "Calls of the CNI plugin by command and answer", calls);
    }

    /// Serves until dropped.
    pub async fn run(self) {
        let places = Arc::new(Semaphore::new(MAX_CALLS));
        let mut calls = JoinSet::new();
        loop {
            // The semaphore is never closed.
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            while let Some(ended) = calls.try_join_next() {
                if let Err(error) = ended {
                    tracing::error!(%error, "a call of the CNI plugin died");
                }
            }
            match self.listener.accept().await {
                Ok(socket) => {
                    let shared = Arc::clone(&self.shared);
                    calls.spawn(async move {
                        if let Err(error) = shared.converse(&socket).await {
                            tracing::warn!(%error, "a call of the CNI plugin failed");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a call of the CNI plugin");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl<S: PodSource> Shared<S> {
    async fn converse(&self, socket: &SeqPacket) -> io::Result<()> {
        let mut buffer = vec![0; MAX_PACKET];
        let received = timeout(REQUEST, socket.recv(&mut buffer)).await??;
        let request: Request = serde_json::from_slice(buffer.get(..received.len).unwrap_or_default())?;
        let netns = received.descriptors.into_iter().next().map(Netns::from_fd).transpose();
        let netns = netns.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        let (command, answer) = match request {
            Request::Add(sandbox) => ("add", self.add(sandbox, netns).await),
            Request::Check(sandbox) => ("check", self.check(&sandbox, netns).await),
            Request::Del(sandbox) => ("del", self.del(&sandbox).await),
            Request::Gc { valid } => {
                self.agent.collect(valid.into_iter().collect()).await;
                ("gc", Answer::Done)
            }
        };
        self.calls.get_or_create(&[("command", command), ("answer", name_of(&answer))]).inc();
        socket.send(&serde_json::to_vec(&answer)?, &[]).await
    }

    async fn add(&self, sandbox: Sandbox, netns: Option<Netns>) -> Answer {
        let Sandbox { id, pod, netns_path, ips } = sandbox;
        let wanted = match self.source.verdict(&pod).await {
            Ok(Verdict::In(wanted)) => wanted,
            Ok(Verdict::Out(reason)) => {
                tracing::debug!(pod.namespace, pod.name, %reason, "new pod is not enrolled");
                return Answer::Done;
            }
            Err(error) => {
                tracing::warn!(pod.namespace, pod.name, %error, "new pod has to wait");
                return try_again(error);
            }
        };
        let Some(netns) = netns else { return try_again("the request has no network namespace") };
        let ips = match addresses(ips, &netns).await {
            Ok(ips) => ips,
            Err(reason) => return try_again(reason),
        };
        let WantedPod { uid, name, namespace, service_account, ips: _, options } = wanted;
        self.source.announce(&uid);
        let spec = PodSpec {
            uid: uid.clone(),
            name,
            namespace,
            service_account,
            ips,
            netns: Some(netns),
            netns_path,
            sandbox: Some(id),
            options,
        };
        if let Err(error) = self.agent.enrol(spec).await {
            tracing::warn!(uid, %error, kind = error.kind().as_str(), "new pod not enrolled");
            return try_again(error);
        }
        if self.agent.wait_enabled(&uid, self.served_within).await {
            return Answer::Done;
        }
        let reason = self.agent.status(&uid).and_then(|status| status.reason);
        try_again(format!("no node proxy serves it: {}", reason.as_deref().unwrap_or("none is connected")))
    }

    async fn check(&self, sandbox: &Sandbox, netns: Option<Netns>) -> Answer {
        let wanted = match self.source.verdict(&sandbox.pod).await {
            Ok(Verdict::In(wanted)) => wanted,
            Ok(Verdict::Out(_)) => return Answer::Done,
            Err(error) => return try_again(error),
        };
        let status = self.agent.status(&wanted.uid);
        let Some(PodState::Pending | PodState::Enabled) = status.map(|status| status.state) else {
            return not_as_planned("it is not enrolled");
        };
        let Some(netns) = netns else { return try_again("the request has no network namespace") };
        match redirect::verify(&netns, &plan(&wanted.options, Stage::In)).await {
            Ok(faults) if faults.is_empty() => Answer::Done,
            Ok(faults) => {
                not_as_planned(faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
            }
            Err(error) => try_again(error),
        }
    }

    async fn del(&self, sandbox: &Sandbox) -> Answer {
        match self.agent.remove_sandbox(&sandbox.id).await {
            Ok(()) => Answer::Done,
            Err(error) => try_again(error),
        }
    }
}

/// The pod's addresses: those that the plugins before gave it, else those that its namespace holds.
async fn addresses(given: Vec<IpAddr>, netns: &Netns) -> Result<Vec<IpAddr>, String> {
    if !given.is_empty() {
        return Ok(given);
    }
    let held = discovery::addresses(netns).await.map_err(|e| e.to_string())?;
    Ok(held.into_iter().filter(is_pods).collect())
}

/// Addresses by which others reach the pod.
fn is_pods(ip: &IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !ip.is_loopback() && !link_local
}

fn try_again(reason: impl Into<Box<dyn std::error::Error>>) -> Answer {
    Answer::TryAgain { reason: reason.into().to_string() }
}

fn not_as_planned(reason: impl Into<String>) -> Answer {
    Answer::NotAsPlanned { reason: reason.into() }
}

fn name_of(answer: &Answer) -> &'static str {
    match answer {
        Answer::Done => "done",
        Answer::TryAgain { .. } => "try_again",
        Answer::NotAsPlanned { .. } => "not_as_planned",
    }
}
