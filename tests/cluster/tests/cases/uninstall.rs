//! The end of the mesh: nothing of it stays on nodes, in pods or in the API server, and pods go on.

use std::fs;
use std::time::Duration;

use ambit_cluster::{Cluster, mesh, wait};
use tokio::process::Command;

use super::apps::{Apps, MARKER};
use super::mesh::{OURS, THEIRS, set_mode, wait_until_enrolled};
use super::{Cases, Outcome, Stage, cli};

/// How soon nodes are clean on a busy machine.
const SOON: Duration = Duration::from_secs(240);
/// Kinds whose objects of ours go with the release.
const KINDS: &str = "clusterroles,clusterrolebindings,validatingadmissionpolicies,validatingadmissionpolicybindings,\
                     gatewayclasses,clustertrustbundles";
/// What the agent puts on a node.
const HOST_FILES: &str = "ls /opt/cni/bin/ambit-cni /etc/cni/net.d/*ambit* 2>/dev/null; \
                          grep -l ambit /etc/cni/net.d/* 2>/dev/null; nft list tables | grep ambit";
/// Rules in the network namespaces of pods.
const POD_RULES: &str = "for ns in /run/netns/*; do nsenter --net=$ns nft list tables | grep ambit; done";

pub(crate) fn add(cases: &mut Cases) {
    cases.add_to(Stage::Removal, "uninstalling_leaves_nothing", uninstall);
}

async fn uninstall(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    let apps = Apps::start(cluster, "leave", ("n1", "n2")).await?;
    set_mode(cluster, "leave", true).await?;
    assert!(on_nodes(cluster, HOST_FILES).await?.contains("ambit"), "nothing to remove");
    assert!(on_nodes(cluster, POD_RULES).await?.contains("ambit"), "nothing to remove");
    refuse_umbrella(cluster).await?;
    // Proxies that roll need an agent to become ready, so what earlier cases set differently is put back first.
    mesh::install(cluster, &mesh::SETTINGS).await?;
    let plan = cli::run(cluster, &["uninstall"]).await?;
    assert!(plan.contains("2 nodes") && plan.contains("helm uninstall ambit"), "{plan}");
    assert!(on_nodes(cluster, POD_RULES).await?.contains("ambit"), "it was to say only what it would do");
    let said = cli::run(cluster, &["uninstall", "--yes"]).await?;
    assert!(said.contains("every node is clean"), "{said}");
    wait_until_enrolled(cluster, "leave", false).await?;
    let releases = kubectl.helm(&["list", "--all-namespaces", "--short"]).await?;
    assert_eq!(releases.trim(), "");
    kubectl.run(&["delete", "namespace", mesh::NAMESPACE, "--wait"]).await?;
    for what in [HOST_FILES, POD_RULES] {
        let left = on_nodes(cluster, what).await?;
        assert!(left.trim().is_empty(), "{left}");
    }
    // Definitions stay, with the objects of their kinds.
    for definition in [THEIRS, OURS] {
        kubectl.get(&["customresourcedefinition", definition]).await?;
    }
    let objects = kubectl.run(&["get", KINDS, "--output", "name"]).await?;
    let ours: Vec<_> = objects.lines().filter(|name| name.contains("ambit")).collect();
    assert!(ours.is_empty(), "{ours:?}");
    let answer = wait::until("the pods go on", SOON, async || {
        apps.request(cluster).await.map_err(|error| error.to_string())
    })
    .await?;
    assert!(answer.contains(MARKER), "{answer}");
    Ok(apps.stop(cluster).await?)
}

/// The release of a chart of which Ambit is a dependency holds more than Ambit, and is not uninstalled.
async fn refuse_umbrella(cluster: &Cluster) -> Outcome {
    let directory = cluster.layout().images().join("umbrella");
    let charts = directory.join("charts");
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    fs::create_dir_all(&charts)?;
    fs::create_dir(directory.join("templates"))?;
    fs::write(directory.join("Chart.yaml"), "apiVersion: v2\nname: platform\nversion: 1.0.0\n")?;
    fs::write(
        directory.join("templates/more.yaml"),
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: more}\n",
    )?;
    let chart = cluster.layout().repository().join("charts/ambit");
    let copied = Command::new("cp").arg("--recursive").arg(&chart).arg(&charts).status().await?;
    assert!(copied.success(), "copy {}", chart.display());
    let directory = directory.display().to_string();
    let settings = mesh::SETTINGS.map(|setting| format!("ambit.{setting}")).join(",");
    let upgrade = ["upgrade", mesh::RELEASE, &directory, "--namespace", mesh::NAMESPACE, "--set", &settings];
    cluster.kubectl().helm(&upgrade).await?;
    let said = cli::refusal(cluster, &["uninstall", "--yes"]).await?;
    assert!(said.contains("holds more than Ambit, such as platform/"), "{said}");
    assert!(on_nodes(cluster, POD_RULES).await?.contains("ambit"), "it was to do nothing");
    Ok(())
}

/// What a command prints on both nodes.
async fn on_nodes(cluster: &Cluster, command: &str) -> ambit_cluster::Result<String> {
    let mut output = String::new();
    for node in ["n1", "n2"] {
        output += &cluster.run_on(node, &["sh", "-c", command]).await?.output;
    }
    Ok(output)
}
