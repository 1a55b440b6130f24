//! Policies made of observed traffic: `ambit authz suggest` and `ambit authz diff` on a cluster.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use ambit_cluster::{Cluster, wait};

use super::apps::{Apps, ROLLOUT};
use super::cli::{command, run};
use super::mesh::{set_mode, wait_until_enrolled};
use super::waypoint::put_behind_waypoint;
use super::{Cases, Outcome};

/// How soon something shows on a busy machine.
const SOON: Duration = Duration::from_secs(240);
const NAMESPACE: &str = "observed";

pub(crate) fn add(cases: &mut Cases) {
    cases.add("policies_made_of_traffic_let_in_what_was_seen_and_nothing_else", authz);
}

/// A client and a server in the mesh behind a waypoint.
async fn start(cluster: &Cluster, namespace: &'static str) -> Result<Apps, Box<dyn std::error::Error>> {
    let apps = Apps::start(cluster, namespace, ("n1", "n2")).await?;
    set_mode(cluster, namespace, true).await?;
    put_behind_waypoint(cluster, &apps).await?;
    Ok(apps)
}

/// What a command says while a client sends requests again and again.
pub(crate) async fn during(
    cluster: &Cluster,
    (namespace, client): (&str, &str),
    url: &str,
    args: &[&str],
) -> Result<String, String> {
    let sending = async {
        loop {
            // Some are meant to be refused.
            cluster.kubectl().exec(namespace, client, &["/app", "get", url]).await.ok();
        }
    };
    let mut asked = command(cluster, args)?;
    let output = asked.stdin(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true).output();
    tokio::select! {
        ran = tokio::time::timeout(SOON, output) => {
            let ran = ran.map_err(|_| format!("{args:?} does not end"))?.map_err(|error| error.to_string())?;
            let said = String::from_utf8_lossy(&ran.stdout).into_owned();
            let errors = String::from_utf8_lossy(&ran.stderr);
            if ran.status.success() { Ok(said) } else { Err(format!("{args:?}: {said}{errors}")) }
        }
        () = sending => Err("unreachable".to_owned()),
    }
}

async fn authz(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    let apps = start(cluster, NAMESPACE).await?;
    kubectl.apply(STRANGER).await?;
    kubectl.rolled_out(NAMESPACE, "deployment/stranger", ROLLOUT).await?;
    wait_until_enrolled(cluster, NAMESPACE, true).await?;
    let ask = async |client: &str| {
        let answer =
            kubectl.exec(NAMESPACE, client, &["/app", "get", "http://server/seen-in-the-clear"]).await;
        answer.map_err(|error| error.to_string())
    };
    ask("deployment/client").await?;

    let directory = tempfile::tempdir()?;
    let file = directory.path().join("policies.yaml");
    let path = file.display().to_string();
    // Proxies count off the data path.
    let suggested = wait::until("what was seen is suggested", SOON, async || {
        let suggested = run(cluster, &["authz", "suggest", NAMESPACE]).await?;
        let wanted = [
            "name: allow-server-requests",
            "cluster.local/ns/observed/sa/client",
            "/seen-in-the-clear",
            "cluster.local/ns/observed/sa/waypoint",
            "istio.io/dry-run: \"true\"",
        ];
        if wanted.iter().all(|part| suggested.contains(part)) { Ok(suggested) } else { Err(suggested) }
    })
    .await?;
    assert!(!suggested.contains("sa/stranger"), "{suggested}");
    fs::write(&file, &suggested)?;
    kubectl.apply(&suggested).await?;
    // As a dry run they deny nothing, and would deny nothing of what was seen.
    ask("deployment/client").await?;
    let same = run(cluster, &["authz", "diff", "--file", &path, "--namespace", NAMESPACE]).await?;
    assert!(same.contains("0 would be denied"), "{same}");
    ask("deployment/stranger").await?;
    let differs = wait::until("the stranger's request would be denied", SOON, async || {
        let differs =
            super::cli::refusal(cluster, &["authz", "diff", "--file", &path, "--namespace", NAMESPACE])
                .await?;
        if differs.contains("observed/stranger") { Ok(differs) } else { Err(differs) }
    })
    .await?;
    assert!(!differs.contains("observed/client"), "{differs}");

    // Enforced, as suggested before the stranger came.
    kubectl.apply(&suggested.replace("istio.io/dry-run: \"true\"", "istio.io/dry-run: \"false\"")).await?;
    wait::until("the stranger is denied", SOON, async || match ask("deployment/stranger").await {
        Err(error) if error.contains("403") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await?;
    for _ in 0..20 {
        ask("deployment/client").await?;
    }
    // Past the waypoint nobody gets in either.
    let pods = kubectl.list(&["pods", "--namespace", NAMESPACE, "--selector", "app=server"]).await?;
    let address = pods[0]["status"]["podIP"].as_str().ok_or("no address")?.to_owned();
    let past = ["/app", "get", &format!("http://{address}:8080/seen-in-the-clear")];
    let past = kubectl.exec(NAMESPACE, "deployment/stranger", &past).await;
    assert!(past.is_err(), "{past:?}");
    let enforced = run(cluster, &["authz", "suggest", NAMESPACE, "--enforce"]).await?;
    assert!(!enforced.contains("dry-run") && enforced.contains("sa/client"), "{enforced}");

    // A condition is judged too.
    fs::write(&file, CONDITION)?;
    let differs =
        super::cli::refusal(cluster, &["authz", "diff", "--file", &path, "--namespace", NAMESPACE]).await?;
    assert!(
        differs.contains("denied by TrafficPolicy observed/writers: condition writers does not hold"),
        "{differs}"
    );
    Ok(apps.stop(cluster).await?)
}

const STRANGER: &str = r#"
apiVersion: v1
kind: ServiceAccount
metadata: {name: stranger, namespace: observed}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: stranger, namespace: observed}
spec:
  selector: {matchLabels: {app: stranger}}
  template:
    metadata: {labels: {app: stranger}}
    spec:
      serviceAccountName: stranger
      nodeName: n1
      terminationGracePeriodSeconds: 1
      containers:
      - {name: client, image: "local/app:1", imagePullPolicy: IfNotPresent, args: [wait]}
"#;

const CONDITION: &str = "
apiVersion: ambit.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: writers, namespace: observed}
spec:
  targetRefs: [{group: '', kind: Service, name: server}]
  conditions: [{name: writers, expression: request.method != 'GET'}]
";
