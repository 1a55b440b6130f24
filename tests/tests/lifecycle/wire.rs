//! What is seen on the wire between the nodes while an enrolled client sends without pause.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ambit_local::{Capture, Pod, PodOptions};
use ambit_tests::apps::{self, App, Running};
use ambit_tests::wait;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::bed::{Bed, ECHO, HBONE, ping};

/// Text that must not be readable on the wire, unless a pod outside the mesh sends it.
pub(crate) const SECRET: &str = "xyzzy-in-the-clear-xyzzy";
/// A namespace that is never in the mesh.
const OUTSIDE: &str = "outside";
/// Time between two attempts of a client.
const PACE: Duration = Duration::from_millis(20);
/// How long one attempt may wait for its answer.
const ATTEMPT: Duration = Duration::from_secs(3);

/// A client that sends the secret on a new connection every 20 ms, to the service and to the first server itself
/// in turn, and on a kept one for as long as it lives.
pub(crate) struct RetryingClient {
    counts: Arc<Counts>,
    tasks: JoinSet<()>,
}

#[derive(Default)]
struct Counts {
    tried: AtomicU64,
    answered: AtomicU64,
    /// Attempts that came to an end, whichever.
    ended: AtomicU64,
}

impl RetryingClient {
    /// Starts with everything working: returns after the first answers.
    pub(crate) async fn start(bed: &Bed) -> Self {
        let kept = bed.echo(bed.vip(ECHO)).await;
        let retrying = Self::start_unanswered(bed);
        let Self { counts, mut tasks } = retrying;
        tasks.spawn(send_on(kept));
        let retrying = Self { counts, tasks };
        retrying.answered_again().await;
        retrying
    }

    /// Starts without waiting for an answer.
    pub(crate) fn start_unanswered(bed: &Bed) -> Self {
        let counts: Arc<Counts> = Arc::default();
        let targets = [bed.vip(ECHO), SocketAddr::new(bed.servers[0].ip().into(), ECHO)];
        let mut tasks = JoinSet::new();
        tasks.spawn(send_repeatedly(bed.client.clone(), targets, Arc::clone(&counts)));
        Self { counts, tasks }
    }

    /// Waits until it has tried so many times more.
    pub(crate) async fn tries(&self, count: u64) {
        let target = self.counts.tried.load(Ordering::Relaxed) + count;
        wait::until("more attempts", wait::SOON, || async {
            self.counts.tried.load(Ordering::Relaxed) >= target
        })
        .await;
    }

    /// Answers so far.
    pub(crate) fn answered(&self) -> u64 {
        self.counts.answered.load(Ordering::Relaxed)
    }

    /// Attempts that are under way now, and may be answered still.
    pub(crate) fn under_way(&self) -> u64 {
        let ended = self.counts.ended.load(Ordering::Acquire);
        self.counts.tried.load(Ordering::Acquire).saturating_sub(ended)
    }

    /// Waits for ten answers from now on.
    pub(crate) async fn answered_again(&self) {
        let target = self.answered() + 10;
        wait::until("answers", Duration::from_secs(30), || async { self.answered() >= target }).await;
    }
}

async fn send_repeatedly(client: Pod, targets: [SocketAddr; 2], counts: Arc<Counts>) {
    let mut turns = tokio::time::interval(PACE);
    let mut attempts = JoinSet::new();
    for target in targets.iter().cycle() {
        turns.tick().await;
        let (client, target, counts) = (client.clone(), *target, Arc::clone(&counts));
        attempts.spawn(async move {
            counts.tried.fetch_add(1, Ordering::Relaxed);
            let exchange = async {
                let mut stream = client.connect(target).await?;
                ping(&mut stream, SECRET).await
            };
            if let Ok(Ok(_)) = tokio::time::timeout(ATTEMPT, exchange).await {
                counts.answered.fetch_add(1, Ordering::Relaxed);
            }
            counts.ended.fetch_add(1, Ordering::Release);
        });
        while attempts.try_join_next().is_some() {}
    }
}

async fn send_on(mut kept: TcpStream) {
    let mut turns = tokio::time::interval(PACE);
    while ping(&mut kept, SECRET).await.is_ok() {
        turns.tick().await;
    }
}

/// A capture between the nodes, with two pods outside the mesh whose talk it must see.
pub(crate) struct Wire {
    capture: Capture,
    outside: [Pod; 2],
    target: SocketAddr,
    _echo: Running,
}

impl Wire {
    /// Starts to listen; what pods outside the mesh say is heard from here on.
    pub(crate) async fn tap(bed: &Bed) -> Self {
        bed.cluster.namespace(OUTSIDE, false).await.unwrap();
        let pod =
            async |name, node| bed.cluster.pod(PodOptions::new(OUTSIDE, name).node(node)).await.unwrap();
        let outside = [pod("speaker", 0).await, pod("listener", 1).await];
        let target = SocketAddr::new(outside[1].ip().into(), ECHO);
        let echo = apps::run(&outside[1], target, App::Echo).await.unwrap();
        let capture = bed.cluster.capture().await.unwrap();
        let wire = Self { capture, outside, target, _echo: echo };
        wire.control().await;
        wire
    }

    /// What an un-enrolled pod sends can be read: the capture would find a leak.
    async fn control(&self) {
        let mut stream = self.outside[0].connect_within(self.target, wait::SOON).await.unwrap();
        assert_eq!(ping(&mut stream, SECRET).await.unwrap(), SECRET);
    }

    /// Ends it: the secret was seen from outside the mesh only, and no enrolled pod sent or got a byte but in tunnels.
    pub(crate) async fn assert_nothing_in_the_clear(self, bed: &Bed, also: &[Pod]) {
        self.control().await;
        let Self { capture, outside, .. } = self;
        let captured = capture.stop().await.unwrap();
        assert_eq!(captured.dropped, 0, "the capture is complete");
        let outside = outside.map(|pod| IpAddr::from(pod.ip()));
        let found = captured.find(SECRET.as_bytes());
        let (expected, leaked): (Vec<_>, Vec<_>) = found
            .into_iter()
            .partition(|(from, to)| outside.contains(&from.ip()) && outside.contains(&to.ip()));
        assert!(expected.len() >= 4, "two connections in the clear, both ways, can be seen: {expected:?}");
        assert!(leaked.is_empty(), "in the clear: {leaked:?}");
        let enrolled: Vec<IpAddr> = bed.pods().chain(also).map(|pod| pod.ip().into()).collect();
        let bare = captured.packets.iter().filter(|packet| {
            let ends = [packet.source, packet.destination];
            packet.tcp
                && !packet.payload.is_empty()
                && ends.iter().any(|end| enrolled.contains(&end.ip()))
                && ends.iter().all(|end| end.port() != HBONE)
        });
        let bare: Vec<_> =
            bare.map(|packet| (packet.source, packet.destination, packet.payload.len())).collect();
        assert!(bare.is_empty(), "payload outside tunnels: {bare:?}");
    }
}
