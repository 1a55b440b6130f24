//! The command `ambit` on a cluster: what it says of the mesh, of a pod and of objects that do not do what they say, and what it
//! changes.

use std::process::Stdio;
use std::time::Duration;

use ambit_cluster::{Cluster, layout, mesh, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
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
    cases.add("the_command_names_objects_without_effect", name_objects);
    cases.add("the_command_makes_a_waypoint_and_opens_a_page", make);
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

    logs(cluster).await?;
    cluster.kubectl().apply(BLOCKS).await?;
    let (code, sections) = json(cluster, &["check"]).await?;
    assert_eq!(code, 1);
    assert!(sections.to_string().contains("NetworkPolicy looked-at/web"), "{sections}");
    Ok(apps.stop(cluster).await?)
}

/// The log of both replicas of the control plane, and its level.
async fn logs(cluster: &Cluster) -> Outcome {
    let pods = ["pods", "--namespace", mesh::NAMESPACE, "--selector", "app.kubernetes.io/name=ambit-control"];
    let pods = cluster.kubectl().list(&pods).await?;
    let names: Vec<_> = pods.iter().filter_map(|pod| pod["metadata"]["name"].as_str()).collect();
    assert!(names.len() > 1, "{names:?}");
    for args in [&["log", "control", "--tail", "20"][..], &["log", "control", "--level", "debug"]] {
        let said = run(cluster, args).await?;
        assert!(names.iter().all(|name| said.contains(name)), "{args:?}: {said}");
    }
    let more = async || run(cluster, &["log", "control", "--tail", "1000"]).await;
    wait::until("debug lines are written", SOON, async || {
        let said = more().await?;
        if said.contains("DEBUG") { Ok(()) } else { Err(said) }
    })
    .await?;
    run(cluster, &["log", "control", "--reset"]).await?;
    Ok(())
}

async fn name_objects(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    kubectl.apply(WITHOUT_EFFECT).await?;
    let (code, reports) = json(cluster, &["analyze", "--namespace", "analyzed"]).await?;
    assert_eq!(code, 0, "{reports}");
    let of =
        |object: &str| reports.as_array().into_iter().flatten().find(|report| report["object"] == object);
    let policy = of("AuthorizationPolicy analyzed/no-deletes").ok_or(format!("{reports}"))?;
    assert_eq!(policy["level"], "warning", "{policy}");
    assert!(policy["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()), "{policy}");
    let (code, reports) = json(cluster, &["analyze", "--strict", "--namespace", "analyzed"]).await?;
    assert_eq!(code, 1, "{reports}");

    // Beside Istio with a trust domain of its own.
    let (code, found) = json(cluster, &["migrate", "check", "--istio-namespace", "analyzed"]).await?;
    assert_eq!(code, 1, "{found}");
    let settings = found["settings"].to_string();
    assert!(settings.contains("Istio's is elsewhere.example, Ambit's cluster.local"), "{settings}");
    assert!(found["objects"].to_string().contains("analyzed/no-deletes"), "{found}");
    kubectl.run(&["delete", "namespace", "analyzed", "--wait"]).await?;
    Ok(())
}

async fn make(cluster: &Cluster) -> Outcome {
    let apps = Apps::start(cluster, "made", ("n1", "n2")).await?;
    set_mode(cluster, "made", true).await?;
    let apply =
        ["waypoint", "apply", "--namespace", "made", "--enroll-namespace", "--wait", "--timeout", "240"];
    let said = run(cluster, &apply).await?;
    assert!(said.contains("namespace made labelled with istio.io/use-waypoint=waypoint"), "{said}");
    let (code, status) = json(cluster, &["waypoint", "status", "--namespace", "made"]).await?;
    assert_eq!((code, &status["programmed"]), (0, &true.into()), "{status}");
    wait::until("the client's proxy goes through the waypoint", SOON, async || {
        let (_, dumps) = json(cluster, &["config", "services", "n1"]).await?;
        let services = dumps[0]["entries"].as_array().into_iter().flatten();
        let bound =
            services.into_iter().find(|service| service["hostname"] == "server.made.svc.cluster.local");
        if bound.is_some_and(|service| !service["waypoint"].is_null()) {
            Ok(())
        } else {
            Err(dumps.to_string())
        }
    })
    .await?;
    apps.request(cluster).await?;

    let page = open_page(cluster, &["dashboard", "control"]).await?;
    assert!(page["version"].is_string() && !page["resources"].is_null(), "{page}");
    let page = open_page(cluster, &["dashboard", "n1"]).await?;
    assert!(page["workloads"].is_array(), "{page}");

    let said = run(cluster, &["waypoint", "delete", "waypoint", "--namespace", "made"]).await?;
    assert!(said.contains("waypoint made/waypoint deleted"), "{said}");
    let (_, left) = json(cluster, &["waypoint", "list", "--namespace", "made"]).await?;
    let left: Vec<_> =
        left.as_array().into_iter().flatten().filter(|gateway| gateway["name"] == "waypoint").collect();
    assert!(left.is_empty(), "{left:?}");
    Ok(apps.stop(cluster).await?)
}

/// Has the command open a page, reads it as JSON, and ends the command as Ctrl-C does.
async fn open_page(cluster: &Cluster, args: &[&str]) -> Result<Value, Box<dyn std::error::Error>> {
    let mut child = command(cluster, args)?.stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    let line = tokio::time::timeout(SOON, lines.next_line()).await??.ok_or("it ended")?;
    let url = line.strip_prefix("open ").ok_or_else(|| line.clone())?;
    let read = Command::new("curl").args(["--silent", "--show-error", "--fail", url]).output().await?;
    if !read.status.success() {
        return Err(String::from_utf8_lossy(&read.stderr).into());
    }
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).ok_or("it ended")?;
    kill(Pid::from_raw(pid), Signal::SIGINT)?;
    let ended = tokio::time::timeout(SOON, child.wait()).await??;
    assert!(ended.success(), "{args:?}: {ended}");
    Ok(serde_json::from_slice(&read.stdout)?)
}

/// The command, for this cluster, with the test bed's Helm.
pub(crate) fn command(cluster: &Cluster, args: &[&str]) -> Result<Command, String> {
    let program = layout::built().map_err(|error| error.to_string())?.join("ambit");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(&program);
    command.args(args).arg("--kubeconfig").arg(cluster.kubectl().kubeconfig());
    command.env("PATH", format!("{}:{path}", cluster.layout().bin().display()));
    if program.exists() { Ok(command) } else { Err(format!("{}: run `make build`", program.display())) }
}

/// What a command says that is to refuse.
pub(crate) async fn refusal(cluster: &Cluster, args: &[&str]) -> Result<String, String> {
    match run(cluster, args).await {
        Ok(said) => Err(format!("{args:?} did it: {said}")),
        Err(said) => Ok(said),
    }
}

/// What a command prints, whether it ends well or not.
pub(crate) async fn output(cluster: &Cluster, args: &[&str]) -> Result<String, String> {
    let ran = command(cluster, args)?.output().await.map_err(|error| error.to_string())?;
    Ok([ran.stdout, ran.stderr].iter().map(|text| String::from_utf8_lossy(text)).collect())
}

/// What a command prints; a failure is an error.
pub(crate) async fn run(cluster: &Cluster, args: &[&str]) -> Result<String, String> {
    let ran = command(cluster, args)?.output().await.map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    let errors = String::from_utf8_lossy(&ran.stderr);
    if ran.status.success() { Ok(said) } else { Err(format!("{args:?}: {}: {said}{errors}", ran.status)) }
}

/// Exit code and result of a command.
pub(crate) async fn json(cluster: &Cluster, args: &[&str]) -> Result<(i32, Value), String> {
    let ran = command(cluster, &[args, &["--output", "json"]].concat())?.output().await;
    let ran = ran.map_err(|error| error.to_string())?;
    let output = String::from_utf8_lossy(&ran.stdout);
    let errors = String::from_utf8_lossy(&ran.stderr);
    let value =
        serde_json::from_str(&output).map_err(|error| format!("{args:?}: {error}: {output}{errors}"))?;
    Ok((ran.status.code().unwrap_or(-1), value))
}

/// A policy that names what no node proxy sees, and the settings of an Istio.
const WITHOUT_EFFECT: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: analyzed}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-deletes, namespace: analyzed}
spec: {action: DENY, rules: [{to: [{operation: {methods: [DELETE]}}]}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: analyzed}
data: {mesh: "trustDomain: elsewhere.example"}
"#;
