//! Inbound plaintext, port 15006: policy asked with no identity, then socket to socket.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use ambit_net::relay::Counters;
use ambit_net::socket::reset_on_close;
use ambit_net::{original_dst, splice::splice};
use tokio::net::TcpStream;

use crate::connection::error::ConnectionError;
use crate::inbound::destination::{Authenticated, Connected};
use crate::pods::Pod;
use crate::proxy::Worker;

/// Serves one connection to its end.
pub async fn serve(worker: Arc<Worker>, pod: Arc<Pod>, mut stream: TcpStream, peer: SocketAddr) {
    let reached = match original_dst(&stream) {
        Ok(reached) => SocketAddr::new(reached.ip().to_canonical(), reached.port()),
        Err(error) => {
            tracing::debug!(%peer, %error, "a plaintext connection without a destination");
            return reset_on_close(&stream);
        }
    };
    let asked = Authenticated {
        worker,
        pod,
        source: peer,
        client_port: peer.port(),
        peer: None,
        certificate: None,
        client: None,
        reached,
        authority: None,
        host: None,
        baggage: None,
        since: Instant::now(),
        counters: Arc::new(Counters::new()),
    };
    let connected = Box::pin(async { asked.authorize().await?.connect().await }).await;
    // The failure has been reported; the client sees a reset.
    let Ok(Connected { stream: mut application, open, report }) = connected else {
        return reset_on_close(&stream);
    };
    let outcome = match open.cut().race(splice(&mut stream, &mut application, &open.counters)).await {
        Ok(ended) => ended.map_err(ConnectionError::from),
        Err(reason) => {
            reset_on_close(&stream);
            reset_on_close(&application);
            Err(ConnectionError::Cut(reason))
        }
    };
    report.finish(&outcome);
}
