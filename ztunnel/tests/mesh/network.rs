//! Pods as network namespaces on one bridge, made over netlink. Needs root.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use ambit_net::{Netns, SocketStock, connect};
use futures_util::TryStreamExt;
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};
use tokio::net::{TcpListener, TcpStream};

/// The wire between all pods.
pub(crate) struct Fabric {
    netns: Netns,
    next: AtomicU8,
}

/// A pod's namespace and addresses.
#[derive(Clone)]
pub(crate) struct PodNet {
    pub(crate) netns: Netns,
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
}

impl Fabric {
    pub(crate) async fn new() -> Self {
        let netns = Netns::create().expect("network namespaces need root");
        inside(&netns, async |handle| {
            handle.link().add(LinkBridge::new("fabric").up().build()).execute().await.unwrap();
        })
        .await;
        Self { netns, next: AtomicU8::new(1) }
    }

    /// A new pod on the wire, IPv4 and IPv6, with a default route so that it can dial virtual addresses.
    pub(crate) async fn pod(&self) -> PodNet {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.pod_at(number).await
    }

    /// A new pod with the addresses of an earlier one.
    pub(crate) async fn pod_at(&self, number: u8) -> PodNet {
        let netns = Netns::create().unwrap();
        let (v4, v6) =
            (Ipv4Addr::new(10, 77, 0, number), Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, number.into()));
        let (near, far) = (format!("p{number}"), netns.clone());
        inside(&self.netns, async move |handle| {
            // A former pod of that number has gone with its namespace, its link with it.
            if let Some(old) = index(&handle, &near).await {
                handle.link().del(old).execute().await.unwrap();
            }
            handle.link().add(LinkVeth::new(&near, "passing").build()).execute().await.unwrap();
            let bridge = index(&handle, "fabric").await.unwrap();
            let (near, passing) =
                (index(&handle, &near).await.unwrap(), index(&handle, "passing").await.unwrap());
            let port = LinkUnspec::new_with_index(near).controller(bridge).up().build();
            handle.link().set(port).execute().await.unwrap();
            let fd = std::os::fd::AsFd::as_fd(&far).as_raw_fd();
            let moved = LinkUnspec::new_with_index(passing).setns_by_fd(fd).name("eth0".to_owned()).build();
            handle.link().set(moved).execute().await.unwrap();
        })
        .await;
        inside(&netns, async move |handle| {
            std::fs::write("/proc/sys/net/ipv6/conf/eth0/accept_dad", "0").unwrap();
            let (lo, eth) = (index(&handle, "lo").await.unwrap(), index(&handle, "eth0").await.unwrap());
            // An address used again keeps its link address, as with a routed network, so that no neighbour is stale.
            let mac = vec![2, 0, 0, 0, 0, number];
            handle.link().set(LinkUnspec::new_with_index(eth).address(mac).build()).execute().await.unwrap();
            for link in [lo, eth] {
                handle.link().set(LinkUnspec::new_with_index(link).up().build()).execute().await.unwrap();
            }
            handle.address().add(eth, v4.into(), 16).execute().await.unwrap();
            handle.address().add(eth, v6.into(), 64).execute().await.unwrap();
            let v4 = RouteMessageBuilder::<Ipv4Addr>::new().output_interface(eth).build();
            handle.route().add(v4).execute().await.unwrap();
            let address = v6;
            let v6 = RouteMessageBuilder::<Ipv6Addr>::new().output_interface(eth).build();
            handle.route().add(v6).execute().await.unwrap();
            let deadline = std::time::Instant::now() + Duration::from_secs(10);
            while std::net::UdpSocket::bind((address, 0)).is_err() {
                assert!(std::time::Instant::now() < deadline, "{address} never became usable");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        PodNet { netns, v4, v6 }
    }
}

impl PodNet {
    /// Connects as an application in the pod does.
    pub(crate) async fn dial(&self, address: SocketAddr) -> Result<TcpStream, ambit_net::ConnectError> {
        let stock = SocketStock::new(self.netns.clone(), None);
        connect(&stock, address, Duration::from_secs(15)).await
    }

    /// Connects from an address that the application chooses; it must be local.
    pub(crate) async fn dial_from(
        &self,
        source: IpAddr,
        address: SocketAddr,
    ) -> Result<TcpStream, ambit_net::ConnectError> {
        let stock = SocketStock::new(self.netns.clone(), None);
        ambit_net::connect_from(&stock, source, address, Duration::from_secs(15)).await
    }

    /// Gives the pod's loopback another address, as a pod with NET_ADMIN can.
    pub(crate) async fn add_address(&self, ip: IpAddr) {
        inside(&self.netns, async move |handle| {
            let lo = index(&handle, "lo").await.unwrap();
            handle.address().add(lo, ip, if ip.is_ipv4() { 32 } else { 128 }).execute().await.unwrap();
        })
        .await;
    }

    /// Makes an address unreachable from the pod, as its network policy may.
    pub(crate) async fn unreachable(&self, ip: Ipv4Addr) {
        inside(&self.netns, async move |handle| {
            let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(ip, 32);
            let route = route.kind(rtnetlink::packet_route::route::RouteType::Unreachable).build();
            handle.route().add(route).execute().await.unwrap();
        })
        .await;
    }

    /// Listens as an application in the pod does.
    pub(crate) async fn listen(&self, ip: IpAddr, port: u16) -> TcpListener {
        let address = SocketAddr::new(ip, port);
        let listener = ambit_net::listen::listen_tcp(&self.netns, address, <_>::default()).await.unwrap();
        TcpListener::from_std(listener).unwrap()
    }

    /// Both addresses.
    pub(crate) fn ips(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

async fn index(handle: &Handle, name: &str) -> Option<u32> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    links.try_next().await.ok().flatten().map(|link| link.header.index)
}

/// Runs netlink requests inside a namespace, on a thread of their own.
async fn inside<T, F>(netns: &Netns, work: F) -> T
where
    F: AsyncFnOnce(Handle) -> T + Send + 'static,
    T: Send + 'static,
{
    let netns = netns.clone();
    let done = tokio::task::spawn_blocking(move || {
        netns.run_blocking(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection().unwrap();
                tokio::spawn(connection);
                work(handle).await
            })
        })
    });
    done.await.unwrap().unwrap()
}
