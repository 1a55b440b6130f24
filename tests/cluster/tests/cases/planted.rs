//! Three planted faults, and what the command says of each: a policy that denies, a route in the shade of another, and a waypoint
//! that isn't ready. What it says is in `snapshots`.

use std::collections::BTreeMap;
use std::time::Duration;

use ambit_cluster::{Cluster, wait};

use super::apps::{Apps, ROLLOUT};
use super::cli::output;
use super::mesh::set_mode;
use super::observe::during;
use super::{Cases, Outcome};

/// How soon something shows on a busy machine.
const SOON: Duration = Duration::from_secs(240);
const NAMESPACE: &str = "planted";

pub(crate) fn add(cases: &mut Cases) {
    cases.add("the_command_leads_to_each_planted_fault", explained);
}

async fn explained(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    let apps = Apps::start(cluster, NAMESPACE, ("n1", "n2")).await?;
    set_mode(cluster, NAMESPACE, true).await?;
    kubectl.apply(FAULTS).await?;
    kubectl.rolled_out(NAMESPACE, "deployment/waypoint", ROLLOUT).await?;
    kubectl
        .run(&["label", "service", "server", "--namespace", NAMESPACE, "istio.io/use-waypoint=waypoint"])
        .await?;
    let pods = kubectl.list(&["pods", "--namespace", NAMESPACE, "--selector", "app=client"]).await?;
    let client = format!("{NAMESPACE}/{}", pods[0]["metadata"]["name"].as_str().ok_or("no client")?);
    let shown = async |args: &[&str]| -> Result<String, String> {
        Ok(known(cluster, &output(cluster, args).await?).await)
    };

    // Every object that does not do what it says, and the mesh at a glance.
    let analyzed = wait::until("the command names the shadow and the waypoint", SOON, async || {
        let said = shown(&["analyze", "--namespace", NAMESPACE]).await?;
        if said.contains("Shadowed") && said.contains("WaypointNotReady") { Ok(said) } else { Err(said) }
    })
    .await?;
    insta::assert_snapshot!("analyze", analyzed);
    let status = shown(&["status"]).await?;
    let of_namespace =
        status.lines().filter(|line| line.contains(NAMESPACE) || line.starts_with("NAMESPACE"));
    insta::assert_snapshot!("status", of_namespace.collect::<Vec<_>>().join("\n"));

    // A policy that denies.
    let denied = wait::until("the policy denies", SOON, async || {
        let said = shown(&["why", &client, "http://server/orders", "-X", "DELETE"]).await?;
        if said.contains("answers 403") { Ok(said) } else { Err(said) }
    })
    .await?;
    insta::assert_snapshot!("why_a_policy_denies", denied);
    let tap = ["tap", "--namespace", NAMESPACE, "--denied", "--why", "--count", "1", "--for", "120s"];
    let tapped = during(cluster, (NAMESPACE, "deployment/client"), "http://server/secret", &tap).await?;
    insta::assert_snapshot!("tap_a_policy_denies", known(cluster, &tapped).await);

    // A route in the shade of another.
    let shaded = shown(&["why", &client, "http://server/orders"]).await?;
    insta::assert_snapshot!("why_a_route_is_in_the_shade", shaded);

    // A waypoint that isn't ready.
    let missing = wait::until("the waypoint is asked for", SOON, async || {
        let said = shown(&["why", &client, "http://lonely/"]).await?;
        if said.contains("planted/absent") { Ok(said) } else { Err(said) }
    })
    .await?;
    insta::assert_snapshot!("why_a_waypoint_is_missing", missing);
    let failed =
        ["tap", "--namespace", NAMESPACE, "--status", "failed", "--why", "--count", "1", "--for", "120s"];
    let failed = during(cluster, (NAMESPACE, "deployment/client"), "http://lonely/", &failed).await?;
    insta::assert_snapshot!("tap_a_waypoint_is_missing", known(cluster, &failed).await);
    Ok(apps.stop(cluster).await?)
}

/// What a command says, with names in place of what differs from run to run: names of pods, addresses, times.
async fn known(cluster: &Cluster, said: &str) -> String {
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    for kind in ["pods", "services"] {
        for object in cluster.kubectl().list(&[kind, "--all-namespaces"]).await.unwrap_or_default() {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            let owner = match (kind, name.rsplitn(3, '-').nth(2), name.rsplit_once('-')) {
                ("services", ..) => name,
                (_, _, Some((owner, _)))
                    if !object["metadata"]["labels"]["controller-revision-hash"].is_null() =>
                {
                    owner
                }
                (_, Some(owner), _) => owner,
                _ => name,
            };
            if kind == "pods" {
                let on = object["spec"]["nodeName"].as_str().unwrap_or_default();
                let on = if owner == "ztunnel" { format!(" of {on}") } else { String::new() };
                names.insert(name.to_owned(), format!("<{owner}{on}>"));
            }
            let address = object["status"]["podIP"].as_str().or(object["spec"]["clusterIP"].as_str());
            if let Some(address) = address.filter(|address| address.contains('.')) {
                names.insert(address.to_owned(), format!("<address of {owner}>"));
            }
        }
    }
    let mut said = said.to_owned();
    // Longer ones first: 10.0.0.12 before 10.0.0.1.
    let mut names: Vec<_> = names.into_iter().collect();
    names.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
    for (name, stands_for) in names {
        said = said.replace(&name, &stands_for);
    }
    let lines = said.lines().map(|line| line.split(' ').map(timeless).collect::<Vec<_>>().join(" "));
    let columns =
        lines.map(|line| line.split_whitespace().fold(indent(&line), |text, word| text + word + " "));
    columns.map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// Times of day and durations are others each time; the width of columns follows from what is in them.
fn timeless(word: &str) -> String {
    let is_time = word.len() == 12 && word.bytes().filter(|byte| *byte == b':').count() == 2;
    let is_duration = word.strip_suffix("ms").is_some_and(|number| number.parse::<u64>().is_ok());
    let port = word.rsplit_once(':').filter(|(host, port)| host.ends_with('>') && port.len() == 5);
    match (is_time, is_duration, port) {
        (true, ..) => "<time>".to_owned(),
        (_, true, _) => "<duration>".to_owned(),
        (_, _, Some((host, port))) if port != "15008" => format!("{host}:<port>"),
        _ => word.to_owned(),
    }
}

fn indent(line: &str) -> String {
    line.chars().take_while(|letter| *letter == ' ').collect()
}

const FAULTS: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: planted}
spec:
  gatewayClassName: ambit-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
# It denies every client.
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-deletes, namespace: planted}
spec:
  targetRefs: [{group: "", kind: Service, name: server}]
  action: DENY
  rules:
  - to: [{operation: {methods: [DELETE]}}]
  - to: [{operation: {paths: [/secret]}}]
---
# It has the same match as the route that is meant, and comes first by its name.
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: a-trial, namespace: planted}
spec:
  parentRefs: [{group: "", kind: Service, name: server, port: 80}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /orders}}]
    backendRefs: [{name: server, port: 80}]
  - backendRefs: [{name: server, port: 80}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: orders, namespace: planted}
spec:
  parentRefs: [{group: "", kind: Service, name: server, port: 80}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /orders}}]
    backendRefs: [{name: server, port: 80}]
---
# No node has the label that its pods ask for.
apiVersion: v1
kind: ConfigMap
metadata: {name: absent, namespace: planted}
data:
  deployment: |
    spec: {template: {spec: {nodeSelector: {nobody: has-it}}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: absent, namespace: planted}
spec:
  gatewayClassName: ambit-waypoint
  infrastructure: {parametersRef: {group: "", kind: ConfigMap, name: absent}}
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
apiVersion: v1
kind: Service
metadata: {name: lonely, namespace: planted, labels: {istio.io/use-waypoint: absent}}
spec: {selector: {app: server}, ports: [{port: 80, targetPort: 8080}]}
"#;
