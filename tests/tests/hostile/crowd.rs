//! Many handshakes that are never completed.

use std::io;
use std::time::{Duration, Instant};

use ambit_tests::apps::exchange;
use ambit_tests::beds::Trials;
use ambit_tests::usage::{descriptors, resident};
use ambit_tests::wait;
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::Hostile;

/// Handshakes that are begun and not continued.
const SLOW: usize = 2_000;
/// Opened at a time.
const TOGETHER: usize = 100;
/// What a handshake in progress may cost the node proxy, bytes.
const EACH: u64 = 64 * 1024;
/// How long any other client may take meanwhile.
const OTHERS: Duration = Duration::from_secs(5);

/// Begins a handshake with the header of a record whose body never comes.
///
/// Beyond the share of its address the connection is reset, perhaps immediately.
async fn begin(bed: &Hostile) -> io::Result<TcpStream> {
    let mut stream = bed.stranger.connect_within(bed.tunnel_port(), wait::SOON).await?;
    stream.write_all(b"\x16\x03\x01\x02\x00\x01").await?;
    Ok(stream)
}

async fn thousands_of_slow_handshakes_hinder_nobody(bed: &Hostile) {
    let ztunnel = bed.cluster.ztunnel(1).unwrap();
    let (memory, before) = (resident(&ztunnel), descriptors(&ztunnel));
    let counted = async || {
        let metrics = ztunnel.metrics().await.unwrap();
        let refused = metrics.sum("ambit_connections_refused_total", &[("reason", "peer")]);
        bed.failures("TLS_FAILURE").await + refused
    };
    let failed = counted().await;
    let mut slow = Vec::new();
    let mut most = 0;
    for _ in 0..SLOW / TOGETHER {
        slow.extend(join_all((0..TOGETHER).map(|_| begin(bed))).await.into_iter().flatten());
        most = most.max(descriptors(&ztunnel));
        let asked = Instant::now();
        let mut stream = bed.client.connect_within(bed.application(), OTHERS).await.unwrap();
        assert_eq!(exchange(&mut stream, b"meanwhile").await.unwrap(), b"meanwhile");
        assert!(asked.elapsed() < OTHERS, "another client waited for {:?}", asked.elapsed());
    }
    assert!(most > before + SLOW / 4, "no crowd: {most} descriptors after {before}");
    let grown = resident(&ztunnel).saturating_sub(memory);
    assert!(grown < SLOW as u64 * EACH, "{grown} bytes for {SLOW} handshakes");
    bed.goes_on().await;
    let ends = slow.iter_mut().map(|stream| async {
        let mut rest = Vec::new();
        drop(stream.read_to_end(&mut rest).await);
    });
    tokio::time::timeout(wait::SOON, join_all(ends)).await.expect("every slow handshake is ended");
    wait::until("the descriptors are back", wait::SOON, || async { descriptors(&ztunnel) < before + 200 })
        .await;
    let all = f64::from(u32::try_from(SLOW).unwrap());
    wait::until("each is counted", wait::SOON, async || counted().await >= failed + all).await;
    bed.goes_on().await;
}

pub(crate) fn add(trials: &mut Trials<Hostile>) {
    trials.add("crowd::thousands_of_slow_handshakes_hinder_nobody", async |bed| {
        thousands_of_slow_handshakes_hinder_nobody(bed).await;
    });
}
