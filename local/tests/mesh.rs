//! The mesh on a local cluster while it changes: labels, node proxies and agents come and go under load.
//!
//! These tests make network namespaces, so they need root, and they start `ambit-control` and `ztunnel`, so those
//! must be built.

#![allow(clippy::expect_used, reason = "a test says what it needs and fails without it")]

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ambit_local::{Cluster, DATAPLANE_MODE, Pod, PodOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const LIMIT: Duration = Duration::from_secs(20);
const PORT: u16 = 7000;
const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: echo, namespace: shop}\nspec: {selector: {app: echo}, ports: [{port: 7000}]}\n";
/// Connections that are kept over the whole test.
const KEPT: usize = 10;

/// Two clients and two servers on two nodes, all in one namespace, and the VIP of the servers.
struct Bed {
    cluster: Cluster,
    clients: Vec<Pod>,
    target: SocketAddr,
}

impl Bed {
    async fn new(ambient: bool) -> Self {
        let builder = Cluster::builder().ztunnel_config("drainTimeout", "30s");
        let cluster = builder.start().await.expect("root, ambit-control and ztunnel");
        cluster.namespace("shop", ambient).await.expect("a namespace");
        cluster.apply(SERVICE).await.expect("a service");
        let mut clients = Vec::new();
        for node in 0..2 {
            let server = PodOptions::new("shop", format!("echo-{node}")).node(node).label("app", "echo");
            let server = cluster.pod(server.service_account("echo")).await.expect("a pod");
            echo(&server).await;
            let client =
                PodOptions::new("shop", format!("client-{node}")).node(node).service_account("client");
            clients.push(cluster.pod(client).await.expect("a pod"));
        }
        let vip = cluster.service_ips("shop", "echo")[0];
        Self { cluster, clients, target: SocketAddr::new(vip, PORT) }
    }

    fn pods(&self) -> Vec<Pod> {
        self.cluster.pods().into_iter().filter(|pod| pod.namespace() == "shop").collect()
    }

    /// Ends the load and judges it. What was under way through a process when it was killed may be cut.
    async fn ends(self, load: Load, kept_survive: bool, kills: &[Instant]) {
        let verdict = load.stop(kills).await;
        if !verdict.is_clean(kept_survive) {
            for (name, lines) in self.cluster.mesh_logs() {
                eprintln!("== {name}");
                lines.iter().rev().take(40).rev().for_each(|line| eprintln!("{line}"));
            }
        }
        let Verdict { asked, new_failed, kept_failed, first_fault } = &verdict;
        assert!(*asked > 100, "the load ran: {asked}");
        assert_eq!(*new_failed, 0, "of {asked}, new ones failed: {first_fault:?}");
        if kept_survive {
            assert_eq!(*kept_failed, 0, "kept connections were cut: {first_fault:?}");
        }
        self.cluster.shutdown().await;
    }
}

/// Sends back what comes, on both address families.
async fn echo(pod: &Pod) {
    let listener = pod.listen(SocketAddr::new(IpAddr::from([0, 0, 0, 0]), PORT)).await.expect("a port");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = [0; 1024];
                while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                    if stream.write_all(&buffer[..length]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
}

/// 100 new connections and 100 requests on 10 kept ones a second.
struct Load {
    stop: Arc<AtomicBool>,
    tasks: JoinSet<()>,
    tally: Arc<Tally>,
}

#[derive(Default)]
struct Tally {
    asked: AtomicU64,
    kept_failed: AtomicU64,
    faults: std::sync::Mutex<Vec<Fault>>,
}

/// A failure of a new connection: when it began and ended, and what it was.
#[derive(Debug)]
struct Fault {
    began: Instant,
    ended: Instant,
    text: String,
}

#[derive(Debug)]
struct Verdict {
    asked: u64,
    new_failed: usize,
    kept_failed: u64,
    first_fault: Option<String>,
}

impl Verdict {
    fn is_clean(&self, kept_survive: bool) -> bool {
        self.new_failed == 0 && (!kept_survive || self.kept_failed == 0)
    }
}

impl Load {
    async fn start(bed: &Bed) -> Self {
        let (stop, tally) = (Arc::new(AtomicBool::new(false)), Arc::new(Tally::default()));
        let mut tasks = JoinSet::new();
        for number in 0..KEPT {
            let client = bed.clients[number % bed.clients.len()].clone();
            let stream = client.connect_within(bed.target, LIMIT).await.expect("a first connection");
            tasks.spawn(keep(stream, Arc::clone(&stop), Arc::clone(&tally)));
        }
        for client in &bed.clients {
            tasks.spawn(renew(client.clone(), bed.target, Arc::clone(&stop), Arc::clone(&tally)));
        }
        Self { stop, tasks, tally }
    }

    async fn stop(mut self, kills: &[Instant]) -> Verdict {
        self.stop.store(true, Ordering::Release);
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("no task of the load panics");
        }
        let read = |count: &AtomicU64| count.load(Ordering::Acquire);
        let faults = self.tally.faults.lock().expect("no holder panics");
        let counts = |fault: &&Fault| !kills.iter().any(|kill| fault.began < *kill && fault.ended > *kill);
        let failed: Vec<&Fault> = faults.iter().filter(counts).collect();
        Verdict {
            asked: read(&self.tally.asked),
            new_failed: failed.len(),
            kept_failed: read(&self.tally.kept_failed),
            first_fault: failed.first().map(|fault| fault.text.clone()),
        }
    }

    /// Lets the load run on for a while: the time is the test's subject.
    async fn run_for(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }
}

async fn ask(stream: &mut TcpStream) -> std::io::Result<()> {
    let question = *b"0123456789abcdef";
    let exchange = async {
        stream.write_all(&question).await?;
        let mut answer = [0; 16];
        stream.read_exact(&mut answer).await?;
        if answer == question { Ok(()) } else { Err(std::io::Error::other("another answer")) }
    };
    let silent = |_| std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer within 10 s");
    tokio::time::timeout(Duration::from_secs(10), exchange).await.map_err(silent)?
}

async fn keep(mut stream: TcpStream, stop: Arc<AtomicBool>, tally: Arc<Tally>) {
    let began = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    while !stop.load(Ordering::Acquire) {
        ticks.tick().await;
        tally.asked.fetch_add(1, Ordering::AcqRel);
        if let Err(error) = ask(&mut stream).await {
            tally.kept_failed.fetch_add(1, Ordering::AcqRel);
            return eprintln!("a kept connection, after {:?}: {error}", began.elapsed());
        }
    }
}

async fn renew(client: Pod, target: SocketAddr, stop: Arc<AtomicBool>, tally: Arc<Tally>) {
    let load_began = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    let mut asking = JoinSet::new();
    while !stop.load(Ordering::Acquire) {
        ticks.tick().await;
        let (client, tally) = (client.clone(), Arc::clone(&tally));
        asking.spawn(async move {
            let began = Instant::now();
            tally.asked.fetch_add(1, Ordering::AcqRel);
            let exchange = async {
                let mut stream = client.connect_within(target, Duration::from_secs(10)).await?;
                ask(&mut stream).await
            };
            if let Err(error) = exchange.await {
                let text = format!("after {:?}, {client}: {error}", load_began.elapsed());
                let fault = Fault { began, ended: Instant::now(), text };
                tally.faults.lock().expect("no holder panics").push(fault);
            }
        });
        while asking.try_join_next().is_some() {}
    }
    while asking.join_next().await.is_some() {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_goes_into_the_mesh_and_out_again_under_load_without_a_failure() {
    let bed = Bed::new(false).await;
    let load = Load::start(&bed).await;
    load.run_for(Duration::from_secs(1)).await;
    let began = Instant::now();
    bed.cluster.label_namespace("shop", DATAPLANE_MODE, Some("ambient")).await.expect("a label");
    for pod in bed.pods() {
        bed.cluster.wait_enrolled(&pod).await.expect("it comes in");
    }
    let took = began.elapsed();
    load.run_for(Duration::from_secs(2)).await;
    let tunnelled = bed.cluster.ztunnel(0).expect("a ztunnel").metrics().await.expect("metrics");
    let secure = [("reporter", "source"), ("connection_security_policy", "mutual_tls")];
    assert!(
        tunnelled.sum("istio_tcp_connections_opened_total", &secure) > 0.0,
        "new connections are tunnelled"
    );
    bed.cluster.label_namespace("shop", DATAPLANE_MODE, None).await.expect("no label");
    for pod in bed.pods() {
        bed.cluster.wait_unenrolled(&pod).await.expect("it goes out");
    }
    load.run_for(Duration::from_secs(2)).await;
    assert!(took < Duration::from_secs(1), "it took {took:?}");
    bed.ends(load, true, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_ztunnel_that_is_started_again_refuses_no_new_connection() {
    let bed = Bed::new(true).await;
    let load = Load::start(&bed).await;
    load.run_for(Duration::from_secs(1)).await;
    let mut kills = Vec::new();
    for node in 0..2 {
        let ztunnel = bed.cluster.ztunnel(node).expect("a ztunnel");
        kills.push(Instant::now());
        ztunnel.kill().await.expect("it is killed");
        ztunnel.start().await.expect("it starts");
        ztunnel.wait_ready().await.expect("it is ready");
        load.run_for(Duration::from_secs(1)).await;
    }
    bed.ends(load, false, &kills).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ztunnels_are_replaced_one_by_one_without_a_failure() {
    let bed = Bed::new(true).await;
    let load = Load::start(&bed).await;
    load.run_for(Duration::from_secs(1)).await;
    for node in 0..2 {
        let old = bed.cluster.ztunnel(node).expect("a ztunnel");
        let new = bed.cluster.start_another_ztunnel(node).await.expect("a second one starts");
        assert_ne!(old.pid(), new.pid());
        old.terminate().await.expect("the first one drains");
        load.run_for(Duration::from_secs(1)).await;
        assert!(old.is_running(), "it drains until its connections have ended");
    }
    bed.ends(load, true, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_and_a_control_plane_that_restart_are_not_noticed() {
    let bed = Bed::new(true).await;
    let load = Load::start(&bed).await;
    bed.cluster.stop_agent(0).await.expect("it stops");
    bed.cluster.control().expect("a control plane").kill().await.expect("it is killed");
    load.run_for(Duration::from_secs(1)).await;
    bed.cluster.start_agent(0).await.expect("it starts");
    let control = bed.cluster.control().expect("a control plane");
    control.start().await.expect("it starts");
    control.wait_ready().await.expect("it is ready");
    load.run_for(Duration::from_secs(1)).await;
    let late = PodOptions::new("shop", "late").node(0).service_account("client");
    let late = bed.cluster.pod(late).await.expect("a new pod comes in after the restart");
    let mut stream = late.connect_within(bed.target, LIMIT).await.expect("it connects");
    ask(&mut stream).await.expect("it is answered");
    bed.ends(load, true, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_renewed_before_they_expire() {
    let lifetime = Duration::from_secs(4);
    let cluster = Cluster::builder().token_lifetime(lifetime).start().await.expect("root and the programs");
    cluster.namespace("shop", true).await.expect("a namespace");
    cluster.apply(SERVICE).await.expect("a service");
    let began = Instant::now();
    cluster
        .wait_until("two lifetimes to pass", LIMIT, async || began.elapsed() > 2 * lifetime)
        .await
        .expect("time passes");
    // Identities that nobody has had yet need certificates now.
    let server = PodOptions::new("shop", "late").node(1).label("app", "echo").service_account("late-server");
    let server = cluster.pod(server).await.expect("a pod");
    echo(&server).await;
    let client = PodOptions::new("shop", "late-client").node(0).service_account("late-client");
    let client = cluster.pod(client).await.expect("a pod");
    let target = SocketAddr::new(IpAddr::V4(server.ip()), PORT);
    let mut stream = client.connect_within(target, LIMIT).await.expect("it connects");
    ask(&mut stream).await.expect("it is answered");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edited_label_in_the_manifests_moves_running_programs_in_and_out() {
    let manifests = tempfile::tempdir().expect("a directory");
    let namespace = |labels: &str| {
        format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{labels}}}}}\n")
    };
    let file = manifests.path().join("namespace.yaml");
    std::fs::write(&file, namespace("")).expect("the file can be written");
    let app = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: app, namespace: shop}\nspec:\n  replicas: 2\n  selector: {matchLabels: {app: a}}\n  template:\n    metadata: {labels: {app: a}}\n    spec: {terminationGracePeriodSeconds: 0, containers: [{name: c, image: any, command: [sleep, '1000']}]}\n";
    std::fs::write(manifests.path().join("app.yaml"), app).expect("the file can be written");
    let cluster = Cluster::builder().manifests(manifests.path()).start().await.expect("it starts");
    cluster.wait_ready("shop", "app", LIMIT).await.expect("it runs");
    let pods = cluster.pods_of("shop", "app", "a");
    assert!(pods.iter().all(|pod| !pod.is_enrolled()));
    let began = Instant::now();
    std::fs::write(&file, namespace("istio.io/dataplane-mode: ambient")).expect("the file can be written");
    for pod in &pods {
        cluster.wait_enrolled(pod).await.expect("it comes in");
    }
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    std::fs::write(&file, namespace("")).expect("the file can be written");
    for pod in &pods {
        cluster.wait_unenrolled(pod).await.expect("it goes out");
        assert_eq!(pod.view().restarts(), 0);
        assert!(pod.is_ready());
    }
    assert_eq!(cluster.pods_of("shop", "app", "a").len(), 2, "the same pods, not others");
    cluster.shutdown().await;
}
