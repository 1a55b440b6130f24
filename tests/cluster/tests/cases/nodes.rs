//! The CNI plugin in a list of its own.

use std::time::Duration;

use ambit_cluster::{Cluster, mesh, wait};

use super::apps::Apps;
use super::mesh::{set_mode, wait_until_tunnelled};
use super::{Cases, Outcome};

/// How soon a change has its effect on a busy machine.
const SOON: Duration = Duration::from_secs(240);
/// The plugin's own list on a node.
const OWN_LIST: &str = "/etc/cni/net.d/00-ambit.conflist";
/// The list of the main network on a node.
const MAIN_LIST: &str = "/etc/cni/net.d/10-pods.conflist";

pub(crate) fn add(cases: &mut Cases) {
    cases.add("an_own_list_follows_the_main_network", own_list);
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
