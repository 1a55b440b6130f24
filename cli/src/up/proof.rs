//! Checks of what the mesh promises. Each is a claim with its outcome and the reason.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use ambit_api::ports::INBOUND_HBONE;
use ambit_local::{Captured, Cluster, Pod, PodOptions, State};
use anyhow::{Context, anyhow, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use crate::up::answers::{self, Target};
use crate::up::expectations::{self, Expectations, ServiceName};
use crate::up::flows::{self, Connections};
use crate::up::forward::Forward;
use crate::up::requests::Exchanged;

/// Duration of the packet capture.
const LISTEN_FOR: Duration = Duration::from_secs(4);
/// How long a check waits for its condition.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// Interval between two tests of the condition.
pub(super) const POLL: Duration = Duration::from_millis(200);
/// Port of the plaintext sample.
const SAMPLE_PORT: u16 = 8099;
/// Namespace of the pods that send the sample, which are not in the mesh.
const SAMPLE_NAMESPACE: &str = "ambit-sample";

/// One check.
#[derive(Debug, Clone)]
pub(crate) struct Check {
    /// What is checked.
    pub(crate) claim: String,
    /// Its outcome.
    pub(crate) outcome: Outcome,
}

/// The outcome of a check, with a description of what was observed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It holds.
    Shown(String),
    /// There was no traffic that could show it, which is not a fault of the mesh.
    NotShown(String),
    /// It does not hold.
    Failed(String),
}

/// The error of a check that saw no traffic.
#[derive(Debug)]
struct NoTraffic(String);

impl std::fmt::Display for NoTraffic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no traffic: {}", self.0)
    }
}

impl std::error::Error for NoTraffic {}

impl From<anyhow::Result<String>> for Outcome {
    fn from(result: anyhow::Result<String>) -> Self {
        match result {
            Ok(seen) => Self::Shown(seen),
            Err(error) if error.is::<NoTraffic>() => Self::NotShown(error.to_string()),
            Err(error) => Self::Failed(format!("{error:#}")),
        }
    }
}

/// All checks so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Proof {
    pub(crate) checks: Vec<Check>,
}

impl Proof {
    /// No checks yet.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a check.
    pub(crate) fn note(&mut self, claim: &str, outcome: anyhow::Result<String>) {
        self.checks.push(Check { claim: claim.to_owned(), outcome: outcome.into() });
    }

    /// Whether no check failed.
    pub(crate) fn holds(&self) -> bool {
        let failed = |check: &Check| matches!(check.outcome, Outcome::Failed(_));
        !self.checks.is_empty() && !self.checks.iter().any(failed)
    }

    /// Runs all checks but the first, which is [`wait_ready`].
    pub(crate) async fn run(
        &mut self,
        cluster: &Cluster,
        expectations: &Expectations,
        page: Option<&Forward>,
    ) {
        let encrypted = encrypted(cluster, &expectations.unreadable).await;
        self.note("no payload is readable on the wire between the nodes", encrypted);
        for service in &expectations.spread {
            let claim = format!("traffic to {} reaches every workload behind it", service.name);
            self.note(&claim, spread(cluster, service).await);
        }
        for pod in cluster.pods() {
            for url in expectations::denied(&pod) {
                let claim = format!("{} is refused by {url}", workload_of(&pod));
                self.note(&claim, denied(&pod, &url).await);
            }
            self.answers(cluster, &pod).await;
        }
        self.note("every connection is authenticated on both sides", authenticated(cluster).await);
        if let Some(forward) = page {
            self.note("the page opens from this machine", opens(forward, expectations.page_path()).await);
        }
        let troubles = cluster.program_troubles();
        let running = if troubles.is_empty() {
            Ok("control plane and node proxies run".to_owned())
        } else {
            Err(anyhow!("{}", troubles.join("; ")))
        };
        self.note("no program of the mesh has ended", running);
    }

    /// What a pod's requests are answered with.
    async fn answers(&mut self, cluster: &Cluster, pod: &Pod) {
        let name = workload_of(pod);
        match expectations::answers(pod) {
            Ok(exchanges) => {
                for exchange in &exchanges {
                    let claim = format!("{name}: {}", answers::claim(exchange));
                    self.note(&claim, answers::check(cluster, pod, &name, exchange).await);
                }
            }
            Err(error) => self.note(&format!("{name}: its requests are answered"), Err(error)),
        }
    }
}

/// Waits until every pod is ready and those that are to be in the mesh are captured and served.
///
/// # Errors
/// After `limit`, with the pods that are not ready, the faults of the manifests and the crashes.
pub(crate) async fn wait_ready(cluster: &Cluster, limit: Duration) -> anyhow::Result<String> {
    let deadline = Instant::now() + limit;
    loop {
        let mut problems = cluster.problems();
        problems.extend(cluster.control_problems().await);
        ensure!(problems.is_empty(), "{}", problems.join("; "));
        let pods: Vec<Pod> =
            cluster.pods().into_iter().filter(|pod| pod.namespace() != SAMPLE_NAMESPACE).collect();
        let waiting: Vec<String> = pods.iter().filter_map(unready).collect();
        if waiting.is_empty() && !pods.is_empty() {
            let meshed = pods.iter().filter(|pod| pod.is_enrolled()).count();
            return Ok(format!("{} pods, {meshed} of them in the mesh", pods.len()));
        }
        if Instant::now() >= deadline {
            bail!("after {limit:?}: {}", waiting.join("; "));
        }
        tokio::time::sleep(POLL).await;
    }
}

fn unready(pod: &Pod) -> Option<String> {
    let view = pod.view();
    let ended_well =
        view.containers.iter().any(|container| matches!(container.state, State::Terminated { code: 0, .. }));
    if !view.is_ready() && !ended_well {
        return Some(format!("{pod} is not ready ({})", view.summary()));
    }
    if pod.is_wanted_in_mesh() && !pod.is_enrolled() {
        return Some(format!("{pod} is not captured yet"));
    }
    None
}

/// Flows with at least one connection whose source is in the mesh.
fn meshed(flows: &Connections) -> impl Iterator<Item = (&flows::Pair, &flows::Flow)> {
    flows.iter().filter(|(pair, flow)| !pair.source.principal.is_empty() && flow.opened > 0.0)
}

/// Both proxies of every pair must report the same two identities and mutual TLS.
async fn authenticated(cluster: &Cluster) -> anyhow::Result<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let flows = flows::read(cluster).await;
        let verdict = judge_authentication(&flows.connections);
        if verdict.is_ok() || Instant::now() >= deadline {
            return verdict;
        }
        tokio::time::sleep(POLL).await;
    }
}

fn judge_authentication(flows: &Connections) -> anyhow::Result<String> {
    let mut pairs = 0;
    for (pair, flow) in meshed(flows) {
        let (source, destination) = (&pair.source, &pair.destination);
        let name = format!("{} to {}", source.workload, destination.workload);
        ensure!(flow.mutual_tls, "{name} is not mutual TLS");
        ensure!(!destination.principal.is_empty(), "{name} has no identity at its destination");
        ensure!(flow.confirmed > 0.0, "{name} is not confirmed by the destination's proxy");
        pairs += 1;
    }
    if pairs == 0 {
        return Err(NoTraffic("no workload of the mesh has connected to another".to_owned()).into());
    }
    Ok(format!("{pairs} pairs of workloads, mutual TLS, identities reported alike by both proxies"))
}

/// Captures packets between the nodes while the workloads exchange traffic and a plaintext sample is sent. The capture must
/// contain the sample, which proves that it would also contain other plaintext.
async fn encrypted(cluster: &Cluster, words: &[String]) -> anyhow::Result<String> {
    ensure!(cluster.nodes() > 1, "there is only one node, so nothing crosses a wire");
    let sample = Sample::new(cluster).await.context("make the pods of the sample in the clear")?;
    let capture = cluster.capture().await?;
    let sent = sample.send(words).await;
    tokio::time::sleep(LISTEN_FOR).await;
    let captured = capture.stop().await?;
    sample.remove(cluster).await;
    sent.context("send the sample in the clear")?;
    // Waypoints are in the mesh without being captured.
    let enrolled = cluster.pods().into_iter().filter(Pod::is_enrolled);
    let meshed: BTreeSet<IpAddr> = enrolled.chain(cluster.waypoints()).flat_map(|pod| pod.ips()).collect();
    judge_capture(&captured, words, &meshed, sample.address)
}

fn judge_capture(
    captured: &Captured,
    words: &[String],
    meshed: &BTreeSet<IpAddr>,
    sample: SocketAddr,
) -> anyhow::Result<String> {
    ensure!(captured.dropped == 0, "the capture lost {} frames, so it proves nothing", captured.dropped);
    for word in words {
        let found = captured.find(word.as_bytes());
        ensure!(
            found.iter().any(|(_, to)| *to == sample),
            "the capture did not even find {word:?} in the sample in the clear"
        );
        let readable =
            found.iter().find(|(from, to)| meshed.contains(&from.ip()) && meshed.contains(&to.ip()));
        if let Some((from, to)) = readable {
            bail!("{word:?} is readable from {from} to {to}");
        }
    }
    let tunnelled: usize = captured
        .packets
        .iter()
        .filter(|packet| {
            packet.tcp && [packet.source.port(), packet.destination.port()].contains(&INBOUND_HBONE)
        })
        .map(|packet| packet.payload.len())
        .sum();
    if tunnelled == 0 {
        return Err(NoTraffic(format!("nothing crossed the wire on port {INBOUND_HBONE}")).into());
    }
    Ok(format!(
        "{} packets listened to, {tunnelled} bytes on port {INBOUND_HBONE}; {} words found only in a sample sent in the clear",
        captured.packets.len(),
        words.len()
    ))
}

/// Two pods outside the mesh, on two nodes.
struct Sample {
    client: Pod,
    server: Pod,
    address: SocketAddr,
}

impl Sample {
    async fn new(cluster: &Cluster) -> anyhow::Result<Self> {
        let pod = |name: &str, node| PodOptions::new(SAMPLE_NAMESPACE, name).node(node);
        let (client, server) =
            tokio::try_join!(cluster.pod(pod("client", 0)), cluster.pod(pod("server", 1)))?;
        let address = SocketAddr::new(IpAddr::V4(server.ip()), SAMPLE_PORT);
        Ok(Self { client, server, address })
    }

    /// Sends all words in one connection.
    async fn send(&self, words: &[String]) -> anyhow::Result<()> {
        let listener = self.server.listen(self.address).await?;
        let text = words.join(" ");
        let receive = async {
            let (mut stream, _) = listener.accept().await?;
            let mut received = String::new();
            stream.read_to_string(&mut received).await?;
            Ok::<_, std::io::Error>(received)
        };
        let send = async {
            let mut stream = self.client.connect_within(self.address, Duration::from_secs(3)).await?;
            stream.write_all(text.as_bytes()).await?;
            stream.shutdown().await
        };
        let (received, ()) =
            tokio::time::timeout(PATIENCE, async { tokio::try_join!(receive, send) }).await??;
        ensure!(received == text, "it arrived changed");
        Ok(())
    }

    async fn remove(&self, cluster: &Cluster) {
        for pod in [&self.client, &self.server] {
            if let Err(error) = cluster.delete_pod(pod).await {
                tracing::warn!(%error, "a pod of the sample is left");
            }
        }
    }
}

/// Every workload behind a service must have been connected to, or have answered a waypoint.
async fn spread(cluster: &Cluster, service: &ServiceName) -> anyhow::Result<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let backends = cluster.backends(&service.namespace, &service.name, None);
        let wanted: BTreeSet<String> = backends.iter().map(|(pod, _)| workload_of(pod)).collect();
        let flows = flows::read(cluster).await;
        let reached = |workload: &String| -> f64 {
            let to = |pair: &flows::Pair| {
                pair.destination.workload == *workload && pair.destination.namespace == service.namespace
            };
            let connections = flows.connections.iter().filter(|(pair, _)| to(pair));
            let answered = |key: &Exchanged| key.workload == *workload && key.namespace == service.namespace;
            let requests = flows.requests.iter().filter(|(key, _)| answered(key));
            // A waypoint's own connections are not counted beside the requests in them.
            let requests: f64 = requests.map(|(_, row)| row.count()).sum();
            if requests > 0.0 { requests } else { connections.map(|(_, flow)| flow.opened).sum() }
        };
        let missing: Vec<&String> = wanted.iter().filter(|workload| reached(workload) == 0.0).collect();
        if missing.is_empty() && wanted.len() > 1 {
            let shares: Vec<String> =
                wanted.iter().map(|workload| format!("{workload} {}", reached(workload))).collect();
            return Ok(shares.join(", "));
        }
        if Instant::now() >= deadline {
            if missing.len() == wanted.len() {
                return Err(NoTraffic(format!("no workload has reached {}", service.name)).into());
            }
            bail!("of {wanted:?}, nobody reached {missing:?}");
        }
        tokio::time::sleep(POLL).await;
    }
}

/// A workload's name: a pod's without what its Deployment added.
fn workload_of(pod: &Pod) -> String {
    let name = pod.name();
    match pod.labels().get("pod-template-hash").and_then(|hash| name.split_once(&format!("-{hash}-"))) {
        Some((workload, _)) => workload.to_owned(),
        None => name.to_owned(),
    }
}

/// Sends a request from inside a pod. A waypoint refuses it with 403, a ztunnel closes the connection; fails if any other
/// answer arrives, be it a single byte.
async fn denied(pod: &Pod, url: &str) -> anyhow::Result<String> {
    // Resolved first, because a name that does not resolve proves nothing about a policy.
    let target = Target::resolve(pod, url).await?;
    let Target { address, host, path } = target;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    match pod.run(move || ask(address, &request)).await? {
        Ok(answer) if answer.is_empty() => Ok("the connection was closed without an answer".to_owned()),
        Ok(answer) => {
            let text = String::from_utf8_lossy(&answer);
            let status = text.lines().next().unwrap_or_default();
            ensure!(status.starts_with("HTTP/1.1 403"), "{} bytes of an answer came: {status}", answer.len());
            Ok(status.trim_start_matches("HTTP/1.1 ").to_owned())
        }
        Err(error) => Ok(error.to_string()),
    }
}

/// Runs on a thread inside the pod; the beginning of the answer.
fn ask(address: SocketAddr, request: &str) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    stream.write_all(request.as_bytes())?;
    let mut buffer = vec![0; 4096];
    let length = stream.read(&mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}

/// Opens the page from this machine, through the open port.
async fn opens(forward: &Forward, path: &str) -> anyhow::Result<String> {
    let address = forward.address();
    let exchange = async {
        let mut stream = forward.try_out().await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        Ok::<_, anyhow::Error>(answer)
    };
    let answer = tokio::time::timeout(PATIENCE, exchange).await.context("no answer")??;
    let text = String::from_utf8_lossy(&answer);
    let status = text.lines().next().unwrap_or_default().to_owned();
    ensure!(status.contains(" 200"), "http://{address}{path} answered {status:?}");
    Ok(format!("http://{address}{path}, {} bytes", answer.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_local::Packet;

    fn packet(from: &str, to: &str, payload: &[u8]) -> Packet {
        Packet {
            tcp: true,
            source: from.parse().expect("an address"),
            destination: to.parse().expect("an address"),
            sequence: 1,
            payload: payload.to_vec(),
        }
    }

    fn judge(packets: Vec<Packet>, dropped: u64) -> anyhow::Result<String> {
        let captured = Captured { packets, dropped, others: 0 };
        let meshed = ["10.0.0.1", "10.0.0.2"].map(|ip| ip.parse().expect("an address")).into();
        judge_capture(&captured, &["word".to_owned()], &meshed, "10.9.9.9:8099".parse().expect("an address"))
    }

    fn sample() -> Packet {
        packet("10.9.9.8:1", "10.9.9.9:8099", b"a word in the clear")
    }

    fn tunnel() -> Packet {
        packet("10.0.0.1:1", "10.0.0.2:15008", b"\x17\x03\x03")
    }

    #[test]
    fn a_word_is_a_leak_only_between_two_meshed_pods() {
        assert!(judge(vec![sample(), tunnel()], 0).is_ok());
        let outside = packet("10.7.7.7:1", "10.0.0.2:9080", b"word");
        assert!(judge(vec![sample(), tunnel(), outside], 0).is_ok());
        let leak = packet("10.0.0.1:1", "10.0.0.2:9080", b"word");
        assert!(judge(vec![sample(), tunnel(), leak], 0).is_err());
    }

    #[test]
    fn a_capture_that_proves_nothing_is_no_proof() {
        assert!(judge(vec![tunnel()], 0).is_err(), "the sample was not seen");
        assert!(judge(vec![sample()], 0).is_err(), "nothing was tunnelled");
        assert!(judge(vec![sample(), tunnel()], 1).is_err(), "frames were lost");
    }

    #[test]
    fn a_pair_not_confirmed_by_the_destination_is_unauthenticated() {
        let party = |name: &str| flows::Party {
            workload: name.to_owned(),
            namespace: "n".to_owned(),
            principal: format!("spiffe://x/{name}"),
        };
        let pair = flows::Pair { source: party("a"), destination: party("b"), service: "b".to_owned() };
        let flow = flows::Flow { opened: 1.0, mutual_tls: true, confirmed: 1.0, ..flows::Flow::default() };
        let judge = |flow: flows::Flow| judge_authentication(&[(pair.clone(), flow)].into());
        assert!(judge(flow).is_ok());
        assert!(judge(flows::Flow { confirmed: 0.0, ..flow }).is_err());
        assert!(judge(flows::Flow { mutual_tls: false, ..flow }).is_err());
        assert!(judge_authentication(&Connections::new()).is_err());
    }
}
