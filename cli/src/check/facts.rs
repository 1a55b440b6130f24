//! What checks look at, read from the cluster once.

use std::collections::BTreeMap;

use ambit_control::api_server::{CallError, call};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use serde::Deserialize;

use super::probe::Probes;
use crate::cluster::{Cluster, Component, PROXY_ADMIN, PodName, get, is_ready};
use crate::enrolment::{self, Namespaces};
use crate::output::Wait;

/// Name of the ConfigMap with the mesh's roots in each namespace (certificate contract).
pub(super) const ROOTS: &str = "istio-ca-root-cert";

/// Everything that checks look at.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// Namespace of Ambit's own pods.
    pub(super) system: String,
    /// Major and minor version of the API server.
    pub(super) version: (u32, u32),
    /// Nodes.
    pub(super) nodes: Vec<Node>,
    /// Leases by which kubelets report.
    pub(super) node_leases: Vec<Lease>,
    /// Namespaces by name.
    pub(super) namespaces: Namespaces,
    /// Pods of all namespaces.
    pub(super) pods: Vec<Pod>,
    /// DaemonSets of all namespaces.
    pub(super) daemon_sets: Vec<DaemonSet>,
    /// Deployments of all namespaces.
    pub(super) deployments: Vec<Deployment>,
    /// NetworkPolicies of all namespaces.
    pub(super) network_policies: Vec<NetworkPolicy>,
    /// Configuration of Cilium, if it is there.
    pub(super) cilium: Option<BTreeMap<String, String>>,
    /// Annotations of CustomResourceDefinitions by name.
    pub(super) definitions: BTreeMap<String, BTreeMap<String, String>>,
    /// The lease of the control plane.
    pub(super) lease: Option<Lease>,
    /// Now, by this machine's clock, in seconds since the epoch.
    pub(super) now: i64,
    /// The mesh's roots by namespace.
    pub(super) roots: BTreeMap<String, String>,
    /// What the ready node agents report, by node and pod, or why that can't be had.
    pub(super) agents: BTreeMap<PodName, Result<AgentReport, String>>,
    /// What was tried out on nodes; `None` where that was not asked for.
    pub(super) probes: Option<Probes>,
    /// What could not be read, and why.
    pub(super) unread: Vec<(&'static str, String)>,
}

/// What a node agent reports of itself.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct AgentReport {
    pub(super) health: AgentHealth,
    pub(super) cni: Cni,
    #[serde(default)]
    pub(super) pods: BTreeMap<String, AgentPod>,
}

/// The agent's own state.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct AgentHealth {
    pub(super) proxies: usize,
    pub(super) weaknesses: Vec<Weakness>,
}

/// A guarantee that does not hold on a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub(super) struct Weakness {
    pub(super) missing: String,
    pub(super) guarantee: String,
    pub(super) remedy: String,
}

/// The installation of the CNI plugin.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Cni {
    pub(super) installed: bool,
    pub(super) problem: Option<String>,
}

/// How far a pod's enrolment is.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct AgentPod {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) state: String,
    pub(super) reason: Option<String>,
}

impl Facts {
    /// Whether a part of Ambit is there.
    pub(super) fn is_installed(&self) -> bool {
        self.deployment(Component::Control).is_some() || self.daemon_set(Component::Node).is_some()
    }

    /// The DaemonSet of a component.
    pub(super) fn daemon_set(&self, component: Component) -> Option<&DaemonSet> {
        self.daemon_sets.iter().find(|set| is_ours(*set, &self.system, component))
    }

    /// The Deployment of a component.
    pub(super) fn deployment(&self, component: Component) -> Option<&Deployment> {
        self.deployments.iter().find(|deployment| is_ours(*deployment, &self.system, component))
    }

    /// The pods of a component.
    pub(super) fn pods_of(&self, component: Component) -> impl Iterator<Item = &Pod> {
        let label = |pod: &Pod| pod.labels().get("app.kubernetes.io/name").cloned();
        self.pods.iter().filter(move |pod| {
            pod.namespace().as_ref() == Some(&self.system)
                && label(pod).as_deref() == Some(component.workload())
        })
    }
}

fn is_ours<K: ResourceExt>(object: &K, system: &str, component: Component) -> bool {
    object.namespace().as_deref() == Some(system)
        && object.name_any() == component.workload()
        && object.labels().get("app.kubernetes.io/part-of").is_some_and(|part| part == "ambit")
}

/// Reads the cluster. What may not be read is noted and left out.
///
/// # Errors
/// When the API server can't be reached at all.
pub(super) async fn read(cluster: &Cluster, wait: &Wait) -> anyhow::Result<Facts> {
    let info = call(cluster.client.apiserver_version()).await?;
    let mut unread = Vec::new();
    let mut facts = Facts {
        system: cluster.system.clone(),
        version: (number(&info.major), number(&info.minor)),
        nodes: note(&mut unread, "nodes", cluster.list_cluster().await),
        namespaces: enrolment::by_name(note::<Namespace>(
            &mut unread,
            "namespaces",
            cluster.list_cluster().await,
        )),
        node_leases: note(&mut unread, "leases of nodes", cluster.list(Some("kube-node-lease"), "").await),
        pods: note(&mut unread, "pods", cluster.list(None, "").await),
        daemon_sets: note(&mut unread, "daemonsets", cluster.list(None, "").await),
        deployments: note(&mut unread, "deployments", cluster.list(None, "").await),
        network_policies: note(&mut unread, "networkpolicies", cluster.list(None, "").await),
        now: time::OffsetDateTime::now_utc().unix_timestamp(),
        ..Facts::default()
    };
    facts.definitions = match definitions(cluster).await {
        Ok(found) => found,
        Err(error) => {
            unread.push(("customresourcedefinitions", error.to_string()));
            BTreeMap::new()
        }
    };
    facts.cilium = cilium(cluster, &facts).await;
    if facts.is_installed() {
        wait.show("asking the components");
        let leases: Api<Lease> = Api::namespaced(cluster.client.clone(), &cluster.system);
        match call(leases.get_opt(ambit_control::write::lease::LEASE)).await {
            Ok(lease) => facts.lease = lease,
            Err(error) => unread.push(("leases", error.to_string())),
        }
        facts.roots = roots(cluster, &mut unread).await;
        facts.agents = agents(cluster, &facts).await;
    }
    facts.unread = unread;
    Ok(facts)
}

fn note<K>(
    unread: &mut Vec<(&'static str, String)>,
    what: &'static str,
    outcome: Result<Vec<K>, CallError>,
) -> Vec<K> {
    outcome.unwrap_or_else(|error| {
        unread.push((what, error.to_string()));
        Vec::new()
    })
}

/// `1`, or `33+` as some platforms spell it.
fn number(text: &str) -> u32 {
    text.trim_end_matches(|letter: char| !letter.is_ascii_digit()).parse().unwrap_or(0)
}

async fn definitions(cluster: &Cluster) -> Result<BTreeMap<String, BTreeMap<String, String>>, CallError> {
    let api: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    // Their schemas are megabytes.
    let found = call(api.list_metadata(&ListParams::default())).await?;
    Ok(found.items.into_iter().map(|crd| (crd.name_any(), crd.annotations().clone())).collect())
}

async fn cilium(cluster: &Cluster, facts: &Facts) -> Option<BTreeMap<String, String>> {
    let agent = facts.daemon_sets.iter().find(|set| set.name_any() == "cilium")?;
    let namespace = agent.namespace().unwrap_or_default();
    let api: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), &namespace);
    call(api.get_opt("cilium-config")).await.ok().flatten().and_then(|config| config.data)
}

async fn roots(cluster: &Cluster, unread: &mut Vec<(&'static str, String)>) -> BTreeMap<String, String> {
    let api: Api<ConfigMap> = Api::all(cluster.client.clone());
    let named = ListParams::default().fields(&format!("metadata.name={ROOTS}"));
    match call(api.list(&named)).await {
        Ok(found) => {
            let pair = |config: ConfigMap| {
                let namespace = config.namespace().unwrap_or_default();
                Some((namespace, config.data?.remove("root-cert.pem")?))
            };
            found.items.into_iter().filter_map(pair).collect()
        }
        Err(error) => {
            unread.push(("configmaps", error.to_string()));
            BTreeMap::new()
        }
    }
}

/// Number of agents that are asked at the same time.
const TOGETHER: usize = 16;

async fn agents(cluster: &Cluster, facts: &Facts) -> BTreeMap<PodName, Result<AgentReport, String>> {
    use futures_util::StreamExt as _;
    // An agent that is not ready may still answer: it then says what it lacks.
    let runs = |pod: &&Pod| {
        is_ready(pod) || pod.status.as_ref().is_some_and(|s| s.phase.as_deref() == Some("Running"))
    };
    let pods: Vec<PodName> = facts.pods_of(Component::Node).filter(runs).map(PodName::of).collect();
    let ask = |pod: PodName| async move {
        let report = agent_report(cluster, &pod).await.map_err(|error| format!("{error:#}"));
        (pod, report)
    };
    futures_util::stream::iter(pods).map(ask).buffer_unordered(TOGETHER).collect().await
}

async fn agent_report(cluster: &Cluster, pod: &PodName) -> anyhow::Result<AgentReport> {
    let body = get(&cluster.client, pod, PROXY_ADMIN, "/config_dump").await?;
    Ok(serde_json::from_slice(&body)?)
}
