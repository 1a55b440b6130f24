//! Connections that are being opened while policies change.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ambit_tests::wait::{self, SOON};
use tokio::task::JoinSet;

use crate::bed::{Bed, Line, PORTS, Route, must_be_refused, must_close, policy};

/// How often the policy comes and goes.
const CHANGES: usize = 12;
/// Clients that open connections one after another, on each route.
const CLIENTS: usize = 3;
/// Connections that a client holds; with one more it drops them all.
const HELD: usize = 64;

/// What a client has seen.
#[derive(Default)]
struct Seen {
    open: Vec<Line>,
    opened: usize,
    refused: usize,
}

/// Opens connections until `stop` is set, and holds them.
async fn keep_opening(route: Route, stop: Arc<AtomicBool>) -> Seen {
    let mut seen = Seen::default();
    while !stop.load(Ordering::Relaxed) {
        match Line::open(&route).await {
            Ok(line) => {
                seen.opened += 1;
                if seen.open.len() >= HELD {
                    seen.open.clear();
                }
                seen.open.push(line);
            }
            Err(error) => {
                assert_ne!(error.kind(), io::ErrorKind::TimedOut, "{route}: {error}");
                seen.refused += 1;
            }
        }
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn no_connection_that_opens_while_a_policy_comes_is_left_open() {
    let bed = Bed::start().await;
    let routes = bed.routes(&bed.bob, &PORTS[..1]);
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for route in routes.iter().cycle().take(routes.len() * CLIENTS) {
        clients.spawn(keep_opening(route.clone(), Arc::clone(&stop)));
    }
    let deny = policy("comes-and-goes", "action: DENY, rules: [{from: [{source: {namespaces: [west]}}]}]");
    for _ in 0..CHANGES {
        bed.apply(&deny).await;
        for route in &routes {
            wait::until(&format!("{route} is refused"), SOON, || async { Line::open(route).await.is_err() })
                .await;
        }
        bed.delete("AuthorizationPolicy", "shop", "comes-and-goes").await;
        for route in &routes {
            wait::for_ok(&format!("{route} opens"), SOON, || Line::open(route)).await;
        }
    }
    // Not waited for: what is opening now meets the policy in every state of its coming.
    bed.apply(&deny).await;
    for route in &routes {
        wait::until(&format!("{route} is refused"), SOON, || async { Line::open(route).await.is_err() })
            .await;
    }
    stop.store(true, Ordering::Relaxed);
    let seen = clients.join_all().await;
    let (opened, refused) = seen.iter().fold((0, 0), |sum, s| (sum.0 + s.opened, sum.1 + s.refused));
    assert!(opened > CHANGES && refused > CHANGES, "{opened} were opened and {refused} refused");
    let held: Vec<Line> = seen.into_iter().flat_map(|seen| seen.open).collect();
    assert!(!held.is_empty(), "some were held until the end");
    must_close(held).await;
    must_be_refused(&routes).await;
    bed.end().await;
}
