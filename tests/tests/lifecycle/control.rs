//! The control plane gone and back, and certificates that are renewed, under load.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ambit_local::{Cluster, PodOptions};
use ambit_tests::wait;
use serde_json::json;

use crate::bed::{Bed, ECHO, NAMESPACE, ping};

#[tokio::test(flavor = "multi_thread")]
async fn the_control_plane_killed_and_started_again_under_load_fails_no_request() {
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
    let late = PodOptions::new(NAMESPACE, "late").node(0).service_account("late");
    let late = bed.cluster.pod(late).await.unwrap();
    let mut stream = late.connect_within(bed.vip(ECHO), wait::SOON).await.unwrap();
    assert_eq!(ping(&mut stream, "late").await.unwrap(), "late");
    let tally = load.finish().await;
    bed.end(&tally, |_| false).await;
}

/// When every certificate of a node proxy ends, seconds since 1970, by identity.
async fn certificates(bed: &Bed, node: usize) -> BTreeMap<String, u64> {
    let dump = bed.cluster.ztunnel(node).unwrap().config_dump().await.unwrap();
    let all = dump["certificates"].as_array().cloned().unwrap_or_default();
    let ends = all.iter().filter_map(|c| Some((c["identity"].as_str()?.to_owned(), c["notAfter"].as_u64()?)));
    ends.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_renewed_and_expire_under_load_and_no_request_fails() {
    let builder = Cluster::builder().nodes(2).ztunnel_config("certificates", json!({ "lifetime": "60s" }));
    let bed = Bed::on(builder, true, &[1]).await;
    let load = bed.load().await;
    load.more(10).await;
    let first = [certificates(&bed, 0).await, certificates(&bed, 1).await];
    assert!(first.iter().all(|of_node| !of_node.is_empty()), "{first:?}");
    for (node, before) in first.iter().enumerate() {
        wait::until("every certificate is renewed before its end", Duration::from_secs(50), || async {
            let now = certificates(&bed, node).await;
            before.iter().all(|(identity, end)| now.get(identity).is_some_and(|renewed| renewed > end))
        })
        .await;
    }
    load.more(50).await;
    // Kept connections must live on past the end of the certificates that they began with.
    let end = first.iter().flat_map(BTreeMap::values).max().copied().unwrap();
    wait::until("the first certificates have expired", Duration::from_secs(50), || async {
        SystemTime::now().duration_since(UNIX_EPOCH).is_ok_and(|now| now.as_secs() > end + 1)
    })
    .await;
    load.more(50).await;
    let tally = load.finish().await;
    bed.end(&tally, |_| false).await;
}
