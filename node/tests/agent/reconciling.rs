//! `Agent::reconcile`: the node in line with the pods that are to be enrolled.

use std::collections::HashSet;
use std::os::unix::fs::symlink;
use std::time::Duration;

use ambit_api::workload::zds::workload_request::Payload;
use ambit_net::Netns;
use ambit_node::discovery::Discovery;
use ambit_node::redirect::{self, Options, Stage, plan};
use ambit_node::{AgentError, PodSpec, PodState, nft};
use ambit_telemetry::Registry;
use tokio::time::Instant;

use crate::bed::{Running, SOON, enrol_all, lasting_path, state};
use crate::common::{bare, eventually, pair, spec};

/// Pods of one node that start at a time.
const MANY: u8 = 100;
/// How long these may take on a busy machine.
const ALL_UP: Duration = Duration::from_secs(60);

#[tokio::test]
async fn proxies_are_served_after_the_first_reconciliation() {
    let (_outside, pod) = pair().await;
    let running = Running::start_in(tempfile::tempdir().unwrap(), |_| {}).await;
    let mut proxy = running.proxy(true).await;
    proxy.hears_nothing().await;
    assert!(!running.agent.health().reconciled);
    let done = running.reconcile(vec![spec("a", &pod)]).await;
    assert_eq!((done.enrolled, done.failed.len()), (1, 0));
    proxy.obey_add("a").await;
    assert!(matches!(proxy.obey().await, Payload::SnapshotSent(_)));
    assert!(running.agent.health().is_ready());
}

#[tokio::test]
async fn a_pod_that_cannot_be_enrolled_is_kept_and_tried_again() {
    let (_outside, pod) = pair().await;
    let directory = tempfile::tempdir().unwrap();
    let namespaces = directory.path().join("netns");
    let discovery = Discovery { proc: None, directories: vec![namespaces.clone()] };
    let running = Running::start_in(directory, |config| config.discovery = discovery).await;
    let done = running.reconcile(vec![PodSpec { netns: None, ..spec("a", &pod) }]).await;
    assert!(matches!(&done.failed[..], [(_, AgentError::NamespaceNotFound { .. })]), "{done:?}");
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Failed));
    let mut proxy = running.proxy(true).await;
    assert!(matches!(proxy.obey().await, Payload::Keep(keep) if keep.uid == "a"));
    assert!(matches!(proxy.obey().await, Payload::SnapshotSent(_)));
    std::fs::create_dir(&namespaces).unwrap();
    symlink(lasting_path(&pod.netns), namespaces.join("cni-1")).unwrap();
    proxy.obey_add("a").await;
    assert!(running.agent.wait_enabled("a", SOON).await);
}

#[tokio::test]
async fn a_pod_that_is_not_desired_is_unenrolled_unless_it_is_newer() {
    let (_outside, pod) = pair().await;
    let (_outside2, newer) = pair().await;
    let running = Running::start(|_| {}).await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    let listed = Instant::now();
    running.agent.enrol(spec("b", &newer)).await.unwrap();
    let done = running.agent.reconcile(vec![], &HashSet::new(), listed).await;
    assert_eq!(done.unenrolled, ["a"]);
    eventually("it is out", async || running.agent.status("a").is_none()).await;
    assert_eq!(nft::tables(&pod.netns).await.unwrap(), [] as [&str; 0]);
    assert_eq!(state(&running.agent, "b").await, Some(PodState::Pending));
}

#[tokio::test]
async fn namespaces_are_found_by_address_and_those_of_no_pod_cleaned() {
    let (outside, pod) = pair().await;
    let (_outside2, left) = pair().await;
    let directory = tempfile::tempdir().unwrap();
    let namespaces = directory.path().join("netns");
    std::fs::create_dir(&namespaces).unwrap();
    std::fs::write(namespaces.join("no-namespace"), "").unwrap();
    let discovery = Discovery { proc: None, directories: vec![namespaces.clone()] };
    let theirs = nft::Table { name: "theirs".into(), chains: vec![] };
    nft::apply(&left.netns, theirs).await.unwrap();
    redirect::apply(&left.netns, &plan(&Options::default(), Stage::In)).await.unwrap();
    for (name, host) in [("outside", &outside), ("pod", &pod)] {
        symlink(lasting_path(&host.netns), namespaces.join(name)).unwrap();
    }
    let running = Running::start_in(directory, |config| config.discovery = discovery).await;
    let desired = PodSpec { netns: None, ..spec("a", &pod) };
    let done = running.reconcile(vec![desired.clone()]).await;
    assert_eq!((done.enrolled, done.cleaned), (1, vec![]));
    assert_eq!(redirect::verify(&pod.netns, &plan(&Options::default(), Stage::In)).await.unwrap(), []);
    // It holds the pod's address as well: only the agent's own knowledge distinguishes the two from here on.
    symlink(lasting_path(&left.netns), namespaces.join("left")).unwrap();
    let done = running.reconcile(vec![desired]).await;
    assert_eq!((done.enrolled, done.cleaned), (1, vec![left.netns.id()]));
    assert_eq!(nft::tables(&left.netns).await.unwrap(), ["theirs"]);
    assert_eq!(redirect::verify(&pod.netns, &plan(&Options::default(), Stage::In)).await.unwrap(), []);
}

#[tokio::test]
async fn namespaces_of_processes_are_found() {
    let netns = Netns::create().unwrap();
    let sleep = || std::process::Command::new("sleep").arg("60").spawn();
    let mut process = netns.run_blocking(sleep).unwrap().unwrap();
    let found = Discovery { proc: Some("/proc".into()), directories: vec![] }.walk().await;
    process.kill().unwrap();
    process.wait().unwrap();
    let path = format!("/proc/{}/ns/net", process.id());
    assert!(
        found.namespaces.iter().any(|found| found.netns.id() == netns.id() && found.path.ends_with(&path))
    );
}

/// A procfs that shows one process.
fn process(proc: &std::path::Path, pid: u32, pod: &str, netns: &Netns) {
    let directory = proc.join(pid.to_string());
    std::fs::create_dir_all(directory.join("ns")).unwrap();
    symlink(lasting_path(netns), directory.join("ns/net")).unwrap();
    std::fs::write(directory.join("cgroup"), format!("0::/kubepods/pod{pod}/c1\n")).unwrap();
}

#[tokio::test]
async fn a_namespace_of_another_pods_process_is_not_believed() {
    const POD: &str = "0b0bd2b6-4f4c-4e31-9d6b-0a4f4f6a7d10";
    const SQUATTER: &str = "1c1ce3c7-4f4c-4e31-9d6b-0a4f4f6a7d10";
    let (_outside, pod) = pair().await;
    // It gave itself the same addresses.
    let (_outside2, squatted) = pair().await;
    let directory = tempfile::tempdir().unwrap();
    let (proc, netns) = (directory.path().join("proc"), directory.path().join("netns"));
    process(&proc, 11, SQUATTER, &squatted.netns);
    let discovery = Discovery { proc: Some(proc.clone()), directories: vec![netns.clone()] };
    let running = Running::start_in(directory, |config| config.discovery = discovery).await;
    let desired = PodSpec { netns: None, ..spec(POD, &pod) };
    let done = running.reconcile(vec![desired.clone()]).await;
    assert!(matches!(&done.failed[..], [(_, AgentError::NamespaceNotFound { .. })]), "{done:?}");

    process(&proc, 12, POD, &pod.netns);
    let done = running.reconcile(vec![desired.clone()]).await;
    assert_eq!((done.enrolled, done.failed.len()), (1, 0), "{done:?}");
    let wanted = plan(&Options::default(), Stage::In);
    assert_eq!(redirect::verify(&pod.netns, &wanted).await.unwrap(), []);
    assert_eq!(nft::tables(&squatted.netns).await.unwrap(), [] as [&str; 0]);

    // A second namespace of the pod's own does not outdo that of the runtime.
    std::fs::create_dir(&netns).unwrap();
    symlink(lasting_path(&pod.netns), netns.join("cni-1")).unwrap();
    process(&proc, 13, POD, &squatted.netns);
    running.agent.remove_pod(POD, None).await.unwrap();
    let done = running.reconcile(vec![desired]).await;
    assert_eq!((done.enrolled, done.failed.len()), (1, 0), "{done:?}");
    assert_eq!(nft::tables(&squatted.netns).await.unwrap(), [] as [&str; 0]);
}

#[tokio::test]
async fn a_deleted_pod_whose_processes_run_stays_captured() {
    const POD: &str = "0b0bd2b6-4f4c-4e31-9d6b-0a4f4f6a7d10";
    let (_outside, pod) = pair().await;
    let directory = tempfile::tempdir().unwrap();
    let proc = directory.path().join("proc");
    let sleep = || std::process::Command::new("sleep").arg("60").spawn();
    let mut live = pod.netns.run_blocking(sleep).unwrap().unwrap();
    let entry = proc.join(live.id().to_string());
    std::fs::create_dir_all(&entry).unwrap();
    symlink(format!("/proc/{}/ns", live.id()), entry.join("ns")).unwrap();
    std::fs::write(entry.join("cgroup"), format!("0::/kubepods/pod{POD}/c1\n")).unwrap();
    let discovery = Discovery { proc: Some(proc), directories: vec![] };
    let running = Running::start_in(directory, |config| config.discovery = discovery).await;
    let done = running.reconcile(vec![PodSpec { netns: None, ..spec(POD, &pod) }]).await;
    assert_eq!((done.enrolled, done.failed.len()), (1, 0), "{done:?}");

    // What `kubectl delete --force` or the garbage collection of pods does.
    running.agent.remove_pod(POD, None).await.unwrap();
    let done = running.reconcile(vec![]).await;
    assert_eq!((running.agent.status(POD), done.cleaned), (None, vec![]));
    assert_eq!(redirect::verify(&pod.netns, &plan(&Options::default(), Stage::In)).await.unwrap(), []);

    // What an agent left behind in a pod that runs outside the mesh is removed.
    let outside = HashSet::from([POD.to_owned()]);
    let done = running.agent.reconcile(vec![], &outside, Instant::now()).await;
    live.kill().unwrap();
    live.wait().unwrap();
    assert_eq!(done.cleaned, [pod.netns.id()]);
    assert_eq!(nft::tables(&pod.netns).await.unwrap(), [] as [&str; 0]);
}

#[tokio::test]
async fn a_walk_that_misses_a_process_is_incomplete() {
    let directory = tempfile::tempdir().unwrap();
    let proc = directory.path().join("proc");
    let discovery = Discovery { proc: Some(proc.clone()), directories: vec![] };
    let netns = Netns::create().unwrap();
    process(&proc, 11, "x", &netns);
    // It ended meanwhile.
    std::fs::create_dir_all(proc.join("12")).unwrap();
    assert!(discovery.walk().await.complete);
    // Its namespace cannot be opened.
    std::fs::create_dir_all(proc.join("13/ns")).unwrap();
    symlink("net", proc.join("13/ns/net")).unwrap();
    let walk = discovery.walk().await;
    assert_eq!((walk.namespaces.len(), walk.complete), (1, false));
    std::fs::remove_dir_all(proc.join("13")).unwrap();
    // Nothing is known of its pod.
    std::fs::remove_file(proc.join("11/cgroup")).unwrap();
    std::fs::create_dir(proc.join("11/cgroup")).unwrap();
    assert!(!discovery.walk().await.complete);
    std::fs::remove_dir_all(&proc).unwrap();
    std::fs::write(&proc, "").unwrap();
    assert!(!discovery.walk().await.complete, "processes cannot be listed");
}

/// Without `hostPID` the agent is the first of the processes that it sees, and those of pods are not among them.
#[tokio::test]
async fn a_walk_over_the_agents_own_processes_is_incomplete() {
    let directory = tempfile::tempdir().unwrap();
    let proc = directory.path().join("proc");
    let discovery = Discovery { proc: Some(proc.clone()), directories: vec![] };
    let netns = Netns::create().unwrap();
    process(&proc, 1, "x", &netns);
    symlink("7", proc.join("self")).unwrap();
    assert!(discovery.walk().await.complete);
    std::fs::remove_file(proc.join("self")).unwrap();
    symlink("1", proc.join("self")).unwrap();
    assert!(!discovery.walk().await.complete);
}

#[tokio::test]
async fn an_ambiguous_namespace_is_given_to_no_pod() {
    let (_outside, pod) = pair().await;
    let (_outside2, twin) = pair().await;
    let directory = tempfile::tempdir().unwrap();
    for (name, host) in [("netns-a", &pod), ("netns-b", &twin)] {
        symlink(lasting_path(&host.netns), directory.path().join(name)).unwrap();
    }
    let discovery = Discovery { proc: None, directories: vec![directory.path().into()] };
    let running = Running::start_in(directory, |config| config.discovery = discovery).await;
    let done = running.reconcile(vec![PodSpec { netns: None, ..spec("a", &pod) }]).await;
    assert!(matches!(&done.failed[..], [(_, AgentError::Ambiguous { .. })]), "{done:?}");
    for host in [&pod, &twin] {
        assert_eq!(nft::tables(&host.netns).await.unwrap(), [] as [&str; 0]);
    }
}

#[tokio::test]
async fn a_pod_takes_over_the_namespace_of_its_predecessor() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    running.agent.enrol(spec("old", &pod)).await.unwrap();
    proxy.obey_add("old").await;
    let desired = vec![spec("new", &pod)];
    let (done, ()) = tokio::join!(running.reconcile(desired), async {
        assert!(matches!(proxy.obey().await, Payload::Del(del) if del.uid == "old"));
        proxy.obey_add("new").await;
    });
    assert_eq!(done.enrolled, 1);
    assert_eq!(running.agent.status("old"), None);
    assert_eq!(redirect::verify(&pod.netns, &plan(&Options::default(), Stage::In)).await.unwrap(), []);
}

#[tokio::test]
async fn a_hundred_pods_that_start_together_are_all_enrolled() {
    let mut pods = Vec::new();
    for number in 1..=MANY {
        pods.push(bare(number).await);
    }
    let running = Running::start(|_| {}).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    let began = Instant::now();
    enrol_all(&running, &mut proxy, &pods, || ()).await;
    assert!(began.elapsed() < ALL_UP, "it took {:?}", began.elapsed());
    let registry = Registry::new();
    running.agent.register_metrics(&registry);
    let text = registry.encode();
    for line in [
        "ambit_node_pods{state=\"enabled\"} 100",
        "ambit_node_pods{state=\"failed\"} 0",
        "ambit_node_enrolments_total 100",
        "ambit_node_proxies 1",
    ] {
        assert!(text.lines().any(|known| known == line), "{line:?} is missing in\n{text}");
    }
}
