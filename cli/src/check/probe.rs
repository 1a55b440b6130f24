//! `ambit check --probe`: a pod on each node that has the node agent's image and privileges, and tries out what the agent will need:
//! kernel, privileges, CNI directories, and port 15008 of the next node.
//!
//! The pods live in a namespace of their own, which goes with the check, also when that is interrupted.

use std::collections::BTreeMap;
use std::time::Duration;

use ambit_control::api_server::call;
use anyhow::Context;
use clap::Args;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::facts::Weakness;
use super::platform;
use crate::cluster::{
    Access, Cluster, PROXY_ADMIN, PodName, block_on, get, is_ready, node_of, until_interrupted,
};
use crate::finding::Finding;
use crate::output::Wait;

/// The image of the probes: that of the node agent.
const IMAGE: &str = concat!("ambit/node:", env!("CARGO_PKG_VERSION"));
/// Where a probe listens for those of other nodes.
const HBONE: u16 = 15008;
/// How long the pods may take to be ready: an image may have to be pulled.
const READY: Duration = Duration::from_secs(90);
/// Between two looks at the pods.
const LOOK: Duration = Duration::from_millis(500);

/// ProbeOptions of the probes.
#[derive(Debug, Args)]
pub(super) struct ProbeOptions {
    /// Try out each node: runs a privileged pod there for some seconds, in a namespace made for it.
    #[arg(long)]
    pub(super) probe: bool,
    /// Image of these pods.
    #[arg(long, value_name = "IMAGE", default_value = IMAGE, requires = "probe")]
    probe_image: String,
    /// The nodes' directory of CNI plugins; default is that of the platform.
    #[arg(long, value_name = "DIR", requires = "probe")]
    cni_bin_dir: Option<String>,
    /// The nodes' directory of CNI configurations; default is that of the platform.
    #[arg(long, value_name = "DIR", requires = "probe")]
    cni_conf_dir: Option<String>,
}

/// What was found on each node, or why its probe can't be had.
pub(super) type Probes = BTreeMap<String, Result<NodeProbe, String>>;

/// What was found on a node.
#[derive(Clone, Debug, Default)]
pub(super) struct NodeProbe {
    /// The probe's own report.
    pub(super) report: Report,
    /// Another node that was dialled and did not answer, and why.
    pub(super) unreachable: Option<(String, String)>,
}

/// The report of a probe.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    pub(super) weaknesses: Vec<Weakness>,
    pub(super) cni_problems: Vec<String>,
}

/// Runs the probes and removes them.
///
/// # Errors
/// When the pods can't be made or removed, or the command is interrupted.
pub(super) fn run(access: &Access, nodes: &[Node], options: &ProbeOptions) -> anyhow::Result<Probes> {
    let namespace = format!("ambit-check-{}", time::OffsetDateTime::now_utc().unix_timestamp());
    let outcome = until_interrupted(async {
        let cluster = access.connect().await?;
        probe(&cluster, &namespace, nodes, options).await
    });
    // With a client of its own: the other ended with its runtime.
    block_on(async {
        let namespaces: Api<Namespace> = Api::all(access.connect().await?.client);
        match call(namespaces.delete(&namespace, &DeleteParams::default())).await {
            Err(error) if !error.is_not_found() => {
                Err(error).with_context(|| format!("delete the probes: kubectl delete namespace {namespace}"))
            }
            _ => Ok(()),
        }
    })?;
    outcome?.context("interrupted")
}

async fn probe(
    cluster: &Cluster,
    namespace: &str,
    nodes: &[Node],
    options: &ProbeOptions,
) -> anyhow::Result<Probes> {
    let wait = Wait::start("starting a probe on each node");
    let params = PostParams::default();
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    call(namespaces.create(&params, &serde_json::from_value(namespace_of_probes(namespace))?))
        .await
        .with_context(|| format!("create the namespace {namespace}"))?;
    let sets: Api<DaemonSet> = Api::namespaced(cluster.client.clone(), namespace);
    let set = serde_json::from_value(daemon_set(namespace, nodes, options))?;
    call(sets.create(&params, &set)).await.context("create the probes")?;
    let pods = pods_when_ready(cluster, &sets, namespace).await?;
    wait.show("asking the probes");
    let ready: Vec<&Pod> = pods.iter().filter(|pod| is_ready(pod)).collect();
    let mut probes = Probes::new();
    for (at, pod) in ready.iter().enumerate() {
        // In a ring: each node dials one, and is dialled by one.
        let next = ready.get((at + 1) % ready.len()).filter(|next| node_of(next) != node_of(pod));
        let found = ask(cluster, pod, next.copied()).await.map_err(|error| format!("{error:#}"));
        probes.insert(node_of(pod).to_owned(), found);
    }
    for pod in pods.iter().filter(|pod| !is_ready(pod)) {
        probes.insert(node_of(pod).to_owned(), Err(why_not_ready(pod)));
    }
    Ok(probes)
}

/// The pods, once all are ready or have had their time.
async fn pods_when_ready(
    cluster: &Cluster,
    sets: &Api<DaemonSet>,
    namespace: &str,
) -> anyhow::Result<Vec<Pod>> {
    let deadline = Instant::now() + READY;
    loop {
        let status = call(sets.get(NAME)).await?.status.unwrap_or_default();
        let all =
            status.observed_generation.is_some() && status.number_ready >= status.desired_number_scheduled;
        if all || Instant::now() >= deadline {
            return Ok(cluster.list(Some(namespace), "").await?);
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn ask(cluster: &Cluster, pod: &Pod, next: Option<&Pod>) -> anyhow::Result<NodeProbe> {
    let name = PodName::of(pod);
    let body = get(&cluster.client, &name, PROXY_ADMIN, "/report").await?;
    let report = serde_json::from_slice(&body).context("read the report")?;
    let address = |pod: &Pod| pod.status.as_ref().and_then(|status| status.pod_ip.clone());
    let Some((next, address)) = next.and_then(|next| Some((next, address(next)?))) else {
        return Ok(NodeProbe { report, unreachable: None });
    };
    let body = get(&cluster.client, &name, PROXY_ADMIN, &format!("/reach?to={address}")).await?;
    let problem: Option<String> = serde_json::from_slice(&body).context("read the outcome of a dial")?;
    Ok(NodeProbe { report, unreachable: problem.map(|problem| (node_of(next).to_owned(), problem)) })
}

/// What a pod waits for, as its container or its conditions say.
fn why_not_ready(pod: &Pod) -> String {
    let status = pod.status.clone().unwrap_or_default();
    let containers = status.container_statuses.unwrap_or_default();
    let waiting = containers.into_iter().find_map(|container| container.state?.waiting);
    let waiting = waiting.map(|waiting| [waiting.reason, waiting.message]);
    let unmet = status.conditions.unwrap_or_default().into_iter().find(|one| one.status == "False");
    let unmet = unmet.map(|condition| [condition.reason, condition.message]);
    let said: Vec<String> = waiting.or(unmet).into_iter().flatten().flatten().collect();
    if said.is_empty() { format!("its pod is not ready after {READY:?}") } else { said.join(": ") }
}

/// Name of the DaemonSet.
const NAME: &str = "ambit-check";

fn namespace_of_probes(name: &str) -> Value {
    json!({ "metadata": { "name": name, "labels": {
        "app.kubernetes.io/part-of": "ambit", "pod-security.kubernetes.io/enforce": "privileged",
        "istio.io/dataplane-mode": "none",
    } } })
}

/// A pod on each Linux node, with what the chart gives the node agent.
fn daemon_set(namespace: &str, nodes: &[Node], options: &ProbeOptions) -> Value {
    let platform = nodes.first().map_or(platform::USUAL, platform::of_node);
    let bin_dir = options.cni_bin_dir.as_deref().unwrap_or(platform.bin_dir);
    let conf_dir = options.cni_conf_dir.as_deref().unwrap_or(platform.conf_dir);
    let labels = json!({ "app.kubernetes.io/name": NAME, "app.kubernetes.io/part-of": "ambit" });
    json!({
        "metadata": { "name": NAME, "namespace": namespace, "labels": labels },
        "spec": { "selector": { "matchLabels": labels }, "template": {
            "metadata": { "labels": labels },
            "spec": {
                "automountServiceAccountToken": false,
                "hostPID": true,
                "nodeSelector": { "kubernetes.io/os": "linux" },
                "tolerations": [{ "operator": "Exists" }],
                "terminationGracePeriodSeconds": 1,
                "containers": [{
                    "name": "probe",
                    "image": options.probe_image,
                    "imagePullPolicy": "IfNotPresent",
                    "args": ["probe", "--node-name=$(NODE)", format!("--cni-bin-dir={bin_dir}"), format!("--cni-conf-dir={conf_dir}")],
                    "env": [{ "name": "NODE", "valueFrom": { "fieldRef": { "fieldPath": "spec.nodeName" } } }],
                    "readinessProbe": { "tcpSocket": { "port": HBONE }, "periodSeconds": 1 },
                    "securityContext": {
                        "runAsUser": 0, "runAsGroup": 0, "readOnlyRootFilesystem": true,
                        "capabilities": { "drop": ["ALL"], "add": ["NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE"] },
                        "appArmorProfile": { "type": "Unconfined" },
                    },
                }],
            },
        } },
    })
}

/// What the probes found.
pub(super) fn findings(probes: &Probes) -> Vec<Finding> {
    let mut weaknesses: BTreeMap<&Weakness, Vec<String>> = BTreeMap::new();
    let mut findings = Vec::new();
    for (node, found) in probes {
        let subject = format!("node {node}");
        let NodeProbe { report, unreachable } = match found {
            Ok(found) => found,
            Err(why) => {
                let finding = Finding::warning(subject, format!("its probe can't be asked: {why}"));
                findings.push(finding.remedy(
                    "--probe-image names the node agent's image where nodes can pull it; docs/install.md says where images come from",
                ));
                continue;
            }
        };
        for weakness in &report.weaknesses {
            weaknesses.entry(weakness).or_default().push(node.clone());
        }
        findings.extend(report.cni_problems.iter().map(|problem| {
            Finding::error(&subject, format!("the CNI plugin would not be called: {problem}"))
                .shows("new pods enter the mesh only once the agent sees them run, and the node's agent is not ready")
                .remedy(
                    "install with `platform`, or node.cni.binDir and node.cni.confDir, set to where the node's container runtime \
                     looks; --cni-bin-dir and --cni-conf-dir try others",
                )
        }));
        findings.extend(unreachable.iter().map(|(next, why)| {
            Finding::error(&subject, format!("pods of {next} can't be reached on TCP 15008: {why}"))
                .shows("connections between these nodes fail with the flag CONNECT")
                .remedy("admit TCP 15008 between pods in firewalls, security groups and policies of the whole cluster")
        }));
    }
    findings.extend(super::after::weaknesses(weaknesses));
    findings
}
