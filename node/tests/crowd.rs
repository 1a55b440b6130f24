//! The agent under many pods. In a process of its own, so that what it holds can be measured. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "agent/bed.rs"]
#[allow(dead_code, reason = "this program uses a part of it")]
mod bed;
mod common;

use bed::{Payload, Proxy, Running, enrol_all};
use common::{Host, bare, eventually};

/// Pods that come at once.
const MANY: u8 = 100;
/// How often they come and go. The first times make what is kept for later ones.
const ROUNDS: usize = 4;
/// Descriptors that may come and go with the runtime.
const FEW: usize = 8;
/// Threads that work for so many pods, beside those of the test.
const THREADS: usize = 64;
/// Anonymous memory that an allocator may keep from one round to the next, KiB.
const KEPT: usize = 4096;

/// What this process, and so the agent, holds.
#[derive(Debug, Clone, Copy)]
struct Usage {
    descriptors: usize,
    anonymous: usize,
    threads: usize,
}

impl Usage {
    fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
        Self { descriptors, anonymous: field("RssAnon:"), threads: field("Threads:") }
    }
}

/// Has all pods enrolled and served, and then none. Returns the most threads at a time.
async fn come_and_go(running: &Running, proxy: &mut Proxy, pods: &[Host]) -> usize {
    let mut threads = 0;
    enrol_all(running, proxy, pods, || threads = threads.max(Usage::now().threads)).await;
    let (_, ()) = tokio::join!(running.reconcile(vec![]), async {
        for _ in pods {
            assert!(matches!(proxy.obey().await, Payload::Del(_)));
        }
    });
    eventually("all have left", async || running.agent.statuses().is_empty()).await;
    threads
}

#[tokio::test]
async fn a_hundred_pods_that_come_and_go_leave_nothing_behind() {
    let mut pods = Vec::new();
    for number in 1..=MANY {
        pods.push(bare(number).await);
    }
    let running = Running::start(|_| {}).await;
    let mut proxy = running.proxy(true).await;
    proxy.obey_snapshot().await;
    let before = Usage::now();
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let threads = come_and_go(&running, &mut proxy, &pods).await;
        assert!(threads <= before.threads + THREADS, "{threads} threads for {MANY} pods, {before:?}");
        eventually("descriptors are closed", async || Usage::now().descriptors <= before.descriptors + FEW)
            .await;
        rounds.push(Usage::now());
    }
    let (middle, last) = (rounds[ROUNDS / 2 - 1], rounds[ROUNDS - 1]);
    assert!(last.anonymous <= middle.anonymous + KEPT, "{rounds:?}");
    let records = std::fs::read_dir(running.directory.path().join("pods")).unwrap().flatten();
    let records: Vec<_> = records.filter(|entry| entry.path().extension().is_some()).collect();
    assert!(records.is_empty(), "{records:?}");
}
