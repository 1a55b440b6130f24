//! Node agents that are stopped, upgraded and started again while their pods talk.

use ambit_local::{Cluster, Pod};
use ambit_net::Netns;
use ambit_node::nft;
use ambit_node::redirect::{self, Options, Plan, Stage, plan};
use ambit_tests::wait;

use crate::bed::Bed;

/// Upgrades of both nodes' agents.
const UPGRADES: usize = 3;

/// The rules that an older version might have put in: another order of chains, and one that is no longer.
async fn downgrade(pod: &Pod, wanted: &Plan) {
    let mut table = wanted.table.clone();
    table.chains.reverse();
    table.chains.push(nft::Chain { name: "old".into(), hook: None, rules: Vec::new() });
    nft::apply(&namespace(pod), table).await.unwrap();
}

fn namespace(pod: &Pod) -> Netns {
    Netns::from_fd(pod.netns().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_are_upgraded_under_load_and_no_request_fails() {
    let bed = Bed::start(true, &[0, 1]).await;
    let load = bed.load().await;
    load.more(50).await;
    let wanted = plan(&Options::default(), Stage::In);
    let capture = bed.cluster.capture().await.unwrap();
    for _ in 0..UPGRADES {
        for node in 0..2 {
            bed.cluster.stop_agent(node).await.unwrap();
        }
        for pod in bed.pods() {
            downgrade(pod, &wanted).await;
        }
        load.more(50).await;
        for node in 0..2 {
            bed.cluster.start_agent(node).await.unwrap();
        }
        for pod in bed.pods() {
            assert!(pod.is_enrolled(), "{pod} was never called anything else");
            wait::until("its rules are those of this version", wait::SOON, async || {
                redirect::verify(&namespace(pod), &wanted).await.unwrap().is_empty()
            })
            .await;
        }
        load.more(50).await;
    }
    let seen = bed.seen(&capture.stop().await.unwrap());
    assert!(seen.clear.is_empty(), "connections in the clear: {seen:?}");
    bed.assert_a_late_pod_is_served().await;
    let tally = load.finish().await;
    bed.end(&tally, |_| false).await;
}

/// As an upgrade of the whole mesh does: the new proxy starts while the new agent does, and the old one ends once the new one
/// is ready.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_and_its_proxy_are_replaced_at_once_and_no_request_fails() {
    let builder = Cluster::builder().nodes(2).ztunnel_config("drainTimeout", "60s");
    let bed = Bed::on(builder, true, &[0, 1]).await;
    let load = bed.load().await;
    load.more(50).await;
    for node in 0..2 {
        let old = bed.cluster.ztunnel(node).unwrap();
        bed.cluster.stop_agent(node).await.unwrap();
        // The old proxy dials ever more seldom meanwhile.
        load.more(200).await;
        let (new, agent) =
            tokio::join!(bed.cluster.start_another_ztunnel(node), bed.cluster.start_agent(node));
        new.unwrap();
        agent.unwrap();
        old.terminate().await.unwrap();
        load.more(200).await;
    }
    bed.assert_a_late_pod_is_served().await;
    let tally = load.finish().await;
    bed.end(&tally, |_| false).await;
}
