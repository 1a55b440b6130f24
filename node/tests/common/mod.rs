//! Namespaces for tests: a client and a pod, joined by a link, each with IPv4 and IPv6. Needs root.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
pub(crate) mod raw;
pub(crate) mod traffic;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use ambit_net::Netns;
use ambit_node::PodSpec;
use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::LinkFlags;
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};

/// A namespace with one interface, `eth0`.
pub(crate) struct Host {
    pub(crate) netns: Netns,
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
}

impl Host {
    pub(crate) fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// The pod `reviews-UID` of the namespace `shop`.
pub(crate) fn spec(uid: &str, pod: &Host) -> PodSpec {
    PodSpec {
        uid: uid.into(),
        name: format!("reviews-{uid}"),
        namespace: "shop".into(),
        service_account: "reviews".into(),
        ips: pod.addresses().to_vec(),
        netns: Some(pod.netns.clone()),
        netns_path: None,
        sandbox: None,
        options: Default::default(),
    }
}

/// Two namespaces joined by a link: `.1` is outside, `.2` the pod. Panics without root, as every test
/// of this kind must not pass unseen.
pub(crate) async fn pair() -> (Host, Host) {
    let outside = Netns::create().expect("these tests need root: creating a network namespace failed");
    let pod = Netns::create().expect("create a network namespace");
    let host = |netns: &Netns, n: u8| Host {
        netns: netns.clone(),
        v4: Ipv4Addr::new(10, 77, 0, n),
        v6: Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, n.into()),
    };
    let (outside, pod) = (host(&outside, 1), host(&pod, 2));
    let (link, driver) = netlink(&outside.netns).await;
    link.link().add(LinkVeth::new("eth0", "peer0").build()).execute().await.expect("make a link");
    let peer = index(&link, "peer0").await;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(&pod.netns));
    link.link()
        .set(LinkUnspec::new_with_index(peer).name("eth0").setns_by_fd(fd).build())
        .execute()
        .await
        .expect("move the link's end");
    driver.abort();
    for (here, there) in [(&outside, &pod), (&pod, &outside)] {
        configure(here, there).await;
    }
    for host in [&outside, &pod] {
        let (link, driver) = netlink(&host.netns).await;
        // A link that the kernel has not started yet loses what is sent.
        eventually("the link runs", async || {
            let eth0 = link.link().get().match_name("eth0").execute().try_next().await;
            eth0.unwrap().unwrap().header.flags.contains(LinkFlags::Running)
        })
        .await;
        driver.abort();
    }
    (outside, pod)
}

async fn configure(here: &Host, there: &Host) {
    let (link, driver) = netlink(&here.netns).await;
    link.link().set(LinkUnspec::new_with_index(1).up().build()).execute().await.expect("lo up");
    let eth0 = index(&link, "eth0").await;
    link.link().set(LinkUnspec::new_with_index(eth0).up().build()).execute().await.expect("eth0 up");
    link.address().add(eth0, here.v4.into(), 24).execute().await.expect("IPv4 address");
    let mut v6 = link.address().add(eth0, here.v6.into(), 64);
    // An address that is being probed for duplicates cannot be used yet.
    v6.message_mut().header.flags = rtnetlink::packet_route::address::AddressHeaderFlags::Nodad;
    v6.execute().await.expect("IPv6 address");
    let v4: RouteMessage = RouteMessageBuilder::<Ipv4Addr>::new().gateway(there.v4).build();
    link.route().add(v4).execute().await.expect("IPv4 default route");
    let v6: RouteMessage = RouteMessageBuilder::<Ipv6Addr>::new().gateway(there.v6).build();
    link.route().add(v6).execute().await.expect("IPv6 default route");
    driver.abort();
}

/// A pod's namespace with nothing but an address.
pub(crate) async fn bare(number: u8) -> Host {
    let netns = Netns::create().unwrap();
    let v4 = Ipv4Addr::new(10, 78, 0, number);
    let (link, driver) = netlink(&netns).await;
    link.link().set(LinkUnspec::new_with_index(1).up().build()).execute().await.unwrap();
    link.address().add(1, v4.into(), 32).execute().await.unwrap();
    driver.abort();
    Host { netns, v4, v6: Ipv6Addr::LOCALHOST }
}

/// A netlink handle inside a namespace.
pub(crate) async fn netlink(inside: &Netns) -> (Handle, tokio::task::JoinHandle<()>) {
    let runtime = tokio::runtime::Handle::current();
    let (driver, handle, _) = inside
        .run(move || {
            let _on = runtime.enter();
            rtnetlink::new_connection()
        })
        .await
        .expect("enter the namespace")
        .expect("open netlink");
    (handle, tokio::spawn(driver))
}

async fn index(link: &Handle, name: &str) -> u32 {
    let found = link.link().get().match_name(name).execute().try_next().await;
    found.expect("read the link").expect("the link exists").header.index
}

/// Waits until `holds`, for at most ten seconds.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds().await {
        assert!(Instant::now() < deadline, "not within 10 s: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
