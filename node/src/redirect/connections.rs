//! The TCP connections of a pod's namespace: the mesh's own, and those that are older than the redirection.
//!
//! The agent counts both; [`apply`](super::apply) has the older ones entered into connection tracking.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;

use ambit_net::conntrack::Conntrack;
use ambit_net::sockdiag::{self, Kind};
use ambit_net::{MARK_MASK, Netns, NetnsError, PROXY_CONNMARK, PROXY_MARK};

use ambit_api::ports;

/// Why connections could not be entered into tracking, or removed from it.
#[derive(Debug, thiserror::Error)]
pub(super) enum TrackError {
    #[error(transparent)]
    Namespace(#[from] NetnsError),
    #[error("enter the connection from {client} to {server} into tracking: {source}")]
    Enter { client: SocketAddr, server: SocketAddr, source: io::Error },
    #[error("remove the connection from {client} to {server} from tracking: {source}")]
    Delete { client: SocketAddr, server: SocketAddr, source: io::Error },
}

/// Whether a socket belongs to the proxy.
pub(crate) fn is_mesh(entry: &sockdiag::Entry) -> bool {
    let ours = [ports::OUTBOUND, ports::INBOUND_PLAINTEXT, ports::INBOUND_HBONE, ports::DNS, ports::SOCKS5];
    entry.mark & MARK_MASK == PROXY_MARK || ours.contains(&entry.local.port())
}

/// The namespace's open TCP connections that `choose` accepts, without applications' connections to loopback.
pub(crate) async fn connections(
    inside: &Netns,
    choose: impl Fn(&sockdiag::Entry) -> bool,
) -> Result<HashSet<(SocketAddr, SocketAddr)>, NetnsError> {
    let listed = sockdiag::list(inside, Kind::TcpConnections).await?;
    let outside = |entry: &&sockdiag::Entry| is_mesh(entry) || !entry.remote.ip().is_loopback();
    Ok(listed
        .iter()
        .filter(outside)
        .filter(|entry| choose(entry))
        .map(|entry| (entry.local, entry.remote))
        .collect())
}

/// Who began a connection, and to whom.
pub(super) type Pair = (SocketAddr, SocketAddr);

/// Enters every open connection of applications that tracking does not know and the proxy does not have, so that none of
/// them is taken for one that tracking lost. Returns those that it did not know.
pub(super) async fn track(inside: &Netns) -> Result<HashSet<Pair>, TrackError> {
    let listed = sockdiag::list(inside, Kind::TcpConnections).await?;
    let older = older(&listed);
    if older.is_empty() {
        return Ok(HashSet::new());
    }
    let listeners = sockdiag::list(inside, Kind::TcpListeners).await?;
    let listening: HashSet<u16> = listeners.iter().map(|listener| listener.local.port()).collect();
    let mut conntrack = Conntrack::open(inside).await?;
    let mut entered = HashSet::new();
    for (local, remote) in older {
        // Who began matters: the proxy's connection to an application may have the addresses of one that its client
        // itself began, but not of one that would have begun the other way.
        let (client, server) =
            if listening.contains(&local.port()) { (remote, local) } else { (local, remote) };
        let outcome = conntrack.enter_tcp(client, server).await;
        if outcome.map_err(|source| TrackError::Enter { client, server, source })? {
            entered.insert((client, server));
        }
    }
    Ok(entered)
}

/// Removes those of the entries that [`track`] made whose connection has ended meanwhile: nothing would end them.
pub(super) async fn forget_ended(inside: &Netns, entered: HashSet<Pair>) -> Result<(), TrackError> {
    if entered.is_empty() {
        return Ok(());
    }
    let listed = sockdiag::list(inside, Kind::TcpConnections).await?;
    let open: HashSet<Pair> = listed.iter().map(addresses).collect();
    let mut conntrack = Conntrack::open(inside).await?;
    for (client, server) in entered {
        if !open.contains(&(client, server)) && !open.contains(&(server, client)) {
            let outcome = conntrack.delete_tcp(client, server).await;
            outcome.map_err(|source| TrackError::Delete { client, server, source })?;
        }
    }
    Ok(())
}

/// The connections of applications that the proxy does not have, without those that stay on loopback.
fn older(listed: &[sockdiag::Entry]) -> HashSet<Pair> {
    let of_proxy: Vec<_> = listed.iter().filter(|entry| is_mesh(entry)).collect();
    // The other end of a captured connection is a socket of the proxy here: one that accepted it from the same client,
    // or one that dialled the application in the client's name.
    let clients: HashSet<SocketAddr> = of_proxy
        .iter()
        .filter(|entry| [ports::OUTBOUND, ports::DNS, ports::SOCKS5].contains(&entry.local.port()))
        .map(|entry| canonical(entry.remote))
        .collect();
    let dialled: HashSet<Pair> = of_proxy.iter().map(|entry| addresses(entry)).collect();
    listed
        .iter()
        .filter(|entry| !is_mesh(entry) && entry.mark & MARK_MASK != PROXY_CONNMARK)
        .map(addresses)
        .filter(|(local, remote)| {
            !remote.ip().is_loopback() && !clients.contains(local) && !dialled.contains(&(*remote, *local))
        })
        .collect()
}

fn addresses(entry: &sockdiag::Entry) -> Pair {
    (canonical(entry.local), canonical(entry.remote))
}

/// A socket of both families lists IPv4 addresses as IPv6 ones (RFC 4291 §2.5.5.2); packets carry the former.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
