//! What the L7 figures are taken on: one cluster with a waypoint between a client and its servers, and the same servers behind
//! other proxies outside the mesh.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use ambit_local::{Cluster, Command, Pod, PodOptions, Process};
use ambit_scale::machine;
use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::load::Drive;
use super::report::{Path, Row, Sample};
use super::rivals::{PORTS, Rival, Task};
use crate::load::Outcome;

const SERVER_PORT: u16 = 9200;
/// How long programs may take to be ready, and routes to be in force.
const READY: Duration = Duration::from_secs(60);
/// Time between two requests that look for a change: the precision of what is measured.
const LOOK: Duration = Duration::from_millis(1);
/// Time before a change, so that it is the first one after a quiet time: the control plane gathers what follows on another change.
const BETWEEN_CHANGES: Duration = Duration::from_millis(500);
/// Memory is read once it no longer falls, at most this often.
const RESTING: u32 = 6;
/// Routes that are applied at once.
const AT_ONCE: usize = 1000;
const GATEWAYS: &str = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\n\
    metadata: {name: waypoint, namespace: inside}\n\
    spec: {gatewayClassName: ambit-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}\n\
    ---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: gateway, namespace: inside}\n\
    spec: {gatewayClassName: ambit, listeners: [{name: http, port: 8080, protocol: HTTP}, \
    {name: http2, port: 8081, protocol: HTTP}, {name: grpc, port: 8082, protocol: HTTP}]}\n";
/// Says whose gateway a pod is.
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

/// A proxy outside the mesh.
struct Other {
    rival: Rival,
    pod: Pod,
    process: Option<Process>,
    directory: tempfile::TempDir,
}

/// The cluster with its servers and proxies running.
pub(crate) struct Bed {
    cluster: Cluster,
    inside: Pod,
    outside: Pod,
    /// Outside the mesh: a, b.
    servers: [SocketAddr; 2],
    waypoint: Pod,
    gateway: Pod,
    /// The virtual addresses of the services with servers in the mesh, and without.
    services: [IpAddr; 2],
    others: Vec<Other>,
    routes: usize,
    change: u32,
    _running: Vec<Process>,
    _logs: tempfile::TempDir,
}

impl Bed {
    /// Brings everything up, without routes.
    ///
    /// # Errors
    /// Without root, or when a program of ours is missing or does not become ready.
    pub(crate) async fn start(settings: &[(String, String)]) -> Result<Self> {
        // Every proxy writes its access log to a file.
        let logs = tempfile::tempdir().context("a directory for access logs")?;
        let log = logs.path().join("access.log").display().to_string();
        let mut builder = Cluster::builder().nodes(2).waypoint_env("AMBIT_WAYPOINT_WORKERS", "2");
        builder = builder.waypoint_env("AMBIT_WAYPOINT_ACCESS_LOG_PATH", &log);
        for (name, value) in settings {
            builder = builder.waypoint_env(name, value);
        }
        let cluster = builder.start().await?;
        cluster.namespace("outside", false).await?;
        cluster.namespace("inside", true).await?;
        let pod = async |namespace: &str, name: &str, node, app: &str, mode: &str| {
            let options = PodOptions::new(namespace, name).service_account(name).node(node).label("app", app);
            cluster
                .pod(if mode.is_empty() { options } else { options.label("istio.io/dataplane-mode", mode) })
                .await
        };
        let outside = pod("outside", "client", 0, "client", "").await?;
        let inside = pod("inside", "client", 0, "client", "").await?;
        let mut running = Vec::new();
        let mut addresses = Vec::new();
        for (namespace, name, mode) in [
            ("outside", "a", ""),
            ("outside", "b", ""),
            ("inside", "a", ""),
            ("inside", "b", ""),
            ("inside", "plain-a", "none"),
            ("inside", "plain-b", "none"),
        ] {
            let server = pod(namespace, name, 1, name, mode).await?;
            let address = SocketAddr::new(server.ip().into(), SERVER_PORT);
            running.push(serve(&server, address).await?);
            addresses.push(address);
        }
        cluster.apply(GATEWAYS).await?;
        cluster.apply(&services()).await?;
        let waypoint = ready(&cluster, "waypoint").await?;
        let gateway = ready(&cluster, "gateway").await?;
        let vip = |name: &str| {
            let mut vips = cluster.service_ips("inside", name).into_iter();
            vips.find(IpAddr::is_ipv4).with_context(|| format!("service {name} has no address"))
        };
        let services = [vip("web")?, vip("plain")?];
        let mut others = Vec::new();
        for rival in Rival::ALL.into_iter().filter(|rival| rival.program().is_some()) {
            let name = rival.title().to_ascii_lowercase();
            let directory = tempfile::tempdir().context("a directory for a proxy")?;
            others.push(Other {
                rival,
                pod: pod("outside", &name, 1, &name, "").await?,
                process: None,
                directory,
            });
        }
        let servers = [addresses[0], addresses[1]];
        let (routes, change) = (0, 0);
        Ok(Self {
            cluster,
            inside,
            outside,
            servers,
            waypoint,
            gateway,
            services,
            others,
            routes,
            change,
            _running: running,
            _logs: logs,
        })
    }

    /// Takes everything down.
    pub(crate) async fn stop(self) {
        self.cluster.shutdown().await;
    }

    /// The paths that this machine can measure. The service whose servers are in the mesh has one route only, so that the
    /// waypoint holds no more routes than the others.
    pub(crate) fn paths(&self) -> Vec<Path> {
        let others = self.others.iter().map(|other| Path::Rival(other.rival));
        let own = [Path::Direct, Path::Gateway, Path::Waypoint, Path::Mesh].into_iter();
        own.filter(|path| self.routes <= 1 || *path != Path::Mesh).chain(others).collect()
    }

    /// Gives every proxy this many routes and waits until the last one is in force.
    ///
    /// # Errors
    /// When one does not follow.
    pub(crate) async fn set_routes(&mut self, routes: usize) -> Result<()> {
        for first in (self.routes..routes).step_by(AT_ONCE) {
            let text: String = (first..routes.min(first + AT_ONCE)).map(route).collect();
            self.cluster.apply(&text).await?;
        }
        if self.routes == 0 {
            self.cluster.apply(&other_protocols()).await?;
        }
        self.routes = routes;
        self.change += 1;
        self.cluster.apply(&change(self.change)).await?;
        for index in 0..self.others.len() {
            self.restart(index).await?;
        }
        let last = format!("/r{}/x", routes - 1);
        for path in self.paths() {
            let (client, target) = (self.client(path), self.target(path, 0)?);
            self.wait_for(client, target, &last, |answer| answer.starts_with("HTTP/1.1 200"))
                .await
                .with_context(|| format!("{routes} routes over {}", path.title()))?;
        }
        Ok(())
    }

    async fn restart(&mut self, index: usize) -> Result<()> {
        let command = {
            let other = &self.others[index];
            other.rival.command(&self.task(other))?
        };
        let other = &mut self.others[index];
        if let Some(process) = other.process.take() {
            process.terminate(Duration::from_secs(5)).await?;
        }
        other.process = match command {
            Some(command) => Some(other.pod.spawn(command).await?),
            None => None,
        };
        Ok(())
    }

    fn task<'a>(&self, other: &'a Other) -> Task<'a> {
        Task {
            listen: other.pod.ip().into(),
            servers: self.servers,
            routes: self.routes,
            change: self.change,
            directory: other.directory.path(),
        }
    }

    fn client(&self, path: Path) -> &Pod {
        match path {
            Path::Waypoint | Path::Mesh => &self.inside,
            Path::Direct | Path::Gateway | Path::Rival(_) => &self.outside,
        }
    }

    /// Where a client sends requests of the protocol with this number.
    fn target(&self, path: Path, protocol: usize) -> Result<SocketAddr> {
        let port = [80, 81, 82].get(protocol).copied().context("no such protocol")?;
        let outside = PORTS.get(protocol).copied().context("no such protocol")?;
        Ok(match path {
            Path::Direct => self.servers[0],
            Path::Mesh => SocketAddr::new(self.services[0], port),
            Path::Waypoint => SocketAddr::new(self.services[1], port),
            Path::Gateway => SocketAddr::new(self.gateway.ip().into(), outside),
            Path::Rival(rival) => SocketAddr::new(self.other(rival)?.pod.ip().into(), outside),
        })
    }

    fn other(&self, rival: Rival) -> Result<&Other> {
        let other = self.others.iter().find(|other| other.rival == rival);
        other.with_context(|| format!("{} is not here", rival.title()))
    }

    /// The processes of the proxy itself, and those of the node proxies beside it.
    fn processes(&self, path: Path) -> Result<(Vec<u32>, Vec<u32>)> {
        let own = |pod: &Pod| pod.process(0).context("the waypoint is gone").map(|process| process.pid());
        let ztunnels = || -> Result<Vec<u32>> {
            (0..self.cluster.nodes())
                .map(|node| self.cluster.ztunnel(node)?.pid().context("a ztunnel is gone"))
                .collect()
        };
        Ok(match path {
            Path::Direct => (Vec::new(), Vec::new()),
            Path::Gateway => (vec![own(&self.gateway)?], Vec::new()),
            Path::Mesh | Path::Waypoint => (vec![own(&self.waypoint)?], ztunnels()?),
            Path::Rival(rival) => {
                let process = self.other(rival)?.process.as_ref();
                (with_children(process.context("a proxy is gone")?.pid())?, Vec::new())
            }
        })
    }

    /// Runs one row over one path once.
    ///
    /// # Errors
    /// When a request fails.
    pub(crate) async fn sample(&self, row: &Row, path: Path, seconds: f64) -> Result<Sample> {
        let drive = Drive {
            protocol: row.protocol,
            server: self.target(path, row.protocol as usize)?,
            path: format!("/r{}/x", self.routes - 1),
            connections: row.connections,
            streams: row.streams,
            seconds,
            every_ms: row.every_ms,
        };
        // Before the measured ones: certificates, pools and caches are as in service.
        self.drive(self.client(path), Drive { seconds: 0.3, ..drive.clone() }).await?;
        let (own, nodes) = self.processes(path)?;
        let before = (cpu_seconds(&own)?, cpu_seconds(&nodes)?);
        let outcome = self.drive(self.client(path), drive).await?;
        let cpu_seconds = cpu_seconds(&own)? - before.0;
        let node_cpu_seconds = self::cpu_seconds(&nodes)? - before.1;
        Ok(Sample { outcome, cpu_seconds, node_cpu_seconds })
    }

    async fn drive(&self, client: &Pod, drive: Drive) -> Result<Outcome> {
        let program = std::env::current_exe().context("finding this program")?;
        let command = Command::new(program).arg("drive-l7").args(drive.to_arguments());
        let process = client.spawn(command).await?;
        let status = process.wait_within(Duration::from_secs_f64(drive.seconds + 30.0)).await?;
        let last = process.last_line().unwrap_or_default();
        if !status.success() {
            bail!("the client ended with {status}: {}", process.logs().join("\n"));
        }
        serde_json::from_str(&last).with_context(|| format!("the client's outcome {last:?}"))
    }

    /// Resident memory of a proxy once it no longer falls, in bytes.
    ///
    /// # Errors
    /// When it is gone.
    pub(crate) async fn resident(&self, path: Path) -> Result<u64> {
        let read = || -> Result<u64> { self.processes(path)?.0.into_iter().map(machine::resident).sum() };
        let mut last = read()?;
        for _ in 0..RESTING {
            tokio::time::sleep(Duration::from_secs(2)).await;
            let now = read()?;
            if now >= last - last / 100 {
                return Ok(now);
            }
            last = now;
        }
        Ok(last)
    }

    /// How long it takes from a route's change to the first answer by it, in milliseconds. A change of ours begins when its object is in the
    /// control plane's directory: what the local cluster does before, with every object that it has, is not of the mesh.
    ///
    /// # Errors
    /// When the change does not come into force.
    pub(crate) async fn change(&mut self, path: Path) -> Result<f64> {
        tokio::time::sleep(BETWEEN_CHANGES).await;
        self.change += 1;
        let wanted = format!("x-change: {}", self.change);
        let begun = SystemTime::now();
        let (client, target) = (self.client(path), self.target(path, 0)?);
        let seen = async {
            self.wait_for(client, target, "/change/", |answer| answer.to_ascii_lowercase().contains(&wanted))
                .await?;
            Ok(SystemTime::now())
        };
        let changing = async {
            match path {
                Path::Rival(rival) => {
                    let other = self.other(rival)?;
                    rival.write(&self.task(other))?;
                    if let (Rival::Nginx, Some(process)) = (rival, &other.process) {
                        process.signal(Signal::SIGHUP).await;
                    }
                }
                _ => self.cluster.apply(&change(self.change)).await?,
            }
            Ok::<_, anyhow::Error>(())
        };
        let (seen, ()) = tokio::try_join!(seen, changing)?;
        let begun = match path {
            Path::Rival(_) => begun,
            _ => {
                let file = self.cluster.directory().join("objects/HTTPRoute_inside_plain-change.json");
                let written = std::fs::metadata(&file).and_then(|file| file.modified());
                written.with_context(|| format!("the time of {}", file.display()))?
            }
        };
        Ok(seen.duration_since(begun).unwrap_or_default().as_secs_f64() * 1e3)
    }

    async fn wait_for(
        &self,
        client: &Pod,
        target: SocketAddr,
        path: &str,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let begun = Instant::now();
        let mut last = String::new();
        while begun.elapsed() < READY {
            match ask(client, target, path).await {
                Ok(answer) if wanted(&answer) => return Ok(()),
                Ok(answer) => last = answer,
                Err(error) => last = error.to_string(),
            }
            tokio::time::sleep(LOOK).await;
        }
        bail!("{path} of {target} still says {last:?}; {:?}", self.waypoint.logs().last())
    }
}

/// The pod of a Gateway, once it is ready.
async fn ready(cluster: &Cluster, name: &str) -> Result<Pod> {
    let find = || {
        cluster
            .waypoints()
            .into_iter()
            .find(|pod| pod.labels().get(GATEWAY_NAME).is_some_and(|it| it == name))
    };
    let is_ready = async || find().is_some_and(|pod| pod.is_ready());
    cluster.wait_until(&format!("the {name} is ready"), READY, is_ready).await?;
    find().with_context(|| format!("no {name}"))
}

/// One request on a connection of its own.
async fn ask(client: &Pod, target: SocketAddr, path: &str) -> Result<String> {
    let asking = async {
        let mut stream = client.connect(target).await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = vec![0; 4096];
        let length = stream.read(&mut answer).await?;
        Ok::<_, std::io::Error>(
            String::from_utf8_lossy(answer.get(..length).unwrap_or_default()).into_owned(),
        )
    };
    Ok(tokio::time::timeout(Duration::from_secs(2), asking).await??)
}

async fn serve(pod: &Pod, address: SocketAddr) -> Result<Process> {
    let program = std::env::current_exe().context("finding this program")?;
    let command = Command::new(program).args(["serve-l7", "--listen"]).arg(address.to_string());
    let process = pod.spawn(command).await?;
    process.wait_for_line(READY, |line| line == "ready").await?;
    Ok(process)
}

/// Services `web` and `plain` for the waypoint, and those that their routes lead to.
fn services() -> String {
    let mut text = String::new();
    for (name, app, bound) in [
        ("web", "a", true),
        ("plain", "plain-a", true),
        ("a", "a", false),
        ("b", "b", false),
        ("plain-a", "plain-a", false),
        ("plain-b", "plain-b", false),
    ] {
        let labels = if bound { ", labels: {istio.io/use-waypoint: waypoint}" } else { "" };
        let ports: Vec<String> = [("http", 80), ("http2", 81), ("grpc", 82)]
            .map(|(name, port)| format!("{{name: {name}, port: {port}, targetPort: {SERVER_PORT}}}"))
            .into();
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: inside{labels}}}\n\
             spec: {{selector: {{app: {app}}}, ports: [{}]}}\n",
            ports.join(", ")
        );
    }
    text
}

/// The services that routes are for, and what the names of their backends begin with. What is for the first is for the gateway too.
const SERVICES: [(&str, &str); 2] = [("plain", "plain-"), ("web", "")];

/// A route of one port of services, and of the listener of the gateway that stands for it.
fn route_to(services: &[(&str, &str)], name: &str, port: u16, prefix: &str, filters: &str) -> String {
    let mut text = String::new();
    for (service, before) in services {
        let listener = match (*service, port) {
            ("plain", 80) => ", {name: gateway, sectionName: http}",
            ("plain", 81) => ", {name: gateway, sectionName: http2}",
            ("plain", 82) => ", {name: gateway, sectionName: grpc}",
            _ => "",
        };
        let _ = write!(
            text,
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\n\
             metadata: {{name: {service}-{name}, namespace: inside}}\nspec:\n  \
             parentRefs: [{{group: '', kind: Service, name: {service}, port: {port}}}{listener}]\n  rules:\n  - \
             matches: [{{path: {{type: PathPrefix, value: {prefix}}}}}]\n    \
             retry: {{attempts: 2, backoff: 25ms, codes: [503]}}\n{filters}    backendRefs: \
             [{{name: {before}a, port: {port}, weight: 90}}, {{name: {before}b, port: {port}, weight: 10}}]\n"
        );
    }
    text
}

fn route(number: usize) -> String {
    let services = if number == 0 { &SERVICES[..] } else { &SERVICES[..1] };
    route_to(services, &format!("r{number}"), 80, &format!("/r{number}"), "")
}

fn other_protocols() -> String {
    route_to(&SERVICES, "http2", 81, "/", "") + &route_to(&SERVICES, "grpc", 82, "/", "")
}

fn change(number: u32) -> String {
    let filters = format!(
        "    filters: [{{type: ResponseHeaderModifier, responseHeaderModifier: {{set: [{{name: x-change, value: '{number}'}}]}}}}]\n"
    );
    route_to(&SERVICES[..1], "change", 80, "/change", &filters)
}

/// A process and its children: workers of one program.
fn with_children(pid: u32) -> Result<Vec<u32>> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let children = children.split_whitespace().filter_map(|child| child.parse().ok());
    Ok(std::iter::once(pid).chain(children).collect())
}

fn cpu_seconds(pids: &[u32]) -> Result<f64> {
    pids.iter().map(|&pid| machine::cpu_seconds(pid)).sum()
}
