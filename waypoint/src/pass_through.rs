//! Step 8 for connections whose bytes are passed on unread: one endpoint after the other is dialled, then bytes go both ways.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use ambit_balance::Outcome;
use ambit_directory::WorkloadUid;
use ambit_route::Retry;
use smallvec::SmallVec;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, sleep_until, timeout};

use crate::accept::Inbound;
use crate::attempt::{ConnectBudget, connect, connect_timeout};
use crate::authorize::{Began, denied_later};
use crate::backend_policies::{HashKey, PoolPolicy};
use crate::backend_tls::Alpn;
use crate::balance::{Chosen, Target, endpoint};
use crate::balancers::circuit::Connection;
use crate::balancers::host::Active;
use crate::balancers::key::of_address;
use crate::client_hello::Opening;
use crate::failure::Failure;
use crate::io::{Endpoint, ReadAhead};
use crate::names;
use crate::report::ConnectionReport;

/// A connection to an endpoint, and what counts it.
struct Upstream {
    io: Endpoint,
    pool: PoolPolicy,
    active: Option<Active>,
    counted: Option<Arc<Connection>>,
}

/// Passes bytes on to an endpoint of the destination, unread.
pub async fn serve(
    inbound: &Arc<Inbound>,
    opening: &Opening,
    client: ReadAhead<impl AsyncRead + AsyncWrite + Unpin>,
) {
    let worker = &inbound.worker;
    let mut report = worker.reporter.connection(inbound);
    let published = worker.proxy.published.load_full();
    if let Err(failure) = crate::authorize::authorize_connection(&published, inbound, opening) {
        return report.deny(failure.to_string());
    }
    let target = match crate::matching::connection(&published, inbound, opening.hello()) {
        Ok(target) => target,
        Err(failure) => return report.finish(Err(failure.to_string())),
    };
    let asked = opening.hello().and_then(|hello| names::asked_host(hello.server_name.as_deref()?));
    let target = match target.asking(&published, inbound, asked) {
        Ok(target) => target,
        Err(failure) => return report.finish(Err(failure.to_string())),
    };
    let upstream = match dial(inbound, &target, &mut report).await {
        Ok(upstream) => upstream,
        Err(failure @ Failure::Overflow(_)) => return report.overflow(failure.to_string()),
        Err(failure) => return report.finish(Err(failure.to_string())),
    };
    report.set_open();
    relay(inbound, opening, client, upstream, report).await;
}

/// Dials endpoints until one answers.
async fn dial(
    inbound: &Arc<Inbound>,
    target: &Target,
    report: &mut ConnectionReport,
) -> Result<Upstream, Failure> {
    let worker = &inbound.worker;
    let key = match &target.balanced {
        Some(balanced) => {
            let by_source = balanced.current(&worker.proxy)?.hash_key() == Some(&HashKey::SourceIp);
            by_source.then(|| of_address(inbound.remote.ip()))
        }
        None => None,
    };
    let mut tried: SmallVec<[WorkloadUid; 4]> = SmallVec::new();
    let mut last = None;
    let connects = ConnectBudget::new(worker.proxy.settings.limits.connect_budget.get());
    for _ in 0..=Retry::default().attempts {
        let chosen = match endpoint(worker, inbound.remote, target, &tried, key) {
            Ok(chosen) => chosen,
            Err(failure) => {
                last.get_or_insert(failure);
                break;
            }
        };
        let Chosen { endpoint: chosen, trial, gate } = chosen;
        let chosen = match names::locate(worker, chosen).await {
            Ok(chosen) => chosen,
            Err(failure) => {
                if let Some(trial) = trial {
                    trial.fail(&failure, Duration::ZERO);
                }
                last = Some(failure);
                continue;
            }
        };
        report.set_endpoint(&chosen);
        let gate = gate.as_ref();
        let pool = gate.map(|gate| *gate.pool()).unwrap_or_default();
        // A connection does not wait: what is too much is closed.
        let counted = gate.map(|gate| gate.circuit.stream(&pool)).transpose()?;
        let Some(limit) = connects.limit(connect_timeout(worker, gate)) else { break };
        let spending = connects.spend();
        let connected = timeout(limit, Box::pin(connect(worker, &chosen, gate, Alpn::None))).await;
        drop(spending);
        match connected.unwrap_or(Err(Failure::Connect(format!("{} did not answer", chosen.address)))) {
            Ok(io) => {
                let active = trial.and_then(|trial| trial.end(Outcome::Answer(200)));
                return Ok(Upstream { io, pool, active, counted });
            }
            Err(failure) => {
                if let Some(trial) = trial {
                    trial.fail(&failure, Duration::ZERO);
                }
                tried.extend(chosen.workload.as_ref().map(|workload| workload.uid.clone()));
                last = Some(failure);
            }
        }
    }
    Err(last.unwrap_or_else(|| Failure::NoEndpoint("none was tried".to_owned())))
}

/// Passes bytes both ways until both ends have closed, policy denies the connection, or it is silent or open for longer than it may.
async fn relay(
    inbound: &Arc<Inbound>,
    opening: &Opening,
    mut client: ReadAhead<impl AsyncRead + AsyncWrite + Unpin>,
    upstream: Upstream,
    report: ConnectionReport,
) {
    let Upstream { io, pool, active, counted } = upstream;
    let workload = report.workload();
    let load = workload.map(|workload| inbound.worker.proxy.loads.open(&workload.uid));
    let activity = Activity::new(pool.stream_idle_timeout);
    let mut upstream = Watched { io, activity: activity.clone(), read: 0, written: 0 };
    let reason = tokio::select! {
        relayed = tokio::io::copy_bidirectional(&mut client, &mut upstream) => {
            drop((active, counted, load));
            return report.finish(relayed.map_err(|error| error.to_string()));
        }
        failure = denied_later(inbound, Began::Passed(opening)) => {
            drop((active, counted, load));
            return report.deny(failure.to_string());
        }
        () = activity.silent() => "it was silent for as long as its policy allows",
        () = expired(pool.max_age) => "it is as old as its policy allows",
    };
    tracing::info!(source = %inbound.source, to = %inbound.default_host, reason, "a connection is closed");
    drop((active, counted, load));
    report.finish(Ok((upstream.written, upstream.read)));
}

async fn expired(most: Option<Duration>) {
    match most {
        Some(most) => tokio::time::sleep(most).await,
        None => std::future::pending().await,
    }
}

/// When a byte was passed on last. Clones share it.
#[derive(Debug, Clone)]
struct Activity {
    started: Instant,
    /// Milliseconds after that; none where nobody asks.
    last: Option<Arc<AtomicU64>>,
    limit: Duration,
}

impl Activity {
    fn new(limit: Option<Duration>) -> Self {
        Self {
            started: Instant::now(),
            last: limit.map(|_| Arc::default()),
            limit: limit.unwrap_or_default(),
        }
    }

    fn note(&self) {
        if let Some(last) = &self.last {
            let millis = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
            last.store(millis, Ordering::Relaxed);
        }
    }

    /// Waits until there was silence for as long as may be.
    async fn silent(&self) {
        let Some(last) = &self.last else { return std::future::pending().await };
        loop {
            let due = self.started + Duration::from_millis(last.load(Ordering::Relaxed)) + self.limit;
            if Instant::now() >= due {
                return;
            }
            sleep_until(due).await;
        }
    }
}

/// Notes when bytes pass.
struct Watched<IO> {
    io: IO,
    activity: Activity,
    read: u64,
    written: u64,
}

impl<IO> Watched<IO> {
    fn note_written(&mut self, passed: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = &passed {
            self.written += *bytes as u64;
            self.activity.note();
        }
        passed
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Watched<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let passed = Pin::new(&mut self.io).poll_read(cx, buf);
        if matches!(passed, Poll::Ready(Ok(()))) {
            self.read += (buf.filled().len() - before) as u64;
            self.activity.note();
        }
        passed
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Watched<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let passed = Pin::new(&mut self.io).poll_write(cx, buf);
        self.note_written(passed)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let passed = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.note_written(passed)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_counts_from_the_last_byte() {
        let second = Duration::from_secs(1);
        let activity = Activity::new(Some(10 * second));
        let (near, mut far) = tokio::io::duplex(64);
        let mut watched = Watched { io: near, activity: activity.clone(), read: 0, written: 0 };
        let before = Instant::now();
        tokio::time::sleep(6 * second).await;
        watched.write_all(b"x").await.unwrap();
        tokio::time::sleep(6 * second).await;
        far.write_all(b"y").await.unwrap();
        watched.read_u8().await.unwrap();
        assert_eq!((watched.read, watched.written), (1, 1));
        activity.silent().await;
        let took = before.elapsed();
        assert!((22 * second..23 * second).contains(&took), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_limit_nothing_ends() {
        let activity = Activity::new(None);
        let forever = async { tokio::join!(activity.silent(), expired(None)) };
        assert!(timeout(Duration::from_secs(86_400), forever).await.is_err());
    }
}
