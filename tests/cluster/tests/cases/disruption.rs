//! What traffic of the mesh survives: restarts of its parts and of Kubernetes', under steady load.

use std::time::Duration;

use ambit_cluster::{Cluster, mesh, wait};
use serde_json::Value;

use super::apps::{Apps, ROLLOUT};
use super::mesh::{expect_tunnelled_request, set_mode, wait_until_enrolled};
use super::{Cases, Outcome};

/// How soon a change has its effect on a busy machine.
const SOON: Duration = Duration::from_secs(240);
/// How long the API server stays away.
const AWAY: Duration = Duration::from_secs(30);
/// Requests that may fail when both node proxies are killed: the load keeps ten connections, each of which passes both.
const MOST_KEPT: u64 = 20;
/// The programs that the chart runs.
const PROGRAMS: [&str; 3] = ["ztunnel", "ambit-node", "ambit-control"];
/// The namespace of these cases.
pub(crate) const NAMESPACE: &str = "load";

pub(crate) fn add(cases: &mut Cases) {
    cases.add("upgrade_and_rollback_fail_no_request", upgrade);
    cases.add("killed_programs_of_the_mesh_come_back", kills);
    cases.add("restarts_of_kubernetes_fail_no_request", kubernetes_restarts);
    cases.add("a_crashed_node_comes_back_into_the_mesh", crash);
    cases.add("a_hundred_pods_at_once_are_enrolled", hundred);
}

/// Counts of a client that sends 200 requests a second, half of them on new connections.
#[derive(Debug)]
struct Load {
    ok: u64,
    failed: u64,
    reasons: Value,
}

/// What the client has counted so far.
async fn load(cluster: &Cluster) -> Result<Load, String> {
    let args = ["logs", "--namespace", NAMESPACE, "load", "--tail=1"];
    let line = cluster.kubectl().run(&args).await.map_err(|error| error.to_string())?;
    let counts: Value = serde_json::from_str(line.trim()).map_err(|error| format!("{error}: {line}"))?;
    let count = |key: &str| counts[key].as_u64().ok_or_else(|| line.clone());
    Ok(Load { ok: count("ok")?, failed: count("failed")?, reasons: counts["reasons"].clone() })
}

/// Starts the load in the mesh and waits until it runs without failures.
async fn start(cluster: &Cluster) -> Result<Apps, Box<dyn std::error::Error>> {
    let apps = Apps::start(cluster, NAMESPACE, ("n1", "n2")).await?;
    set_mode(cluster, NAMESPACE, true).await?;
    cluster.kubectl().apply(LOAD).await?;
    wait_until_enrolled(cluster, NAMESPACE, true).await?;
    expect_progress(cluster).await?;
    Ok(apps)
}

/// Waits for another thousand requests, of which none may have failed.
pub(crate) async fn expect_progress(cluster: &Cluster) -> Outcome {
    let after = progress(cluster).await?;
    assert_eq!(after.failed, 0, "{:?}", after.reasons);
    Ok(())
}

/// Waits for another thousand requests.
async fn progress(cluster: &Cluster) -> Result<Load, Box<dyn std::error::Error>> {
    let before = wait::until("the load runs", SOON, async || load(cluster).await).await?;
    let after = wait::until("the load goes on", SOON, async || match load(cluster).await {
        Ok(now) if now.ok >= before.ok + 1_000 => Ok(now),
        other => Err(format!("{other:?}")),
    })
    .await?;
    Ok(after)
}

/// An upgrade of all parts at once, and going back.
async fn upgrade(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    let apps = start(cluster).await?;
    let chart = cluster.layout().repository().join("charts/ambit").display().to_string();
    let settings = ["ztunnel", "node", "control"].map(|part| format!("{part}.annotations.upgraded=now"));
    let settings = settings.join(",");
    let upgraded = async || -> ambit_cluster::Result<bool> {
        let values = ["get", "values", mesh::RELEASE, "--namespace", mesh::NAMESPACE];
        Ok(kubectl.helm(&values).await?.contains("upgraded: now"))
    };
    let upgrade = ["upgrade", mesh::RELEASE, &chart, "--reuse-values", "--set", &settings];
    replace_all_pods(cluster, &upgrade).await?;
    assert!(upgraded().await?);
    replace_all_pods(cluster, &["rollback", mesh::RELEASE]).await?;
    assert!(!upgraded().await?);
    expect_tunnelled_request(cluster, &apps).await?;
    Ok(apps.stop(cluster).await?)
}

/// Runs Helm, waits until the pods of every program of the mesh are new, and for further requests.
async fn replace_all_pods(cluster: &Cluster, helm: &[&str]) -> Outcome {
    let mut before = Vec::new();
    for program in PROGRAMS {
        before.push(ready_pods(cluster, program).await?);
    }
    cluster.kubectl().helm(&[helm, &["--namespace", mesh::NAMESPACE]].concat()).await?;
    for (program, before) in PROGRAMS.iter().zip(before) {
        // Not `rollout status`: old node proxies stay as long as the connections that the load keeps.
        wait::until(&format!("{program} has new pods"), SOON, async || {
            let now = ready_pods(cluster, program).await.map_err(|error| error.to_string())?;
            let new = now.iter().filter(|pod| !before.contains(pod)).count();
            if new == before.len() { Ok(()) } else { Err(format!("{before:?}, then {now:?}")) }
        })
        .await?;
    }
    Ok(expect_progress(cluster).await.map_err(|error| format!("after {helm:?}: {error}"))?)
}

/// Processes that are killed come back. A killed agent is not noticed; a killed node proxy takes the connections with it that
/// it carried, and new ones wait for its successor.
async fn kills(cluster: &Cluster) -> Outcome {
    let apps = start(cluster).await?;
    kill(cluster, "ambit-node").await?;
    expect_progress(cluster).await.map_err(|error| format!("after the end of the agents: {error}"))?;
    kill(cluster, "ztunnel").await?;
    let lost = progress(cluster).await?.failed;
    assert!(lost <= MOST_KEPT, "{lost} requests failed, of {MOST_KEPT} connections that were kept");
    let later = progress(cluster).await?.failed;
    assert_eq!(later, lost, "requests fail after the node proxies came back");
    expect_tunnelled_request(cluster, &apps).await?;
    Ok(apps.stop(cluster).await?)
}

/// Kills a program of the mesh on both nodes, and waits until it serves again.
async fn kill(cluster: &Cluster, program: &str) -> Outcome {
    let restarts = async || -> ambit_cluster::Result<Vec<u64>> {
        let selector = format!("app.kubernetes.io/name={program}");
        let pods = ["pods", "--namespace", mesh::NAMESPACE, "--selector", &selector];
        let pods = cluster.kubectl().list(&pods).await?;
        let live = pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let statuses = live.map(|pod| &pod["status"]["containerStatuses"][0]);
        let ready = statuses.filter(|status| status["ready"] == true);
        Ok(ready.map(|status| status["restartCount"].as_u64().unwrap_or_default()).collect())
    };
    let before: u64 = restarts().await?.iter().sum();
    let command = format!("kill -9 $(busybox pidof {program})");
    for node in ["n1", "n2"] {
        let ran = cluster.run_on(node, &["sh", "-c", &command]).await?;
        assert_eq!(ran.code, 0, "{ran:?}");
    }
    wait::until(&format!("{program} came back"), SOON, async || {
        let now = restarts().await.map_err(|error| error.to_string())?;
        if now.len() == 2 && now.iter().sum::<u64>() >= before + 2 { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await?;
    Ok(())
}

/// Names of the ready pods of one of the mesh's programs.
async fn ready_pods(cluster: &Cluster, program: &str) -> ambit_cluster::Result<Vec<String>> {
    let selector = format!("app.kubernetes.io/name={program}");
    let pods = ["pods", "--namespace", mesh::NAMESPACE, "--selector", &selector];
    let pods = cluster.kubectl().list(&pods).await?;
    let ready = pods.iter().filter(|pod| {
        let status = &pod["status"]["containerStatuses"][0];
        status["ready"] == true && pod["metadata"]["deletionTimestamp"].is_null()
    });
    Ok(ready.filter_map(|pod| pod["metadata"]["name"].as_str()).map(str::to_owned).collect())
}

async fn kubernetes_restarts(cluster: &Cluster) -> Outcome {
    let apps = start(cluster).await?;
    for (program, away) in [("kube-apiserver", AWAY), ("etcd", Duration::ZERO)] {
        cluster.stop_program(program).await?;
        // Nothing can be asked meanwhile: the load's counts come by the API server as well.
        tokio::time::sleep(away).await;
        cluster.start_program(program).await?;
        expect_progress(cluster).await.map_err(|error| format!("after a restart of {program}: {error}"))?;
    }
    let kill = "kill -9 $(busybox pidof kubelet)";
    assert_eq!(cluster.run_on("n2", &["sh", "-c", kill]).await?.code, 0);
    expect_progress(cluster).await.map_err(|error| format!("after a restart of kubelet: {error}"))?;
    Ok(apps.stop(cluster).await?)
}

async fn crash(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    let apps = Apps::start(cluster, NAMESPACE, ("n1", "n2")).await?;
    set_mode(cluster, NAMESPACE, true).await?;
    cluster.crash("n2").await?;
    cluster.boot("n2").await?;
    let pod = ["pods", "--namespace", NAMESPACE, "--selector", "app=server"];
    let restarted = |list: &Value| {
        let status = &list["items"][0]["status"]["containerStatuses"][0];
        status["restartCount"].as_u64() >= Some(1) && status["ready"] == true
    };
    kubectl.wait_for(ROLLOUT, &pod, restarted).await?;
    for what in ["daemonset/ztunnel", "daemonset/ambit-node", "deployment/ambit-control"] {
        kubectl.rolled_out(mesh::NAMESPACE, what, SOON).await?;
    }
    wait::until("the server answers", SOON, async || {
        apps.request(cluster).await.map_err(|error| error.to_string())
    })
    .await?;
    expect_tunnelled_request(cluster, &apps).await?;
    Ok(apps.stop(cluster).await?)
}

async fn hundred(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    kubectl.apply(HUNDRED).await?;
    kubectl.rolled_out("hundred", "deployment/many", Duration::from_secs(300)).await?;
    wait_until_enrolled(cluster, "hundred", true).await?;
    kubectl.run(&["delete", "namespace", "hundred", "--wait"]).await?;
    Ok(())
}

pub(crate) const LOAD: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: load, namespace: load}
spec:
  serviceAccountName: client
  nodeName: n1
  terminationGracePeriodSeconds: 1
  containers:
  - {name: load, image: "local/app:1", imagePullPolicy: IfNotPresent, args: [load, "http://server/seen-in-the-clear"]}
"#;

const HUNDRED: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: hundred, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: many, namespace: hundred}
spec:
  replicas: 100
  progressDeadlineSeconds: 300
  selector: {matchLabels: {app: many}}
  template:
    metadata: {labels: {app: many}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: wait, image: "local/app:1", imagePullPolicy: IfNotPresent, args: [serve]}
"#;
