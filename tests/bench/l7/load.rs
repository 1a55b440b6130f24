//! The application and the client of the L7 figures: HTTP/1.1, HTTP/2 and gRPC, each answered with 64 bytes.
//!
//! Both run as child processes in pods. The server looks at a connection's first bytes; the client prints an [`Outcome`].

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use clap::{Args, ValueEnum};
use h2::client::SendRequest;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, Response};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval_at};

use crate::load::{Outcome, percentile};

const BODY: &[u8; 64] = b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 64\r\n\r\n\
0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
/// How every HTTP/2 connection begins, as far as it differs from HTTP/1.
const PREFACE: &[u8] = b"PRI";
/// A gRPC message of 64 bytes: not compressed, its length, the bytes.
const MESSAGE_HEAD: [u8; 5] = [0, 0, 0, 0, 64];
/// Largest head of an answer.
const HEAD: usize = 16 << 10;

/// What a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Protocol {
    /// HTTP/1.1, one request at a time on a connection.
    Http1,
    /// HTTP/2 without TLS.
    Http2,
    /// Unary calls.
    Grpc,
}

/// What a client is to do.
#[derive(Clone, Debug, Args)]
pub(crate) struct Drive {
    /// What is spoken.
    #[arg(long, value_enum)]
    pub(crate) protocol: Protocol,
    /// Where the proxy, or the server, listens.
    #[arg(long)]
    pub(crate) server: SocketAddr,
    /// The path that is asked for.
    #[arg(long)]
    pub(crate) path: String,
    /// Connections at once.
    #[arg(long)]
    pub(crate) connections: usize,
    /// Requests at once on a connection of HTTP/2.
    #[arg(long)]
    pub(crate) streams: usize,
    /// How long it goes on.
    #[arg(long)]
    pub(crate) seconds: f64,
    /// Milliseconds from one request of a stream to its next; 0 is one after the other.
    #[arg(long, default_value_t = 0)]
    pub(crate) every_ms: u32,
}

impl Drive {
    /// As arguments of a command line.
    pub(crate) fn to_arguments(&self) -> Vec<String> {
        let Self { protocol, server, path, connections, streams, seconds, every_ms } = self;
        let protocol = protocol.to_possible_value().map(|it| it.get_name().to_owned()).unwrap_or_default();
        [
            ("--protocol", protocol),
            ("--server", server.to_string()),
            ("--path", path.clone()),
            ("--connections", connections.to_string()),
            ("--streams", streams.to_string()),
            ("--seconds", seconds.to_string()),
            ("--every-ms", every_ms.to_string()),
        ]
        .into_iter()
        .flat_map(|(name, value)| [name.to_owned(), value])
        .collect()
    }
}

/// Serves until the process ends.
pub(crate) async fn serve(listen: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(listen).await.with_context(|| format!("binding {listen}"))?;
    println!("ready");
    loop {
        let (stream, _) = listener.accept().await.context("accepting")?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            // A client that disconnects ends its connection, which is not an error.
            if let Err(error) = serve_one(stream).await {
                tracing::debug!(%error, "connection ended");
            }
        });
    }
}

async fn serve_one(stream: TcpStream) -> Result<()> {
    let mut first = [0; 3];
    if stream.peek(&mut first).await? == first.len() && first == *PREFACE {
        return serve_http2(stream).await;
    }
    serve_http1(stream).await
}

async fn serve_http1(mut stream: TcpStream) -> Result<()> {
    let mut head = Vec::with_capacity(4096);
    loop {
        if stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
        // No request of the client has a body.
        while let Some(end) = end_of_head(&head) {
            head.drain(..end);
            stream.write_all(ANSWER).await?;
        }
        ensure!(head.len() < HEAD, "a head that does not end");
    }
}

/// Where the first head ends.
fn end_of_head(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

async fn serve_http2(stream: TcpStream) -> Result<()> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(accepted) = connection.accept().await {
        let (request, respond) = accepted?;
        tokio::spawn(async move {
            if let Err(error) = answer(request, respond).await {
                tracing::debug!(%error, "a stream ended");
            }
        });
    }
    Ok(())
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Result<()> {
    let is_grpc = request.headers().contains_key("te");
    drain(request.into_body()).await?;
    if !is_grpc {
        let mut stream = respond.send_response(Response::new(()), false)?;
        return Ok(stream.send_data(Bytes::from_static(BODY), true)?);
    }
    let response = Response::builder().header("content-type", "application/grpc").body(())?;
    let mut stream = respond.send_response(response, false)?;
    send_message(&mut stream, false)?;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    Ok(stream.send_trailers(trailers)?)
}

fn send_message(stream: &mut SendStream<Bytes>, ends: bool) -> Result<()> {
    let message = [&MESSAGE_HEAD[..], BODY].concat();
    Ok(stream.send_data(message.into(), ends)?)
}

/// Reads a body to its end; its length.
async fn drain(mut body: RecvStream) -> Result<(usize, Option<HeaderMap>)> {
    let mut length = 0;
    while let Some(data) = body.data().await {
        let data = data?;
        length += data.len();
        body.flow_control().release_capacity(data.len())?;
    }
    Ok((length, body.trailers().await?))
}

/// Runs a client and returns what it measured.
///
/// # Errors
/// When a request fails or is not answered with 200.
pub(crate) async fn drive(drive: Drive) -> Result<Outcome> {
    let mut ready = Vec::new();
    for _ in 0..drive.connections {
        match drive.protocol {
            Protocol::Http1 => ready.push(Requester::Http1(Box::new(Http1::open(&drive).await?))),
            Protocol::Http2 | Protocol::Grpc => {
                let sender = open_http2(drive.server).await?;
                ready.extend((0..drive.streams).map(|_| Requester::Http2(sender.clone())));
            }
        }
    }
    let start = Instant::now();
    let deadline = start + Duration::from_secs_f64(drive.seconds);
    let count = ready.len();
    let mut tasks = JoinSet::new();
    for (index, requester) in ready.into_iter().enumerate() {
        let begin = start + Duration::from_millis(drive.every_ms.into()).mul_f64(index as f64 / count as f64);
        tasks.spawn(repeat(drive.clone(), requester, begin, deadline));
    }
    let mut samples = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        samples.append(&mut ended??);
    }
    let seconds = start.elapsed().as_secs_f64();
    samples.sort_unstable();
    Ok(Outcome {
        operations: samples.len() as u64,
        seconds,
        p50_us: percentile(&samples, 0.5),
        p99_us: percentile(&samples, 0.99),
        p999_us: percentile(&samples, 0.999),
        ..Outcome::default()
    })
}

enum Requester {
    Http1(Box<Http1>),
    Http2(SendRequest<Bytes>),
}

/// Requests one after the other until the deadline; their latencies in nanoseconds. Where there is a pace, a latency counts
/// from when the request was due.
async fn repeat(
    drive: Drive,
    mut requester: Requester,
    begin: Instant,
    deadline: Instant,
) -> Result<Vec<u64>> {
    let mut latencies = Vec::with_capacity(1 << 14);
    let mut ticks = (drive.every_ms > 0).then(|| {
        let mut ticks = interval_at(begin.into(), Duration::from_millis(drive.every_ms.into()));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        ticks
    });
    loop {
        let due = match &mut ticks {
            Some(ticks) => ticks.tick().await.into_std(),
            None => Instant::now(),
        };
        if due >= deadline {
            return Ok(latencies);
        }
        match &mut requester {
            Requester::Http1(connection) => connection.request().await?,
            Requester::Http2(sender) => request_http2(&drive, sender).await?,
        }
        latencies.push(u64::try_from(due.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
}

/// A connection of HTTP/1.1.
struct Http1 {
    stream: TcpStream,
    request: Vec<u8>,
    buffer: Vec<u8>,
}

impl Http1 {
    async fn open(drive: &Drive) -> Result<Self> {
        let server = drive.server;
        let stream = TcpStream::connect(server).await.with_context(|| format!("connecting to {server}"))?;
        stream.set_nodelay(true)?;
        let request = format!(
            "GET {} HTTP/1.1\r\nhost: web\r\nuser-agent: ambit-bench\r\naccept: */*\r\n\r\n",
            drive.path
        );
        Ok(Self { stream, request: request.into_bytes(), buffer: Vec::with_capacity(HEAD) })
    }

    async fn request(&mut self) -> Result<()> {
        self.stream.write_all(&self.request).await?;
        loop {
            if let Some(head) = end_of_head(&self.buffer) {
                let whole = head + length(self.buffer.get(..head).unwrap_or_default())?;
                if self.buffer.len() >= whole {
                    self.buffer.drain(..whole);
                    return Ok(());
                }
            }
            ensure!(self.buffer.len() < HEAD, "an answer that does not end");
            ensure!(self.stream.read_buf(&mut self.buffer).await? > 0, "the connection was closed");
        }
    }
}

/// The length of an answer's body, by its head.
fn length(head: &[u8]) -> Result<usize> {
    let head = std::str::from_utf8(head).context("a head that is no text")?;
    ensure!(head.starts_with("HTTP/1.1 200 "), "answered with {head}");
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>())
    });
    Ok(length.with_context(|| format!("no length in {head}"))??)
}

async fn open_http2(server: SocketAddr) -> Result<SendRequest<Bytes>> {
    let stream = TcpStream::connect(server).await.with_context(|| format!("connecting to {server}"))?;
    stream.set_nodelay(true)?;
    let (sender, connection) = h2::client::handshake(stream).await.context("the handshake of HTTP/2")?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection ended");
        }
    });
    Ok(sender)
}

async fn request_http2(drive: &Drive, sender: &mut SendRequest<Bytes>) -> Result<()> {
    let mut ready = sender.clone().ready().await?;
    let uri = format!("http://web{}", drive.path);
    let is_grpc = drive.protocol == Protocol::Grpc;
    let request = match is_grpc {
        true => {
            Request::post(uri).header("content-type", "application/grpc").header("te", "trailers").body(())?
        }
        false => Request::get(uri).header("user-agent", "ambit-bench").body(())?,
    };
    let (response, mut stream) = ready.send_request(request, !is_grpc)?;
    if is_grpc {
        send_message(&mut stream, true)?;
    }
    let response = response.await?;
    ensure!(response.status() == 200, "answered with {}", response.status());
    let (length, trailers) = drain(response.into_body()).await?;
    if is_grpc {
        let status = trailers.as_ref().and_then(|trailers| trailers.get("grpc-status"));
        ensure!(status.is_some_and(|status| status == "0"), "ended with {trailers:?}");
    }
    if length < BODY.len() {
        bail!("{length} bytes of an answer");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_protocol_is_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serve_one(stream));
            }
        });
        for protocol in [Protocol::Http1, Protocol::Http2, Protocol::Grpc] {
            let path = "/r0/x".to_owned();
            let wanted =
                Drive { protocol, server, path, connections: 2, streams: 2, seconds: 0.05, every_ms: 1 };
            let outcome = drive(wanted).await.unwrap();
            assert!(outcome.operations > 2, "{protocol:?}: {outcome:?}");
            assert!(outcome.p999_us >= outcome.p50_us);
        }
    }

    #[test]
    fn what_is_not_200_is_an_error() {
        assert_eq!(length(b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n").unwrap(), 64);
        assert!(length(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n").is_err());
    }
}
