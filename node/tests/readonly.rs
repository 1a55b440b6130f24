//! The agent where `/proc/sys` is read-only, as in most containers. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::net::SocketAddr;

use ambit_net::{SocketStock, connect};
use ambit_node::{Agent, AgentConfig, PodState};
use common::traffic::SOON;
use common::{pair, spec};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Runs `test` on threads for which `/proc/sys` is read-only. Threads inherit the mounts of the one that starts them,
/// and the thread that enters namespaces is started within.
fn with_read_only_proc_sys(test: impl Future<Output = ()>) {
    unshare(CloneFlags::CLONE_NEWNS).expect("these tests need root: unsharing mounts failed");
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("/proc/sys"), "/proc/sys", none, MsFlags::MS_BIND, none).unwrap();
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(none, "/proc/sys", none, read_only, none).unwrap();
    assert!(std::fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "2").is_err(), "/proc/sys is still writable");
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(test);
}

#[test]
fn a_pod_is_captured_where_settings_are_read_only() {
    with_read_only_proc_sys(async {
        let (outside, pod) = pair().await;
        let directory = tempfile::tempdir().unwrap();
        let config =
            AgentConfig::new(directory.path().join("ztunnel.sock"), directory.path().join("registry"));
        let (agent, driver) = Agent::start(config).await.unwrap();
        let driver = tokio::spawn(driver);
        let weaknesses = agent.health().weaknesses;
        assert!(weaknesses.iter().any(|weak| weak.missing.contains("tcp_fwmark_accept")), "{weaknesses:?}");
        agent.enrol(spec("a", &pod)).await.expect("enrolled without the settings");
        assert_eq!(agent.status("a").unwrap().state, PodState::Pending);
        let to = SocketAddr::new(outside.v4.into(), 9080);
        connect(&SocketStock::new(pod.netns.clone(), None), to, SOON).await.expect("held for the proxy");
        driver.abort();
    });
}
