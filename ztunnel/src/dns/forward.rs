//! Asks resolvers on behalf of a pod, with sockets in the pod's namespace, by UDP and TCP.
//!
//! Questions go out as the client wrote them, under an id and from a port of our own; only what answers
//! the question comes back. Whatever else a resolver sends is counted and forgotten.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ambit_net::connect::{ConnectError, connect};
use ambit_net::listen::{Options, bind_udp};
use ambit_net::{NetnsError, SocketStock};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::message::MAX_UDP;
use super::{Metrics, wire};

/// Messages that answer nothing, per attempt, before the resolver is given up on.
const MAX_BAD_ANSWERS: usize = 16;

/// Why a resolver gave no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ForwardError {
    #[error("resolver {upstream}: no socket: {source}")]
    Socket { upstream: SocketAddr, source: NetnsError },
    #[error("resolver {upstream}: {source}")]
    Io { upstream: SocketAddr, source: io::Error },
    #[error("resolver {upstream}: {source}")]
    Connect { upstream: SocketAddr, source: ConnectError },
    #[error("resolver {upstream}: no answer within {limit:?}")]
    Timeout { upstream: SocketAddr, limit: Duration },
    #[error("resolver {upstream}: sends what answers no question")]
    Nonsense { upstream: SocketAddr },
    #[error("there is no resolver to ask")]
    None,
}

/// How a question travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

/// What is needed to ask.
#[derive(Clone, Copy)]
pub(super) struct Forwarder<'a> {
    pub(super) sockets: &'a SocketStock,
    pub(super) metrics: &'a Metrics,
    pub(super) limit: Duration,
}

impl Forwarder<'_> {
    /// Asks the resolvers in turn until one answers. The answer carries the id of `query`.
    pub(super) async fn ask(
        &self,
        query: &[u8],
        upstreams: &[SocketAddr],
        transport: Transport,
    ) -> Result<Vec<u8>, ForwardError> {
        let mut last = ForwardError::None;
        for upstream in upstreams {
            let own_id = wire::with_id(query, rand::random());
            let attempt = async {
                match transport {
                    Transport::Udp => self.ask_udp(&own_id, *upstream).await,
                    Transport::Tcp => self.ask_tcp(&own_id, *upstream).await,
                }
            };
            let timed_out = ForwardError::Timeout { upstream: *upstream, limit: self.limit };
            match timeout(self.limit, attempt).await.unwrap_or(Err(timed_out)) {
                Ok(answer) => return Ok(wire::with_id(&answer, wire::id(query).unwrap_or_default())),
                Err(error) => {
                    tracing::debug!(%error, "a resolver does not answer");
                    last = error;
                }
            }
        }
        Err(last)
    }

    /// Sends a datagram as it is, id included, and returns its answer. What is signed (TSIG) stays valid.
    pub(super) async fn pass(&self, query: &[u8], upstream: SocketAddr) -> Result<Vec<u8>, ForwardError> {
        let timed_out = ForwardError::Timeout { upstream, limit: self.limit };
        timeout(self.limit, self.ask_udp(query, upstream)).await.unwrap_or(Err(timed_out))
    }

    async fn ask_udp(&self, query: &[u8], upstream: SocketAddr) -> Result<Vec<u8>, ForwardError> {
        let fail = |source| ForwardError::Io { upstream, source };
        let any: IpAddr = match upstream {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let options = Options { mark: self.sockets.mark(), ..Options::default() };
        let socket = bind_udp(self.sockets.netns(), SocketAddr::new(any, 0), options)
            .await
            .map_err(|source| ForwardError::Socket { upstream, source })?;
        let socket = UdpSocket::from_std(socket).map_err(fail)?;
        // Connected, so that only this resolver is heard and a refusal is noticed.
        socket.connect(upstream).await.map_err(fail)?;
        socket.send(query).await.map_err(fail)?;
        // One byte more than is passed on, so that what is longer shows.
        let mut buffer = vec![0; MAX_UDP + 1];
        for _ in 0..MAX_BAD_ANSWERS {
            let length = socket.recv(&mut buffer).await.map_err(fail)?;
            let response = buffer.get(..length).unwrap_or_default();
            if wire::answers(query, response) {
                return Ok(response.to_vec());
            }
            self.metrics.bad_answers.inc();
        }
        Err(ForwardError::Nonsense { upstream })
    }

    async fn ask_tcp(&self, query: &[u8], upstream: SocketAddr) -> Result<Vec<u8>, ForwardError> {
        let fail = |source| ForwardError::Io { upstream, source };
        let mut stream = connect(self.sockets, upstream, self.limit)
            .await
            .map_err(|source| ForwardError::Connect { upstream, source })?;
        stream.write_all(&framed(query)).await.map_err(fail)?;
        for _ in 0..MAX_BAD_ANSWERS {
            let length = stream.read_u16().await.map_err(fail)?;
            let mut response = vec![0; usize::from(length)];
            stream.read_exact(&mut response).await.map_err(fail)?;
            if wire::answers(query, &response) {
                return Ok(response);
            }
            self.metrics.bad_answers.inc();
        }
        Err(ForwardError::Nonsense { upstream })
    }
}

/// RFC 1035 §4.2.2: length first, and both in one piece.
pub(super) fn framed(message: &[u8]) -> Vec<u8> {
    let message = message.get(..wire::MAX_MESSAGE).unwrap_or(message);
    let mut frame = Vec::with_capacity(message.len() + 2);
    frame.extend(u16::try_from(message.len()).unwrap_or(u16::MAX).to_be_bytes());
    frame.extend_from_slice(message);
    frame
}
