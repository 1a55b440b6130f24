//! A node proxy that requests only resources that its pods dial.

use ambit_local::{Pod, PodOptions};
use ambit_tests::add_trials;
use ambit_tests::apps::{self, App, Running};
use ambit_tests::beds::Trials;
use ambit_tests::wait;

use crate::{Extensions, PORT, attempt, service};

async fn serves(bed: &Extensions, name: &str, app: &str, node: usize) -> (Pod, Running) {
    let options = PodOptions::new("shop", name).service_account(name).label("app", app).node(node);
    let pod = bed.cluster.pod(options).await.unwrap();
    let running = apps::run(&pod, (pod.ip(), PORT).into(), App::Http(name.to_owned())).await.unwrap();
    bed.wait_captured(&pod).await;
    (pod, running)
}

/// Whether the proxy has a workload or service whose name begins with `name`.
async fn is_known(bed: &Extensions, name: &str) -> bool {
    let dump = bed.cluster.ztunnel(1).unwrap().config_dump().await.unwrap();
    let named = |section: &str, key: &str| {
        let all = dump[section].as_array().cloned().unwrap_or_default();
        all.iter().any(|one| one[key].as_str().is_some_and(|value| value.starts_with(name)))
    };
    named("services", "hostname") || named("workloads", "name")
}

async fn page(bed: &Extensions, target: std::net::SocketAddr) -> std::io::Result<String> {
    let mut stream = bed.gazer.connect_within(target, wait::SOON).await?;
    apps::get(&mut stream).await
}

/// Nothing is known before. The first connection already uses a tunnel to the expected identity, and the service is followed
/// from then on.
async fn what_is_dialled_is_asked_for_and_followed_from_then_on(bed: &Extensions) {
    let (first, _running) = serves(bed, "rare-1", "rare", 0).await;
    bed.cluster.apply(&service("rare")).await.unwrap();
    bed.knows(0, "services", "rare-pods").await;
    assert!(!is_known(bed, "rare").await, "it is known without a request");
    let vip = bed.vip("rare", false);
    assert_eq!(page(bed, vip).await.unwrap(), "rare-1");
    assert!(is_known(bed, "rare.shop.svc").await, "the service is not known after it was dialled");
    assert!(!is_known(bed, "rare-pods").await, "a name that was not dialled is known");
    let line = bed.logs[1]
        .wait_for("the first connection", |l| l["direction"] == "outbound" && l["dst.workload"] == "rare-1");
    assert_eq!(line.await["dst.identity"], first.spiffe_id().as_str());
    let (_second, _also) = serves(bed, "rare-2", "rare", 0).await;
    let second_answers = || async { page(bed, vip).await.is_ok_and(|page| page == "rare-2") };
    wait::until("an endpoint that came later is chosen", wait::SOON, second_answers).await;
    bed.cluster.delete_pod(&first).await.unwrap();
    wait::until("the first is forgotten", wait::SOON, || async { !is_known(bed, "rare-1").await }).await;
    for _ in 0..10 {
        assert_eq!(page(bed, vip).await.unwrap(), "rare-2", "only the second is left");
    }
}

async fn a_pod_that_is_dialled_by_its_address_is_asked_for(bed: &Extensions) {
    let (pod, _running) = serves(bed, "lonely", "lonely", 0).await;
    assert!(!is_known(bed, "lonely").await, "it is known without a request");
    assert_eq!(page(bed, (pod.ip(), PORT).into()).await.unwrap(), "lonely");
    let line = bed.logs[1]
        .wait_for("the connection", |l| l["direction"] == "outbound" && l["dst.workload"] == "lonely");
    assert_eq!(line.await["dst.identity"], pod.spiffe_id().as_str(), "it went through a tunnel");
}

/// An address that nobody knows is reached as it is, and policy of the pods here holds as anywhere.
async fn what_nobody_knows_is_reached_in_the_clear_and_policies_hold_all_the_same(bed: &Extensions) {
    let node: std::net::IpAddr = bed.cluster.node_addresses(0).unwrap().v4.into();
    let outcome = attempt(&bed.gazer, (node, 9).into(), b"?").await;
    assert!(outcome.is_err(), "nobody listens there");
    let (pod, _running) = serves(bed, "guarded", "guarded", 1).await;
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
        metadata: {namespace: shop, name: guard}\nspec:\n  selector: {matchLabels: {app: guarded}}\n  action: ALLOW\n  \
        rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]}]\n";
    bed.cluster.apply(policy).await.unwrap();
    let target = (pod.ip(), PORT).into();
    let gazer_refused = || async { page(bed, target).await.is_err() };
    wait::until("the policy holds", wait::SOON, gazer_refused).await;
    let mut stream = bed.client.connect_within(target, wait::SOON).await.unwrap();
    assert_eq!(apps::get(&mut stream).await.unwrap(), "guarded");
}

pub(crate) fn add(trials: &mut Trials<Extensions>) {
    add_trials!(
        trials, "ondemand":
        what_is_dialled_is_asked_for_and_followed_from_then_on,
        a_pod_that_is_dialled_by_its_address_is_asked_for,
        what_nobody_knows_is_reached_in_the_clear_and_policies_hold_all_the_same,
    );
}
