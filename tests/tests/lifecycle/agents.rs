//! Node agents that are stopped, upgraded and started again while their pods talk.

use ambit_local::Pod;
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
