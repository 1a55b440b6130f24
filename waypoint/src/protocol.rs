//! Step 2: what is spoken in a tunnel: HTTP/1, HTTP/2, or bytes that are passed on.
//!
//! The port's declared protocol decides whether HTTP may be spoken at all; the first bytes show which version it is. Where
//! nothing is declared, silence is TCP: there the server speaks first.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ambit_directory::AppProtocol;
use ambit_hbone::Tunnel;
use bytes::{Bytes, BytesMut};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::accept::Inbound;
use crate::activity::Exceeded;
use crate::client::Client;
use crate::client_hello::Opening;
use crate::client_stream::ClientStream;
use crate::clients::Place;
use crate::failure::Failure;
use crate::io::ReadAhead;
use crate::report::Record;
use crate::{authorize, client_hello, exchange, matching, pass_through};

/// RFC 9113 §3.4: how every HTTP/2 connection begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Longest method that is taken for HTTP/1 where no protocol is declared.
const LONGEST_METHOD: usize = 16;
/// The answer to a head that takes too long (RFC 9110 §15.5.9).
const HEAD_TIMEOUT: &[u8] = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
/// Bytes read at once while the protocol is not known.
const FIRST_READ: usize = 1024;

/// What the first bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spoken {
    /// HTTP/1.
    Http1,
    /// HTTP/2.
    Http2,
    /// Bytes that are passed on unread.
    Other,
}

/// Serves a tunnel to its end.
pub async fn serve(inbound: Arc<Inbound>, tunnel: Tunnel) {
    let declared = inbound.destination.protocol();
    let mut stream = tunnel.into_stream();
    let limits = &inbound.worker.proxy.settings.limits;
    let (spoken, first) = match declared {
        AppProtocol::Tcp | AppProtocol::Tls => (Spoken::Other, Bytes::new()),
        AppProtocol::Http11 | AppProtocol::Http2 | AppProtocol::Grpc => {
            match first_request(&inbound, &mut stream).await {
                Some(detected) => detected,
                // Nothing was asked, so nothing is answered.
                None => return drop(stream.shutdown().await),
            }
        }
        AppProtocol::Unknown => match detect(&mut stream, false, limits.detect_timeout.get()).await {
            Some(detected) => detected,
            None => return,
        },
    };
    match spoken {
        Spoken::Http1 => serve_http1(inbound, first, Client::tunnel(stream)).await,
        Spoken::Http2 => serve_http2(inbound, first, Client::tunnel(stream)).await,
        Spoken::Other => {
            let mut first = BytesMut::from(first);
            // On a port of plain TCP the server may be the first to speak.
            let reads = declared != AppProtocol::Tcp && matching::needs_client_hello(&inbound);
            let opening = match reads && (declared == AppProtocol::Tls || !first.is_empty()) {
                true => client_hello::read(&mut stream, &mut first, limits.head_timeout.get()).await,
                false => Opening::Unread,
            };
            pass_through::serve(&inbound, &opening, ReadAhead::new(first.freeze(), stream)).await;
        }
    }
}

/// Serves a connection of a client outside the mesh on which HTTP is spoken to its end. What TLS has negotiated is the version, whatever
/// the first bytes look like (RFC 9113 §3.2). The connection has its place among the pending ones until its client has begun.
pub async fn serve_http(
    inbound: Arc<Inbound>,
    negotiated: Option<Spoken>,
    mut client: Client,
    pending: Place,
) {
    let first = first_request(&inbound, &mut client).await;
    drop(pending);
    let Some((detected, first)) = first else {
        return drop(client.shutdown().await);
    };
    match negotiated.unwrap_or(detected) {
        Spoken::Http2 => serve_http2(inbound, first, client).await,
        Spoken::Http1 | Spoken::Other => serve_http1(inbound, first, client).await,
    }
}

/// What a protocol is that TLS has negotiated (RFC 7301).
pub fn of_alpn(protocol: Option<&[u8]>) -> Option<Spoken> {
    match protocol? {
        b"h2" => Some(Spoken::Http2),
        b"http/1.1" | b"http/1.0" => Some(Spoken::Http1),
        _ => None,
    }
}

/// Waits for the first bytes of a connection on which HTTP is spoken; `None` if there are none in time.
async fn first_request(inbound: &Inbound, stream: &mut (impl AsyncRead + Unpin)) -> Option<(Spoken, Bytes)> {
    let limit = inbound.worker.proxy.settings.limits.head_timeout.get();
    // RFC 9113 §6.8: a tunnel that was opened before GOAWAY may bring its first request yet, for as long as an idle
    // connection may bring its last.
    let mut drain = inbound.worker.proxy.drain.clone();
    let unused = async move {
        drain.draining().await;
        tokio::time::sleep(IDLE_AT_DRAIN).await;
    };
    tokio::select! {
        detected = detect(stream, true, limit) => detected,
        () = unused => None,
    }
}

/// Reads until it is clear what is spoken. Where HTTP is declared, everything but the preface of HTTP/2 is HTTP/1. `None` if
/// the client left, or where HTTP is declared said nothing in time.
async fn detect(
    stream: &mut (impl AsyncRead + Unpin),
    http_declared: bool,
    limit: Duration,
) -> Option<(Spoken, Bytes)> {
    let mut first = BytesMut::with_capacity(FIRST_READ);
    let reading = async {
        loop {
            if let Some(spoken) = classify(&first, http_declared) {
                return Some(spoken);
            }
            match stream.read_buf(&mut first).await {
                Ok(0) if first.is_empty() && http_declared => return None,
                Ok(0) => return Some(Spoken::Other),
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(%error, "a tunnel broke before its first request");
                    return None;
                }
            }
        }
    };
    match timeout(limit, reading).await {
        Ok(spoken) => spoken.map(|spoken| (spoken, first.freeze())),
        Err(_) if http_declared => None,
        Err(_) => Some((Spoken::Other, first.freeze())),
    }
}

/// What bytes are the beginning of; `None` while there are too few.
pub fn classify(first: &[u8], http_declared: bool) -> Option<Spoken> {
    if first.is_empty() {
        return None;
    }
    let common = first.len().min(PREFACE.len());
    if first.get(..common) == PREFACE.get(..common) {
        return (common == PREFACE.len()).then_some(Spoken::Http2);
    }
    if http_declared {
        return Some(Spoken::Http1);
    }
    // RFC 9112 §3: a method is a token, followed by one space.
    let token = first.iter().take_while(|byte| byte.is_ascii_uppercase() || **byte == b'-').count();
    match first.get(token) {
        None if token <= LONGEST_METHOD => None,
        Some(b' ') if (1..=LONGEST_METHOD).contains(&token) => Some(Spoken::Http1),
        _ => Some(Spoken::Other),
    }
}

/// How long an idle HTTP/1 connection stays open in a drain, for a last request.
const IDLE_AT_DRAIN: Duration = Duration::from_secs(2);

async fn serve_http1(inbound: Arc<Inbound>, first: Bytes, transport: Client) {
    let activity = inbound.activity.clone();
    if !first.is_empty() {
        activity.handle_bytes(Instant::now());
    }
    let (stream, remains) = ClientStream::new(first, transport, activity.clone());
    // Dropped with what remains, the connection is reset.
    let Some(ended) = while_trusted(&inbound, http1_connection(inbound.clone(), stream)).await else {
        return;
    };
    let (source, tallies) = (inbound.source, &inbound.worker.proxy.tallies);
    if let Err(error) = &ended {
        tracing::debug!(%source, %error, "an HTTP/1 connection ended");
    }
    let exceeded = activity.exceeded();
    tallies.count_closed(&activity);
    let failure = match &ended {
        _ if exceeded == Some(Exceeded::Head) => Some(Failure::HeadTimeout),
        Err(error) if error.is_parse_too_large() => Some(Failure::HeadTooLarge),
        Err(error) if error.is_parse() => Some(Failure::Malformed("what was sent is not HTTP/1")),
        _ => None,
    };
    if let Some(failure) = &failure {
        tallies.count_failure(failure);
        Record::unread(&inbound).refuse(failure);
    }
    let Some(mut transport) = remains.take() else { return };
    // Who takes nothing takes no end either: dropped, the connection is reset.
    if exceeded == Some(Exceeded::Write) {
        return;
    }
    // A response that broke off must not look as if it had ended: dropped, the tunnel is reset.
    if ended.is_err_and(|error| error.is_user() || error.is_body_write_aborted()) {
        return;
    }
    // hyper has no answer for a head that takes too long.
    let answer: &[u8] = if matches!(failure, Some(Failure::HeadTimeout)) { HEAD_TIMEOUT } else { b"" };
    let closing = async {
        transport.write_all(answer).await?;
        transport.shutdown().await
    };
    if let Err(error) = closing.await {
        tracing::debug!(%source, %error, "a client was gone before its connection was closed");
    }
}

/// Serves a connection for as long as its client is trusted. `None` if it was cut for that: its stream has been dropped.
async fn while_trusted<T>(inbound: &Inbound, connection: impl Future<Output = T>) -> Option<T> {
    let Some(certificate) = &inbound.certificate else { return Some(connection.await) };
    let trust = &inbound.worker.proxy.trust;
    tokio::select! {
        ended = connection => Some(ended),
        error = authorize::distrusted(trust, certificate) => {
            tracing::info!(source = %inbound.source, to = %inbound.default_host, %error, "an HTTP connection is closed");
            inbound.worker.proxy.tallies.count_closed(&inbound.activity);
            None
        }
    }
}

/// Waits until a client's connection is to take its last request: in a drain, or once the client's certificate has expired.
async fn leaving(inbound: &Inbound) {
    let mut drain = inbound.worker.proxy.drain.clone();
    let Some(certificate) = &inbound.certificate else { return drain.draining().await };
    tokio::select! {
        () = drain.draining() => {}
        // Certificate contract: an expired client has the time of one renewal to move.
        () = authorize::expired(certificate) => {}
    }
}

/// Serves one connection. When this returns, the stream has been dropped.
async fn http1_connection(inbound: Arc<Inbound>, stream: ClientStream) -> hyper::Result<()> {
    let limits = &inbound.worker.proxy.settings.limits;
    let mut server = http1::Builder::new();
    // Deadlines are those of the stream: hyper has one for a head and an idle connection alike, and no answer. Pipelined
    // flushes are off: with them a refusal stays in the buffer while bytes of the refused head are unread.
    server
        .header_read_timeout(None)
        .max_headers(limits.headers)
        .max_buf_size(limits.head_size)
        .half_close(true);
    let (activity, leaver) = (inbound.activity.clone(), inbound.clone());
    // RFC 9112 §9.6: a request may be on its way to a connection that is idle here, and would be lost. So the next answer says
    // that it is the last, and only who asks for nothing is closed without one. hyper closes a connection whose head it has
    // read in part: that request would be lost too.
    let closing = async move {
        leaving(&leaver).await;
        activity.close_after_next();
        tokio::time::sleep(IDLE_AT_DRAIN).await;
        activity.head_is_read().await;
    };
    let service = service_fn(move |request| exchange::handle(inbound.clone(), request));
    let connection = server.serve_connection(TokioIo::new(stream), service).with_upgrades();
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => ended,
        () = closing => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    }
}

async fn serve_http2(inbound: Arc<Inbound>, first: Bytes, transport: Client) {
    let activity = inbound.activity.clone();
    // Its deadlines are watched below: bytes of HTTP/2 are no sign of a request.
    let (stream, remains) = ClientStream::without_deadlines(first, transport, activity.clone());
    let Some(ended) = while_trusted(&inbound, http2_connection(inbound.clone(), stream)).await else {
        return;
    };
    if let Err(error) = ended {
        tracing::debug!(source = %inbound.source, %error, "an HTTP/2 connection ended");
    }
    inbound.worker.proxy.tallies.count_closed(&activity);
    match remains.take() {
        // A client that misbehaves is cut: its tunnel is reset.
        Some(_) if matches!(activity.exceeded(), Some(Exceeded::Abandoned | Exceeded::Write)) => {}
        Some(mut transport) => drop(transport.shutdown().await),
        None => {}
    }
}

/// Serves one connection. When this returns, the stream has been dropped.
async fn http2_connection(inbound: Arc<Inbound>, stream: ClientStream) -> hyper::Result<()> {
    let limits = &inbound.worker.proxy.settings.limits;
    let mut server = http2::Builder::new(TokioExecutor::new());
    server
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(u32::try_from(limits.head_size).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(20)
        .max_local_error_reset_streams(200)
        .enable_connect_protocol()
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20));
    let (activity, source) = (inbound.activity.clone(), inbound.source);
    let (leaver, limit) = (inbound.clone(), inbound.worker.proxy.settings.drain_idle);
    let service = service_fn(move |request| exchange::handle(inbound.clone(), request));
    let connection = server.serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let mut closing = false;
    // A client that reads only when it asks for something leaves GOAWAY unanswered.
    let mut quiet = std::pin::pin!(activity.quiet(limit));
    let mut stalled = std::pin::pin!(activity.stalled());
    loop {
        if activity.exceeded() == Some(Exceeded::Abandoned) {
            tracing::warn!(%source, "a client reset too many requests");
            return Ok(());
        }
        let close = tokio::select! {
            ended = connection.as_mut() => return ended,
            () = leaving(&leaver), if !closing => true,
            () = activity.idle(), if !closing => true,
            () = activity.changed() => activity.is_used_up(),
            () = quiet.as_mut(), if closing => return Ok(()),
            () = stalled.as_mut() => {
                tracing::info!(%source, "a client took nothing of an answer for too long");
                return Ok(());
            }
        };
        if close && !closing {
            closing = true;
            connection.as_mut().graceful_shutdown();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_distinguish_protocols() {
        for (bytes, spoken) in [
            (&b"GET / HTTP/1.1\r\n"[..], Some(Spoken::Http1)),
            (b"M-SEARCH * HTTP/1.1\r\n", Some(Spoken::Http1)),
            (b"GE", None),
            (b"", None),
            (b"PRI * HT", None),
            (PREFACE, Some(Spoken::Http2)),
            (b"\x16\x03\x01\x02", Some(Spoken::Other)),
            (b"hello", Some(Spoken::Other)),
            (b" GET / HTTP/1.1", Some(Spoken::Other)),
            (b"AVERYLONGWORDTHATISNOMETHOD", Some(Spoken::Other)),
        ] {
            assert_eq!(classify(bytes, false), spoken, "{:?}", String::from_utf8_lossy(bytes));
        }
        assert_eq!(classify(b"hello", true), Some(Spoken::Http1));
    }
}
