//! Kubelet's probes: connections from the host's namespace to enrolled pods.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::process::Command;

use ambit_node::probes::HOST_TABLE;
use ambit_node::redirect::{PROBE_V4, PROBE_V6};
use ambit_node::{PodState, nft};

use crate::bed::{Running, dial, lasting_path, state};
use crate::common::traffic::{accept, listen, talk};
use crate::common::{eventually, pair, spec};

const KUBELET: u32 = 0;
/// A user of no process of the system.
const OTHER: u32 = 54_321;

#[tokio::test]
async fn probes_of_kubelet_reach_an_enrolled_pod_past_capture() {
    let (host, pod) = pair().await;
    let path = lasting_path(&host.netns);
    let running = Running::start(|config| {
        config.host_netns = path;
        config.kubelet_uid = Some(KUBELET);
    })
    .await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    for (ip, probe) in [(pod.v4.into(), IpAddr::from(PROBE_V4)), (pod.v6.into(), PROBE_V6.into())] {
        let to = SocketAddr::new(ip, 9080);
        let app = listen(&pod.netns, to).await;
        // No proxy runs: what is captured waits.
        let mut kubelet = dial(&host.netns, to).await.unwrap();
        let (mut probed, peer) = accept(&app).await;
        assert_eq!(peer.ip(), probe);
        talk(&mut kubelet, &mut probed).await;
    }
    running.agent.remove_pod("a", None).await.unwrap();
    eventually("the pod's rules are gone", async || {
        let wanted = ambit_node::probes::plan(&Default::default(), KUBELET);
        nft::verify(&host.netns, wanted).await.unwrap().is_none()
    })
    .await;
    assert!(ambit_node::probes::remove(&host.netns).await.unwrap());
    assert!(!nft::tables(&host.netns).await.unwrap().iter().any(|name| name == HOST_TABLE));
}

#[tokio::test]
async fn connections_of_other_users_of_the_host_are_captured() {
    let (host, pod) = pair().await;
    let path = lasting_path(&host.netns);
    let running = Running::start(|config| {
        config.host_netns = path;
        config.kubelet_uid = Some(KUBELET);
    })
    .await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Pending));
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    let to = SocketAddr::new(pod.v4.into(), 9080);
    let _app = listen(&pod.netns, to).await;
    let script = format!("exec 3<>/dev/tcp/{}/{}; read -t 5 <&3", to.ip(), to.port());
    let other = move || Command::new("bash").args(["-c", &script]).uid(OTHER).gid(OTHER).spawn();
    let mut other = host.netns.run_blocking(other).unwrap().unwrap();
    let captured = proxy.listener("a", 15006);
    let (_taken, peer) = accept(&captured).await;
    assert_eq!(peer.ip(), IpAddr::from(host.v4));
    other.kill().ok();
    other.wait().unwrap();
}
