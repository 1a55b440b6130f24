//! Step 1 of a gateway: ports are opened and closed as its listeners say, and each connection that a client outside the mesh
//! makes is served as its listener says.
//!
//! A port stays open while any listener names it, whatever else of them changes. Connections outlive their port: their next
//! request finds no listener, and is answered with 404.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ambit_runtime::drain::Drain;
use ambit_runtime::peers::{End, peer_labels};
use ambit_runtime::workers::{WorkerHandle, Workers};
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::task::JoinSet;

use crate::accept::{Destination, Inbound};
use crate::app::{accept_all, listen};
use crate::client::Client;
use crate::protocol;
use crate::proxy::{Proxy, Worker};

/// How soon a port that could not be opened is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// Keeps the ports of the gateway's listeners open until the drain.
pub async fn run(proxy: Arc<Proxy>, workers: Arc<Workers<Worker>>, mut drain: Drain) {
    let mut changes = proxy.published.listener_changes();
    let mut ports = Ports { open: BTreeMap::new(), refused: BTreeSet::new(), tasks: JoinSet::new() };
    loop {
        let wanted: BTreeSet<u16> = proxy.published.load().listeners.ports().collect();
        ports.close_others(&wanted);
        for port in wanted {
            ports.open(port, &workers, &drain);
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
struct Ports {
    open: BTreeMap<u16, AbortHandle>,
    /// Those that could not be opened.
    refused: BTreeSet<u16>,
    /// One for each open port.
    tasks: JoinSet<()>,
}

impl Ports {
    fn close_others(&mut self, wanted: &BTreeSet<u16>) {
        self.refused.retain(|port| wanted.contains(port));
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
                self.refused.remove(&port);
                tracing::info!(port, "a listener's port is open");
                let accepting =
                    accept_all(listener, workers.clone(), drain.clone(), "gateway connection", serve);
                self.open.insert(port, self.tasks.spawn(accepting));
            }
            Err(error) => {
                if self.refused.insert(port) {
                    tracing::error!(
                        port,
                        error = format!("{error:#}"),
                        "a listener's port can't be opened; trying again"
                    );
                }
            }
        }
    }
}

/// Serves one connection to its end.
pub async fn serve(worker: Arc<Worker>, handle: WorkerHandle, stream: TcpStream, peer: SocketAddr) {
    if let Err(error) = stream.set_nodelay(true) {
        return tracing::debug!(%peer, %error, "a client left at once");
    }
    let local = match stream.local_addr() {
        Ok(local) => SocketAddr::new(local.ip().to_canonical(), local.port()),
        Err(error) => return tracing::debug!(%peer, %error, "a client left at once"),
    };
    let source = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let inbound = inbound(worker, &handle, source, Destination::Listener { address: local });
    Box::pin(protocol::serve_http(Arc::new(inbound), Client::plain(stream))).await;
}

fn inbound(
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
        trusted_forwarder: false,
        client_labels: peer_labels(&reported),
        client: End::default(),
        recent_series: crate::report::RecentSeries::default(),
        default_host: destination.host().into(),
        activity: Arc::new(proxy.settings.limits.activity()),
        counted: handle.count_connection(),
        source,
        destination,
        worker,
    }
}
