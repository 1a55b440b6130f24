//! A port of this machine whose datagrams lead into a pod, as [`forward`](super::forward) does with connections: each client has a
//! socket inside the pod, so that answers find it.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::Duration;

use ambit_local::Cluster;
use anyhow::Context;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;

use super::expectations::ServiceName;
use super::forward::Forward;

/// Clients at once; datagrams of more are dropped.
const CLIENTS: usize = 256;
/// Datagrams of one client that wait to be passed on; more are dropped.
const QUEUE: usize = 64;
/// How long a client's socket is kept without a datagram.
const IDLE: Duration = Duration::from_secs(60);
/// The largest payload of a datagram.
const LARGEST: usize = 65_535;

/// Where the datagrams go.
#[derive(Clone)]
struct Destination {
    /// A task that outlives the cluster's handle must not keep the cluster.
    cluster: Weak<Cluster>,
    gateway: ServiceName,
    port: u16,
}

/// Forwards datagrams to a UDP port of a Gateway's Service.
///
/// # Errors
/// When the socket can't be used.
pub(super) fn start(
    socket: std::net::UdpSocket,
    cluster: &Arc<Cluster>,
    gateway: ServiceName,
    port: u16,
) -> anyhow::Result<Forward> {
    socket.set_nonblocking(true).context("use the open port")?;
    let socket = Arc::new(UdpSocket::from_std(socket).context("use the open port")?);
    let address = socket.local_addr().context("use the open port")?;
    let destination = Destination { cluster: Arc::downgrade(cluster), gateway, port };
    Ok(Forward::of(address, tokio::spawn(receive(socket, destination)).abort_handle()))
}

async fn receive(socket: Arc<UdpSocket>, destination: Destination) {
    let mut clients: HashMap<SocketAddr, mpsc::Sender<Vec<u8>>> = HashMap::new();
    let mut buffer = vec![0; LARGEST];
    loop {
        // An error says that an answer before found nobody.
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
        clients.retain(|_, queue| !queue.is_closed());
        if clients.len() >= CLIENTS && !clients.contains_key(&client) {
            continue;
        }
        let queue = clients.entry(client).or_insert_with(|| {
            let (queue, datagrams) = mpsc::channel(QUEUE);
            let (socket, destination) = (socket.clone(), destination.clone());
            tokio::spawn(async move {
                if let Err(error) = carry(&socket, client, datagrams, &destination).await {
                    tracing::warn!("{error:#}");
                }
            });
            queue
        });
        // One that does not fit is lost, as on a network.
        drop(queue.try_send(buffer.get(..length).unwrap_or_default().to_vec()));
    }
}

/// Passes a client's datagrams on, and the answers back, until none passes for a while.
async fn carry(
    socket: &UdpSocket,
    client: SocketAddr,
    mut datagrams: mpsc::Receiver<Vec<u8>>,
    Destination { cluster, gateway, port }: &Destination,
) -> anyhow::Result<()> {
    let ServiceName { namespace, name } = gateway;
    let cluster = cluster.upgrade().context("the mesh has ended")?;
    let backends = cluster.backends_of("UDP", namespace, name, Some(*port));
    drop(cluster);
    let (pod, port) = backends.first().with_context(|| format!("no pod of {namespace}/{name} is ready"))?;
    let inside = pod.udp((Ipv4Addr::LOCALHOST, 0).into()).await?;
    let target = SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
    let mut buffer = vec![0; LARGEST];
    loop {
        tokio::select! {
            datagram = datagrams.recv() => match datagram {
                Some(datagram) => _ = inside.send_to(&datagram, target).await.context("forward a datagram")?,
                None => return Ok(()),
            },
            answer = inside.recv_from(&mut buffer) => {
                let (length, _) = answer.with_context(|| format!("forward to {pod}"))?;
                socket.send_to(buffer.get(..length).unwrap_or_default(), client).await.context("answer")?;
            }
            () = tokio::time::sleep(IDLE) => return Ok(()),
        }
    }
}
