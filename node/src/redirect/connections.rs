//! The connections of a pod's namespace: the mesh's own, and those that are older than the redirection.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;

use ambit_net::conntrack::Conntrack;
use ambit_net::sockdiag::{self, Kind};
use ambit_net::{MARK_MASK, Netns, NetnsError, PROXY_CONNMARK, PROXY_MARK};

use crate::ports;

/// Why connections could not be entered into tracking.
#[derive(Debug, thiserror::Error)]
pub(super) enum TrackError {
    #[error(transparent)]
    Namespace(#[from] NetnsError),
    #[error("enter the connection from {client} to {server} into tracking: {source}")]
    Enter { client: SocketAddr, server: SocketAddr, source: io::Error },
}

/// Whether a connection is one of the proxy's, or to it.
pub(crate) fn is_mesh(entry: &sockdiag::Entry) -> bool {
    let ours = [ports::OUTBOUND, ports::INBOUND_PLAINTEXT, ports::INBOUND_HBONE, ports::DNS, ports::SOCKS5];
    entry.mark & MARK_MASK == PROXY_MARK || ours.contains(&entry.local.port())
}

/// The namespace's open TCP connections of a sort, without those that stay on loopback.
pub(crate) async fn connections(
    inside: &Netns,
    of_sort: impl Fn(&sockdiag::Entry) -> bool,
) -> Result<HashSet<(SocketAddr, SocketAddr)>, NetnsError> {
    let listed = sockdiag::list(inside, Kind::TcpConnections).await?;
    let outside = |entry: &&sockdiag::Entry| is_mesh(entry) || !entry.remote.ip().is_loopback();
    Ok(listed
        .iter()
        .filter(outside)
        .filter(|entry| of_sort(entry))
        .map(|entry| (entry.local, entry.remote))
        .collect())
}

/// Enters every open connection of applications that tracking does not know, so that none is taken for one that it
/// lost. Those that are captured are known: their entries stay.
pub(super) async fn track(inside: &Netns) -> Result<(), TrackError> {
    let of_application =
        |entry: &sockdiag::Entry| !is_mesh(entry) && entry.mark & MARK_MASK != PROXY_CONNMARK;
    let open = connections(inside, of_application).await?;
    if open.is_empty() {
        return Ok(());
    }
    let listeners = sockdiag::list(inside, Kind::TcpListeners).await?;
    let listening: HashSet<u16> = listeners.iter().map(|listener| listener.local.port()).collect();
    let mut conntrack = Conntrack::open(inside).await?;
    for (local, remote) in open {
        let (local, remote) = (canonical(local), canonical(remote));
        // Who began matters: the proxy's connection to an application may bear the addresses of one that its client
        // itself began, but not of one that would have begun the other way.
        let (client, server) =
            if listening.contains(&local.port()) { (remote, local) } else { (local, remote) };
        let entered = conntrack.enter_tcp(client, server).await;
        entered.map_err(|source| TrackError::Enter { client, server, source })?;
    }
    Ok(())
}

/// A socket of both families lists IPv4 addresses as IPv6 ones (RFC 4291 §2.5.5.2); packets bear the former.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
