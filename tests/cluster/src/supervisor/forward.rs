//! Makes the API server reachable from this machine: a port on 127.0.0.1, connected through its namespace.

use std::net::{Ipv4Addr, SocketAddr};

use ambit_net::Netns;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::error::{Error, Result};

/// The API server's port.
pub(crate) const API_PORT: u16 = 6443;

/// Forwards connections until the process ends. Returns the port.
pub(crate) async fn serve(inside: Netns, server: Ipv4Addr) -> Result<u16> {
    let attempt = "listen for the API server on 127.0.0.1";
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(Error::system(attempt))?;
    let port = listener.local_addr().map_err(Error::system(attempt))?.port();
    let server = SocketAddr::new(server.into(), API_PORT);
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((client, _)) => drop(tokio::spawn(forward(client, inside.clone(), server))),
                Err(error) => tracing::warn!(%error, "cannot accept a client of the API server"),
            }
        }
    });
    Ok(port)
}

async fn forward(mut client: TcpStream, inside: Netns, server: SocketAddr) {
    let attempt = async {
        let socket = inside.run(TcpSocket::new_v4).await.map_err(std::io::Error::other)??;
        let mut upstream = socket.connect(server).await?;
        copy_bidirectional(&mut client, &mut upstream).await
    };
    // The client sees the end of its connection, and the API server's log has the reason.
    if let Err(error) = attempt.await {
        tracing::debug!(%error, "a forwarded connection ended");
    }
}
