//! Where redirected datagrams were going, as the pod's connection tracking knows it.

use std::future::Future;
use std::net::SocketAddr;

use ambit_net::conntrack::Conntrack;
use ambit_net::{Netns, NetnsError};

/// Says where a datagram was going before it was redirected.
pub trait Originals: Send {
    /// The resolver that `client` asked; `None` if it is unknown.
    fn original(&mut self, client: SocketAddr) -> impl Future<Output = Option<SocketAddr>> + Send;
}

/// Asks the connection tracking of a pod's namespace.
#[derive(Debug)]
pub struct Tracked {
    conntrack: Conntrack,
    local: SocketAddr,
}

impl Tracked {
    /// For the datagrams that arrive in `inside` at `local`, the address of the DNS proxy's socket.
    pub async fn open(inside: &Netns, local: SocketAddr) -> Result<Self, NetnsError> {
        Ok(Self { conntrack: Conntrack::open(inside).await?, local })
    }
}

impl Originals for Tracked {
    async fn original(&mut self, client: SocketAddr) -> Option<SocketAddr> {
        match self.conntrack.original_udp_destination(client, self.local).await {
            // A datagram that was sent to the proxy itself was not redirected.
            Ok(original) => original.filter(|original| *original != self.local),
            Err(error) => {
                tracing::debug!(%error, %client, "connection tracking does not answer");
                None
            }
        }
    }
}
