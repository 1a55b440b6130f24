//! One request on a connection.

use std::time::Duration;

use anyhow::Context;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// How long a request may take, with its connection.
pub(crate) const LIMIT: Duration = Duration::from_secs(5);
/// The longest answer, bytes.
const LONGEST: usize = 64 * 1024;

/// A connection that takes requests.
pub(crate) type Connection = SendRequest<Empty<Bytes>>;

/// Sends one request on a new connection.
pub(crate) async fn get(url: &str) -> anyhow::Result<String> {
    let url: Uri = url.parse()?;
    let whole = async { send(&mut connect(&url).await?, &url).await };
    let answer = tokio::time::timeout(LIMIT, whole).await.context("no answer in time")??;
    Ok(answer.body)
}

/// Connects to the host of an URL.
pub(crate) async fn connect(url: &Uri) -> anyhow::Result<Connection> {
    let host = url.host().context("an URL without a host")?;
    let stream = TcpStream::connect((host, url.port_u16().unwrap_or(80))).await.context("connect")?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    // Its end shows in the next request.
    tokio::spawn(async move { drop(connection.await) });
    Ok(sender)
}

/// The answer to a request.
pub(crate) struct Answer {
    pub(crate) body: String,
    /// Whether it is the connection's last (RFC 9112 §9.6).
    pub(crate) closes: bool,
}

/// Sends a request on a connection.
pub(crate) async fn send(connection: &mut Connection, url: &Uri) -> anyhow::Result<Answer> {
    connection.ready().await.context("the connection has ended")?;
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let host = url.authority().context("an URL without a host")?.as_str();
    let request = Request::get(path).header("host", host).body(Empty::new())?;
    let response = connection.send_request(request).await.context("send a request")?;
    let status = response.status();
    let closes = response
        .headers()
        .get("connection")
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"close"));
    let body = Limited::new(response.into_body(), LONGEST).collect().await;
    let body = body.map_err(|error| anyhow::anyhow!("read the answer: {error}"))?.to_bytes();
    let body = String::from_utf8_lossy(&body).into_owned();
    anyhow::ensure!(status == StatusCode::OK, "{status}: {body}");
    Ok(Answer { body, closes })
}
