//! Step 1 of a gateway: ports are opened and closed as its listeners say, and each connection that a client outside the mesh
//! makes is served as its listener says.
//!
//! A port stays open while any listener names it, whatever else of them changes. Connections outlive their port: their next
//! request finds no listener, and is answered with 404.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ambit_api::l7;
use ambit_directory::Transport;
use ambit_net::datagram::BoundDatagrams;
use ambit_runtime::drain::Drain;
use ambit_runtime::peers::{End, party, peer_labels};
use ambit_runtime::workers::{WorkerHandle, Workers};
use bytes::{Bytes, BytesMut};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::accept::{Destination, Inbound};
use crate::app::{accept_all, listen};
use crate::client::Client;
use crate::client_hello::Opening;
use crate::clients::{Place, Places};
use crate::io::ReadAhead;
use crate::listeners::{Layer, Listener};
use crate::proxy::{Proxy, Worker};
use crate::report::dialled_at;
use crate::sanitise::address_value;
use crate::{client_hello, datagrams, pass_through, protocol, proxy_protocol};

/// How soon a port that could not be opened is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// Keeps the ports of the gateway's listeners open until the drain.
pub async fn run(proxy: Arc<Proxy>, workers: Arc<Workers<Worker>>, mut drain: Drain) {
    let mut changes = proxy.published.listener_changes();
    let mut ports = Ports::default();
    loop {
        let listeners = proxy.published.load().listeners.clone();
        let wanted: BTreeSet<u16> = listeners.ports().collect();
        let of_datagrams: BTreeSet<u16> = listeners.datagram_ports().collect();
        ports.close_others(&wanted, &of_datagrams);
        for port in wanted {
            ports.open(port, &workers, &drain);
        }
        for port in of_datagrams {
            ports.open_datagrams(port, &workers, &drain);
        }
        let failed = u64::try_from(ports.refused.len()).unwrap_or(u64::MAX);
        proxy.tallies.closed_listeners.store(failed, Ordering::Relaxed);
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(AGAIN), if !ports.refused.is_empty() => {}
            Some(_) = ports.tasks.join_next() => {}
            () = drain.accepting_stopped() => return,
        }
    }
}

/// The ports of the gateway.
#[derive(Default)]
struct Ports {
    open: BTreeMap<u16, AbortHandle>,
    /// Those for datagrams: `true` closes one. When the drain begins they go on with the sessions that there are.
    datagrams: BTreeMap<u16, watch::Sender<bool>>,
    /// Those that could not be opened.
    refused: BTreeSet<(Transport, u16)>,
    /// One for each open port.
    tasks: JoinSet<()>,
}

impl Ports {
    fn close_others(&mut self, wanted: &BTreeSet<u16>, of_datagrams: &BTreeSet<u16>) {
        self.refused.retain(|(transport, port)| match transport {
            Transport::Tcp => wanted.contains(port),
            Transport::Udp => of_datagrams.contains(port),
        });
        self.datagrams.retain(|port, closed| {
            // One that no worker reads any more is opened again.
            let stays = of_datagrams.contains(port) && !closed.is_closed();
            if !stays {
                tracing::info!(port, "a listener's UDP port is closed");
                closed.send_replace(true);
            }
            stays
        });
        self.open.retain(|port, accepting| {
            // One whose accepting has ended is opened again.
            let stays = wanted.contains(port) && !accepting.is_finished();
            if !stays {
                tracing::info!(port, "a listener's port is closed");
                accepting.abort();
            }
            stays
        });
    }

    fn open(&mut self, port: u16, workers: &Arc<Workers<Worker>>, drain: &Drain) {
        if self.open.contains_key(&port) {
            return;
        }
        match listen((Ipv6Addr::UNSPECIFIED, port).into()) {
            Ok(listener) => {
                self.refused.remove(&(Transport::Tcp, port));
                tracing::info!(port, "a listener's port is open");
                let accepting =
                    accept_all(listener, workers.clone(), drain.clone(), "gateway connection", serve);
                self.open.insert(port, self.tasks.spawn(accepting));
            }
            Err(error) => self.refuse(Transport::Tcp, port, &error),
        }
    }

    /// Opens a port for datagrams: each worker has a socket of its own.
    fn open_datagrams(&mut self, port: u16, workers: &Arc<Workers<Worker>>, drain: &Drain) {
        if self.datagrams.contains_key(&port) {
            return;
        }
        let sockets: io::Result<Vec<BoundDatagrams>> =
            workers.handles().map(|_| BoundDatagrams::bind(port)).collect();
        let sockets = match sockets {
            Ok(sockets) => sockets,
            Err(error) => return self.refuse(Transport::Udp, port, &error.into()),
        };
        self.refused.remove(&(Transport::Udp, port));
        tracing::info!(port, "a listener's UDP port is open");
        let (close, closed) = watch::channel(false);
        for ((handle, worker), socket) in workers.all().zip(sockets) {
            let (worker, own, at) = (worker.clone(), handle.clone(), (port, socket));
            let taking = datagrams::port::run(worker, own, at, closed.clone(), drain.clone());
            handle.spawn("datagrams", taking);
        }
        self.datagrams.insert(port, close);
    }

    fn refuse(&mut self, transport: Transport, port: u16, error: &anyhow::Error) {
        if self.refused.insert((transport, port)) {
            let error = format!("{error:#}");
            tracing::error!(port, ?transport, error, "a listener's port can't be opened; trying again");
        }
    }
}

/// Serves one connection to its end.
pub async fn serve(worker: Arc<Worker>, handle: WorkerHandle, mut stream: TcpStream, peer: SocketAddr) {
    if let Err(error) = stream.set_nodelay(true) {
        return tracing::debug!(%peer, %error, "a client left at once");
    }
    let local = match stream.local_addr() {
        Ok(local) => SocketAddr::new(local.ip().to_canonical(), local.port()),
        Err(error) => return tracing::debug!(%peer, %error, "a client left at once"),
    };
    let source = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let Some((remote, Places { open, pending })) = admit(&worker.proxy, &mut stream, source).await else {
        return;
    };
    let connection = Connection { worker, handle, source, remote, local, place: open };
    let layer = connection.worker.proxy.published.load().listeners.layer(local.port());
    match layer {
        Some(Layer::Requests) => {
            let inbound = connection.inbound(None, None);
            Box::pin(protocol::serve_http(inbound, None, Client::plain(stream), pending)).await;
        }
        Some(Layer::Encrypted) => Box::pin(serve_encrypted(connection, stream, pending)).await,
        Some(Layer::Plain) => {
            // The server may be the first to speak.
            drop(pending);
            let Some(taken) = connection.listener("") else { return };
            let stream = ReadAhead::new(Bytes::new(), stream);
            Box::pin(pass_through::serve(&connection.inbound(Some(taken), None), &Opening::Unread, stream))
                .await;
        }
        // The last listener of the port has gone since.
        None => {}
    }
}

/// Who the client of a connection is, and its places; `None` where there are too many, or where no load balancer says who it is that
/// should.
async fn admit(proxy: &Proxy, stream: &mut TcpStream, source: SocketAddr) -> Option<(SocketAddr, Places)> {
    let trusted = proxy.published.load().trusted_proxies.clone();
    let refusals = &proxy.tallies.clients;
    let take =
        |address: SocketAddr, is_proxy: bool| match proxy.clients.take(address.ip(), is_proxy, refusals) {
            Ok(places) => Some(places),
            Err(refused) => {
                tracing::debug!(%address, ?refused, "a connection is refused: too many are open");
                None
            }
        };
    let is_proxy = trusted.proxy_protocol || trusted.has_network_of(source.ip());
    let places = take(source, is_proxy)?;
    if !trusted.proxy_protocol {
        return Some((source, places));
    }
    let refuse = |reason: &dyn std::fmt::Display| {
        refusals.proxy_protocol.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(%source, %reason, "a connection is refused: nobody says who its client is");
    };
    if trusted.excludes(source.ip()) {
        refuse(&"it comes from none of the trusted proxies");
        return None;
    }
    match proxy_protocol::read(stream, proxy.settings.limits.handshake_timeout.get()).await {
        Ok(None) => Some((source, places)),
        Ok(Some(client)) => {
            let client = SocketAddr::new(client.ip().to_canonical(), client.port());
            drop(places);
            Some((client, take(client, trusted.has_network_of(client.ip()))?))
        }
        Err(error) => {
            refuse(&error);
            None
        }
    }
}

/// A connection of a client outside the mesh.
struct Connection {
    worker: Arc<Worker>,
    handle: WorkerHandle,
    source: SocketAddr,
    remote: SocketAddr,
    local: SocketAddr,
    place: Place,
}

/// Serves a connection that begins with TLS, by the name that it asks for: passed on unread, or ended here.
async fn serve_encrypted(connection: Connection, mut stream: TcpStream, pending: Place) {
    let proxy = connection.worker.proxy.clone();
    let (source, limit) = (connection.source, proxy.settings.limits.handshake_timeout.get());
    let mut first = BytesMut::new();
    let opening = client_hello::read(&mut stream, &mut first, limit).await;
    let Some(hello) = opening.hello() else {
        proxy.tallies.failed_handshakes.fetch_add(1, Ordering::Relaxed);
        return tracing::debug!(%source, "a client does not begin with TLS");
    };
    let server_name = hello.server_name.as_deref().unwrap_or_default();
    let Some(taken) = connection.listener(server_name) else {
        proxy.tallies.failed_handshakes.fetch_add(1, Ordering::Relaxed);
        return tracing::debug!(%source, server_name, "no listener is for the name that a client asks for");
    };
    let is_http = taken.protocol == l7::ListenerProtocol::HttpsListener;
    let stream = ReadAhead::new(first.freeze(), stream);
    let Some(config) = taken.tls.clone() else {
        drop(pending);
        let inbound = connection.inbound(Some(taken), None);
        return pass_through::serve(&inbound, &opening, stream).await;
    };
    let shaken = timeout(limit, TlsAcceptor::from(config).accept(stream)).await;
    let stream = match shaken.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(stream) => stream,
        Err(error) => {
            proxy.tallies.failed_handshakes.fetch_add(1, Ordering::Relaxed);
            return tracing::debug!(%source, %error, "a handshake failed");
        }
    };
    let inbound = connection.inbound(Some(taken), hello.server_name.clone());
    let negotiated = protocol::of_alpn(stream.get_ref().1.alpn_protocol());
    match is_http {
        true => protocol::serve_http(inbound, negotiated, Client::tls(stream), pending).await,
        false => {
            drop(pending);
            pass_through::serve(&inbound, &opening, ReadAhead::new(Bytes::new(), stream)).await;
        }
    }
}

impl Connection {
    /// The listener for a name, of those that there are now.
    fn listener(&self, server_name: &str) -> Option<Arc<Listener>> {
        let published = self.worker.proxy.published.load();
        published.listeners.find(self.local.port(), server_name).cloned()
    }

    fn inbound(self, taken: Option<Arc<Listener>>, server_name: Option<Box<str>>) -> Arc<Inbound> {
        let Self { worker, handle, source, remote, local, place } = self;
        let destination = Destination::Listener { address: local, taken };
        Arc::new(Inbound {
            remote,
            server_name,
            client_party: Arc::new(party(&End::default(), remote)),
            forwarded_for: address_value(remote.ip()),
            place: Some(place),
            ..inbound(worker, &handle, source, destination)
        })
    }
}

/// What is known of a client outside the mesh, and where it came to.
pub(crate) fn inbound(
    worker: Arc<Worker>,
    handle: &WorkerHandle,
    source: SocketAddr,
    destination: Destination,
) -> Inbound {
    let proxy = &worker.proxy;
    // Metrics know the gateway as the source, as those of Istio's gateways do: nothing is known of clients outside.
    let own = proxy.published.load().directory.workload(proxy.settings.uid.as_str()).cloned();
    let reported = End { workload: own, identity: Some(proxy.identity.clone()), baggage: None };
    Inbound {
        certificate: None,
        server_name: None,
        trusted_forwarder: false,
        client_labels: peer_labels(&reported),
        client_party: Arc::new(party(&End::default(), source)),
        dialled: Arc::new(dialled_at(&destination)),
        forwarded_for: address_value(source.ip()),
        client: End::default(),
        recent_series: crate::report::RecentSeries::default(),
        default_host: destination.host().into(),
        activity: Arc::new(proxy.settings.limits.activity()),
        counted: handle.count_connection(),
        place: None,
        source,
        remote: source,
        destination,
        worker,
    }
}
