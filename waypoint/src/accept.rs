//! Step 1: an HBONE connection is accepted, its peer authenticated, and each CONNECT found its destination: a service or
//! workload that is bound to this waypoint, or it is refused.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ambit_api::l7;
use ambit_directory::{AppProtocol, Service, Transport, Vip, Workload};
use ambit_hbone::{Authority, Baggage, Endpoints, Incoming, ServeError};
use ambit_identity::{PeerCertificate, SpiffeId};
use ambit_runtime::peers::{End, party, peer_labels};
use ambit_runtime::workers::{ConnectionGuard, WorkerHandle};
use ambit_telemetry::access::{Dialled, Party};
use ambit_telemetry::tcp::PeerLabels;
use http::{HeaderValue, StatusCode};
use tokio::net::TcpStream;

use crate::activity::Activity;
use crate::clients::Place;
use crate::listeners::Listener;
use crate::proxy::{Published, Worker};
use crate::report::{RecentSeries, dialled_at};
use crate::sanitise::Claims;
use crate::{protocol, sanitise};

/// Where a tunnel goes.
#[derive(Debug, Clone)]
pub enum Destination {
    /// A port of a service.
    Service {
        /// The service.
        service: Arc<Service>,
        /// Its port.
        port: u16,
        /// The address that was dialled; `None` where it was dialled by name.
        dialled: Option<IpAddr>,
    },
    /// An address of a workload.
    Workload {
        /// The workload.
        workload: Arc<Workload>,
        /// Its address and port.
        address: SocketAddr,
    },
    /// A port of the gateway.
    Listener {
        /// The address and port that the connection came to.
        address: SocketAddr,
        /// The listener that took the connection; `None` where each request's host says which one it is for.
        taken: Option<Arc<Listener>>,
    },
}

impl Destination {
    /// The service, if it is one.
    pub fn service(&self) -> Option<&Arc<Service>> {
        match self {
            Self::Service { service, .. } => Some(service),
            Self::Workload { .. } | Self::Listener { .. } => None,
        }
    }

    /// The port that was dialled.
    pub fn port(&self) -> u16 {
        match self {
            Self::Service { port, .. } => *port,
            Self::Workload { address, .. } | Self::Listener { address, .. } => address.port(),
        }
    }

    /// The address that was dialled, as policies and routes compare it. For a service that was dialled by name its virtual address;
    /// 0.0.0.0 for one that has none.
    pub fn address(&self) -> IpAddr {
        match self {
            Self::Workload { address, .. } | Self::Listener { address, .. } => address.ip(),
            Self::Service { dialled: Some(address), .. } => *address,
            Self::Service { service, .. } => {
                let mut addresses = service.vips.iter().filter_map(|vip| match vip {
                    Vip::Address(address) => Some(address.address),
                    Vip::Net { .. } => None,
                });
                addresses.next().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
            }
        }
    }

    /// Whether it takes connections or datagrams.
    pub fn transport(&self) -> Transport {
        match self {
            Self::Listener { taken: Some(listener), .. }
                if listener.protocol == l7::ListenerProtocol::UdpListener =>
            {
                Transport::Udp
            }
            Self::Service { .. } | Self::Workload { .. } | Self::Listener { .. } => Transport::Tcp,
        }
    }

    /// What is spoken there, as far as it was declared.
    pub fn protocol(&self) -> AppProtocol {
        match self {
            Self::Service { service, port, .. } => {
                service.ports.get(*port).map(|mapping| mapping.app_protocol).unwrap_or_default()
            }
            Self::Workload { workload, address } => {
                let ports = workload.services.iter().flat_map(|service| service.ports.iter());
                let mut of_port = ports.filter(|port| port.target_port == address.port());
                of_port.next().map(|mapping| mapping.app_protocol).unwrap_or_default()
            }
            Self::Listener { taken, .. } => match taken.as_ref().map(|listener| listener.protocol) {
                None | Some(l7::ListenerProtocol::HttpListener | l7::ListenerProtocol::HttpsListener) => {
                    AppProtocol::Http11
                }
                Some(l7::ListenerProtocol::TlsListener) => AppProtocol::Tls,
                Some(
                    l7::ListenerProtocol::TcpListener
                    | l7::ListenerProtocol::UdpListener
                    | l7::ListenerProtocol::Unknown,
                ) => AppProtocol::Tcp,
            },
        }
    }

    /// Its name for requests that name no host.
    pub fn host(&self) -> String {
        match self {
            Self::Service { service, .. } => service.host.hostname.to_string(),
            Self::Workload { address, .. } | Self::Listener { address, .. } => address.to_string(),
        }
    }
}

/// A tunnel to a destination that is bound here, or a connection of a client outside the mesh. Its requests share it.
#[derive(Debug)]
pub struct Inbound {
    /// The worker that carries it.
    pub worker: Arc<Worker>,
    /// The client's certificate of the mesh; `None` for one outside of it.
    pub certificate: Option<PeerCertificate>,
    /// The address that the connection comes from: the client's, as its node's proxy dials from it, or that of a load balancer in front of
    /// a gateway.
    pub source: SocketAddr,
    /// The client's address, by the PROXY protocol where a load balancer speaks it.
    pub remote: SocketAddr,
    /// Where it goes.
    pub destination: Destination,
    /// What the client's proxy says of its workload: for metrics and logs, never for a decision.
    pub client: End,
    /// The same as the access log shows it.
    pub client_party: Arc<Party>,
    /// What was dialled, for the access log's observers.
    pub dialled: Arc<Dialled>,
    /// The client as metrics name it.
    pub client_labels: Arc<PeerLabels>,
    /// Counters of its last requests.
    pub recent_series: RecentSeries,
    /// The client's address as a value of `X-Forwarded-For`.
    pub forwarded_for: HeaderValue,
    /// The host of requests that may name none.
    pub default_host: Box<str>,
    /// The name that the client's TLS asked for, where it ends here; clients in the mesh ask for none.
    pub server_name: Option<Box<str>>,
    /// Whether what the client claims of other clients is kept.
    pub trusted_forwarder: bool,
    /// What its HTTP connection is doing.
    pub activity: Arc<Activity>,
    /// Counts it for the drain, upgraded connections included.
    #[expect(dead_code, reason = "held to be dropped")]
    pub(crate) counted: ConnectionGuard,
    /// Its place among those of clients outside the mesh.
    #[expect(dead_code, reason = "held to be dropped")]
    pub(crate) place: Option<Place>,
}

impl Inbound {
    /// Who the client is, if it proved that.
    pub fn identity(&self) -> Option<&SpiffeId> {
        self.certificate.as_ref().map(PeerCertificate::identity)
    }

    /// The client's namespace, by its identity; empty if it has none.
    pub fn client_namespace(&self) -> &str {
        self.identity().map_or("", SpiffeId::namespace)
    }

    /// What requests are completed with, and whose claims count.
    pub fn claims<'a>(&'a self, published: &'a Published) -> Claims<'a> {
        let (ends_tls, proxies) = match &self.destination {
            Destination::Listener { taken, .. } => {
                (taken.as_ref().is_some_and(|taken| taken.tls.is_some()), Some(&*published.trusted_proxies))
            }
            Destination::Service { .. } | Destination::Workload { .. } => (false, None),
        };
        let is_trusted = |identity: &SpiffeId| {
            published.trusted_forwarders.iter().any(|trusted| trusted == identity.as_str())
        };
        Claims {
            ends_tls,
            client: self.remote.ip(),
            forwarded_for: &self.forwarded_for,
            trusted: self.trusted_forwarder || self.identity().is_some_and(is_trusted),
            proxies,
            default_host: &self.default_host,
            target_size: self.worker.proxy.settings.limits.target_size,
        }
    }
}

/// Serves one connection to its end.
pub async fn serve(worker: Arc<Worker>, handle: WorkerHandle, stream: TcpStream, peer: SocketAddr) {
    if let Err(error) = Box::pin(run(worker, handle, stream, peer)).await {
        tracing::info!(%peer, %error, "a connection was not accepted");
    }
}

async fn run(
    worker: Arc<Worker>,
    handle: WorkerHandle,
    stream: TcpStream,
    peer: SocketAddr,
) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let local = stream.local_addr()?;
    let local = SocketAddr::new(local.ip().to_canonical(), local.port());
    let proxy = worker.proxy.clone();
    let certificate = proxy.certificates.certificate(&proxy.identity).await?;
    let endpoints = Endpoints { local, remote: peer };
    let accepted = Box::pin(proxy.server.accept(stream, endpoints, certificate.server_config())).await?;
    drop(certificate);
    let certificate = accepted.peer().certificate.clone();
    let mut drain = proxy.drain.clone();
    let ending = async move { drain.draining().await };
    let served = proxy.server.serve(accepted, ending, move |incoming| {
        let opened = (worker.clone(), handle.clone(), certificate.clone());
        tunnel(opened, peer, incoming)
    });
    match served.await {
        Ok(()) => {}
        Err(error @ ServeError::PingTimeout { .. }) => {
            tracing::info!(%peer, %error, "a tunnel connection was given up");
        }
        Err(error) if error.is_misconduct() => tracing::warn!(%peer, %error, "a tunnel connection ended"),
        Err(error) => tracing::debug!(%peer, %error, "a tunnel connection ended"),
    }
    Ok(())
}

async fn tunnel(
    (worker, handle, certificate): (Arc<Worker>, WorkerHandle, PeerCertificate),
    source: SocketAddr,
    incoming: Incoming,
) {
    let counted = handle.count_connection();
    let request = incoming.request();
    let Some(destination) = destination(&worker, &certificate, &request.authority) else {
        worker.proxy.tallies.unbound.fetch_add(1, Ordering::Relaxed);
        tracing::info!(%source, peer = %certificate.identity(), authority = %request.authority, "not bound to this waypoint");
        return incoming.refuse(StatusCode::SERVICE_UNAVAILABLE);
    };
    let client = End {
        workload: None,
        identity: Some(certificate.identity().clone()),
        baggage: request.baggage.clone().map(Arc::<Baggage>::new),
    };
    let activity = Arc::new(worker.proxy.settings.limits.activity());
    let trusted = &worker.proxy.settings.trusted_forwarders;
    let inbound = Inbound {
        server_name: None,
        trusted_forwarder: trusted.iter().any(|trusted| trusted == certificate.identity().as_str()),
        client_labels: peer_labels(&client),
        client_party: Arc::new(party(&client, source)),
        dialled: Arc::new(dialled_at(&destination)),
        forwarded_for: sanitise::address_value(source.ip()),
        recent_series: RecentSeries::default(),
        default_host: destination.host().into(),
        worker,
        certificate: Some(certificate),
        source,
        remote: source,
        destination,
        client,
        activity,
        counted,
        place: None,
    };
    match incoming.accept(None) {
        Ok(tunnel) => Box::pin(protocol::serve(Arc::new(inbound), tunnel)).await,
        // The client gave it up.
        Err(error) => tracing::debug!(%source, %error, "a tunnel was not opened"),
    }
}

/// What an authority stands for, if that is bound to this waypoint.
fn destination(worker: &Worker, certificate: &PeerCertificate, authority: &Authority) -> Option<Destination> {
    let published = worker.proxy.published.load();
    let network = &worker.proxy.settings.network;
    find(&published, network, certificate.identity().namespace(), authority)
}

/// What a client in `namespace` means by an authority, if that is bound to this waypoint.
pub fn find(
    published: &Published,
    network: &str,
    namespace: &str,
    authority: &Authority,
) -> Option<Destination> {
    let snapshot = &published.directory;
    let service = match authority {
        Authority::Address(address) => snapshot.service_at(network, address.ip(), namespace),
        Authority::Host { host, .. } => snapshot.service_named(host, namespace),
    };
    let port = authority.port();
    if let Some(service) = service.filter(|service| published.is_bound(service)) {
        let dialled = authority.address().map(|address| address.ip().to_canonical());
        return Some(Destination::Service { service: service.clone(), port, dialled });
    }
    let address = authority.address()?;
    let workload = snapshot.workload_at(network, address.ip())?;
    published
        .is_bound_workload(workload)
        .then(|| Destination::Workload { workload: workload.clone(), address })
}
