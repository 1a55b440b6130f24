//! What `ambit check` says of nodes before an installation and of an installation for another platform, and the CNI plugin in a list of
//! its own.

use std::time::Duration;

use ambit_cluster::{Cluster, mesh, wait};
use serde_json::Value;

use super::apps::Apps;
use super::cli::json;
use super::mesh::{set_mode, wait_until_tunnelled};
use super::{Cases, Outcome, Stage};

/// How soon a change has its effect on a busy machine.
const SOON: Duration = Duration::from_secs(240);
/// Drops what arrives for tunnels, as a firewall between nodes would.
const BLOCK: &str = "nft add table inet blocked && nft 'add chain inet blocked forward { type filter hook forward priority 0; }' \
                     && nft add rule inet blocked forward tcp dport 15008 drop";
/// Takes that away.
const UNBLOCK: &str = "nft delete table inet blocked";
/// The plugin's own list on a node.
const OWN_LIST: &str = "/etc/cni/net.d/00-ambit.conflist";
/// The list of the main network on a node.
const MAIN_LIST: &str = "/etc/cni/net.d/10-pods.conflist";

pub(crate) fn add_before_mesh(cases: &mut Cases) {
    cases.add_to(Stage::Cluster, "probes_try_out_nodes_before_an_installation", probes);
}

pub(crate) fn add(cases: &mut Cases) {
    cases.add("an_installation_for_another_platform_is_explained", other_platform);
    cases.add("an_own_list_follows_the_main_network", own_list);
}

async fn probes(cluster: &Cluster) -> Outcome {
    cluster.load(&mesh::images(cluster.layout())?).await?;
    assert_eq!(probed(cluster, &[]).await?, Vec::<Value>::new());

    on(cluster, "n2", BLOCK).await?;
    let found = probed(cluster, &["--cni-conf-dir", "/etc/nowhere"]).await;
    on(cluster, "n2", UNBLOCK).await?;
    let found = Value::from(found?).to_string();
    assert!(found.contains("pods of n2 can't be reached on TCP 15008: no answer"), "{found}");
    assert!(found.contains("the CNI plugin would not be called: list /etc/nowhere"), "{found}");

    wait::until("the probes are gone", SOON, async || {
        let namespaces = cluster.kubectl().run(&["get", "namespaces", "--output", "name"]).await;
        let namespaces = namespaces.map_err(|error| error.to_string())?;
        if namespaces.contains("ambit-check") { Err(namespaces) } else { Ok(()) }
    })
    .await?;
    Ok(())
}

/// What the probes of nodes found.
async fn probed(cluster: &Cluster, options: &[&str]) -> Result<Vec<Value>, String> {
    let (_, sections) = json(cluster, &[&["check", "--probe"], options].concat()).await?;
    let mut sections = sections.as_array().cloned().unwrap_or_default();
    let probed = sections.iter_mut().find(|section| section["title"] == "nodes have what the agent needs");
    match probed.map(|section| section["findings"].take()) {
        Some(Value::Array(findings)) => Ok(findings),
        other => Err(format!("no result of probes: {other:?} in {sections:?}")),
    }
}

/// The agents of an installation for MicroK8s find no network, and the command says why.
async fn other_platform(cluster: &Cluster) -> Outcome {
    let chart = cluster.layout().repository().join("charts/ambit").display().to_string();
    let upgrade = ["upgrade", mesh::RELEASE, &chart, "--namespace", mesh::NAMESPACE, "--reuse-values"];
    cluster.kubectl().helm(&[&upgrade[..], &["--set", "platform=microk8s"]].concat()).await?;
    wait::until("the command says what is wrong", SOON, async || {
        let (code, sections) = json(cluster, &["check"]).await?;
        let said = sections.to_string();
        let parts = [
            "it uses /var/snap/microk8s/current/args/cni-network, where this platform has /etc/cni/net.d",
            "the CNI plugin is not installed: no network configuration in /host/cni/net.d yet",
        ];
        if code == 1 && parts.iter().all(|part| said.contains(part)) { Ok(()) } else { Err(said) }
    })
    .await?;
    Ok(mesh::install(cluster, &mesh::SETTINGS).await?)
}

/// With a list of its own the plugin is called although the owner of the main network writes its list anew.
async fn own_list(cluster: &Cluster) -> Outcome {
    mesh::install(cluster, &[&mesh::SETTINGS[..], &["node.cni.ownList=true"]].concat()).await?;
    let own = on(cluster, "n1", &format!("cat {OWN_LIST}")).await?;
    assert!(own.contains("ambit-cni"), "{own}");

    // As its owner does at a boot: the list is written anew, with a setting that it did not have.
    let rewrite = format!(
        "sed 's/\"cniVersion\"/\"disableCheck\": true, \"cniVersion\"/' {MAIN_LIST} > /tmp/list && mv /tmp/list {MAIN_LIST}"
    );
    on(cluster, "n1", &rewrite).await?;
    wait::until("the own list follows", SOON, async || {
        let own = on(cluster, "n1", &format!("cat {OWN_LIST}")).await?;
        if own.contains("disableCheck") && own.contains("ambit-cni") { Ok(()) } else { Err(own) }
    })
    .await?;
    let apps = Apps::start(cluster, "own-list", ("n1", "n2")).await?;
    set_mode(cluster, "own-list", true).await?;
    wait_until_tunnelled(cluster, &apps).await?;
    apps.stop(cluster).await?;

    mesh::install(cluster, &mesh::SETTINGS).await?;
    wait::until("the main list has the entry again", SOON, async || {
        let lists = format!("ls {OWN_LIST} 2>/dev/null; grep -c ambit-cni {MAIN_LIST}");
        let found = on(cluster, "n1", &lists).await?;
        if found.trim() == "1" { Ok(()) } else { Err(found) }
    })
    .await?;
    Ok(())
}

/// What a command prints on a node; its failure is an error.
async fn on(cluster: &Cluster, node: &str, command: &str) -> Result<String, String> {
    let ran = cluster.run_on(node, &["sh", "-c", command]).await.map_err(|error| error.to_string())?;
    if ran.code == 0 { Ok(ran.output) } else { Err(format!("{command}: {ran:?}")) }
}
