//! `holdFor`: how long connections wait for a proxy that does not come, and what becomes of them then.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use ambit_local::Cluster;
use ambit_tests::wait;

use crate::bed::{Bed, ECHO, ping};

/// Hold time of these tests.
const HOLD: Duration = Duration::from_secs(3);
/// What "at once" means for a refusal on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(2);

async fn held_then_refused_then_served(node: usize) {
    let bed = Bed::on(Cluster::builder().nodes(2).hold_for(HOLD), true, &[1]).await;
    drop(bed.echo(bed.vip(ECHO)).await);
    let ztunnel = bed.cluster.ztunnel(node).unwrap();
    let died = Instant::now();
    ztunnel.kill().await.unwrap();
    let mut held = bed.client.connect_within(bed.vip(ECHO), wait::SOON).await.expect("held, not refused");
    let error = ping(&mut held, "patience").await.expect_err("nobody came");
    let waited = died.elapsed();
    assert_ne!(error.kind(), ErrorKind::TimedOut, "still held after {waited:?}");
    assert!(waited >= HOLD - Duration::from_millis(100), "refused after {waited:?} already");
    for _ in 0..5 {
        let began = Instant::now();
        let outcome = async {
            let mut stream = bed.client.connect_within(bed.vip(ECHO), wait::SOON).await?;
            ping(&mut stream, "anybody").await
        };
        let error = outcome.await.expect_err("nobody is there");
        let refused = [ErrorKind::ConnectionRefused, ErrorKind::ConnectionReset, ErrorKind::UnexpectedEof];
        assert!(refused.contains(&error.kind()), "{error}");
        assert!(began.elapsed() < AT_ONCE, "refused only after {:?}: {error}", began.elapsed());
    }
    ztunnel.start().await.unwrap();
    wait::for_ok("it is served again", wait::SOON, async || {
        let mut stream = bed.client.connect_within(bed.vip(ECHO), wait::SOON).await?;
        ping(&mut stream, "back").await
    })
    .await;
    bed.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_clients_proxy_connections_are_held_then_refused() {
    held_then_refused_then_served(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_servers_proxy_connections_are_held_then_refused() {
    held_then_refused_then_served(1).await;
}
