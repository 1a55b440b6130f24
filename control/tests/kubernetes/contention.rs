//! Another controller that writes the same objects, as istiod in the same cluster does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::api_server::ApiServer;
use crate::replica::Replica;
use crate::{namespace, until};

const FOREIGN: &str = "the roots of another control plane";

#[tokio::test(flavor = "multi_thread")]
async fn roots_that_somebody_changes_back_are_written_ever_more_seldom() {
    let server = Arc::new(ApiServer::start().await);
    for name in ["shop", "quiet"] {
        server.apply_value(namespace(name)).await;
    }
    let replica = Replica::start(&server).await;
    let text = async |server: &ApiServer, namespace: &str| {
        let map = server.get("v1", "ConfigMap", namespace, "istio-ca-root-cert").await?;
        map["data"]["root-cert.pem"].as_str().map(str::to_owned)
    };
    let roots = until("the roots are there", async || text(&server, "shop").await).await;

    // It changes them back as fast as it can, and counts how often it had to.
    let (fights, reverted) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
    let fight = tokio::spawn({
        let (server, fights, reverted) = (server.clone(), fights.clone(), reverted.clone());
        async move {
            while fights.load(Ordering::Relaxed) {
                if text(&server, "shop").await.as_deref() != Some(FOREIGN) {
                    let fields = json!({ "data": { "root-cert.pem": FOREIGN } });
                    server.merge("ConfigMap", "shop", "istio-ca-root-cert", fields).await;
                    reverted.fetch_add(1, Ordering::Relaxed);
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    });
    until("writes are held", async || {
        let held = replica.metric("ambit_control_writes_held_total");
        (held >= 3.0).then_some(())
    })
    .await;
    // Three pauses passed: of one, two and four seconds.
    assert!(reverted.load(Ordering::Relaxed) <= 9, "{reverted:?}");
    // Others are not held up.
    server
        .merge("ConfigMap", "quiet", "istio-ca-root-cert", json!({ "data": { "root-cert.pem": "" } }))
        .await;
    until("the other namespace is right", async || (text(&server, "quiet").await? == roots).then_some(()))
        .await;

    fights.store(false, Ordering::Relaxed);
    fight.await.unwrap();
    until("the roots are right in the end", async || (text(&server, "shop").await? == roots).then_some(()))
        .await;
}
