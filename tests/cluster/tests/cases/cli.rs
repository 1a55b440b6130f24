//! The command `ambit` on a cluster: what it says of the mesh, of a pod, and of a policy that blocks tunnels.

use std::time::Duration;

use ambit_cluster::{Cluster, layout, mesh, wait};
use serde_json::Value;
use tokio::process::Command;

use super::apps::Apps;
use super::mesh::{set_mode, wait_until_enrolled};
use super::{Cases, Outcome};

/// How soon something shows on a busy machine.
const SOON: Duration = Duration::from_secs(240);

/// A policy that admits the application's port and not that of tunnels.
const BLOCKS: &str = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: web, namespace: looked-at}, \
                      spec: {podSelector: {}, ingress: [{ports: [{port: 8080}]}]}}";

pub(crate) fn add(cases: &mut Cases) {
    cases.add("the_command_shows_the_mesh_and_what_is_wrong", look);
}

async fn look(cluster: &Cluster) -> Outcome {
    mesh::install(cluster, &mesh::SETTINGS).await?;
    let apps = Apps::start(cluster, "looked-at", ("n1", "n2")).await?;
    let pods = cluster.kubectl().list(&["pods", "--namespace", "looked-at"]).await?;
    let pod = format!("looked-at/{}", pods[0]["metadata"]["name"].as_str().unwrap_or_default());

    let (code, outside) = json(cluster, &["status", &pod]).await?;
    assert_eq!((code, &outside["verdict"]["state"]), (0, &"outside".into()), "{outside}");

    set_mode(cluster, "looked-at", true).await?;
    wait_until_enrolled(cluster, "looked-at", true).await?;
    wait::until("the pod is protected", SOON, async || {
        let (code, status) = json(cluster, &["status", &pod]).await?;
        let state = status["verdict"]["state"] == "protected";
        if code == 0 && state { Ok(()) } else { Err(status.to_string()) }
    })
    .await?;
    wait::until("the mesh is well", SOON, async || {
        let (code, sections) = json(cluster, &["check"]).await?;
        if code == 0 { Ok(()) } else { Err(sections.to_string()) }
    })
    .await?;

    let (_, dumps) = json(cluster, &["config", "certificates", &pod]).await?;
    assert_eq!(dumps[0]["entries"][0]["state"], "Available", "{dumps}");
    let (_, dumps) = json(cluster, &["config", "workloads", &pod]).await?;
    assert_eq!(dumps[0]["entries"][0]["protocol"], "HBONE", "{dumps}");

    cluster.kubectl().apply(BLOCKS).await?;
    let (code, sections) = json(cluster, &["check"]).await?;
    assert_eq!(code, 1);
    assert!(sections.to_string().contains("NetworkPolicy looked-at/web"), "{sections}");
    Ok(apps.stop(cluster).await?)
}

/// Exit code and result of a command.
async fn json(cluster: &Cluster, args: &[&str]) -> Result<(i32, Value), String> {
    let program = layout::built().map_err(|error| error.to_string())?.join("ambit");
    let ran = Command::new(&program)
        .args(args)
        .args(["--output", "json", "--kubeconfig"])
        .arg(cluster.kubectl().kubeconfig())
        .output()
        .await
        .map_err(|error| format!("{}: {error}: run `make build`", program.display()))?;
    let output = String::from_utf8_lossy(&ran.stdout);
    let errors = String::from_utf8_lossy(&ran.stderr);
    let value =
        serde_json::from_str(&output).map_err(|error| format!("{args:?}: {error}: {output}{errors}"))?;
    Ok((ran.status.code().unwrap_or(-1), value))
}
