//! The test bed itself: what the other cases rely on.

use std::fs;
use std::time::Duration;

use ambit_cluster::layout::Layout;
use ambit_cluster::{Cluster, Options, cluster, wait};

use super::apps::{Apps, MARKER, ROLLOUT};
use super::{Cases, Outcome, Stage, program};

const SOON: Duration = Duration::from_secs(240);

pub(crate) fn add(cases: &mut Cases) {
    cases.add_to(Stage::Cluster, "pods_on_two_nodes_talk_through_a_service", talk);
    cases.add_to(Stage::Cluster, "a_crashed_node_boots_with_its_pods", crash_and_boot);
    cases.add_to(Stage::Cluster, "a_node_that_is_cut_off_hears_nothing", cut_off);
    cases.add_to(Stage::Cluster, "a_killed_supervisor_leaves_nothing_behind", killed_supervisor);
}

async fn talk(cluster: &Cluster) -> Outcome {
    let capture = cluster.capture(&["n1", "n2"]).await?;
    let apps = Apps::start(cluster, "plain", ("n1", "n2")).await?;
    let answer = apps.request(cluster).await?;
    let captured = capture.stop().await?;
    assert!(answer.contains(MARKER), "{answer}");
    assert_eq!(captured.dropped, 0);
    // Nothing protects it yet, which shows that captures see what pods send.
    assert!(!captured.find(MARKER.as_bytes()).is_empty(), "{:?}", captured.tcp_ports());
    Ok(apps.stop(cluster).await?)
}

async fn crash_and_boot(cluster: &Cluster) -> Outcome {
    let apps = Apps::start(cluster, "crash", ("n1", "n2")).await?;
    let pod = ["pods", "--namespace", "crash", "--selector", "app=server"];
    let before = cluster.kubectl().list(&pod).await?;
    cluster.crash("n2").await?;
    assert!(cluster.run_on("n2", &["true"]).await.is_err(), "a crashed node runs a command");
    cluster.boot("n2").await?;
    let restarted = |list: &serde_json::Value| {
        let status = &list["items"][0]["status"]["containerStatuses"][0];
        status["restartCount"].as_u64() >= Some(1) && status["ready"] == true
    };
    let after = cluster.kubectl().wait_for(ROLLOUT, &pod, restarted).await?;
    assert_eq!(before[0]["metadata"]["uid"], after["items"][0]["metadata"]["uid"]);
    wait::until("the server answers", SOON, async || {
        apps.request(cluster).await.map_err(|error| error.to_string())
    })
    .await?;
    Ok(apps.stop(cluster).await?)
}

async fn cut_off(cluster: &Cluster) -> Outcome {
    let ping = ["busybox", "ping", "-c", "1", "-W", "1", "172.30.0.12"];
    assert_eq!(cluster.run_on("n1", &ping).await?.code, 0);
    cluster.set_link("n2", false).await?;
    assert_ne!(cluster.run_on("n1", &ping).await?.code, 0);
    cluster.set_link("n2", true).await?;
    wait::until("the link is mended", SOON, async || match cluster.run_on("n1", &ping).await {
        Ok(ran) if ran.code == 0 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await?;
    Ok(())
}

/// A second cluster beside the first, of another name, whose supervisor gets no chance to clean up.
async fn killed_supervisor(_: &Cluster) -> Outcome {
    let layout = Layout::find();
    let name = "killed";
    let options = Options { number: 1, nodes: 1, ..Options::new(name, program()) };
    let second = Cluster::start(options).await?;
    let groups = || {
        let entries = fs::read_dir("/sys/fs/cgroup/pids").or_else(|_| fs::read_dir("/sys/fs/cgroup"));
        let names = entries.expect("control groups").flatten().map(|entry| entry.file_name());
        names.filter(|group| group.to_string_lossy().starts_with(&layout.cgroup_prefix(name))).count()
    };
    assert_eq!(groups(), 1);
    second.kill_supervisor().await?;
    wait::until("nothing is left", SOON, async || {
        cluster::clean_dead(&layout).map_err(|error| error.to_string())?;
        if groups() == 0 && !layout.run(name).exists() { Ok(()) } else { Err("something is left".to_owned()) }
    })
    .await?;
    Ok(())
}
