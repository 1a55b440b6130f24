//! The mesh that a command looks at: that of a cluster, or one that `ambit up` runs on this machine.
//!
//! Both have proxies with the same admin servers, and objects; here they are found and asked in the same words.

use anyhow::{Context, bail, ensure};
use clap::Args;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::mpsc;

use crate::analyze::{self, Item};
use crate::cluster::{
    Access, Cluster, Component, PROXY_ADMIN, PodName, get, is_ready, lines, node_of, pods_of,
};
use crate::proxies;
use crate::remote::{self, AskedProxy};

/// Proxies that a command asks at once, at most: each is a port-forward of its own.
const MOST_PROXIES: usize = 100;

/// Which mesh.
#[derive(Debug, Args)]
pub(crate) struct Selection {
    /// The mesh that `ambit up` runs on this machine, not a cluster.
    #[arg(long)]
    local: bool,
    /// Process id of the `ambit up` when several run.
    #[arg(long, value_name = "PID", requires = "local")]
    mesh: Option<u32>,
    #[command(flatten)]
    access: Access,
}

/// A mesh.
pub(crate) enum Mesh {
    /// In a cluster.
    Cluster(Box<Cluster>),
    /// On this machine, run by `ambit up` with this process id, or by the only one.
    Local(Option<u32>),
}

/// What a proxy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The proxy of a node.
    Node,
    /// A waypoint, or a gateway for clients outside the mesh.
    Waypoint,
}

/// A proxy of a mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Proxy {
    /// What it is.
    pub(crate) role: Role,
    /// For people.
    pub(crate) name: String,
    place: Place,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Pod(PodName),
    Local(AskedProxy),
}

impl Selection {
    /// Finds the mesh.
    ///
    /// # Errors
    /// When no kubeconfig can be used.
    pub(crate) async fn connect(&self) -> anyhow::Result<Mesh> {
        match self.local {
            true => Ok(Mesh::Local(self.mesh)),
            false => Ok(Mesh::Cluster(Box::new(self.access.connect().await?))),
        }
    }
}

impl Mesh {
    /// The proxies that `target` means (a node, a pod of a proxy, or a pod that a proxy serves), or all: those of nodes, then
    /// waypoints and gateways.
    ///
    /// # Errors
    /// When the mesh can't be asked, there is no such proxy, or there are more than can be asked at once.
    pub(crate) async fn proxies(&self, target: Option<&str>) -> anyhow::Result<Vec<Proxy>> {
        let proxies = match self {
            Mesh::Cluster(cluster) => of_cluster(cluster, target).await?,
            Mesh::Local(mesh) => {
                let all = remote::proxies(*mesh).await?;
                all.into_iter()
                    .map(of_local)
                    .filter(|it| target.is_none_or(|name| it.is_named(name)))
                    .collect()
            }
        };
        let missing = || target.map(|target| format!(" named {target}")).unwrap_or_default();
        ensure!(!proxies.is_empty(), "there is no proxy{}", missing());
        let count = proxies.len();
        ensure!(
            count <= MOST_PROXIES,
            "there are {count} proxies, more than {MOST_PROXIES}: name a node or a pod"
        );
        Ok(proxies)
    }

    /// What a proxy's admin server answers to a `GET`.
    ///
    /// # Errors
    /// When it can't be reached, or answers with an error.
    pub(crate) async fn get(&self, proxy: &Proxy, path: &str) -> anyhow::Result<String> {
        match (self, &proxy.place) {
            (Mesh::Cluster(cluster), Place::Pod(pod)) => {
                Ok(String::from_utf8(get(&cluster.client, pod, PROXY_ADMIN, path).await?)?)
            }
            (Mesh::Local(mesh), Place::Local(asked)) => remote::admin(*mesh, asked.clone(), path).await,
            (_, place) => bail!("{place:?} is of another mesh"),
        }
    }

    /// Passes on the lines of an answer that goes on, for as long as somebody takes them.
    ///
    /// # Errors
    /// When the proxy can't be reached, or answers with an error.
    pub(crate) async fn lines(
        &self,
        proxy: &Proxy,
        path: &str,
        taken: &mpsc::Sender<String>,
    ) -> anyhow::Result<()> {
        match (self, &proxy.place) {
            (Mesh::Cluster(cluster), Place::Pod(pod)) => {
                lines(&cluster.client, pod, PROXY_ADMIN, path, taken).await
            }
            (Mesh::Local(mesh), Place::Local(asked)) => {
                remote::admin_lines(*mesh, asked.clone(), path, taken).await
            }
            (_, place) => bail!("{place:?} is of another mesh"),
        }
    }

    /// The objects that the control plane reads.
    ///
    /// # Errors
    /// When the mesh can't be asked.
    pub(crate) async fn objects(&self) -> anyhow::Result<Vec<Item>> {
        match self {
            Mesh::Cluster(cluster) => analyze::read_cluster(cluster).await,
            Mesh::Local(mesh) => Ok(analyze::read_text("", &remote::manifests(*mesh).await?)),
        }
    }

    /// The settings of the control plane.
    ///
    /// # Errors
    /// When the mesh can't be asked.
    pub(crate) async fn settings(&self) -> anyhow::Result<ambit_control::index::Settings> {
        match self {
            Mesh::Cluster(cluster) => analyze::cluster_settings(cluster).await,
            Mesh::Local(_) => Ok(ambit_control::index::Settings {
                cluster_id: ambit_local::CLUSTER_ID.into(),
                root_namespace: ambit_local::SYSTEM_NAMESPACE.into(),
                ..ambit_control::index::Settings::default()
            }),
        }
    }
}

impl Proxy {
    fn is_named(&self, target: &str) -> bool {
        match &self.place {
            Place::Pod(pod) => pod.name == target || pod.to_string() == target,
            Place::Local(AskedProxy::Node { name }) => name == target,
            Place::Local(AskedProxy::Waypoint { namespace, pod }) => {
                pod == target || format!("{namespace}/{pod}") == target
            }
            Place::Local(AskedProxy::Nodes) => false,
        }
    }
}

async fn of_cluster(cluster: &Cluster, target: Option<&str>) -> anyhow::Result<Vec<Proxy>> {
    if target.is_some() {
        let found = proxies::find(cluster, target, &cluster.namespace).await?;
        return Ok(found.proxies.into_iter().map(of_pod).collect());
    }
    let ztunnels: Vec<Pod> =
        pods_of(cluster, Component::Ztunnel).await.context("list the pods of ztunnel")?;
    let nodes = ztunnels.iter().filter(|pod| is_ready(pod)).map(|pod| proxies::Proxy {
        role: proxies::Role::Ztunnel,
        pod: PodName::of(pod),
        node: node_of(pod).to_owned(),
    });
    let waypoints = proxies::waypoints(cluster, None).await.context("list the pods of waypoints")?;
    Ok(nodes.chain(waypoints).map(of_pod).collect())
}

fn of_pod(proxy: proxies::Proxy) -> Proxy {
    let proxies::Proxy { role, pod, node } = proxy;
    let (role, name) = match role {
        proxies::Role::Ztunnel => (Role::Node, format!("node {node}")),
        proxies::Role::Waypoint => (Role::Waypoint, format!("waypoint {pod}")),
    };
    Proxy { role, name, place: Place::Pod(pod) }
}

fn of_local(asked: AskedProxy) -> Proxy {
    let (role, name) = match &asked {
        AskedProxy::Nodes => (Role::Node, "nodes".to_owned()),
        AskedProxy::Node { name } => (Role::Node, format!("node {name}")),
        AskedProxy::Waypoint { namespace, pod } => (Role::Waypoint, format!("waypoint {namespace}/{pod}")),
    };
    Proxy { role, name, place: Place::Local(asked) }
}
