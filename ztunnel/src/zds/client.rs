//! Dials the node agent, follows what it says, answers each packet; dials again when it is gone.
//!
//! Pods continue to be served while the agent is away: losing it only delays the news of
//! the next pod. Runs on the control runtime; ends when the proxy drains, so that the agent turns to
//! a successor at once.

use std::collections::HashSet;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use ambit_api::workload::zds::{Listener, WorkloadInfo};
use ambit_net::seqpacket::SeqPacket;
use rand::RngExt;
use tokio::sync::watch;

use super::session::{self, MAX_MESSAGE, Session, Step};

/// First and longest pause between attempts to dial. A restarted agent takes pods' listeners back from this proxy, and keeps
/// a successor waiting until then.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How long the agent may take to take an answer off its socket.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// What a pod brings along: its namespace, and listeners that the agent bound in it.
#[derive(Debug)]
pub struct PodDescriptors {
    /// The pod's network namespace.
    pub netns: OwnedFd,
    /// Listening sockets and what they are; none if the proxy is to bind its own.
    pub listeners: Vec<(Listener, OwnedFd)>,
}

/// Who serves pods. An error's text goes to the agent; the implementer retries by itself.
pub trait PodSet: Send + Sync {
    /// Serves the pod, or goes on serving it; one under the same uid in another namespace is replaced.
    fn add(
        &self,
        uid: String,
        info: WorkloadInfo,
        descriptors: PodDescriptors,
    ) -> impl Future<Output = Result<(), String>> + Send;
    /// Goes on serving a pod that must be known.
    fn keep(&self, uid: &str) -> impl Future<Output = Result<(), String>> + Send;
    /// Stops serving a pod; one that is not known is no error.
    fn delete(&self, uid: &str) -> impl Future<Output = ()> + Send;
    /// Stops serving all pods but these.
    fn retain(&self, uids: &HashSet<String>) -> impl Future<Output = ()> + Send;
}

/// Where the client stands, for readiness and dumps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Whether the agent is connected now.
    pub connected: bool,
    /// Whether a snapshot was ever complete.
    pub synced: bool,
}

/// Why one connection to the agent ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("receive from the node agent")]
    Receive(#[source] io::Error),
    #[error("send to the node agent")]
    Send(#[source] io::Error),
    #[error("the node agent takes no answers")]
    Stuck,
    #[error("the node agent closed the connection")]
    Closed,
}

/// Runs until the caller drops the future.
pub async fn run(path: &Path, pods: &impl PodSet, progress: &watch::Sender<Progress>) {
    let mut pause = PAUSES.0;
    let mut complained = false;
    loop {
        match SeqPacket::connect(path) {
            Ok(agent) => {
                tracing::info!(path = %path.display(), "connected to the node agent");
                progress.send_modify(|p| p.connected = true);
                let began = tokio::time::Instant::now();
                let ended = follow(&agent, pods, progress).await;
                progress.send_modify(|p| p.connected = false);
                tracing::warn!(error = %Chain(&ended), "lost the node agent; its pods stay served");
                complained = false;
                if began.elapsed() > PAUSES.1 {
                    pause = PAUSES.0;
                }
            }
            Err(error) => {
                if !complained {
                    tracing::warn!(path = %path.display(), %error, "can't reach the node agent; trying on");
                }
                complained = true;
            }
        }
        let jitter = rand::rng().random_range(0.5..1.0);
        tokio::time::sleep(pause.mul_f64(jitter)).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Follows one connection to its end.
async fn follow(agent: &SeqPacket, pods: &impl PodSet, progress: &watch::Sender<Progress>) -> SessionError {
    if let Err(error) = agent.send(&Session::hello(), &[]).await {
        return SessionError::Send(error);
    }
    let mut session = Session::new();
    // Twice the contract's size, so that an agent that exceeds it gets an error instead of a closed connection.
    let mut buffer = [0; 2 * MAX_MESSAGE];
    loop {
        let received = match agent.recv(&mut buffer).await {
            Ok(received) if received.len == 0 => return SessionError::Closed,
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                if let Err(ended) = reply(agent, &Err(error.to_string())).await {
                    return ended;
                }
                continue;
            }
            Err(error) => return SessionError::Receive(error),
        };
        let packet = buffer.get(..received.len).unwrap_or_default();
        let result = match session.handle_packet(packet, received.descriptors.len()) {
            Ok(step) => {
                let complete = matches!(step, Step::Retain(_));
                let result = take(step, received.descriptors, pods).await;
                if complete {
                    progress.send_modify(|p| p.synced = true);
                }
                result
            }
            Err(error) => Err(error.to_string()),
        };
        if let Err(reason) = &result {
            tracing::warn!(reason, "nacked a request of the node agent");
        }
        if let Err(ended) = reply(agent, &result).await {
            return ended;
        }
    }
}

async fn take(step: Step, descriptors: Vec<OwnedFd>, pods: &impl PodSet) -> Result<(), String> {
    match step {
        Step::Add { uid, info, listeners } => {
            let mut descriptors = descriptors.into_iter();
            let netns = descriptors.next().ok_or("no descriptor of the network namespace came")?;
            let listeners = listeners.into_iter().zip(descriptors).collect();
            pods.add(uid, info, PodDescriptors { netns, listeners }).await
        }
        Step::Keep(uid) => pods.keep(&uid).await,
        Step::Delete(uid) => {
            pods.delete(&uid).await;
            Ok(())
        }
        Step::Retain(uids) => {
            pods.retain(&uids).await;
            Ok(())
        }
    }
}

async fn reply(agent: &SeqPacket, result: &Result<(), String>) -> Result<(), SessionError> {
    match tokio::time::timeout(ANSWER_LIMIT, agent.send(&session::answer(result), &[])).await {
        Ok(sent) => sent.map_err(SessionError::Send),
        Err(_) => Err(SessionError::Stuck),
    }
}

/// An error with its causes in one line.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_api::workload::zds::workload_request::Payload;
    use ambit_api::workload::zds::{
        AddWorkload, DelWorkload, SnapshotSent, WorkloadRequest, WorkloadResponse, ZdsHello,
    };
    use ambit_net::seqpacket::SeqPacketListener;
    use parking_lot::Mutex;
    use prost::Message;
    use std::os::fd::{AsFd, BorrowedFd};
    use std::sync::Arc;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<String>>);

    impl PodSet for Recorder {
        async fn add(&self, uid: String, info: WorkloadInfo, d: PodDescriptors) -> Result<(), String> {
            self.0.lock().push(format!("add {uid} {} {}", info.name, d.listeners.len()));
            if uid == "bad" { Err("can't".into()) } else { Ok(()) }
        }
        async fn keep(&self, uid: &str) -> Result<(), String> {
            self.0.lock().push(format!("keep {uid}"));
            Ok(())
        }
        async fn delete(&self, uid: &str) {
            self.0.lock().push(format!("del {uid}"));
        }
        async fn retain(&self, uids: &HashSet<String>) {
            let mut uids: Vec<_> = uids.iter().map(String::as_str).collect();
            uids.sort_unstable();
            self.0.lock().push(format!("retain {}", uids.join(",")));
        }
    }

    async fn ask(agent: &SeqPacket, payload: Payload, fds: &[BorrowedFd<'_>]) -> String {
        let packet = WorkloadRequest { payload: Some(payload) }.encode_to_vec();
        agent.send(&packet, fds).await.unwrap();
        let mut buffer = [0; 1024];
        let got = agent.recv(&mut buffer).await.unwrap();
        let response = WorkloadResponse::decode(&buffer[..got.len]).unwrap();
        let Some(ambit_api::workload::zds::workload_response::Payload::Ack(ack)) = response.payload else {
            panic!("no ack")
        };
        ack.error
    }

    fn add(uid: &str) -> Payload {
        let info = WorkloadInfo { name: "n".into(), namespace: "ns".into(), service_account: "sa".into() };
        let listeners = vec![Listener { port: 15001, udp: false, ipv6: false }];
        Payload::Add(AddWorkload { uid: uid.into(), workload_info: Some(info), listeners })
    }

    #[tokio::test]
    async fn packets_are_answered_and_a_lost_agent_is_dialled_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("zds.sock");
        let pods = Arc::new(Recorder::default());
        let (progress, mut seen) = watch::channel(Progress::default());
        let listener = SeqPacketListener::bind(&path).unwrap();
        let client = tokio::spawn({
            let (path, pods) = (path.clone(), pods.clone());
            async move { run(&path, &*pods, &progress).await }
        });
        let fd = std::fs::File::open("/dev/null").unwrap();
        let fds = [fd.as_fd(), fd.as_fd()];
        for round in 0..2 {
            let agent = listener.accept().await.unwrap();
            let mut buffer = [0; 1024];
            let hello = agent.recv(&mut buffer).await.unwrap();
            assert!(ZdsHello::decode(&buffer[..hello.len]).unwrap().takes_listeners);
            assert_eq!(ask(&agent, add("good"), &fds).await, "");
            assert_eq!(ask(&agent, add("bad"), &fds).await, "can't");
            assert!(ask(&agent, add("short"), &fds[..1]).await.contains("descriptors"));
            agent.send(b"\xff\xff\xff", &[]).await.unwrap();
            assert!(agent.recv(&mut buffer).await.unwrap().len > 2, "nonsense is nacked");
            assert_eq!(ask(&agent, Payload::SnapshotSent(SnapshotSent {}), &[]).await, "");
            seen.wait_for(|p| p.synced && p.connected).await.unwrap();
            assert_eq!(ask(&agent, Payload::Del(DelWorkload { uid: "good".into() }), &[]).await, "");
            drop(agent);
            let expected = ["add good n 1", "add bad n 1", "retain bad,good,short", "del good"];
            assert_eq!(std::mem::take(&mut *pods.0.lock()), expected, "round {round}");
        }
        client.abort();
    }
}
