//! Invalid messages between the node agent and the node proxy, from either side.

use std::time::Duration;

use ambit_api::workload::zds::workload_response::Payload;
use ambit_api::workload::zds::{WorkloadResponse, ZdsHello};
use ambit_local::PodOptions;
use ambit_net::seqpacket::{SeqPacket, SeqPacketListener};
use ambit_tests::add_trials;
use ambit_tests::apps::{self, App, exchange};
use ambit_tests::beds::Trials;
use ambit_tests::wait;
use prost::Message;

use crate::{Hostile, PORT};

/// Longer than any message may be (ZDS contract).
const TOO_LONG: usize = 8 * 1024;
/// How long a node proxy may take to dial an agent that came back.
const REDIAL: Duration = Duration::from_secs(20);

fn nonsense() -> [Vec<u8>; 4] {
    [b"\xff\xff\xff".to_vec(), vec![0x0a; 100], vec![0; TOO_LONG], b"\x0a\x05ab".to_vec()]
}

/// A new pod is captured and served, and answers.
async fn a_new_pod_is_served(bed: &Hostile, name: &str, node: usize) {
    let pod = bed.cluster.pod(PodOptions::new("shop", name).service_account(name).node(node)).await.unwrap();
    let address = (pod.ip(), PORT).into();
    let _app = apps::run(&pod, address, App::Echo).await.unwrap();
    let mut stream = bed.client.connect_within(address, wait::SOON).await.unwrap();
    assert_eq!(exchange(&mut stream, b"newcomer").await.unwrap(), b"newcomer");
    bed.cluster.delete_pod(&pod).await.unwrap();
}

async fn an_agent_that_hears_nonsense_hangs_up_and_serves_its_proxy_as_before(bed: &Hostile) {
    for packet in nonsense() {
        let rogue = SeqPacket::connect(bed.cluster.zds_socket(0)).unwrap();
        rogue.send(&packet, &[]).await.unwrap();
        let mut buffer = [0; 2048];
        // It disconnects, whatever it sends before.
        let end = async { while rogue.recv(&mut buffer).await.is_ok_and(|received| received.len > 0) {} };
        tokio::time::timeout(wait::SOON, end).await.expect("the agent disconnects");
    }
    a_new_pod_is_served(bed, "after-a-rogue-proxy", 0).await;
    bed.goes_on().await;
}

async fn a_proxy_that_hears_nonsense_refuses_it_and_serves_its_pods_as_before(bed: &Hostile) {
    bed.cluster.stop_agent(1).await.unwrap();
    {
        let rogue = SeqPacketListener::bind(bed.cluster.zds_socket(1)).unwrap();
        let proxy = tokio::time::timeout(REDIAL, rogue.accept()).await.expect("the proxy dials").unwrap();
        let mut buffer = [0; 2048];
        let hello = proxy.recv(&mut buffer).await.unwrap();
        assert_eq!(ZdsHello::decode(&buffer[..hello.len]).unwrap().version, 1);
        for packet in nonsense() {
            proxy.send(&packet, &[]).await.unwrap();
            let answer = tokio::time::timeout(wait::SOON, proxy.recv(&mut buffer)).await.expect("an answer");
            let answer = WorkloadResponse::decode(&buffer[..answer.unwrap().len]).unwrap();
            assert!(
                matches!(answer.payload, Some(Payload::Ack(ack)) if !ack.error.is_empty()),
                "it was taken"
            );
        }
        bed.goes_on().await;
    }
    bed.cluster.start_agent(1).await.unwrap();
    bed.cluster.wait_enrolled(&bed.server).await.unwrap();
    a_new_pod_is_served(bed, "after-a-rogue-agent", 1).await;
    bed.goes_on().await;
}

pub(crate) fn add(trials: &mut Trials<Hostile>) {
    add_trials!(
        trials, "node":
        an_agent_that_hears_nonsense_hangs_up_and_serves_its_proxy_as_before,
        a_proxy_that_hears_nonsense_refuses_it_and_serves_its_pods_as_before,
    );
}
