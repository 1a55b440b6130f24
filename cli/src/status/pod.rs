//! One pod: is it protected, by what, and if not, why.

use std::fmt::Write as _;

use ambit_control::api_server::call;
use ambit_node::enrol::{DATAPLANE_MODE, Decision, REDIRECTION, Reason};
use anyhow::Context;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::{Api, ResourceExt};
use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::cluster::{Cluster, Component, PROXY_ADMIN, PodName, get, is_ready, node_of, pods_of};
use crate::config::{binds, expiry, text, waypoint};
use crate::enrolment;
use crate::output::{Palette, duration};
use crate::proxies::{self, Proxy, Role};

/// Names of the policies that PeerAuthentications become.
const CONVERTED: [&str; 2] = ["istio_converted_static_strict", "converted_peer_authentication_"];

/// Whether a pod is protected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "state")]
enum Verdict {
    /// Its TCP connections with other pods of the mesh are encrypted and authenticated.
    Protected,
    /// It should be, and is not.
    Failing { reason: String, remedy: String },
    /// It is not meant to be.
    Outside { reason: String, remedy: String },
}

/// What is known of a pod.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodStatus {
    pod: PodName,
    node: String,
    addresses: Vec<String>,
    verdict: Verdict,
    /// Why it belongs into the mesh.
    enrolled_by: Option<String>,
    /// Its annotation `ambient.istio.io/redirection`.
    redirection: Option<String>,
    /// The node's proxy.
    proxy: Option<PodName>,
    identity: Option<String>,
    certificate: Option<Certificate>,
    /// The waypoint of connections to its address.
    waypoint: Option<String>,
    /// Services that it is an endpoint of, with their waypoints.
    services: Vec<ServiceOfPod>,
    /// Policies that the node's proxy applies to it.
    policies: Vec<Policy>,
    /// Whether connections without identity are refused.
    strict: bool,
    /// Connections that are older than its enrolment and not protected.
    older_connections: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Certificate {
    state: String,
    /// RFC 3339.
    expires: Option<String>,
    last_error: Option<String>,
}

#[derive(Debug, Serialize)]
struct ServiceOfPod {
    host: String,
    waypoint: Option<String>,
}

#[derive(Debug, Serialize)]
struct Policy {
    name: String,
    action: String,
    scope: String,
}

impl PodStatus {
    /// Whether the pod should be protected and is not.
    pub(super) fn is_failure(&self) -> bool {
        matches!(self.verdict, Verdict::Failing { .. })
    }
}

/// What was read of a pod.
struct Facts {
    pod: Pod,
    decision: Decision,
    /// The label that decided is the namespace's.
    by_namespace: bool,
    /// The pods of ztunnel on its node.
    ztunnels: Vec<Pod>,
    /// The configuration of the one that is ready, or why it can't be had.
    dump: Result<Value, String>,
    /// What the node's agent says of the pod.
    agent: Option<Value>,
}

/// Reads everything about a pod.
///
/// # Errors
/// When the API server can't be asked or there is no such pod.
pub(super) async fn read(cluster: &Cluster, name: &PodName) -> anyhow::Result<PodStatus> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), &name.namespace);
    let pod = call(pods.get_opt(&name.name)).await?.with_context(|| format!("there is no pod {name}"))?;
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    let namespace = call(namespaces.get_opt(&name.namespace)).await?;
    let handler = handler(cluster, &pod).await?;
    let settings = enrolment::settings(&cluster.system);
    let namespaces = enrolment::by_name(namespace.into_iter().collect());
    let decision = enrolment::decide(&pod, &namespaces, handler, &settings);
    let ztunnels = pods_of(cluster, Component::Ztunnel).await?;
    let ztunnels: Vec<Pod> =
        ztunnels.into_iter().filter(|ztunnel| node_of(ztunnel) == node_of(&pod)).collect();
    let dump = match ztunnels.iter().find(|ztunnel| is_ready(ztunnel)) {
        None => Err("none is ready".to_owned()),
        Some(ztunnel) => {
            let proxy =
                Proxy { role: Role::Ztunnel, pod: PodName::of(ztunnel), node: node_of(ztunnel).to_owned() };
            proxies::config_dump(cluster, &proxy).await.map_err(|error| format!("{error:#}"))
        }
    };
    let agent = agent(cluster, &pod).await;
    let by_namespace = !pod.labels().contains_key(DATAPLANE_MODE);
    Ok(explain(&Facts { pod, decision, by_namespace, ztunnels, dump, agent }))
}

/// The handler of the pod's RuntimeClass.
async fn handler(cluster: &Cluster, pod: &Pod) -> anyhow::Result<Option<String>> {
    let Some(class) = pod.spec.as_ref().and_then(|spec| spec.runtime_class_name.clone()) else {
        return Ok(None);
    };
    let classes: Api<RuntimeClass> = Api::all(cluster.client.clone());
    Ok(call(classes.get_opt(&class)).await?.map(|class| class.handler))
}

/// What the agent of the pod's node says of it; nothing where it does not answer.
async fn agent(cluster: &Cluster, pod: &Pod) -> Option<Value> {
    let agents = pods_of(cluster, Component::Node).await.ok()?;
    let agent = agents.iter().find(|agent| node_of(agent) == node_of(pod))?;
    let body =
        get(&cluster.client, &PodName::of(agent), PROXY_ADMIN, "/config_dump?section=pods").await.ok()?;
    let dump: Value = serde_json::from_slice(&body).ok()?;
    let pods = dump.get("pods").unwrap_or(&dump);
    pods.get(pod.uid()?).cloned()
}

/// What the facts come to.
fn explain(facts: &Facts) -> PodStatus {
    let Facts { pod, decision, by_namespace, ztunnels, dump, agent } = facts;
    let name = PodName::of(pod);
    let redirection = pod.annotations().get(REDIRECTION).cloned();
    let known = dump.as_ref().ok();
    let workload = known.and_then(|dump| workload_of(dump, &name));
    let certificate = workload.and_then(|workload| certificate_of(known?, workload));
    let policies = policies(known, &name, workload);
    let strict = policies.iter().any(is_converted);
    let owner = if *by_namespace { "namespace" } else { "pod" };
    let enrolled_by = matches!(decision, Decision::In(_))
        .then(|| format!("label {DATAPLANE_MODE}: ambient of its {owner}"));
    let services = workload.map(|workload| services(known, workload)).unwrap_or_default();
    PodStatus {
        node: node_of(pod).to_owned(),
        addresses: addresses(pod),
        verdict: verdict(facts, workload, certificate.as_ref()),
        enrolled_by,
        redirection,
        proxy: ztunnels.iter().find(|ztunnel| is_ready(ztunnel)).map(PodName::of),
        identity: workload.map(|workload| text(&workload["identity"])),
        certificate,
        waypoint: workload.map(waypoint).filter(|waypoint| !waypoint.is_empty()),
        services,
        policies: policies.into_iter().filter(|policy| !is_converted(policy)).collect(),
        strict,
        older_connections: agent.as_ref().and_then(|a| a["olderConnections"].as_u64()).unwrap_or(0),
        pod: name,
    }
}

/// Why a pod is protected or not: the first thing that is missing, from the labels to the certificate.
fn verdict(facts: &Facts, workload: Option<&Value>, certificate: Option<&Certificate>) -> Verdict {
    let Facts { pod, decision, ztunnels, dump, agent, .. } = facts;
    if let Decision::Out(reason) = decision {
        return outside(*reason, pod);
    }
    let failing = |reason: String, remedy: &str| Verdict::Failing { reason, remedy: remedy.to_owned() };
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
    if matches!(phase, "Succeeded" | "Failed") {
        let remedy = "nothing is to be done".to_owned();
        return Verdict::Outside { reason: format!("it has ended ({phase})"), remedy };
    }
    if node_of(pod).is_empty() {
        return failing("it is on no node yet".to_owned(), "kubectl describe it: the scheduler says why");
    }
    let problem = agent.as_ref().and_then(|agent| agent["reason"].as_str());
    let said = problem.map(|problem| format!(": {problem}")).unwrap_or_default();
    match pod.annotations().get(REDIRECTION).map(String::as_str) {
        Some("enabled") => {}
        Some("pending") => {
            let reason =
                format!("its rules are in and no node proxy serves it, so its connections are refused{said}");
            return failing(reason, "look at ztunnel on its node: ambit log ztunnel");
        }
        _ => {
            let reason = format!("the agent of its node has not enrolled it{said}");
            return failing(
                reason,
                "ambit check names what the agent lacks; ambit log node shows what it wrote",
            );
        }
    }
    if ztunnels.is_empty() {
        return failing("no pod of ztunnel is on its node".to_owned(), "kubectl describe daemonset ztunnel");
    }
    if let Err(error) = dump {
        return failing(format!("ztunnel on its node does not answer: {error}"), "ambit log ztunnel");
    }
    let Some(workload) = workload else {
        let reason = "the node's proxy has not heard of it from the control plane".to_owned();
        return failing(reason, "ambit log control; ambit check");
    };
    if workload["protocol"] != "HBONE" {
        let reason = "peers send to it in the clear: the control plane does not know yet that it is captured"
            .to_owned();
        return failing(reason, "it takes seconds; if it stays so, ambit log control");
    }
    match certificate {
        Some(certificate) if certificate.state == "Available" => Verdict::Protected,
        Some(Certificate { state, last_error, .. }) => {
            let error = last_error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
            failing(
                format!("its certificate is {}{error}", state.to_lowercase()),
                "ambit log control; ambit check",
            )
        }
        None => failing(
            "the node's proxy holds no certificate for it".to_owned(),
            "one is made for its first connection; if none comes, ambit log ztunnel",
        ),
    }
}

fn outside(reason: Reason, pod: &Pod) -> Verdict {
    let namespace = pod.namespace().unwrap_or_default();
    let remedy = match reason {
        Reason::NotLabelled => format!("kubectl label namespace {namespace} {DATAPLANE_MODE}=ambient"),
        Reason::PodLabel => format!("take the label {DATAPLANE_MODE} off the pod's template"),
        Reason::HostNetwork => "pods on the host's network can't be in the mesh".to_owned(),
        Reason::StaticPod => "static pods can't be in the mesh".to_owned(),
        Reason::Sidecar => "restart the pod without the sidecar".to_owned(),
        Reason::ExcludedNamespace => {
            "use another namespace, or the chart's value node.excludeNamespaces".to_owned()
        }
        Reason::UnsupportedRuntime => "use a RuntimeClass whose pods use the host's kernel".to_owned(),
    };
    Verdict::Outside { reason: reason.to_string(), remedy }
}

fn addresses(pod: &Pod) -> Vec<String> {
    let addresses = pod.status.as_ref().and_then(|status| status.pod_ips.as_ref());
    addresses.into_iter().flatten().map(|address| address.ip.clone()).collect()
}

fn workload_of<'a>(dump: &'a Value, pod: &PodName) -> Option<&'a Value> {
    let suffix = format!("//Pod/{pod}");
    let mut all = dump["workloads"].as_array()?.iter();
    all.find(|workload| workload["uid"].as_str().is_some_and(|uid| uid.ends_with(&suffix)))
}

fn certificate_of(dump: &Value, workload: &Value) -> Option<Certificate> {
    let certificate =
        dump["certificates"].as_array()?.iter().find(|c| c["identity"] == workload["identity"])?;
    Some(Certificate {
        state: text(&certificate["state"]),
        expires: expiry(certificate).and_then(|at| at.format(&Rfc3339).ok()),
        last_error: certificate["lastError"].as_str().map(str::to_owned),
    })
}

fn services(dump: Option<&Value>, workload: &Value) -> Vec<ServiceOfPod> {
    let all = dump.and_then(|dump| dump["services"].as_array());
    let hosts = workload["services"].as_array().into_iter().flatten().map(|service| text(&service["host"]));
    let waypoint_of = |host: &str| {
        let name =
            |service: &Value| format!("{}/{}", text(&service["namespace"]), text(&service["hostname"]));
        let service = all.into_iter().flatten().find(|service| name(service) == host)?;
        Some(waypoint(service)).filter(|waypoint| !waypoint.is_empty())
    };
    hosts.map(|host| ServiceOfPod { waypoint: waypoint_of(&host), host }).collect()
}

fn policies(dump: Option<&Value>, pod: &PodName, workload: Option<&Value>) -> Vec<Policy> {
    let all = dump.and_then(|dump| dump["policies"].as_array()).into_iter().flatten();
    let bound = all.filter(|policy| binds(policy, &pod.namespace, workload));
    let policy = |policy: &Value| Policy {
        name: format!("{}/{}", text(&policy["namespace"]), text(&policy["name"])),
        action: text(&policy["action"]).to_uppercase(),
        scope: text(&policy["scope"]),
    };
    bound.map(policy).collect()
}

fn is_converted(policy: &Policy) -> bool {
    let name = policy.name.rsplit('/').next().unwrap_or_default();
    CONVERTED.iter().any(|converted| name.starts_with(converted))
}

/// The status for people: one screen.
pub(super) fn render(status: &PodStatus, now: OffsetDateTime, paint: Palette) -> String {
    let mut text = String::new();
    let of_node = if status.node.is_empty() { String::new() } else { format!(" on {}", status.node) };
    let _ = writeln!(
        text,
        "{}{of_node}  {}",
        paint.bold(&format!("Pod {}", status.pod)),
        status.addresses.join(", ")
    );
    add_verdict(status, paint, &mut text);
    let mut line = |key: &str, value: &str| {
        let _ = writeln!(text, "  {} {value}", paint.dim(&format!("{key:<12}")));
    };
    let redirection = status.redirection.as_deref().unwrap_or("none");
    match &status.enrolled_by {
        Some(by) => line("in the mesh", &format!("by the {by}; redirection: {redirection}")),
        // What proxies of others see of it says nothing about its own protection.
        None => return text,
    }
    if let Some(proxy) = &status.proxy {
        line("node proxy", &proxy.to_string());
    }
    if let Some(identity) = &status.identity {
        line("identity", identity);
    }
    if let Some(certificate) = &status.certificate {
        line("certificate", &certificate_line(certificate, now));
    }
    line("waypoint", status.waypoint.as_deref().unwrap_or("none for its address"));
    for service in &status.services {
        let waypoint =
            service.waypoint.as_deref().map(|w| format!(", through waypoint {w}")).unwrap_or_default();
        line("service", &format!("{}{waypoint}", service.host));
    }
    for Policy { name, action, scope } in &status.policies {
        line("policy", &format!("{action} {name} ({scope})"));
    }
    if status.policies.is_empty() {
        line("policy", "none: every identity may connect");
    }
    let plaintext =
        if status.strict { "refused (STRICT), on all or some ports" } else { "accepted (PERMISSIVE)" };
    line("plaintext", plaintext);
    if status.older_connections > 0 {
        let count = status.older_connections;
        line(
            "older",
            &format!("{count} connections from before the enrolment, which are not protected until they end"),
        );
    }
    text
}

fn add_verdict(status: &PodStatus, paint: Palette, text: &mut String) {
    let (line, remedy) = match &status.verdict {
        Verdict::Protected => {
            (paint.green("✓ protected: TCP with other pods of the mesh is encrypted and authenticated"), None)
        }
        Verdict::Failing { reason, remedy } => {
            (paint.red(&format!("✗ not protected: {reason}")), Some(remedy))
        }
        Verdict::Outside { reason, remedy } => {
            (paint.yellow(&format!("– not in the mesh: {reason}")), Some(remedy))
        }
    };
    let _ = writeln!(text, "{line}");
    if let Some(remedy) = remedy {
        let _ = writeln!(text, "  remedy: {remedy}");
    }
}

fn certificate_line(certificate: &Certificate, now: OffsetDateTime) -> String {
    let Certificate { state, expires, last_error } = certificate;
    let expires = expires.as_deref().and_then(|at| OffsetDateTime::parse(at, &Rfc3339).ok());
    let left = match expires.map(|at| (at - now).whole_seconds()) {
        None => String::new(),
        Some(seconds) if seconds <= 0 => ", expired".to_owned(),
        Some(seconds) => format!(", expires in {}", duration(seconds)),
    };
    let error =
        last_error.as_deref().map(|error| format!("; last renewal failed: {error}")).unwrap_or_default();
    format!("{}{left}{error}", state.to_lowercase())
}

#[cfg(test)]
mod tests;
