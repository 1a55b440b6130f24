//! The agent restarted, killed and upgraded while pods are enrolled.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ambit_api::workload::zds::workload_request::Payload;
use ambit_node::nft;
use ambit_node::redirect::{self, Options, Stage, plan};
use ambit_node::{PodSpec, PodState};

use crate::bed::{Running, SOON, dial, lasting_path, state};
use crate::common::traffic::listen;
use crate::common::{eventually, pair, spec};

#[tokio::test]
async fn a_restarted_agent_takes_listeners_back() {
    let (outside, pod) = pair().await;
    let (_outside2, lost) = pair().await;
    let running = Running::start(|_| {}).await;
    let found = PodSpec { netns_path: Some(lasting_path(&pod.netns)), ..spec("a", &pod) };
    running.agent.enrol(found).await.unwrap();
    running.agent.enrol(spec("b", &lost)).await.unwrap();
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    for uid in ["a", "b"] {
        assert!(running.agent.wait_enabled(uid, SOON).await);
    }
    let directory = running.stop().await;
    // The proxy goes on without an agent, and holds the listeners alone.
    let to = SocketAddr::new(outside.v4.into(), 9080);
    dial(&pod.netns, to).await.expect("still served");
    proxy.listener("a", 15001).accept().await.unwrap();

    let running = Running::start_in(directory, |_| {}).await;
    let without = PodSpec { netns: None, ..spec("b", &lost) };
    running.reconcile(vec![PodSpec { netns: None, ..spec("a", &pod) }, without]).await;
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Enabled), "it never stopped being served");
    let listeners = proxy.pods.remove("a").unwrap();
    let mut again = running.proxy(true).await;
    again.obey_add("a").await;
    assert!(matches!(again.obey().await, Payload::Keep(keep) if keep.uid == "b"));
    assert!(matches!(again.obey().await, Payload::SnapshotSent(_)));
    drop(listeners);
    // Only the agent's and the new connection's copies are left; both are the same queue as before.
    dial(&pod.netns, to).await.expect("the listener was taken back");
    again.listener("a", 15001).accept().await.unwrap();
}

/// As for an agent without CAP_SYS_PTRACE, or with a proxy in another process namespace.
#[tokio::test]
async fn a_pod_whose_listeners_cannot_be_taken_back_is_kept() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let lasting = PodSpec { netns_path: Some(lasting_path(&pod.netns)), ..spec("a", &pod) };
    running.agent.enrol(lasting.clone()).await.unwrap();
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    assert!(running.agent.wait_enabled("a", SOON).await);
    let directory = running.stop().await;
    // Another process holds the listeners, as a proxy that cannot be traced does.
    let (_, mut descriptors) = proxy.pods.remove("a").unwrap();
    let mut holder =
        std::process::Command::new("sleep").arg("60").stdin(descriptors.remove(1)).spawn().unwrap();
    drop(descriptors);

    let running = Running::start_in(directory, |config| config.handover = Duration::ZERO).await;
    running.reconcile(vec![lasting]).await;
    let mut again = running.proxy(true).await;
    assert!(matches!(again.obey().await, Payload::Keep(keep) if keep.uid == "a"));
    assert!(matches!(again.obey().await, Payload::SnapshotSent(_)));
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Enabled), "it never stopped being served");
    holder.kill().unwrap();
    holder.wait().unwrap();
    again.obey_add("a").await;
}

/// A process of a pod that has a port of the proxy hands it over to nobody.
#[tokio::test]
async fn a_port_that_an_application_has_delays_no_snapshot() {
    let ((_outside, pod), (_outside2, other)) = (pair().await, pair().await);
    let application = listen(&pod.netns, SocketAddr::new(pod.v4.into(), 15008)).await;
    let running = Running::start(|config| config.handover = SOON * 10).await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    running.agent.enrol(spec("b", &other)).await.unwrap();
    let mut proxy = running.proxy(true).await;
    assert!(matches!(proxy.obey().await, Payload::Keep(keep) if keep.uid == "a"));
    proxy.obey_add("b").await;
    assert!(matches!(proxy.obey().await, Payload::SnapshotSent(_)));
    drop(application);
    proxy.obey_add("a").await;
}

/// A proxy that starts while the agent is replaced may dial the new agent before its predecessor does, which ends once its
/// successor is ready.
#[tokio::test]
async fn a_snapshot_ends_once_held_listeners_are_taken_over() {
    let ((outside, pod), (_outside, other)) = (pair().await, pair().await);
    let running = Running::start(|_| {}).await;
    let lasting = PodSpec { netns_path: Some(lasting_path(&pod.netns)), ..spec("a", &pod) };
    running.agent.enrol(lasting.clone()).await.unwrap();
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    let directory = running.stop().await;
    let (_, mut descriptors) = proxy.pods.remove("a").unwrap();
    let mut predecessor =
        std::process::Command::new("sleep").arg("60").stdin(descriptors.remove(1)).spawn().unwrap();
    drop(descriptors);

    let running = Running::start_in(directory, |config| config.handover = SOON * 10).await;
    running.reconcile(vec![lasting, spec("b", &other)]).await;
    let mut successor = running.proxy(true).await;
    successor.obey_add("b").await;
    successor.hears_nothing().await;
    predecessor.kill().unwrap();
    predecessor.wait().unwrap();
    successor.obey_add("a").await;
    assert!(matches!(successor.obey().await, Payload::SnapshotSent(_)));
    dial(&pod.netns, SocketAddr::new(outside.v4.into(), 9080)).await.expect("held");
}

#[tokio::test]
async fn a_pod_with_an_unreadable_record_stays_served() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    assert!(running.agent.wait_enabled("a", SOON).await);
    let directory = running.stop().await;
    let record = directory.path().join("pods/a.json");
    std::fs::write(&record, "{").unwrap();

    let running = Running::start_in(directory, |_| {}).await;
    let mut events = running.agent.events();
    running.reconcile(vec![spec("a", &pod)]).await;
    assert_eq!(events.recv().await.unwrap().status.state, PodState::Enabled, "its peers keep tunnelling");
    let mut again = running.proxy(true).await;
    again.obey_add("a").await;
    assert_eq!(std::fs::read_to_string(record.with_extension("unreadable")).unwrap(), "{");
}

#[tokio::test]
async fn a_pod_of_which_only_an_unreadable_record_is_known_is_kept() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    let directory = running.stop().await;
    std::fs::write(directory.path().join("pods/a.json"), "{").unwrap();
    let running = Running::start_in(directory, |_| {}).await;
    // It is not desired any more, but there is no way to find its rules.
    assert_eq!(running.reconcile(vec![]).await.failed.len(), 1);
    let mut proxy = running.proxy(true).await;
    assert!(matches!(proxy.obey().await, Payload::Keep(keep) if keep.uid == "a"));
}

#[tokio::test]
async fn an_agent_killed_while_it_enrols_knows_the_pod_afterwards() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let lasting = PodSpec { netns_path: Some(lasting_path(&pod.netns)), ..spec("a", &pod) };
    let agent = running.agent.clone();
    let enrolling = tokio::spawn(async move { agent.enrol(lasting).await });
    eventually("the rules are in", async || redirect::is_present(&pod.netns).await.unwrap()).await;
    let directory = running.stop().await;
    // An agent that ends answers nobody.
    enrolling.await.unwrap().ok();
    let running = Running::start_in(directory, |config| config.leave_grace = Default::default()).await;
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Pending));
    assert_eq!(running.reconcile(vec![]).await.unenrolled, ["a"]);
    eventually("nothing is left", async || !redirect::is_present(&pod.netns).await.unwrap()).await;
}

#[tokio::test]
async fn an_upgraded_agent_replaces_rules_without_a_window() {
    let (outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let lasting = PodSpec { netns_path: Some(lasting_path(&pod.netns)), ..spec("a", &pod) };
    running.agent.enrol(lasting.clone()).await.unwrap();
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    assert!(running.agent.wait_enabled("a", SOON).await);
    let to = SocketAddr::new(outside.v4.into(), 9080);
    let captured = proxy.listener("a", 15001);
    let captured = tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((stream, _)) = captured.accept().await {
            open.push(stream);
        }
    });
    // What is not captured is accepted here.
    let past = listen(&outside.netns, to).await;
    let passed = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&passed);
    let past = tokio::spawn(async move {
        while past.accept().await.is_ok() {
            counting.fetch_add(1, Ordering::Relaxed);
        }
    });
    let (netns, dialled) = (pod.netns.clone(), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&dialled);
    let dialling = tokio::spawn(async move {
        loop {
            dial(&netns, to).await.expect("no connection fails");
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    let wanted = plan(&Options::default(), Stage::In);
    let mut directory = running.stop().await;
    for _ in 0..3 {
        // The rules of an older version: another order, and a chain that is no longer.
        let mut older = wanted.table.clone();
        older.chains.reverse();
        older.chains.push(nft::Chain { name: "old".into(), hook: None, rules: vec![] });
        nft::apply(&pod.netns, older).await.unwrap();
        let before = dialled.load(Ordering::Relaxed);
        let running = Running::start_in(directory, |_| {}).await;
        running.reconcile(vec![lasting.clone()]).await;
        assert_eq!(state(&running.agent, "a").await, Some(PodState::Enabled));
        assert_eq!(redirect::verify(&pod.netns, &wanted).await.unwrap(), []);
        eventually("connections go on", async || dialled.load(Ordering::Relaxed) > before + 20).await;
        directory = running.stop().await;
    }
    assert!(!dialling.is_finished(), "no connection failed");
    dialling.abort();
    assert_eq!(passed.load(Ordering::Relaxed), 0, "connections past the proxy");
    captured.abort();
    past.abort();
}
