//! The description of a cluster, and its start.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ambit_node::AgentConfig;
use futures_util::future::{join_all, try_join_all};
use parking_lot::{Mutex, RwLock};
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use crate::addresses::{Plan, PodRange};
use crate::agent::NodeAgent;
use crate::cluster::controller::Controller;
use crate::cluster::mesh::{self, MeshOptions};
use crate::cluster::objects::Objects;
use crate::cluster::program::Program;
use crate::cluster::shared::{Node, Shared};
use crate::cluster::{Cluster, restart, watch as manifests};
use crate::dns::Dns;
use crate::error::{Error, Result};
use crate::fabric::{Attached, Fabric};
use crate::kubelet::plan::{Programs, is_program};
use crate::token::TokenSigner;

/// More nodes than this have no addresses in the plan.
const MOST_NODES: usize = 64;
/// Default lifetime of service account tokens, as the API server gives projected ones.
const TOKEN_LIFETIME: Duration = Duration::from_secs(3600);

/// Describes a cluster.
#[derive(Debug, Clone)]
pub struct ClusterBuilder {
    nodes: usize,
    node_labels: BTreeMap<usize, BTreeMap<String, String>>,
    ipv6: bool,
    mesh: bool,
    trust_domain: String,
    token_lifetime: Duration,
    hold_for: Option<Duration>,
    programs: BTreeMap<String, PathBuf>,
    bin_dir: Option<PathBuf>,
    directory: Option<PathBuf>,
    restart_programs: bool,
    options: MeshOptions,
}

impl ClusterBuilder {
    pub(crate) fn new() -> Self {
        Self {
            nodes: 2,
            node_labels: BTreeMap::new(),
            ipv6: Path::new("/proc/net/if_inet6").exists(),
            mesh: true,
            trust_domain: "cluster.local".to_owned(),
            token_lifetime: TOKEN_LIFETIME,
            hold_for: None,
            programs: BTreeMap::new(),
            bin_dir: None,
            directory: None,
            restart_programs: false,
            options: MeshOptions::default(),
        }
    }

    /// How many nodes, 1 to 64; default 2. They are called `node-1`, `node-2`, ...
    #[must_use]
    pub fn nodes(mut self, count: usize) -> Self {
        self.nodes = count;
        self
    }

    /// A label of a node, such as its zone; nodes count from 0.
    #[must_use]
    pub fn node_label(mut self, node: usize, key: &str, value: &str) -> Self {
        self.node_labels.entry(node).or_default().insert(key.to_owned(), value.to_owned());
        self
    }

    /// Whether pods have IPv6 addresses too; default is whether this machine's kernel has IPv6.
    #[must_use]
    pub fn ipv6(mut self, ipv6: bool) -> Self {
        self.ipv6 = ipv6;
        self
    }

    /// Whether there is a mesh; without one, no control plane, agent or proxy is started. Default true.
    #[must_use]
    pub fn mesh(mut self, mesh: bool) -> Self {
        self.mesh = mesh;
        self
    }

    /// The directory of manifests, read now and watched.
    #[must_use]
    pub fn manifests(mut self, directory: impl Into<PathBuf>) -> Self {
        self.options.manifests = Some(directory.into());
        self
    }

    /// The program that stands for an image, by the image's name with or without registry and tag. An image that
    /// is not mapped stands for the program of its name beside the mesh's programs.
    #[must_use]
    pub fn program(mut self, image: impl Into<String>, program: impl Into<PathBuf>) -> Self {
        self.programs.insert(image.into(), program.into());
        self
    }

    /// Where `ambit-control`, `ztunnel` and the images' programs lie; default: beside the current executable, or
    /// the directory that the environment variable `AMBIT_BIN_DIR` names.
    #[must_use]
    pub fn bin_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.bin_dir = Some(directory.into());
        self
    }

    /// The `ztunnel` program, when it is not in the programs' directory.
    #[must_use]
    pub fn ztunnel_program(mut self, program: impl Into<PathBuf>) -> Self {
        self.options.ztunnel = program.into();
        self
    }

    /// The `ambit-control` program, when it is not in the programs' directory.
    #[must_use]
    pub fn control_program(mut self, program: impl Into<PathBuf>) -> Self {
        self.options.control = program.into();
        self
    }

    /// A key of every ztunnel's configuration file.
    #[must_use]
    pub fn ztunnel_config(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.options.ztunnel_config.insert(key.to_owned(), value.into());
        self
    }

    /// A key of one node's ztunnel's configuration file; nodes count from 0.
    #[must_use]
    pub fn ztunnel_config_of(mut self, node: usize, key: &str, value: impl Into<Value>) -> Self {
        self.options.ztunnel_config_of.entry(node).or_default().insert(key.to_owned(), value.into());
        self
    }

    /// An environment variable of every ztunnel.
    #[must_use]
    pub fn ztunnel_env(mut self, name: &str, value: &str) -> Self {
        self.options.ztunnel_env.insert(name.to_owned(), value.to_owned());
        self
    }

    /// An environment variable of every waypoint.
    #[must_use]
    pub fn waypoint_env(mut self, name: &str, value: &str) -> Self {
        self.options.waypoint_env.insert(name.to_owned(), value.to_owned());
        self
    }

    /// An argument of the control plane.
    #[must_use]
    pub fn control_arg(mut self, arg: impl Into<String>) -> Self {
        self.options.control_args.push(arg.into());
        self
    }

    /// An environment variable of the control plane.
    #[must_use]
    pub fn control_env(mut self, name: &str, value: &str) -> Self {
        self.options.control_env.insert(name.to_owned(), value.to_owned());
        self
    }

    /// The trust domain; default `cluster.local`.
    #[must_use]
    pub fn trust_domain(mut self, name: impl Into<String>) -> Self {
        self.trust_domain = name.into();
        self
    }

    /// Lifetime of the node proxies' tokens, renewed at three fifths of it; default one hour.
    #[must_use]
    pub fn token_lifetime(mut self, lifetime: Duration) -> Self {
        self.token_lifetime = lifetime;
        self
    }

    /// How long the node agents hold pods' listeners open without a proxy; default is the agent's own, 30 s.
    #[must_use]
    pub fn hold_for(mut self, hold_for: Duration) -> Self {
        self.hold_for = Some(hold_for);
        self
    }

    /// Sends the output of the mesh's programs to files there instead of keeping its end in memory.
    #[must_use]
    pub fn log_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.options.log_dir = Some(directory.into());
        self
    }

    /// Uses an existing directory as the work directory, which stays; default is a temporary one. Its path must
    /// be short: sockets lie in it.
    #[must_use]
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Restarts the control plane and the node proxies when they end by themselves. Default false: tests decide.
    #[must_use]
    pub fn restart_programs(mut self) -> Self {
        self.restart_programs = true;
        self
    }

    /// Brings the cluster up. Returns when the control plane and every ztunnel are ready and the controller has
    /// acted on the manifests once; their pods may still be starting.
    ///
    /// # Errors
    /// When a program is missing, a privilege is missing (root, or a user namespace of one's own is needed), or a
    /// program does not become ready.
    pub async fn start(mut self) -> Result<Cluster> {
        if self.nodes == 0 || self.nodes > MOST_NODES {
            return Err(Error::Exhausted(format!("the plan for {} nodes (1 to {MOST_NODES})", self.nodes)));
        }
        let programs = self.locate()?;
        let (own, directory) = self.work_directory()?;
        let shared = Arc::new(self.build(directory, programs).await?);
        let mut cluster = Cluster {
            shared: Arc::clone(&shared),
            mesh: None,
            tasks: JoinSet::new(),
            _directory: own,
            extra: Mutex::default(),
        };
        if let Some(directory) = self.options.manifests.clone() {
            shared.objects.lock().load(&directory)?;
            let watching = manifests::watch(Arc::clone(&shared), directory)?;
            cluster.tasks.spawn(watching);
        }
        for agent in shared.nodes.iter().filter_map(|node| node.agent.as_ref()) {
            agent.start(&shared, &[]).await?;
        }
        let waypoints = self.mesh.then(|| self.options.waypoint_env.clone());
        let controller = Controller::new(Arc::clone(&shared), waypoints);
        if self.mesh {
            cluster.mesh = Some((self.options.clone(), self.options.control(&shared)?));
        }
        cluster.tasks.spawn(controller.run());
        if self.mesh {
            self.start_mesh(&mut cluster).await?;
        }
        shared.settle().await?;
        Ok(cluster)
    }

    async fn start_mesh(&self, cluster: &mut Cluster) -> Result<()> {
        let shared = Arc::clone(&cluster.shared);
        let control: Program = cluster.control()?.clone();
        control.start().await?;
        let root = mesh::root_file(&shared);
        let ready = async {
            control.wait_ready().await?;
            // The proxies need the roots to trust the control plane at all.
            cluster
                .wait_until("the control plane's roots", crate::cluster::PATIENCE, async || root.is_file())
                .await
        };
        ready.await?;
        let start = (0..self.nodes).map(|index| self.options.start_ztunnel(&shared, index));
        let ztunnels = try_join_all(start).await?;
        cluster.tasks.spawn(renew_tokens(Arc::clone(&shared)));
        for ready in join_all(ztunnels.iter().map(|ztunnel| ztunnel.wait_ready())).await {
            ready?;
        }
        if self.restart_programs {
            cluster.tasks.spawn(restart::keep_running(shared, control));
        }
        Ok(())
    }

    /// Finds the programs before anything is built, so that a missing one is said at once.
    fn locate(&mut self) -> Result<Programs> {
        let beside = match (&self.bin_dir, std::env::var_os("AMBIT_BIN_DIR")) {
            (Some(directory), _) => directory.clone(),
            (None, Some(directory)) => PathBuf::from(directory),
            (None, None) => beside_executable()?,
        };
        if self.mesh {
            for (name, program) in
                [("ambit-control", &mut self.options.control), ("ztunnel", &mut self.options.ztunnel)]
            {
                if program.as_os_str().is_empty() {
                    *program = beside.join(name);
                }
                if !is_program(program) {
                    return Err(Error::program(name, format!("there is no program {}", program.display())));
                }
            }
        }
        Ok(Programs { images: std::mem::take(&mut self.programs), beside })
    }

    fn work_directory(&self) -> Result<(Option<tempfile::TempDir>, PathBuf)> {
        let attempt = "make the work directory";
        let (own, directory) = match &self.directory {
            Some(directory) => (None, directory.clone()),
            None => {
                let own = tempfile::Builder::new().prefix("ambit-").tempdir();
                let own = own.map_err(Error::system(attempt))?;
                let path = own.path().to_owned();
                (Some(own), path)
            }
        };
        for part in ["objects", "ca", "pods", "registry"] {
            std::fs::create_dir_all(directory.join(part)).map_err(Error::system(attempt))?;
        }
        if let Some(logs) = &self.options.log_dir {
            std::fs::create_dir_all(logs).map_err(Error::system(format!("make {}", logs.display())))?;
        }
        Ok((own, directory))
    }

    async fn build(&self, directory: PathBuf, programs: Programs) -> Result<Shared> {
        let plan = Plan { ipv6: self.ipv6 };
        let fabric = Fabric::new("ambit").await?;
        let control_node = fabric.attach("control", "control", plan.control(), None).await?;
        let attach = (0..self.nodes).map(|index| attach_node(&fabric, plan, index));
        let attached = try_join_all(attach).await?;
        self.connect(plan, &control_node, &attached).await?;
        let dns_addresses = plan.control().all().into_iter().map(|ip| SocketAddr::new(ip, 53));
        let dns = Dns::start(&control_node.sandbox, dns_addresses.collect()).await?;
        let nodes = attached.into_iter().enumerate().map(|(index, attached)| {
            let number = u8::try_from(index).unwrap_or(u8::MAX);
            let name = node_name(index);
            let mut labels = self.node_labels.get(&index).cloned().unwrap_or_default();
            labels.insert("kubernetes.io/hostname".to_owned(), name.clone());
            let agent = self.mesh.then(|| {
                let registry = directory.join("registry").join(&name);
                let socket = mesh::zds_socket_in(&directory, index);
                let mut config = AgentConfig::new(socket, registry);
                config.hold_for = self.hold_for.unwrap_or(config.hold_for);
                NodeAgent::new(name.clone(), config, self.options.serves_socks5(index))
            });
            let range = Mutex::new(PodRange::new(plan, number));
            Node { index: number, name, labels, attached, range, agent, ztunnels: Mutex::default() }
        });
        Ok(Shared {
            plan,
            trust_domain: self.trust_domain.clone(),
            nodes: nodes.collect(),
            directory,
            programs: Arc::new(programs),
            fabric,
            control_node,
            dns,
            records: Mutex::default(),
            signer: TokenSigner::new()?,
            token_lifetime: self.token_lifetime,
            tokens: Mutex::default(),
            objects: Mutex::new(Objects::default()),
            pods: RwLock::default(),
            problems: Mutex::default(),
            changed: Notify::new(),
            asked: Mutex::new(0),
            passed: watch::Sender::new(0),
        })
    }

    /// Adds routes to the pods of every node to every namespace on the fabric.
    async fn connect(&self, plan: Plan, control: &Attached, nodes: &[Attached]) -> Result<()> {
        for (at, attached) in nodes.iter().enumerate() {
            let index = u8::try_from(at).unwrap_or(u8::MAX);
            control.route_pods_of(plan, index, attached.addresses).await?;
            for (_, other) in nodes.iter().enumerate().filter(|(other, _)| *other != at) {
                other.route_pods_of(plan, index, attached.addresses).await?;
            }
        }
        Ok(())
    }
}

async fn attach_node(fabric: &Fabric, plan: Plan, index: usize) -> Result<Attached> {
    let number = u8::try_from(index).unwrap_or(u8::MAX);
    let name = node_name(index);
    let attached = fabric.attach(&name, &name, plan.node(number), None).await?;
    attached.become_node().await?;
    Ok(attached)
}

fn node_name(index: usize) -> String {
    format!("node-{}", index + 1)
}

/// The directory of the current executable; of a test's executable (`target/<profile>/deps`), the one above.
fn beside_executable() -> Result<PathBuf> {
    let executable = std::env::current_exe().map_err(Error::system("find the current executable"))?;
    let directory = executable.parent().unwrap_or(Path::new("/"));
    let deps = directory.file_name() == Some(OsStr::new("deps"));
    Ok(directory.parent().filter(|_| deps).unwrap_or(directory).to_owned())
}

/// Signs every token again at three fifths of its life.
async fn renew_tokens(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(shared.token_lifetime * 3 / 5).await;
        let tokens = shared.tokens.lock().clone();
        for (subject, file) in tokens {
            if let Err(error) = shared.signer.write(&subject, shared.token_lifetime, &file) {
                tracing::warn!(%error, "a token is not renewed");
            }
        }
    }
}
