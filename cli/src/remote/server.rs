//! The mesh's side: accepts connections and serves the request of each.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use ambit_local::{Cluster, Command, Pod, Process, Ztunnel};
use ambit_net::seqpacket::{Received, SeqPacket, SeqPacketListener};
use anyhow::{Context, anyhow, bail};
use tokio::sync::Semaphore;

use super::lines::Lines;
use super::protocol::{AskedProxy, LONGEST_PACKET, Reply, Request, Target, pieces};

/// Connections at once; others wait.
const CONNECTIONS: usize = 64;
/// Interval between two reads of the output of a followed container.
const LOOK: Duration = Duration::from_millis(100);
/// Pause after an accept that failed, such as for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Time between SIGTERM and SIGKILL for a command whose caller has disconnected.
const GRACE: Duration = Duration::from_secs(2);

/// Serves commands until the cluster is dropped.
pub(crate) async fn serve(listener: SeqPacketListener, cluster: Weak<Cluster>) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    while let Ok(permit) = Arc::clone(&permits).acquire_owned().await {
        let socket = match listener.accept().await {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%error, "a command could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let cluster = Weak::clone(&cluster);
        tokio::spawn(async move {
            if let Err(error) = answer(&socket, &cluster).await {
                let reply = Reply::Failed(format!("{error:#}"));
                if let Err(error) = send(&socket, &reply).await {
                    tracing::debug!(%error, "the command has disconnected");
                }
            }
            drop(permit);
        });
    }
}

async fn answer(socket: &SeqPacket, cluster: &Weak<Cluster>) -> anyhow::Result<()> {
    let mut buffer = vec![0; LONGEST_PACKET];
    let Received { len, descriptors } = socket.recv(&mut buffer).await?;
    let request = serde_json::from_slice(buffer.get(..len).unwrap_or_default())?;
    match request {
        Request::Exec { target, command } => {
            let process = start(&find(cluster, &target)?, &target, &command, descriptors).await?;
            attend(socket, &process).await
        }
        Request::Logs { target, follow } => {
            let pod = find(cluster, &target)?;
            tokio::select! {
                // The caller sends nothing more, so this is the end of its connection.
                _ = socket.recv(&mut buffer) => Ok(()),
                printed = print_logs(socket, &pod, &target, follow) => printed,
            }
        }
        Request::Dump { node } => dump(socket, cluster, &node).await,
        Request::Admin { proxy, path } => admin(socket, cluster, &proxy, &path).await,
        Request::Proxies => {
            send_text(socket, &serde_json::to_string(&proxies(cluster)?)?).await?;
            send(socket, &Reply::Done { code: 0 }).await
        }
        Request::Stream { proxy, path } => tokio::select! {
            // The caller sends nothing more, so this is the end of its connection.
            _ = socket.recv(&mut buffer) => Ok(()),
            streamed = stream(socket, cluster, &proxy, &path) => streamed,
        },
        Request::Manifests => manifests(socket, cluster).await,
        Request::Signal { .. } => bail!("there is no command to signal"),
    }
}

fn find(cluster: &Weak<Cluster>, target: &Target) -> anyhow::Result<Pod> {
    let cluster = cluster.upgrade().context("the mesh is ending")?;
    let Target { namespace, pod: name, .. } = target;
    let of_deployment = |pod: &Pod| pod.namespace() == namespace && pod.deployment() == Some(name);
    let named = cluster.find_pod(namespace, name);
    let found = named.or_else(|| cluster.pods().into_iter().find(of_deployment));
    found.with_context(|| format!("there is no pod or Deployment {namespace}/{name}"))
}

/// The position of the requested container.
fn position(pod: &Pod, target: &Target) -> anyhow::Result<usize> {
    let Some(wanted) = &target.container else { return Ok(0) };
    let names = pod.container_names();
    names
        .iter()
        .position(|name| name == wanted)
        .with_context(|| format!("pod {pod} has no container {wanted}; it has {}", names.join(", ")))
}

async fn start(
    pod: &Pod,
    target: &Target,
    words: &[String],
    descriptors: Vec<OwnedFd>,
) -> anyhow::Result<Process> {
    let stdio: [OwnedFd; 3] = descriptors
        .try_into()
        .map_err(|_| anyhow!("the request must carry standard input, output and error"))?;
    let (program, args) = words.split_first().context("no command was given")?;
    let mut command = Command::new(program).args(args).stdio(stdio);
    if let Some(process) = pod.process(position(pod, target)?) {
        for (name, value) in process.environment() {
            command = command.env(name, value);
        }
    }
    Ok(pod.spawn(command).await?)
}

/// Waits for the end of a command, forwards signals to it, and ends it when its caller disconnects.
async fn attend(socket: &SeqPacket, process: &Process) -> anyhow::Result<()> {
    let mut buffer = vec![0; LONGEST_PACKET];
    loop {
        tokio::select! {
            status = process.wait() => {
                let code = ambit_local::exit_code(status?);
                return send(socket, &Reply::Done { code: u8::try_from(code).unwrap_or(u8::MAX) }).await;
            }
            received = socket.recv(&mut buffer) => {
                let length = received.map_or(0, |received| received.len);
                match serde_json::from_slice(buffer.get(..length).unwrap_or_default()) {
                    Ok(Request::Signal { number }) => process.signal_number(number).await,
                    _ => {
                        process.terminate(GRACE).await?;
                        return Ok(());
                    }
                }
            }
        }
    }
}

async fn print_logs(socket: &SeqPacket, pod: &Pod, target: &Target, follow: bool) -> anyhow::Result<()> {
    let position = position(pod, target)?;
    let mut printed = (0, 0);
    loop {
        let process = pod.process(position);
        if let Some(process) = &process {
            // A restarted container's output is counted from its beginning.
            let from = if printed.0 == process.pid() { printed.1 } else { 0 };
            let (lines, next) = process.logs_from(from);
            printed = (process.pid(), next);
            for line in lines {
                send_text(socket, &format!("{line}\n")).await?;
            }
        }
        if !follow || pod.view().gone {
            return send(socket, &Reply::Done { code: 0 }).await;
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn dump(socket: &SeqPacket, cluster: &Weak<Cluster>, node: &str) -> anyhow::Result<()> {
    let cluster = cluster.upgrade().context("the mesh is ending")?;
    let dump = ztunnel(&cluster, node)?.config_dump().await?;
    send_text(socket, &format!("{}\n", serde_json::to_string_pretty(&dump)?)).await?;
    send(socket, &Reply::Done { code: 0 }).await
}

/// Passes on what a proxy's admin server answers to a `GET`.
async fn admin(
    socket: &SeqPacket,
    cluster: &Weak<Cluster>,
    proxy: &AskedProxy,
    path: &str,
) -> anyhow::Result<()> {
    let cluster = cluster.upgrade().context("the mesh is ending")?;
    let mut answer = None;
    match proxy {
        AskedProxy::Nodes => {
            for index in 0..cluster.nodes() {
                let answered = cluster.ztunnel(index)?.admin("GET", path).await?;
                let is_success = answered.0 == 200;
                answer = Some(answered);
                if is_success {
                    break;
                }
            }
        }
        AskedProxy::Node { name } => answer = Some(ztunnel(&cluster, name)?.admin("GET", path).await?),
        AskedProxy::Waypoint { namespace, pod } => {
            answer = Some(cluster.waypoint_admin(&waypoint(&cluster, namespace, pod)?, path).await?);
        }
    }
    match answer.context("the mesh has no node")? {
        (200, text) => send_text(socket, &text).await?,
        (status, text) => bail!("{path} answered {status}: {}", text.trim()),
    }
    send(socket, &Reply::Done { code: 0 }).await
}

fn proxies(cluster: &Weak<Cluster>) -> anyhow::Result<Vec<AskedProxy>> {
    let cluster = cluster.upgrade().context("the mesh is ending")?;
    let nodes = cluster.node_names().into_iter().map(|name| AskedProxy::Node { name });
    let waypoints = cluster.waypoints();
    let waypoints = waypoints.iter().map(|pod| AskedProxy::Waypoint {
        namespace: pod.namespace().to_owned(),
        pod: pod.name().to_owned(),
    });
    Ok(nodes.chain(waypoints).collect())
}

/// Passes on the pieces of a proxy's answer as they come.
async fn stream(
    socket: &SeqPacket,
    cluster: &Weak<Cluster>,
    proxy: &AskedProxy,
    path: &str,
) -> anyhow::Result<()> {
    let (status, mut answer) = {
        let cluster = cluster.upgrade().context("the mesh is ending")?;
        match proxy {
            AskedProxy::Nodes => bail!("one proxy must be named"),
            AskedProxy::Node { name } => ztunnel(&cluster, name)?.admin_stream(path).await?,
            AskedProxy::Waypoint { namespace, pod } => {
                cluster.waypoint_admin_stream(&waypoint(&cluster, namespace, pod)?, path).await?
            }
        }
    };
    let mut lines = Lines::default();
    let mut error = String::new();
    while let Some(bytes) = answer.next().await? {
        if status != 200 {
            error.push_str(&String::from_utf8_lossy(&bytes));
            continue;
        }
        for line in lines.feed(&bytes) {
            send_text(socket, &format!("{line}\n")).await?;
        }
    }
    if status != 200 {
        bail!("{path} answered {status}: {}", error.trim());
    }
    send(socket, &Reply::Done { code: 0 }).await
}

/// Sends every object that the control plane reads: those of the manifests, then those that the cluster made or completed.
async fn manifests(socket: &SeqPacket, cluster: &Weak<Cluster>) -> anyhow::Result<()> {
    let (written, directory) = {
        let cluster = cluster.upgrade().context("the mesh is ending")?;
        (cluster.manifests(), cluster.directory().join("objects"))
    };
    let read = move || {
        let mut all: String = written.iter().map(|object| format!("---\n{object}\n")).collect();
        let mut files = std::fs::read_dir(&directory)?.collect::<Result<Vec<_>, _>>()?;
        files.sort_by_key(std::fs::DirEntry::file_name);
        let is_manifest = |path: &std::path::Path| {
            matches!(path.extension().and_then(|it| it.to_str()), Some("yaml" | "yml" | "json"))
        };
        for path in files.iter().map(std::fs::DirEntry::path).filter(|path| is_manifest(path)) {
            all.push_str("---\n");
            all.push_str(&std::fs::read_to_string(path)?);
            all.push('\n');
        }
        std::io::Result::Ok(all)
    };
    let all = tokio::task::spawn_blocking(read).await?.context("read the objects of the mesh")?;
    send_text(socket, &all).await?;
    send(socket, &Reply::Done { code: 0 }).await
}

fn ztunnel(cluster: &Cluster, node: &str) -> anyhow::Result<Ztunnel> {
    let names = cluster.node_names();
    let index = names.iter().position(|name| name == node);
    let index = index.with_context(|| format!("there is no node {node}; there are {}", names.join(", ")))?;
    Ok(cluster.ztunnel(index)?)
}

fn waypoint(cluster: &Cluster, namespace: &str, pod: &str) -> anyhow::Result<Pod> {
    cluster.find_pod(namespace, pod).with_context(|| format!("there is no pod {namespace}/{pod}"))
}

async fn send_text(socket: &SeqPacket, text: &str) -> anyhow::Result<()> {
    for piece in pieces(text) {
        send(socket, &Reply::Text(piece.to_owned())).await?;
    }
    Ok(())
}

async fn send(socket: &SeqPacket, reply: &Reply) -> anyhow::Result<()> {
    Ok(socket.send(&serde_json::to_vec(reply)?, &[]).await?)
}
