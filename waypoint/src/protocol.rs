//! Step 2: what is spoken in a tunnel: HTTP/1, HTTP/2, or bytes that are passed on.
//!
//! The port's declared protocol decides whether HTTP may be spoken at all; the first bytes show which version it is. Where
//! nothing is declared, silence is TCP: there the server speaks first.

use std::sync::Arc;
use std::time::Duration;

use ambit_directory::AppProtocol;
use ambit_hbone::{Tunnel, TunnelStream};
use bytes::{Bytes, BytesMut};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::accept::Inbound;
use crate::io::{Lingering, ReadAhead};
use crate::{attempt, exchange};

/// RFC 9113 §3.4: how every HTTP/2 connection begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Longest method that is taken for HTTP/1 where no protocol is declared.
const LONGEST_METHOD: usize = 16;
/// Bytes read at once while the protocol is not known.
const FIRST_READ: usize = 1024;

/// What the first bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spoken {
    Http1,
    Http2,
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
            let limit = limits.head_timeout.get();
            match detect(&mut stream, true, limit).await {
                Some(detected) => detected,
                None => return,
            }
        }
        AppProtocol::Unknown => match detect(&mut stream, false, limits.detect_timeout.get()).await {
            Some(detected) => detected,
            None => return,
        },
    };
    // HTTP ends a tunnel as a whole: were it dropped after its last answer, a reset would overtake that.
    match spoken {
        Spoken::Http1 => {
            serve_http1(inbound, ReadAhead::new(first, Lingering::new(stream.into_transport()))).await;
        }
        Spoken::Http2 => {
            serve_http2(inbound, ReadAhead::new(first, Lingering::new(stream.into_transport()))).await;
        }
        Spoken::Other => attempt::pass_through(&inbound, ReadAhead::new(first, stream)).await,
    }
}

/// Reads until it is clear what is spoken. Where HTTP is declared, everything but the preface of HTTP/2 is HTTP/1. `None` if
/// the client left, or where HTTP is declared said nothing in time.
async fn detect(stream: &mut TunnelStream, http_declared: bool, limit: Duration) -> Option<(Spoken, Bytes)> {
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
        Err(_) if http_declared => {
            // Nothing was asked, so nothing is answered.
            let _ = stream.shutdown().await;
            None
        }
        Err(_) => Some((Spoken::Other, first.freeze())),
    }
}

/// What bytes are the beginning of; `None` while there are too few.
fn classify(first: &[u8], http_declared: bool) -> Option<Spoken> {
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

async fn serve_http1(inbound: Arc<Inbound>, stream: ReadAhead<Lingering>) {
    let limits = &inbound.worker.proxy.settings.limits;
    let mut server = http1::Builder::new();
    server
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout.get())
        .max_headers(limits.headers)
        .max_buf_size(limits.head_size)
        .half_close(true)
        .pipeline_flush(true);
    let mut drain = inbound.worker.proxy.drain.clone();
    let source = inbound.source;
    let service = service_fn(move |request| exchange::handle(inbound.clone(), request));
    let connection = server.serve_connection(TokioIo::new(stream), service).with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = drain.draining() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%source, %error, "an HTTP/1 connection ended");
    }
}

async fn serve_http2(inbound: Arc<Inbound>, stream: ReadAhead<Lingering>) {
    let limits = &inbound.worker.proxy.settings.limits;
    let mut server = http2::Builder::new(TokioExecutor::new());
    server
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(u32::try_from(limits.head_size).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(20)
        .max_local_error_reset_streams(200)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20));
    let mut drain = inbound.worker.proxy.drain.clone();
    let source = inbound.source;
    let service = service_fn(move |request| exchange::handle(inbound.clone(), request));
    let connection = server.serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = drain.draining() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%source, %error, "an HTTP/2 connection ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_tell_what_is_spoken() {
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
