//! An HTTP/1.1 server for the services: each brings a function from a request to an answer.
//!
//! Ends on SIGTERM or SIGINT after the requests that run are answered.

use std::convert::Infallible;
use std::future::Future;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// An answer whose body is known as a whole.
pub(crate) type Answer = Response<Full<Bytes>>;

/// Larger request bodies are refused, bytes.
const MAX_BODY: usize = 64 * 1024;
/// How long requests that run may still take when the program is asked to end.
const GRACE: Duration = Duration::from_secs(10);

/// Binds; the wildcard of both families becomes that of IPv4 on a machine without IPv6.
async fn bind(listen: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(listen).await {
        Err(_) if listen.ip() == Ipv6Addr::UNSPECIFIED => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, listen.port())).await
        }
        bound => bound,
    }
}

/// Serves `answer` on `listen` until the program is asked to end.
pub(crate) async fn serve<F, A>(listen: SocketAddr, answer: F) -> Result<()>
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + 'static,
    A: Future<Output = Answer> + Send + 'static,
{
    let listener = bind(listen).await.with_context(|| format!("listening on {listen}"))?;
    println!("listening on {listen}");
    let graceful = GracefulShutdown::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        };
        let Ok((stream, _)) = accepted else {
            // Out of descriptors: those that end make room.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let answer = answer.clone();
        let service = service_fn(move |request| {
            let answer = answer(request);
            async move { Ok::<_, Infallible>(answer.await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(Duration::from_secs(60))
            .serve_connection(TokioIo::new(stream), service);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                eprintln!("connection: {error}");
            }
        });
    }
    drop(listener);
    let finished = pin!(graceful.shutdown());
    if tokio::time::timeout(GRACE, finished).await.is_err() {
        eprintln!("requests still ran after {GRACE:?}");
    }
    Ok(())
}

/// The request's body as JSON.
pub(crate) async fn read_json(request: Request<Incoming>) -> Result<Value> {
    let body = Limited::new(request.into_body(), MAX_BODY).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!("reading the body: {error}"))?;
    serde_json::from_slice(&body.to_bytes()).context("the body is no JSON")
}

/// An answer in JSON.
pub(crate) fn json(status: StatusCode, value: &Value) -> Answer {
    with_type(status, "application/json", value.to_string())
}

/// An answer in HTML.
pub(crate) fn html(status: StatusCode, page: String) -> Answer {
    with_type(status, "text/html; charset=utf-8", page)
}

/// `{"status": "NAME is healthy"}`, as the probes and people expect it.
pub(crate) fn healthy(name: &str) -> Answer {
    json(StatusCode::OK, &serde_json::json!({"status": format!("{name} is healthy")}))
}

/// `{"error": …}`.
pub(crate) fn error(status: StatusCode, what: &str) -> Answer {
    json(status, &serde_json::json!({"error": what}))
}

fn with_type(status: StatusCode, kind: &'static str, body: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    answer
}

/// The parts of a path between its slashes.
pub(crate) fn segments(path: &str) -> Vec<&str> {
    path.split('/').filter(|part| !part.is_empty()).collect()
}
