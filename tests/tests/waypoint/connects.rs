//! Endpoints that drop packets: what a request waits for connections, and how it ends.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ambit_local::{DATAPLANE_MODE, Pod, PodOptions};
use ambit_net::Netns;
use ambit_node::nft::{
    self, Action, Chain, ChainKind, Compare, Hook, HookPoint, Match, Protocol, Rule, Table,
};
use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};

use crate::bed::{PORT, Waypoints};
use crate::http;
use crate::resilience;

/// The waypoint's default `limits.connectTimeout` and `limits.connectBudget`.
const TIMEOUT: Duration = Duration::from_secs(5);
const BUDGET: Duration = Duration::from_secs(10);
/// What everything beside waiting may take.
const SLACK: Duration = Duration::from_secs(2);

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("endpoints that drop packets cost a request its budget and no more", async |bed| {
        nobody_answers(bed).await;
    });
    trials.add("an endpoint that drops packets is replaced by one that answers", async |bed| {
        some_answer(bed).await;
    });
}

/// A pod outside the mesh to which nobody gets through: the network drops first packets.
async fn unreachable(bed: &Waypoints, app: &str, number: usize) -> Pod {
    let options = PodOptions::new("shop", format!("{app}-gone-{number}")).label(DATAPLANE_MODE, "none");
    let pod = bed.cluster.pod(options.label("app", app).node(1)).await.unwrap();
    let inside = Netns::from_fd(pod.netns().unwrap()).unwrap();
    let matches =
        [Match::Protocol(Protocol::Tcp), Match::DestinationPort(Compare::Is, PORT), Match::TcpFirst];
    let rules = vec![Rule::new(matches, Action::Drop, "a first packet that the network lost")];
    let hook = Hook { kind: ChainKind::Filter, point: HookPoint::Input, priority: 0 };
    let chain = Chain { name: "lost".to_owned(), hook: Some(hook), rules };
    nft::apply(&inside, Table { name: "black-hole".to_owned(), chains: vec![chain] }).await.unwrap();
    pod
}

async fn nobody_answers(bed: &Waypoints) {
    let to = bed.bind("lost", "http").await;
    for number in 0..4 {
        unreachable(bed, "lost", number).await;
    }
    let ask = async || {
        let before = Instant::now();
        (http::get(&bed.cli, to, "/", "").await.unwrap(), before.elapsed())
    };
    // Until then there is no endpoint, or only one.
    while ask().await.1 < BUDGET - SLACK {}
    // No more than may be sent again at once whatever the retry budget is.
    for (answer, took) in futures_util::future::join_all((0..3).map(|_| ask())).await {
        assert_eq!(answer.status, 503, "{answer:?}");
        // Two tries have their timeout, and nothing is left for a third.
        assert!((BUDGET - SLACK..BUDGET + SLACK).contains(&took), "{took:?}");
    }
    let is_its = |line: &String| {
        let parts = ["\taccess", "lost.shop.svc.cluster.local", "response_flags=\"UF\"", "response_code=503"];
        parts.iter().all(|part| line.contains(part))
    };
    wait::until("the log says that each was tried twice", SOON, || async {
        bed.logs().into_iter().filter(is_its).filter(|line| line.contains("attempts=2")).count() >= 3
    })
    .await;
    // A connection that is passed on waits no longer.
    let stream = bed.expose("lost", "tcp").await;
    let mut taken = Duration::ZERO;
    while taken < TIMEOUT {
        let before = Instant::now();
        assert!(http::get(&bed.cli, stream, "/", "").await.is_err(), "somebody answers");
        taken = before.elapsed();
    }
    assert!(taken < BUDGET + SLACK, "{taken:?}");
}

async fn some_answer(bed: &Waypoints) {
    bed.server("found", "found", http::mirror()).await;
    let to: SocketAddr = bed.bind("found", "http").await;
    bed.apply(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: found, namespace: shop}\n\
         spec: {host: found, trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}, \
         connectionPool: {tcp: {connectTimeout: 1s}, http: {maxRequestsPerConnection: 1, maxRetries: 1000}}}}\n",
    )
    .await;
    wait::until("the policy is in force", SOON, || async {
        let answered = http::get(&bed.cli, to, "/", "").await.is_ok_and(|answer| answer.status == 200);
        answered && resilience::balancer(bed, "found").await["limits"]["maxRetries"] == 1000
    })
    .await;
    for number in 0..2 {
        unreachable(bed, "found", number).await;
    }
    let mut slowest = Duration::ZERO;
    let started = Instant::now();
    // Until a request has met one of them.
    while slowest < Duration::from_secs(1) {
        assert!(started.elapsed() < SOON, "no request met an endpoint that drops packets");
        let before = Instant::now();
        let answer = http::get(&bed.cli, to, "/", "").await.unwrap();
        assert_eq!((answer.status, answer.server()), (200, "found"), "{answer:?}");
        slowest = slowest.max(before.elapsed());
        assert!(slowest < 2 * Duration::from_secs(1) + SLACK, "{slowest:?}");
    }
}
