//! Small HTTP requests to programs inside sandboxes: readiness, metrics, administration.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinHandle;

use crate::error::{Error, Result};
use crate::sandbox::Sandbox;

/// Longest wait for an answer.
const LIMIT: Duration = Duration::from_secs(10);
/// Largest answer, bytes: a configuration dump of a busy node is some megabytes.
const LARGEST_ANSWER: usize = 256 * 1024 * 1024;

/// Connects from inside a sandbox; the stream belongs to the caller's runtime.
///
/// # Errors
/// When the connection is refused or the namespace is gone.
pub(crate) async fn connect(sandbox: &Sandbox, target: SocketAddr) -> Result<TcpStream> {
    let attempt = || format!("connect to {target} from {}", sandbox.name());
    let socket = sandbox.on(move || if target.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() });
    let socket = socket.await?.map_err(Error::system(attempt()))?;
    socket.connect(target).await.map_err(Error::system(attempt()))
}

/// An answer of an admin server that goes on until it is dropped.
#[derive(Debug)]
pub struct Stream {
    body: Incoming,
    connection: JoinHandle<()>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Stream {
    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// When the connection broke.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            let frame = frame.map_err(|error| Error::System {
                attempt: "read an answer".to_owned(),
                source: std::io::Error::other(error),
            })?;
            if let Ok(bytes) = frame.into_data() {
                return Ok(Some(bytes));
            }
        }
    }
}

/// Sends one `GET` and returns the status and the answer as it comes.
///
/// # Errors
/// When there is no connection or no head of an answer within 10 s.
pub(crate) async fn stream(
    sandbox: &Sandbox,
    target: SocketAddr,
    path: &str,
) -> Result<(StatusCode, Stream)> {
    let attempt = format!("GET http://{target}{path} in {}", sandbox.name());
    let other = |error: &dyn std::fmt::Display| Error::System {
        attempt: attempt.clone(),
        source: std::io::Error::other(error.to_string()),
    };
    let asking = async {
        let stream = connect(sandbox, target).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| other(&error))?;
        let connection = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the connection of an answer ended");
            }
        });
        let request = Request::builder()
            .uri(path)
            .header("host", target.to_string())
            .body(Full::<Bytes>::default())
            .map_err(|error| other(&error))?;
        let (head, body) = sender.send_request(request).await.map_err(|error| other(&error))?.into_parts();
        Ok((head.status, Stream { body, connection }))
    };
    tokio::time::timeout(LIMIT, asking).await.map_err(|_| Error::Deadline {
        what: attempt.clone(),
        after: LIMIT,
        detail: None,
    })?
}

/// Sends one request and returns the status and the whole answer.
///
/// # Errors
/// When there is no connection or no complete answer within 10 s.
pub(crate) async fn request(
    sandbox: &Sandbox,
    target: SocketAddr,
    method: Method,
    path: &str,
) -> Result<(StatusCode, Bytes)> {
    let attempt = format!("{method} http://{target}{path} in {}", sandbox.name());
    let other = |error: &dyn std::fmt::Display| Error::System {
        attempt: attempt.clone(),
        source: std::io::Error::other(error.to_string()),
    };
    let exchange = async {
        let stream = connect(sandbox, target).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| other(&error))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", target.to_string())
            .body(Full::<Bytes>::default())
            .map_err(|error| other(&error))?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(|error| other(&error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), LARGEST_ANSWER).collect().await;
            Ok((status, body.map_err(|error| other(&error))?.to_bytes()))
        };
        let mut connection = std::pin::pin!(connection);
        tokio::pin!(answer);
        tokio::select! {
            answer = &mut answer => answer,
            // The connection may close as soon as the answer is complete, so the answer decides.
            _ = &mut connection => answer.await,
        }
    };
    tokio::time::timeout(LIMIT, exchange).await.map_err(|_| Error::Deadline {
        what: attempt.clone(),
        after: LIMIT,
        detail: None,
    })?
}
