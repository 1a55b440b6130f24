//! The control plane gone and back, and certificates that are renewed, under load.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ambit_local::{Cluster, ClusterBuilder};
use ambit_tests::credentials::end_of_dumped;
use ambit_tests::wait;

use crate::bed::{Bed, ECHO, ping};

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_when_the_control_plane_is_killed() {
    let bed = Bed::start(true, &[0, 1]).await;
    let load = bed.load().await;
    load.more(50).await;
    let control = bed.cluster.control().unwrap();
    control.kill().await.unwrap();
    load.more(150).await;
    control.start().await.unwrap();
    control.wait_ready().await.unwrap();
    load.more(100).await;
    // It is of use again: a pod that it never saw before gets a certificate and is known.
    bed.assert_a_late_pod_is_served().await;
    let tally = load.finish().await;
    bed.end(&tally, |_| false).await;
}

/// What a node proxy says of one certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Certificate {
    /// End of validity, seconds since 1970.
    pub(crate) end: u64,
    /// Whether it is valid now.
    available: bool,
    /// Renewals that failed since it was issued.
    failures: u64,
}

/// Every certificate of a node proxy, by identity.
pub(crate) async fn certificates(bed: &Bed, node: usize) -> BTreeMap<String, Certificate> {
    let dump = bed.cluster.ztunnel(node).unwrap().config_dump().await.unwrap();
    let all = dump["certificates"].as_array().cloned().unwrap_or_default();
    let read = |c: &serde_json::Value| {
        let certificate = Certificate {
            end: end_of_dumped(c)?,
            available: c["state"] == "Available",
            failures: c["failures"].as_u64()?,
        };
        Some((c["identity"].as_str()?.to_owned(), certificate))
    };
    let read: BTreeMap<_, _> = all.iter().filter_map(read).collect();
    assert!(!read.is_empty(), "{all:?}");
    read
}

fn with_lifetime(seconds: u64) -> ClusterBuilder {
    Cluster::builder().nodes(2).control_arg(format!("--max-certificate-lifetime={seconds}s"))
}

async fn until_renewed(bed: &Bed, node: usize, before: &BTreeMap<String, Certificate>, limit: Duration) {
    wait::until("every certificate is renewed", limit, async || {
        let now = certificates(bed, node).await;
        before.iter().all(|(identity, old)| now.get(identity).is_some_and(|renewed| renewed.end > old.end))
    })
    .await;
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_expire_under_load_and_no_request_fails() {
    let lifetime = 20;
    let bed = Bed::on(with_lifetime(lifetime), true, &[1]).await;
    let load = bed.load().await;
    load.more(10).await;
    let first = [certificates(&bed, 0).await, certificates(&bed, 1).await];
    for (node, before) in first.iter().enumerate() {
        until_renewed(&bed, node, before, Duration::from_secs(lifetime)).await;
    }
    assert!(first.iter().flat_map(BTreeMap::values).all(|c| now() < c.end), "renewed after their end only");
    load.more(50).await;
    // Kept connections must live on past the end of the certificates that they began with.
    let end = first.iter().flat_map(BTreeMap::values).map(|certificate| certificate.end).max().unwrap();
    wait::until("the first certificates have expired", Duration::from_secs(2 * lifetime), async || {
        now() > end + 1
    })
    .await;
    load.more(50).await;
    let tally = load.finish().await;
    bed.end(&tally, |_| false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_without_control_plane_past_half_a_lifetime() {
    let lifetime = 40;
    let bed = Bed::on(with_lifetime(lifetime), true, &[1]).await;
    let load = bed.load().await;
    let mut idle = bed.echo(bed.vip(ECHO)).await;
    load.more(10).await;
    let control = bed.cluster.control().unwrap();
    control.kill().await.unwrap();
    let first = [certificates(&bed, 0).await, certificates(&bed, 1).await];
    for (node, before) in first.iter().enumerate() {
        wait::until("every renewal has failed twice", Duration::from_secs(lifetime), async || {
            certificates(&bed, node).await.values().all(|certificate| certificate.failures >= 2)
        })
        .await;
        let kept = certificates(&bed, node).await;
        for (identity, certificate) in &kept {
            assert!(certificate.available, "{identity} was given up");
            assert_eq!(before.get(identity).map(|c| c.end), Some(certificate.end), "{identity}");
        }
    }
    load.more(100).await;
    control.start().await.unwrap();
    for (node, before) in first.iter().enumerate() {
        until_renewed(&bed, node, before, Duration::from_secs(lifetime)).await;
    }
    assert!(first.iter().flat_map(BTreeMap::values).all(|c| now() < c.end), "renewed after their end only");
    load.more(50).await;
    assert_eq!(ping(&mut idle, "older than all this").await.unwrap(), "older than all this");
    let tally = load.finish().await;
    bed.end(&tally, |_| false).await;
}
