//! Accepts connections on a pod's listeners and places each on a worker.
//!
//! One task per listener. It ends when its pod is deleted or the proxy drains. A socket that the node agent holds too keeps
//! its queue for a successor; the queue of a socket of our own is served first, because closing it would reset the
//! connections in it.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ambit_net::accept::Acceptor;
use tokio::sync::watch;

use super::{Pod, Role};
use crate::dns::Tracked;
use crate::inbound::passthrough;
use crate::proxy::{Proxy, Worker};
use crate::{inbound, outbound};
use ambit_runtime::drain::Drain;
use ambit_runtime::shares::{Holder, LimitExceeded, Taken};
use ambit_runtime::workers::{WorkerHandle, Workers};

/// Descriptors of a relayed connection: its own, and the one to where it goes.
const RELAYED: u64 = 2;
/// Descriptors of a tunnel connection; its tunnels have their own.
const TUNNELS: u64 = 1;

/// Accepts of the process that failed because of a shortage of descriptors or memory.
static SHORTAGES: AtomicU64 = AtomicU64::new(0);

fn count_shortage(_: &std::io::Error) {
    SHORTAGES.fetch_add(1, Ordering::Relaxed);
}

/// Accepts that failed because of a shortage of descriptors or memory since start.
pub fn accept_shortages() -> u64 {
    SHORTAGES.load(Ordering::Relaxed)
}

/// The task of one listener.
#[derive(Debug)]
pub(super) struct ListenerTask {
    stop: watch::Sender<bool>,
}

impl ListenerTask {
    /// Stops accepting. Accepted connections go on.
    pub(super) fn stop(&self) {
        self.stop.send_replace(true);
    }
}

/// What a listener's task needs.
pub(super) struct ListenerContext {
    pub(super) pod: Arc<Pod>,
    pub(super) role: Role,
    /// Whether the node agent holds the socket too.
    pub(super) is_shared: bool,
    pub(super) proxy: Arc<Proxy>,
    pub(super) workers: Arc<Workers<Worker>>,
    pub(super) drain: Drain,
}

/// Starts accepting on worker `handle`.
pub(super) fn start(context: ListenerContext, handle: &WorkerHandle, listener: TcpListener) -> ListenerTask {
    let (stop, stopped) = watch::channel(false);
    let home = handle.clone();
    handle.spawn("accept", async move { run(context, home, listener, stopped).await });
    ListenerTask { stop }
}

/// Starts answering the datagrams of a DNS socket on worker `handle`.
pub(super) fn start_udp(context: ListenerContext, handle: &WorkerHandle, socket: UdpSocket) -> ListenerTask {
    let (stop, stopped) = watch::channel(false);
    handle.spawn("dns", async move { run_udp(context, socket, stopped).await });
    ListenerTask { stop }
}

async fn run_udp(mut context: ListenerContext, socket: UdpSocket, mut stopped: watch::Receiver<bool>) {
    let (dns, client) = (context.proxy.dns.clone(), context.pod.dns().clone());
    let pod = context.pod.uid().to_owned();
    let netns = context.pod.stock().netns().clone();
    let stop = async move {
        tokio::select! {
            // A dropped sender is a stop too: the pod was deleted.
            _ = stopped.wait_for(|stop| *stop) => {}
            () = context.drain.accepting_stopped() => {}
        }
    };
    let serve = async {
        let local = socket.local_addr()?;
        let originals = Tracked::open(&netns, local).await.map_err(std::io::Error::other)?;
        dns.serve_udp(client, tokio::net::UdpSocket::from_std(socket)?, originals, stop).await;
        Ok::<_, std::io::Error>(())
    };
    if let Err(error) = serve.await {
        tracing::error!(pod, %error, "a pod's DNS socket can't be served");
    }
}

async fn run(
    mut context: ListenerContext,
    home: WorkerHandle,
    listener: TcpListener,
    mut stopped: watch::Receiver<bool>,
) {
    // tcp(7): what is accepted inherits no delay and keepalive, which saves five calls a connection.
    if let Err(error) = ambit_net::socket::prepare_accepted(&listener) {
        tracing::warn!(pod = context.pod.uid(), %error, "a listener's options can't be set");
    }
    let mut acceptor = match Acceptor::new(listener) {
        Ok(acceptor) => acceptor.on_shortage(count_shortage),
        Err(error) => {
            return tracing::error!(pod = context.pod.uid(), %error, "a listener can't be registered");
        }
    };
    loop {
        tokio::select! {
            biased;
            // A dropped sender is a stop too: its pod is gone.
            _ = stopped.wait_for(|stop| *stop) => break,
            () = context.drain.accepting_stopped() => break,
            accepted = acceptor.accept() => match accepted {
                Ok((stream, peer)) => dispatch(&context, &home, stream, peer),
                Err(error) => return tracing::error!(pod = context.pod.uid(), %error, "a listener is lost"),
            },
        }
    }
    if !context.is_shared {
        drain_queue(&context, &home, &acceptor.into_inner());
    }
}

/// Serves the connections in the queue of a socket that is about to close.
fn drain_queue(context: &ListenerContext, home: &WorkerHandle, listener: &TcpListener) {
    while let Ok((stream, peer)) = listener.accept() {
        if let Err(error) = stream.set_nonblocking(true) {
            tracing::debug!(%error, "a connection of a closing listener is lost");
            continue;
        }
        dispatch(context, home, stream, peer);
    }
}

/// What a connection holds while it is served.
struct Admission {
    descriptors: Taken,
    /// Until the peer is known.
    handshake: Option<Taken>,
}

impl ListenerContext {
    /// Takes what serving a connection of `peer` needs on the account of who opened it.
    fn admit(&self, peer: IpAddr) -> Result<Admission, (LimitExceeded, Holder)> {
        let (shares, of_pod) = (&self.proxy.shares, self.pod.shares());
        let (holder, descriptors) = match self.role {
            Role::Outbound | Role::Socks5 | Role::Dns => (of_pod.outbound(), RELAYED),
            Role::Passthrough => (of_pod.inbound(peer), RELAYED),
            Role::Inbound => (of_pod.inbound(peer), TUNNELS),
        };
        let take = || {
            Ok(Admission {
                descriptors: shares.descriptors.take(&holder, descriptors)?,
                handshake: match self.role {
                    Role::Inbound => Some(shares.handshakes.take(&holder, 1)?),
                    Role::Outbound | Role::Socks5 | Role::Dns | Role::Passthrough => None,
                },
            })
        };
        take().map_err(|refusal| (refusal, holder))
    }
}

/// Has a worker serve the connection, or resets it if its pod or peer holds too much.
fn dispatch(context: &ListenerContext, home: &WorkerHandle, stream: TcpStream, peer: SocketAddr) {
    let (pod, workers, name) = (context.pod.clone(), &context.workers, context.role.as_str());
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let Admission { descriptors: held, handshake } = match context.admit(peer.ip()) {
        Ok(admission) => admission,
        Err((refusal, holder)) => {
            context.proxy.shares.report(refusal, name, &holder, pod.uid(), peer.ip());
            ambit_net::socket::reset_on_close(&stream);
            return;
        }
    };
    match context.role {
        Role::Outbound => workers.place(home, name, stream, held, move |_, worker, stream| {
            outbound::serve_captured(worker, pod, stream, peer)
        }),
        Role::Socks5 => workers.place(home, name, stream, held, move |_, worker, stream| {
            outbound::serve_socks5(worker, pod, stream, peer)
        }),
        Role::Inbound => workers.place(home, name, stream, held, move |handle, worker, stream| {
            inbound::serve(worker, handle, pod, stream, peer, handshake)
        }),
        Role::Passthrough => workers.place(home, name, stream, held, move |_, worker, stream| {
            passthrough::serve(worker, pod, stream, peer)
        }),
        Role::Dns => workers.place(home, name, stream, held, move |_, worker, stream| async move {
            let resolver = dialled_resolver(&stream);
            if worker.proxy.dns.is_for_cluster(resolver) {
                worker.proxy.dns.serve_tcp(pod.dns().clone(), stream, resolver).await;
            } else {
                // Port 53 of anything else is a destination like others.
                outbound::serve_captured(worker, pod, stream, peer).await;
            }
        }),
    }
}

/// The resolver that a redirected connection was going to; `None` for one that dialled the listener itself.
fn dialled_resolver(stream: &tokio::net::TcpStream) -> Option<SocketAddr> {
    let dialled = ambit_net::original_dst(stream).ok()?;
    (stream.local_addr().ok() != Some(dialled))
        .then(|| SocketAddr::new(dialled.ip().to_canonical(), dialled.port()))
}
