//! Which proxies a name on the command line means: a node's, a waypoint, or the one that serves a pod.

use ambit_control::api_server::call;
use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt};
use serde_json::Value;

use crate::cluster::{Cluster, Component, PROXY_ADMIN, PodName, get, is_ready, node_of, pods_of};

/// Label of a waypoint's pods that names its Gateway.
pub(crate) const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// Label of pods that a controller made for a Gateway.
const MANAGED: &str = "gateway.istio.io/managed";

/// What a proxy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The proxy of a node.
    Ztunnel,
    /// A waypoint's pod.
    Waypoint,
}

/// A proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Proxy {
    /// What it is.
    pub(crate) role: Role,
    /// Its pod.
    pub(crate) pod: PodName,
    /// The pod's node.
    pub(crate) node: String,
}

/// The proxies that are meant, and the pod whose part of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// The proxies.
    pub(crate) proxies: Vec<Proxy>,
    /// The application's pod, if one was named.
    pub(crate) pod: Option<PodName>,
}

/// Finds the proxies that `target` names: a node, a pod of a proxy, or a pod that a node's proxy serves. No name means every
/// node's proxy.
///
/// # Errors
/// When the API server can't be asked or there is no such node or pod.
pub(crate) async fn find(cluster: &Cluster, target: Option<&str>, namespace: &str) -> anyhow::Result<Target> {
    let ztunnels = pods_of(cluster, Component::Ztunnel).await.context("list the pods of ztunnel")?;
    let pod = match target {
        Some(name) if !ztunnels.iter().any(|pod| node_of(pod) == name) => {
            let name = PodName::parse(name, namespace);
            let api: Api<Pod> = Api::namespaced(cluster.client.clone(), &name.namespace);
            let pod = call(api.get_opt(&name.name)).await?;
            Some(pod.with_context(|| format!("there is no node and no pod {name}"))?)
        }
        _ => None,
    };
    select(target, &ztunnels, pod.as_ref())
}

/// The decision of [`find`]: `pod` is the pod of that name where `target` is not a node.
fn select(target: Option<&str>, ztunnels: &[Pod], pod: Option<&Pod>) -> anyhow::Result<Target> {
    let ztunnel =
        |pod: &Pod| Proxy { role: Role::Ztunnel, pod: PodName::of(pod), node: node_of(pod).to_owned() };
    let Some(pod) = pod else {
        let is_meant = |pod: &&Pod| target.is_none_or(|node| node_of(pod) == node);
        let proxies: Vec<Proxy> =
            ztunnels.iter().filter(is_meant).filter(|pod| is_ready(pod)).map(ztunnel).collect();
        if proxies.is_empty() {
            bail!(
                "no pod of ztunnel is ready{}",
                target.map(|node| format!(" on {node}")).unwrap_or_default()
            );
        }
        return Ok(Target { proxies, pod: None });
    };
    let name = PodName::of(pod);
    if pod.labels().contains_key(MANAGED) && pod.labels().contains_key(GATEWAY_NAME) {
        return Ok(Target { proxies: vec![waypoint(pod)], pod: None });
    }
    if let Some(own) = ztunnels.iter().find(|ztunnel| PodName::of(ztunnel) == name) {
        return Ok(Target { proxies: vec![ztunnel(own)], pod: None });
    }
    let node = node_of(pod);
    let serving = ztunnels.iter().filter(|ztunnel| node_of(ztunnel) == node);
    let proxies: Vec<Proxy> = serving.filter(|pod| is_ready(pod)).map(ztunnel).collect();
    if proxies.is_empty() {
        bail!("no pod of ztunnel is ready on {node}, the node of {name}");
    }
    Ok(Target { proxies, pod: Some(name) })
}

/// A pod of a waypoint as a proxy.
pub(crate) fn waypoint(pod: &Pod) -> Proxy {
    Proxy { role: Role::Waypoint, pod: PodName::of(pod), node: node_of(pod).to_owned() }
}

/// The pods of every waypoint in one namespace or all.
///
/// # Errors
/// When the API server can't be asked.
pub(crate) async fn waypoints(cluster: &Cluster, namespace: Option<&str>) -> anyhow::Result<Vec<Proxy>> {
    let pods: Vec<Pod> = cluster.list(namespace, &format!("{MANAGED},{GATEWAY_NAME}")).await?;
    Ok(pods.iter().filter(|pod| is_ready(pod)).map(waypoint).collect())
}

/// The configuration of a proxy.
///
/// # Errors
/// When it does not answer.
pub(crate) async fn config_dump(cluster: &Cluster, proxy: &Proxy) -> anyhow::Result<Value> {
    let body = get(&cluster.client, &proxy.pod, PROXY_ADMIN, "/config_dump").await?;
    serde_json::from_slice(&body).with_context(|| format!("configuration of {}", proxy.pod))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(namespace: &str, name: &str, node: &str, labels: &Value, ready: bool) -> Pod {
        let ready = if ready { "True" } else { "False" };
        let pod = json!({
            "metadata": { "namespace": namespace, "name": name, "labels": labels },
            "spec": { "nodeName": node, "containers": [] },
            "status": { "conditions": [{ "type": "Ready", "status": ready }] },
        });
        serde_json::from_value(pod).unwrap_or_default()
    }

    fn names(target: &anyhow::Result<Target>) -> Vec<String> {
        let proxies = target.as_ref().map(|target| target.proxies.as_slice()).unwrap_or_default();
        proxies.iter().map(|proxy| proxy.pod.name.clone()).collect()
    }

    #[test]
    fn a_name_means_a_node_a_proxy_or_the_proxy_that_serves_a_pod() {
        let ztunnels = [
            pod("ambit-system", "z1", "n1", &json!({}), true),
            pod("ambit-system", "z2", "n2", &json!({}), true),
            pod("ambit-system", "z3", "n3", &json!({}), false),
        ];
        assert_eq!(names(&select(None, &ztunnels, None)), ["z1", "z2"]);
        assert_eq!(names(&select(Some("n2"), &ztunnels, None)), ["z2"]);
        assert!(select(Some("n3"), &ztunnels, None).is_err());
        let web = pod("shop", "web", "n1", &json!({}), true);
        let found = select(Some("web"), &ztunnels, Some(&web));
        assert_eq!(names(&found), ["z1"]);
        assert_eq!(found.ok().and_then(|target| target.pod), Some(PodName::of(&web)));
        assert_eq!(names(&select(Some("z3"), &ztunnels, ztunnels.last())), ["z3"]);
        let labels = json!({ MANAGED: "istio.io-mesh-controller", GATEWAY_NAME: "waypoint" });
        let waypoint = pod("shop", "waypoint-1", "n1", &labels, true);
        assert_eq!(names(&select(Some("waypoint-1"), &ztunnels, Some(&waypoint))), ["waypoint-1"]);
    }
}
