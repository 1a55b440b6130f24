//! The server: says who it is and whom it sees.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

/// How the server listens.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Address.
    #[arg(long, default_value = "0.0.0.0")]
    address: IpAddr,
    /// Port.
    #[arg(long, default_value_t = 8080)]
    port: u16,
}

pub(crate) async fn serve(options: &Options) -> anyhow::Result<()> {
    let listener = TcpListener::bind((options.address, options.port)).await?;
    loop {
        let (client, peer) = listener.accept().await?;
        tokio::spawn(async move {
            let answer = service_fn(|request| async move { Ok::<_, Infallible>(answer(&request, peer)) });
            let connection = hyper::server::conn::http1::Builder::new();
            // The client's end of the connection is the client's to report.
            connection.serve_connection(TokioIo::new(client), answer).await.ok();
        });
    }
}

fn answer(request: &Request<Incoming>, peer: SocketAddr) -> Response<Full<Bytes>> {
    let host = std::env::var("HOSTNAME").unwrap_or_default();
    let body = serde_json::json!({
        "server": host, "client": peer.ip(), "path": request.uri().path(),
    });
    Response::new(Full::from(body.to_string()))
}
