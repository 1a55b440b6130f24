//! Pods that are enrolled, served and unenrolled.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use ambit_api::workload::zds::ZdsHello;
use ambit_api::workload::zds::workload_request::Payload;
use ambit_net::seqpacket::SeqPacket;
use ambit_net::{Netns, PROXY_MARK};
use ambit_node::redirect::{self, FormerSettings, Options, Stage, plan};
use ambit_node::zds::MAX_PACKET;
use ambit_node::{AgentError, PodSpec, PodState};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::bed::{Proxy, Running, SOON, dial, state};
use crate::common::{eventually, pair, spec};

#[tokio::test]
async fn a_pod_is_pending_with_rules_in_until_a_proxy_serves_it() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let mut events = running.agent.events();
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    let wanted = plan(&Options::default(), Stage::In);
    assert_eq!(redirect::verify(&pod.netns, &wanted).await.unwrap(), []);
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Pending));

    let mut proxy = running.proxy(true).await;
    proxy.obey_add("a").await;
    assert!(matches!(proxy.obey().await, Payload::SnapshotSent(_)));
    assert!(running.agent.wait_enabled("a", SOON).await);
    let seen: Vec<_> =
        [events.recv().await.unwrap(), events.recv().await.unwrap()].map(|event| event.status.state).into();
    assert_eq!(seen, [PodState::Pending, PodState::Enabled]);

    let (add, descriptors) = &proxy.pods["a"];
    let info = add.workload_info.clone().unwrap();
    assert_eq!(
        (info.name, info.namespace, info.service_account),
        ("reviews-a".into(), "shop".into(), "reviews".into())
    );
    assert_eq!(add.listeners.len() + 1, descriptors.len());
    let netns = Netns::from_fd(descriptors[0].try_clone().unwrap()).unwrap();
    assert_eq!(netns.id(), pod.netns.id());
}

#[tokio::test]
async fn passed_listeners_accept_what_was_redirected() {
    let (outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    proxy.obey_add("a").await;
    let to = SocketAddr::new(outside.v4.into(), 9080);
    let mut app = dial(&pod.netns, to).await.unwrap();
    let (mut taken, _) = proxy.listener("a", 15001).accept().await.unwrap();
    assert_eq!(ambit_net::original_dst(&taken).unwrap(), to);
    app.write_all(b"x").await.unwrap();
    assert_eq!(taken.read_u8().await.unwrap(), b'x');
}

#[tokio::test]
async fn no_new_connection_fails_while_a_pod_enrols_and_leaves() {
    let (outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    let to = SocketAddr::new(outside.v4.into(), 9080);
    let server = ambit_net::listen::listen_tcp(&outside.netns, to, Default::default()).await.unwrap();
    let server = TcpListener::from_std(server).unwrap();
    let direct = tokio::spawn(async move {
        let mut taken = Vec::new();
        while let Ok((stream, _)) = server.accept().await {
            taken.push(stream);
        }
    });
    let netns = pod.netns.clone();
    let (stop, mut stopped) = tokio::sync::oneshot::channel();
    let (count, counted) = tokio::sync::watch::channel(0);
    let dialling = tokio::spawn(async move {
        while stopped.try_recv().is_err() {
            let start = Instant::now();
            dial(&netns, to).await.expect("a connection during the change");
            // tcp(7): a lost first packet is sent again after a second.
            assert!(start.elapsed() < Duration::from_millis(900), "a packet was lost");
            count.send_modify(|dialled| *dialled += 1);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    for _ in 0..3 {
        running.agent.enrol(spec("a", &pod)).await.unwrap();
        let (Payload::Add(add), descriptors) = proxy.receive().await else { panic!("no add") };
        // A proxy that takes its time: connections wait for it.
        let before = *counted.borrow();
        eventually("connections that wait for the proxy", async || *counted.borrow() >= before + 20).await;
        proxy.pods.insert("a".into(), (add, descriptors));
        proxy.ack("").await;
        let listener = proxy.listener("a", 15001);
        let served = tokio::spawn(async move { while listener.accept().await.is_ok() {} });
        running.agent.unenrol("a").await.unwrap();
        while !matches!(proxy.obey().await, Payload::Del(_)) {}
        served.abort();
        eventually("the pod is out", async || state(&running.agent, "a").await.is_none()).await;
    }
    stop.send(()).unwrap();
    dialling.await.unwrap();
    direct.abort();
}

#[tokio::test]
async fn connections_wait_for_a_proxy_and_are_refused_after_hold_for() {
    let (outside, pod) = pair().await;
    let running = Running::start(|config| config.hold_for = Duration::from_secs(2)).await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    let mut first = running.proxy(true).await;
    first.obey_snapshot().await;
    assert!(running.agent.wait_enabled("a", SOON).await);
    drop(first);
    eventually("the proxy is missed", async || running.agent.proxies() == 0).await;

    let to = SocketAddr::new(outside.v4.into(), 9080);
    let mut waiting = dial(&pod.netns, to).await.expect("held, not refused");
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Enabled));
    let mut second = running.proxy(true).await;
    second.obey_snapshot().await;
    let (mut taken, _) = second.listener("a", 15001).accept().await.unwrap();
    waiting.write_all(b"x").await.unwrap();
    assert_eq!(taken.read_u8().await.unwrap(), b'x');
    drop(second);

    eventually("connections are refused", async || dial(&pod.netns, to).await.is_err()).await;
    // Bound again for the next proxy.
    let mut third = running.proxy(true).await;
    third.obey_snapshot().await;
    dial(&pod.netns, to).await.expect("accepted again");
}

#[tokio::test]
async fn of_two_proxies_the_newest_gets_adds_and_both_get_dels() {
    let (_outside, pod) = pair().await;
    let (_outside2, pod2) = pair().await;
    let running = Running::start(|_| {}).await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    let mut old = running.proxy(true).await;
    old.obey_snapshot().await;
    let mut new = running.proxy(true).await;
    new.obey_snapshot().await;
    running.agent.enrol(spec("b", &pod2)).await.unwrap();
    new.obey_add("b").await;
    old.hears_nothing().await;
    // Both accept from one queue.
    let inode = |proxy: &Proxy| {
        let listener = proxy.listener("a", 15008);
        std::os::unix::fs::MetadataExt::ino(
            &std::fs::File::from(OwnedFd::from(listener.into_std().unwrap())).metadata().unwrap(),
        )
    };
    assert_eq!(inode(&old), inode(&new));
    running.agent.remove_pod("a", None).await.unwrap();
    for proxy in [&mut old, &mut new] {
        assert!(matches!(proxy.obey().await, Payload::Del(del) if del.uid == "a"));
    }
    drop(new);
    old.obey_add("b").await;
}

#[tokio::test]
async fn a_proxy_that_takes_no_listeners_finds_free_ports() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    let mut ours = running.proxy(true).await;
    ours.obey_snapshot().await;
    drop(ours);
    let mut foreign = running.proxy(false).await;
    foreign.obey_snapshot().await;
    let (add, descriptors) = &foreign.pods["a"];
    assert_eq!((add.listeners.len(), descriptors.len()), (0, 1));
    let options = ambit_net::listen::Options::marked(PROXY_MARK);
    for port in [15001, 15006, 15008] {
        let at = SocketAddr::new("0.0.0.0".parse().unwrap(), port);
        ambit_net::listen::listen_tcp(&pod.netns, at, options).await.expect("the port is free");
    }
}

#[tokio::test]
async fn a_pod_that_a_proxy_refuses_is_pending_with_the_reason() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    assert!(matches!(proxy.receive().await.0, Payload::Add(_)));
    proxy.ack("no certificate").await;
    eventually("the reason is known", async || {
        running.agent.status("a").is_some_and(|s| s.reason.as_deref() == Some("no certificate"))
    })
    .await;
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Pending));
    proxy.obey_add("a").await;
    assert!(running.agent.wait_enabled("a", SOON).await);
    assert_eq!(running.agent.status("a").unwrap().reason, None);
}

#[tokio::test]
async fn a_leaving_pod_is_kept_until_its_last_connection_ends() {
    let (outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    proxy.obey_add("a").await;
    let to = SocketAddr::new(outside.v4.into(), 9080);
    let mut app = dial(&pod.netns, to).await.unwrap();
    let (mut taken, _) = proxy.listener("a", 15001).accept().await.unwrap();

    running.agent.unenrol("a").await.unwrap();
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Leaving));
    let server = ambit_net::listen::listen_tcp(&outside.netns, to, Default::default()).await.unwrap();
    let server = TcpListener::from_std(server).unwrap();
    dial(&pod.netns, to).await.unwrap();
    tokio::time::timeout(SOON, server.accept()).await.expect("a direct connection").unwrap();
    // The tunnelled connection goes on, and nothing is sent to the proxy yet.
    proxy.hears_nothing().await;
    app.write_all(b"x").await.unwrap();
    assert_eq!(taken.read_u8().await.unwrap(), b'x');

    drop((app, taken));
    assert!(matches!(proxy.obey().await, Payload::Del(del) if del.uid == "a"));
    eventually("the pod is out", async || state(&running.agent, "a").await.is_none()).await;
    assert_eq!(ambit_node::nft::tables(&pod.netns).await.unwrap(), [] as [&str; 0]);
    assert_eq!(std::fs::read_dir(running.directory.path().join("pods")).unwrap().count(), 0);
    // And in again.
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    proxy.obey_add("a").await;
    assert!(running.agent.wait_enabled("a", SOON).await);
}

#[tokio::test]
async fn a_leaving_pod_is_served_for_its_grace() {
    let (outside, pod) = pair().await;
    let running = Running::start(|config| config.leave_grace = Duration::from_secs(1)).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    proxy.obey_add("a").await;
    running.agent.unenrol("a").await.unwrap();
    proxy.hears_nothing().await;
    // A peer that has not heard of it yet still tunnels.
    let peer = dial(&outside.netns, SocketAddr::new(pod.v4.into(), 15008)).await.unwrap();
    drop((proxy.listener("a", 15008).accept().await.unwrap(), peer));
    assert!(matches!(proxy.obey().await, Payload::Del(_)));
}

#[tokio::test]
async fn a_connection_is_closed_at_the_leave_timeout() {
    let (outside, pod) = pair().await;
    let running = Running::start(|config| config.leave_timeout = Duration::from_millis(500)).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    proxy.obey_add("a").await;
    let _app = dial(&pod.netns, SocketAddr::new(outside.v4.into(), 9080)).await.unwrap();
    let _taken = proxy.listener("a", 15001).accept().await.unwrap();
    running.agent.unenrol("a").await.unwrap();
    assert!(matches!(proxy.obey().await, Payload::Del(_)));
    eventually("the pod is out", async || state(&running.agent, "a").await.is_none()).await;
}

#[tokio::test]
async fn a_pod_that_comes_back_while_it_leaves_stays() {
    let (outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    proxy.obey_add("a").await;
    assert!(running.agent.wait_enabled("a", SOON).await);
    let to = SocketAddr::new(outside.v4.into(), 9080);
    let app = dial(&pod.netns, to).await.unwrap();
    let taken = proxy.listener("a", 15001).accept().await.unwrap();
    running.agent.unenrol("a").await.unwrap();
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    assert_eq!(state(&running.agent, "a").await, Some(PodState::Enabled));
    drop((app, taken));
    proxy.hears_nothing().await;
    dial(&pod.netns, to).await.unwrap();
    proxy.listener("a", 15001).accept().await.unwrap();
}

#[tokio::test]
async fn the_wrong_namespace_is_given_no_identity() {
    let (outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let swapped = PodSpec { netns: Some(outside.netns.clone()), ..spec("a", &pod) };
    let error = running.agent.enrol(swapped).await.unwrap_err();
    assert!(
        matches!(&error, AgentError::WrongNamespace { missing, .. } if *missing == pod.addresses()),
        "{error}"
    );
    let nameless = PodSpec { ips: vec![], ..spec("a", &pod) };
    assert!(matches!(running.agent.enrol(nameless).await, Err(AgentError::WrongNamespace { .. })));
    let own = PodSpec { netns: Some(Netns::current().unwrap()), ..spec("a", &pod) };
    assert!(matches!(running.agent.enrol(own).await, Err(AgentError::HostNetwork { .. })));
    assert_eq!(running.agent.statuses().len(), 0);
    assert_eq!(ambit_node::nft::tables(&pod.netns).await.unwrap(), [] as [&str; 0]);
}

#[tokio::test]
async fn older_connections_are_counted_until_they_end() {
    let (outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let to = SocketAddr::new(outside.v4.into(), 9080);
    let server = ambit_net::listen::listen_tcp(&outside.netns, to, Default::default()).await.unwrap();
    let server = TcpListener::from_std(server).unwrap();
    let kept = dial(&pod.netns, to).await.unwrap();
    let accepted = server.accept().await.unwrap();
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    assert_eq!(running.agent.status("a").unwrap().older_connections, 1);
    drop(accepted);
    drop(kept);
    eventually("none is left", async || {
        assert_eq!(running.agent.repair().await, []);
        running.agent.status("a").unwrap().older_connections == 0
    })
    .await;
}

#[tokio::test]
async fn tampering_is_repaired() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|config| config.repair_interval = Duration::from_millis(100)).await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    redirect::remove(&pod.netns, &FormerSettings::default()).await.unwrap();
    let wanted = plan(&Options::default(), Stage::In);
    eventually("it is repaired", async || redirect::verify(&pod.netns, &wanted).await.unwrap().is_empty())
        .await;
}

#[tokio::test]
async fn a_hostile_proxy_is_turned_away_and_others_are_served() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    running.agent.enrol(spec("a", &pod)).await.unwrap();
    let path = running.directory.path().join("ztunnel.sock");
    for hello in
        [&[0xff; 16][..], &[0; 2000], &ZdsHello { version: 7, takes_listeners: true }.encode_to_vec()]
    {
        let socket = SeqPacket::connect(&path).unwrap();
        socket.send(hello, &[]).await.unwrap();
        let mut buffer = [0; MAX_PACKET];
        let ended = tokio::time::timeout(SOON, socket.recv(&mut buffer)).await.expect("an end within 5 s");
        assert!(ended.map_or(0, |received| received.len) == 0);
    }
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    assert!(proxy.pods.contains_key("a"));
}
