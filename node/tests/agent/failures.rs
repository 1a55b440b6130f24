//! Enrolments that fail, and pods that the agent does not know.

use std::net::SocketAddr;

use ambit_net::PROXY_MARK;
use ambit_net::listen::{Options as SocketOptions, listen_tcp};
use ambit_node::redirect::{self, Options, Stage, plan};
use ambit_node::{AgentError, ErrorKind, PodSpec, PodState, nft};

use crate::bed::{Running, dial, lasting_path, state};
use crate::common::traffic::{listen, set};
use crate::common::{Host, eventually, pair, spec};

/// Options that no kernel accepts: a rule has at most 128 expressions (`NFT_RULE_MAXEXPRS`).
fn impossible() -> Options {
    let virtual_interfaces = (0..200).map(|number| format!("tap{number}")).collect();
    Options { virtual_interfaces, ..Options::default() }
}

/// Nothing of an enrolment is in the namespace.
async fn assert_untouched(pod: &Host) {
    let missing = redirect::verify(&pod.netns, &plan(&Options::default(), Stage::In)).await.unwrap();
    let all = plan(&Options::default(), Stage::In);
    assert_eq!(missing.len(), all.routes.len() + all.settings.len() + 1, "{missing:?}");
    let at = SocketAddr::new("0.0.0.0".parse().unwrap(), 15008);
    eventually("the port of tunnels is free", async || {
        listen_tcp(&pod.netns, at, SocketOptions::marked(PROXY_MARK)).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn a_failed_enrolment_leaves_nothing_behind() {
    let (outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let failing = PodSpec { options: impossible(), ..spec("a", &pod) };
    let error = running.agent.enrol(failing).await.unwrap_err();
    assert!(matches!(error, AgentError::Redirect { .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::Permanent);
    assert_eq!(running.agent.status("a"), None);
    assert_eq!(std::fs::read_dir(running.directory.path().join("pods")).unwrap().count(), 0);
    assert_untouched(&pod).await;
    let to = SocketAddr::new(outside.v4.into(), 9080);
    let server = listen(&outside.netns, to).await;
    dial(&pod.netns, to).await.unwrap();
    server.accept().await.unwrap();
}

#[tokio::test]
async fn a_failed_renewal_keeps_the_pod_captured() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    let failing = PodSpec { options: impossible(), ..spec("a", &pod) };
    running.agent.enrol(failing).await.unwrap_err();
    assert_eq!(redirect::verify(&pod.netns, &plan(&Options::default(), Stage::In)).await.unwrap(), []);
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Pending));
    assert!(running.agent.status("a").unwrap().reason.is_some());
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    assert_eq!(running.agent.status("a").unwrap().reason, None);
}

#[tokio::test]
async fn unenrolling_an_unknown_pod_fails() {
    let running = Running::start(|_| {}).await;
    let error = running.agent.unenrol("nobody").await.unwrap_err();
    assert!(matches!(error, AgentError::NotEnrolled { .. }), "{error}");
}

#[tokio::test]
async fn unenrolling_a_pod_whose_namespace_is_lost_fails() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    let running = Running::start_in(running.stop().await, |_| {}).await;
    let error = running.agent.unenrol("a").await.unwrap_err();
    assert!(matches!(error, AgentError::NamespaceNotFound { .. }), "{error}");
    assert!(running.agent.status("a").is_some(), "it is still known");
    assert!(running.agent.cleanup(&pod.netns).await.unwrap());
    assert_eq!(nft::tables(&pod.netns).await.unwrap(), [] as [&str; 0]);
    assert!(!running.agent.cleanup(&pod.netns).await.unwrap(), "there was nothing left");
}

#[tokio::test]
async fn the_namespace_of_an_enrolled_pod_is_not_cleaned() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    let error = running.agent.cleanup(&pod.netns).await.unwrap_err();
    assert!(matches!(error, AgentError::NamespaceTaken { .. }), "{error}");
    let error = running.agent.enrol(spec("b", &pod)).await.unwrap_err();
    assert!(matches!(error, AgentError::NamespaceTaken { .. }), "{error}");
}

#[tokio::test]
async fn the_end_of_an_old_sandbox_does_not_end_the_new_one() {
    let (_outside, old) = pair().await;
    let (_outside2, new) = pair().await;
    let running = Running::start(|_| {}).await;
    let in_sandbox = |pod, sandbox: &str| PodSpec { sandbox: Some(sandbox.into()), ..spec("a", pod) };
    running.agent.enrol(in_sandbox(&old, "s1")).await.unwrap();
    running.agent.enrol(in_sandbox(&new, "s2")).await.unwrap();
    running.agent.remove_pod("a", Some("s1")).await.unwrap();
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Pending));
    // The sandbox is known after a restart too.
    let running = Running::start_in(running.stop().await, |_| {}).await;
    running.agent.remove_pod("a", Some("s1")).await.unwrap();
    assert!(running.agent.status("a").is_some());
    running.agent.remove_pod("a", Some("s2")).await.unwrap();
    assert_eq!(running.agent.status("a"), None);
}

#[tokio::test]
async fn the_namespace_of_the_hosts_first_process_is_refused() {
    let (host, _pod) = pair().await;
    // The agent's own namespace is another one, as in a container without the host's network.
    let path = lasting_path(&host.netns);
    let running = Running::start(|config| config.host_netns = path).await;
    let error = running.agent.enrol(spec("a", &host)).await.unwrap_err();
    assert!(matches!(error, AgentError::HostNetwork { .. }), "{error}");
    assert_untouched(&host).await;
}

#[tokio::test]
async fn former_settings_are_restored_when_a_pod_leaves() {
    const SETTING: &str = "net/ipv4/tcp_tw_reuse";
    let (_outside, pod) = pair().await;
    set(&pod, SETTING, 0).await;
    let read = || {
        let read = || std::fs::read_to_string(format!("/proc/sys/{SETTING}"));
        pod.netns.run_blocking(read).unwrap().unwrap()
    };
    let running = Running::start(|_| {}).await;
    let lasting = PodSpec { netns_path: Some(lasting_path(&pod.netns)), ..spec("a", &pod) };
    running.agent.enrol(lasting).await.unwrap();
    assert_eq!(read(), "1\n");
    let running =
        Running::start_in(running.stop().await, |config| config.leave_grace = Default::default()).await;
    running.agent.unenrol("a").await.unwrap();
    eventually("the pod is out", async || running.agent.status("a").is_none()).await;
    assert_eq!(read(), "0\n");
}
