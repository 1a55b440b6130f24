//! Nodes with a node agent and a ztunnel process each, and pods on them.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use ambit_api::workload::{
    NetworkAddress, Port, PortList, Service, TunnelProtocol, Workload, WorkloadStatus,
};
use ambit_node::{Agent, AgentConfig, PodSpec};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

use crate::control::{Control, SERVER_NAME, TRUST_DOMAIN};
use crate::network::{Fabric, PodNet};

/// Long enough for a loaded machine; nothing waits for it when all is well.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

pub(crate) struct Mesh {
    pub(crate) control: Control,
    pub(crate) fabric: Fabric,
    pub(crate) nodes: Vec<Node>,
    /// Proxies that were replaced and still drain.
    pub(crate) retired: Vec<Ztunnel>,
    /// The network that nodes and pods are in.
    pub(crate) network: String,
    /// Descriptors that the ztunnel of a node may open.
    open_files: Option<(usize, u64)>,
    /// Proxies know only what their pods dialled.
    on_demand: bool,
    dir: TempDir,
}

pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) agent: Agent,
    pub(crate) ztunnel: Ztunnel,
}

/// A ztunnel process.
pub(crate) struct Ztunnel {
    pub(crate) child: Child,
    pub(crate) config: Value,
    open_files: Option<u64>,
    dir: PathBuf,
    admin: SocketAddr,
    metrics: SocketAddr,
    ready: SocketAddr,
}

/// A pod in the mesh, and what the control plane says of it.
#[derive(Clone)]
pub(crate) struct Pod {
    pub(crate) net: PodNet,
    pub(crate) uid: String,
    pub(crate) workload: Workload,
}

impl Mesh {
    /// `nodes` nodes; `extra` are keys of every ztunnel's configuration.
    pub(crate) async fn start(nodes: usize, extra: Value) -> Self {
        Self::start_limited(nodes, extra, None).await
    }

    /// The same, and the proxy of node `limited` may open so many descriptors only.
    pub(crate) async fn start_with_files(
        nodes: usize,
        extra: Value,
        limited: usize,
        open_files: u64,
    ) -> Self {
        Self::start_limited(nodes, extra, Some((limited, open_files))).await
    }

    async fn start_limited(nodes: usize, extra: Value, open_files: Option<(usize, u64)>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let network = extra["network"].as_str().unwrap_or_default().to_owned();
        let on_demand = extra["xds"]["onDemand"] == true;
        let control = Control::start(dir.path()).await;
        let fabric = Fabric::new().await;
        let mut mesh = Self {
            control,
            fabric,
            nodes: Vec::new(),
            retired: Vec::new(),
            network,
            open_files,
            on_demand,
            dir,
        };
        for index in 0..nodes {
            let node = mesh.node(index, &extra).await;
            mesh.nodes.push(node);
        }
        mesh
    }

    async fn node(&self, index: usize, extra: &Value) -> Node {
        let name = format!("node-{index}");
        let dir = self.dir.path().join(&name);
        std::fs::create_dir(&dir).unwrap();
        let socket = dir.join("zds.sock");
        let (agent, driver) = Agent::start(AgentConfig::new(&socket, dir.join("registry"))).await.unwrap();
        tokio::spawn(driver);
        // Proxies are served from then on.
        agent.reconcile(vec![], &HashSet::new(), tokio::time::Instant::now()).await;
        let mut config = json!({
            "node": name,
            "controlPlane": self.control.gate.address.to_string(),
            "controlPlaneRoot": self.control.root_file,
            "controlPlaneServerName": SERVER_NAME,
            "tokenFile": self.control.token_file,
            "crlFile": self.control.crl_file,
            "zdsSocket": socket,
            "workers": 2,
            "drainTimeout": "5s",
            "logLevel": "info,ztunnel=debug,ambit_hbone=debug",
            "accessLog": { "format": "json" },
        });
        for (key, value) in extra.as_object().unwrap() {
            config[key] = value.clone();
        }
        let open_files = self.open_files.filter(|(node, _)| *node == index).map(|(_, limit)| limit);
        let ztunnel = Ztunnel::start(&dir, config, open_files).await;
        Node { name, agent, ztunnel }
    }

    /// A pod that is captured and served, with its workload known to the control plane.
    pub(crate) async fn pod(&self, node: usize, name: &str, account: &str) -> Pod {
        let pod = self.uncaptured_pod(node, name, account).await;
        self.capture(node, &pod).await
    }

    /// Brings a pod into the mesh.
    pub(crate) async fn capture(&self, node: usize, pod: &Pod) -> Pod {
        let agent = &self.nodes[node].agent;
        agent.enrol(self.spec(pod)).await.unwrap();
        assert!(agent.wait_enabled(&pod.uid, LIMIT).await, "pod not served: {:?}", agent.status(&pod.uid));
        let mut pod = pod.clone();
        pod.workload.tunnel_protocol = TunnelProtocol::Hbone.into();
        self.announce(&pod).await;
        pod
    }

    pub(crate) fn spec(&self, pod: &Pod) -> PodSpec {
        PodSpec {
            uid: pod.uid.clone(),
            name: pod.workload.name.clone(),
            namespace: pod.workload.namespace.clone(),
            service_account: pod.workload.service_account.clone(),
            ips: pod.net.ips().to_vec(),
            netns: Some(pod.net.netns.clone()),
            netns_path: None,
            sandbox: None,
            options: ambit_node::redirect::Options { socks5: true, ..Default::default() },
        }
    }

    /// A pod outside the mesh.
    pub(crate) async fn uncaptured_pod(&self, node: usize, name: &str, account: &str) -> Pod {
        let net = self.fabric.pod().await;
        let workload = Workload {
            uid: format!("Kubernetes//Pod/default/{name}"),
            name: name.into(),
            namespace: "default".into(),
            addresses: net.ips().iter().map(|ip| bytes(*ip)).collect(),
            network: self.network.clone(),
            trust_domain: TRUST_DOMAIN.into(),
            service_account: account.into(),
            node: format!("node-{node}"),
            canonical_name: name.into(),
            canonical_revision: "v1".into(),
            workload_name: name.into(),
            cluster_id: "Kubernetes".into(),
            status: WorkloadStatus::Healthy.into(),
            ..Workload::default()
        };
        let pod = Pod { net, uid: format!("uid-{name}"), workload };
        self.announce(&pod).await;
        pod
    }

    /// Publishes the pod to the control plane as it is now, and waits until every ztunnel knows; not where they know only
    /// what is demanded.
    pub(crate) async fn announce(&self, pod: &Pod) {
        self.control.workload(pod.workload.clone());
        if self.on_demand {
            return;
        }
        let uid = pod.workload.uid.clone();
        let protocol =
            if pod.workload.tunnel_protocol == i32::from(TunnelProtocol::Hbone) { "HBONE" } else { "TCP" };
        let services = pod.workload.services.len();
        let status =
            if pod.workload.status == i32::from(WorkloadStatus::Healthy) { "Healthy" } else { "Unhealthy" };
        self.wait("workload known", |dump| {
            dump["workloads"].as_array().is_some_and(|workloads| {
                workloads.iter().any(|w| {
                    w["uid"] == uid.as_str()
                        && w["protocol"] == protocol
                        && w["status"] == status
                        && w["services"].as_array().is_none_or(|s| s.len() == services)
                })
            })
        })
        .await;
    }

    /// A service `name.default.svc.cluster.local` at `vip`, port 80 to `target`, with these endpoints.
    pub(crate) async fn service(&self, name: &str, vip: IpAddr, target: u16, pods: &mut [&mut Pod]) {
        self.service_on(name, vip, (80, target), pods).await;
    }

    /// The same, with the service's own port too.
    pub(crate) async fn service_on(
        &self,
        name: &str,
        vip: IpAddr,
        (service_port, target): (u16, u16),
        pods: &mut [&mut Pod],
    ) {
        let hostname = format!("{name}.default.svc.cluster.local");
        let port = Port { service_port: service_port.into(), target_port: target.into(), app_protocol: 0 };
        self.control.service(Service {
            name: name.into(),
            namespace: "default".into(),
            hostname: hostname.clone(),
            addresses: vec![NetworkAddress {
                network: self.network.clone(),
                address: bytes(vip),
                length: None,
            }],
            ports: vec![port],
            ..Service::default()
        });
        for pod in pods {
            let key = format!("default/{hostname}");
            pod.workload.services.insert(key, PortList { ports: vec![port], ..PortList::default() });
            self.announce(pod).await;
        }
        self.wait("service known", |dump| dump["services"].to_string().contains(&hostname)).await;
    }

    /// Waits until `holds` of every ztunnel's configuration dump.
    pub(crate) async fn wait(&self, what: &str, holds: impl Fn(&Value) -> bool) {
        for node in &self.nodes {
            eventually(what, async || holds(&node.ztunnel.dump().await)).await;
        }
    }
}

impl Ztunnel {
    pub(crate) async fn start(dir: &std::path::Path, mut config: Value, open_files: Option<u64>) -> Self {
        let [admin, metrics, ready] = free_addresses();
        config["adminAddress"] = json!(admin.to_string());
        config["metricsAddress"] = json!(metrics.to_string());
        config["readinessAddress"] = json!(ready.to_string());
        let file = dir.join(format!("ztunnel-{}.yaml", admin.port()));
        std::fs::write(&file, serde_json::to_string(&config).unwrap()).unwrap();
        let log =
            |name: &str| std::fs::File::options().create(true).append(true).open(dir.join(name)).unwrap();
        let program = env!("CARGO_BIN_EXE_ztunnel");
        let mut command = match open_files {
            Some(_) => Command::new("prlimit"),
            None => Command::new(program),
        };
        if let Some(limit) = open_files {
            command.arg(format!("--nofile={limit}:{limit}")).arg(program);
        }
        let child = command
            .arg("--config")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log("access.log"))
            .stderr(log("ztunnel.log"))
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let ztunnel = Self { child, config, open_files, dir: dir.to_owned(), admin, metrics, ready };
        eventually("ztunnel ready", async || {
            ztunnel.get(ztunnel.ready, "/healthz/ready").await.starts_with("HTTP/1.1 200")
        })
        .await;
        ztunnel
    }

    /// Another process with the same configuration, as in an upgrade.
    pub(crate) async fn start_another(&self) -> Self {
        Self::start(&self.dir, self.config.clone(), self.open_files).await
    }

    /// Starts a new process in place of this one, which is killed if it still runs.
    pub(crate) async fn replace(&mut self, config: Value) {
        self.child.kill().await.ok();
        *self = Self::start(&self.dir.clone(), config, self.open_files).await;
    }

    pub(crate) async fn is_ready(&self) -> bool {
        self.get(self.ready, "/healthz/ready").await.starts_with("HTTP/1.1 200")
    }

    pub(crate) async fn dump(&self) -> Value {
        let answer = self.get(self.admin, "/config_dump").await;
        answer
            .split_once("\r\n\r\n")
            .and_then(|(_, body)| serde_json::from_str(body).ok())
            .unwrap_or_default()
    }

    pub(crate) async fn metrics(&self) -> String {
        self.get(self.metrics, "/metrics").await
    }

    pub(crate) async fn post(&self, path: &str) -> String {
        self.request(self.admin, "POST", path).await
    }

    /// Access-log lines so far.
    pub(crate) fn access(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.dir.join("access.log")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for an access-log line.
    pub(crate) async fn logged(&self, what: &str, matches: impl Fn(&Value) -> bool) -> Value {
        eventually(what, async || self.access().iter().any(&matches)).await;
        self.access().into_iter().find(|line| matches(line)).unwrap()
    }

    async fn get(&self, address: SocketAddr, path: &str) -> String {
        self.request(address, "GET", path).await
    }

    async fn request(&self, address: SocketAddr, method: &str, path: &str) -> String {
        let exchange = async {
            let mut stream = TcpStream::connect(address).await?;
            let head = format!("{method} {path} HTTP/1.1\r\nhost: ztunnel\r\nconnection: close\r\n\r\n");
            stream.write_all(head.as_bytes()).await?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await?;
            Ok::<_, std::io::Error>(String::from_utf8_lossy(&answer).into_owned())
        };
        exchange.await.unwrap_or_default()
    }

    pub(crate) fn terminate(&self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().unwrap().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    }

    pub(crate) async fn exited(&mut self) -> std::process::ExitStatus {
        tokio::time::timeout(LIMIT, self.child.wait()).await.expect("ztunnel exits").unwrap()
    }
}

impl Drop for Mesh {
    /// A failed test shows what the proxies said.
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in &self.nodes {
                for log in ["ztunnel.log", "access.log"] {
                    let text = std::fs::read_to_string(node.ztunnel.dir.join(log)).unwrap_or_default();
                    let tail: Vec<_> = text.lines().rev().take(60).collect();
                    eprintln!("--- {} {log}", node.name);
                    tail.into_iter().rev().for_each(|line| eprintln!("{line}"));
                }
            }
        }
    }
}

/// Waits for a condition, with a deadline.
pub(crate) async fn eventually(what: &str, holds: impl AsyncFn() -> bool) {
    let deadline = tokio::time::Instant::now() + LIMIT;
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn free_addresses() -> [SocketAddr; 3] {
    let held = [(); 3].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    held.each_ref().map(|listener| listener.local_addr().unwrap())
}

pub(crate) fn bytes(ip: IpAddr) -> bytes::Bytes {
    match ip {
        IpAddr::V4(ip) => bytes::Bytes::copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => bytes::Bytes::copy_from_slice(&ip.octets()),
    }
}

/// Serves echo on a listener; remembers where clients came from.
pub(crate) fn echo(listener: TcpListener) -> tokio::sync::mpsc::UnboundedReceiver<SocketAddr> {
    let (report, reports) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, peer)) = listener.accept().await {
            if report.send(peer).is_err() {
                return;
            }
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.ok();
                write.shutdown().await.ok();
            });
        }
    });
    reports
}

/// Sends `message`, ends the sending half, and reads everything that comes back.
pub(crate) async fn exchange(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<Vec<u8>> {
    let (mut read, mut write) = stream.split();
    let send = async {
        write.write_all(message).await?;
        write.shutdown().await
    };
    let mut received = Vec::new();
    let (sent, got) = tokio::join!(send, read.read_to_end(&mut received));
    sent?;
    got?;
    Ok(received)
}

/// Sends one message and reads as many bytes back.
pub(crate) async fn ping(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<Vec<u8>> {
    stream.write_all(message).await?;
    let mut answer = vec![0; message.len()];
    tokio::time::timeout(LIMIT, stream.read_exact(&mut answer)).await??;
    Ok(answer)
}
