//! From proxy to proxy: each is asked what it would do, and says who is next.

use ambit_control::api_server::call;
use ambit_explain::{Explanation, Next, Workload};
use anyhow::{Context, bail};
use form_urlencoded::Serializer;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use serde::Serialize;

use super::request::Request;
use crate::cluster::{Cluster, Component, PROXY_ADMIN, PodName, get, is_ready, node_of, pods_of};
use crate::output::Wait;
use crate::remote::{self, AskedProxy};

/// Where the proxies are.
pub(super) enum Mesh {
    /// In a cluster.
    Cluster(Box<Cluster>),
    /// On this machine, run by `ambit up` with this process id, or by the only one.
    Local(Option<u32>),
}

/// What becomes of a request or connection.
#[derive(Debug, Serialize)]
pub(super) struct Answer {
    /// Who asks.
    pub(super) client: String,
    /// For what.
    pub(super) request: String,
    /// The proxies on its way.
    pub(super) hops: Vec<Hop>,
    /// What it comes to.
    pub(super) outcome: Outcome,
}

/// A proxy on the way.
#[derive(Debug, Serialize)]
pub(super) struct Hop {
    /// What it is.
    pub(super) proxy: String,
    /// What it would do.
    #[serde(flatten)]
    pub(super) explanation: Explanation,
}

/// What it comes to.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "is")]
pub(super) enum Outcome {
    /// The application gets it.
    Delivered {
        /// The pod.
        to: String,
        /// Whether every part of the way is encrypted and authenticated.
        encrypted: bool,
    },
    /// It leaves the mesh.
    Leaves {
        /// To this address.
        to: String,
    },
    /// A proxy answers.
    Answered {
        /// Which.
        by: String,
        /// With this status.
        status: u16,
    },
    /// A proxy refuses it.
    Refused {
        /// Which.
        by: String,
        /// At this step.
        step: String,
        /// Why.
        why: String,
    },
}

impl Answer {
    /// Whether the client does not get what it asked for because of the mesh.
    pub(super) fn is_refused(&self) -> bool {
        match &self.outcome {
            Outcome::Refused { .. } => true,
            Outcome::Answered { status, .. } => *status >= 400,
            Outcome::Delivered { .. } | Outcome::Leaves { .. } => false,
        }
    }
}

/// Proxies on a way, at most: the client's node, a waypoint, the server's node.
const LONGEST: usize = 4;

/// Follows a request from the client's pod to its end.
///
/// # Errors
/// When a proxy can't be asked.
pub(super) async fn follow(
    mesh: &Mesh,
    client: &PodName,
    request: &Request,
    wait: &Wait,
) -> anyhow::Result<Answer> {
    let (proxy, explanation) = mesh.outbound(client, &request.destination).await?;
    let identity = explanation.client.as_ref().and_then(|client| client.identity.clone());
    let source = explanation.client.as_ref().map(|client| client.address.to_string());
    let source = source.unwrap_or_else(|| "0.0.0.0".to_owned());
    let found = explanation.client.as_ref().map(|client| client.name.clone());
    let client = &found.unwrap_or_else(|| client.to_string());
    let mut path = Path { hops: Vec::new(), identity, encrypted: true };
    let mut next = path.add(proxy, explanation);
    while path.hops.len() < LONGEST {
        match next {
            Next::Waypoint { pod, authority } => {
                let identity = path.identity.clone().context("a waypoint is asked only with an identity")?;
                wait.show(&format!("asking waypoint {}/{}", pod.namespace, pod.name));
                let question = request.question(&authority, &identity, &source);
                let (proxy, explanation) = mesh.waypoint(&pod, &question).await?;
                next = path.add(proxy, explanation);
            }
            Next::Workload { workload, address, tunnel, identity } => {
                path.encrypted &= tunnel;
                path.identity = if tunnel { identity.or(path.identity) } else { None };
                wait.show(&format!("asking the node of {}/{}", workload.namespace, workload.name));
                let entered =
                    mesh.inbound(&workload, address.port(), path.identity.as_deref(), &source).await?;
                let Some((proxy, explanation)) = entered else {
                    return Ok(path.leaves(
                        client,
                        request,
                        format!("{address}, {}/{}", workload.namespace, workload.name),
                    ));
                };
                let refused = explanation.refusal().is_some();
                let last = path.add(proxy, explanation);
                let to = format!("{}/{}, port {}", workload.namespace, workload.name, address.port());
                if refused {
                    return Ok(path.end(client, request, last));
                }
                let outcome = Outcome::Delivered { to, encrypted: path.encrypted };
                return Ok(path.finish(client, request, outcome));
            }
            last => return Ok(path.end(client, request, last)),
        }
    }
    bail!("the path has more than {LONGEST} proxies");
}

/// The proxies so far, and who the next one sees.
struct Path {
    hops: Vec<Hop>,
    identity: Option<String>,
    encrypted: bool,
}

impl Path {
    fn add(&mut self, proxy: String, explanation: Explanation) -> Next {
        let next = explanation.next.clone();
        self.hops.push(Hop { proxy, explanation });
        next
    }

    fn leaves(self, client: &str, request: &Request, to: String) -> Answer {
        self.finish(client, request, Outcome::Leaves { to })
    }

    /// The end at a proxy that passes nothing on to a workload.
    fn end(self, client: &str, request: &Request, last: Next) -> Answer {
        let by = self.hops.last().map(|hop| hop.proxy.clone()).unwrap_or_default();
        let refusal = self.hops.last().and_then(|hop| hop.explanation.refusal()).cloned();
        let outcome = match (last, refusal) {
            (Next::Outside { address }, _) => Outcome::Leaves { to: address },
            (Next::Answer { status }, _) => Outcome::Answered { by, status },
            (_, Some(step)) => Outcome::Refused { by, step: step.step, why: step.text },
            (_, None) => {
                Outcome::Refused { by, step: "connect".to_owned(), why: "it goes nowhere".to_owned() }
            }
        };
        self.finish(client, request, outcome)
    }

    fn finish(self, client: &str, request: &Request, outcome: Outcome) -> Answer {
        Answer { client: client.to_owned(), request: request.shown(), hops: self.hops, outcome }
    }
}

impl Mesh {
    /// Asks the proxy of the client's node.
    async fn outbound(&self, client: &PodName, destination: &str) -> anyhow::Result<(String, Explanation)> {
        let mut query = Serializer::new(String::new());
        query.append_pair("pod", &client.to_string()).append_pair("to", destination);
        let path = format!("/explain/outbound?{}", query.finish());
        match self {
            Mesh::Local(mesh) => {
                let text = remote::admin(*mesh, AskedProxy::Nodes, &path).await?;
                Ok((format!("node proxy of {client}"), read(&text)?))
            }
            Mesh::Cluster(cluster) => {
                let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), &client.namespace);
                let pod = call(pods.get_opt(&client.name)).await?;
                let pod = pod.with_context(|| format!("there is no pod {client}"))?;
                at_node(cluster, node_of(&pod), &path).await
            }
        }
    }

    /// Asks a waypoint.
    async fn waypoint(&self, pod: &Workload, path: &str) -> anyhow::Result<(String, Explanation)> {
        let name = format!("waypoint {}/{}", pod.namespace, pod.name);
        let text = match self {
            Mesh::Local(mesh) => {
                let asked = AskedProxy::Waypoint { namespace: pod.namespace.clone(), pod: pod.name.clone() };
                remote::admin(*mesh, asked, path).await?
            }
            Mesh::Cluster(cluster) => {
                let pod = PodName { namespace: pod.namespace.clone(), name: pod.name.clone() };
                String::from_utf8(get(&cluster.client, &pod, PROXY_ADMIN, path).await?)?
            }
        };
        Ok((name, read(&text)?))
    }

    /// Asks the proxy of the workload's node; `None` where the workload is no pod of the mesh.
    async fn inbound(
        &self,
        workload: &Workload,
        port: u16,
        identity: Option<&str>,
        source: &str,
    ) -> anyhow::Result<Option<(String, Explanation)>> {
        let pod = format!("{}/{}", workload.namespace, workload.name);
        let mut query = Serializer::new(String::new());
        query.append_pair("pod", &pod).append_pair("port", &port.to_string()).append_pair("source", source);
        if let Some(identity) = identity {
            query.append_pair("from", identity);
        }
        let path = format!("/explain/inbound?{}", query.finish());
        let is_unserved = |error: &anyhow::Error| format!("{error:#}").contains("serves no pod");
        let answered = match self {
            Mesh::Local(mesh) => match remote::admin(*mesh, AskedProxy::Nodes, &path).await {
                Ok(text) => Ok((format!("node proxy of {pod}"), read(&text)?)),
                Err(error) => Err(error),
            },
            Mesh::Cluster(_) if workload.node.is_empty() => return Ok(None),
            Mesh::Cluster(cluster) => at_node(cluster, &workload.node, &path).await,
        };
        match answered {
            Ok(answered) => Ok(Some(answered)),
            Err(error) if is_unserved(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Asks the proxy of a node.
async fn at_node(cluster: &Cluster, node: &str, path: &str) -> anyhow::Result<(String, Explanation)> {
    let ztunnels = pods_of(cluster, Component::Ztunnel).await.context("list the pods of ztunnel")?;
    let mut ready = ztunnels.iter().filter(|pod| node_of(pod) == node && is_ready(pod));
    let ztunnel = ready.next().with_context(|| format!("no pod of ztunnel is ready on node {node:?}"))?;
    let name = PodName::of(ztunnel);
    let body = get(&cluster.client, &name, PROXY_ADMIN, path).await?;
    Ok((format!("node proxy {name} on {node}"), read(std::str::from_utf8(&body)?)?))
}

fn read(text: &str) -> anyhow::Result<Explanation> {
    serde_json::from_str(text).context("the proxy's answer can't be read: is it of this version?")
}
