//! Proxies that come and go: drain, two side by side, killed and started again, EMFILE.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::io::AsyncReadExt;

use crate::mesh::{LIMIT, Mesh, Pod, Ztunnel, echo, eventually, exchange, ping};

/// New connections all the time; says how many worked and what failed.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<Vec<String>>,
}

impl Load {
    fn start(client: &Pod, address: SocketAddr) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, count, client) = (stop.clone(), done.clone(), client.clone());
        let task = tokio::spawn(async move {
            let mut failures = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let outcome = async {
                    let mut stream = client.net.dial(address).await.map_err(|e| e.to_string())?;
                    let answer = exchange(&mut stream, b"hello").await.map_err(|e| e.to_string())?;
                    if answer == b"hello" { Ok(()) } else { Err(format!("answered {answer:?}")) }
                };
                match tokio::time::timeout(LIMIT, outcome).await {
                    Ok(Ok(())) => drop(count.fetch_add(1, Ordering::Relaxed)),
                    Ok(Err(error)) => failures.push(error),
                    Err(_) => failures.push("no answer".to_owned()),
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            failures
        });
        Self { stop, done, task }
    }

    async fn more(&self, count: usize) {
        let target = self.done.load(Ordering::Relaxed) + count;
        eventually("connections succeed", async || self.done.load(Ordering::Relaxed) >= target).await;
    }

    async fn failures(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

async fn pair(mesh: &Mesh) -> (Pod, SocketAddr, tokio::sync::mpsc::UnboundedReceiver<SocketAddr>) {
    let client = mesh.pod(0, "client", "client").await;
    let server = mesh.pod(1, "server", "server").await;
    let seen = echo(server.net.listen(server.net.v4.into(), 8080).await);
    (client, SocketAddr::new(server.net.v4.into(), 8080), seen)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_with_two_proxies_loses_no_connection() {
    let mut mesh = Mesh::start(2, json!({ "drainTimeout": "60s" })).await;
    let (client, address, _seen) = pair(&mesh).await;
    let mut kept = client.net.dial(address).await.unwrap();
    assert_eq!(ping(&mut kept, b"before").await.unwrap(), b"before");
    let load = Load::start(&client, address);
    load.more(20).await;
    for node in 0..2 {
        let successor = mesh.nodes[node].ztunnel.start_another().await;
        let mut old = std::mem::replace(&mut mesh.nodes[node].ztunnel, successor);
        load.more(20).await;
        old.terminate();
        load.more(20).await;
        assert_eq!(ping(&mut kept, b"during").await.unwrap(), b"during");
        assert!(old.child.try_wait().unwrap().is_none(), "a draining proxy serves its connections");
        mesh.retired.push(old);
    }
    load.more(20).await;
    assert_eq!(ping(&mut kept, b"after").await.unwrap(), b"after");
    assert_eq!(load.failures().await, Vec::<String>::new());
    assert_eq!(exchange(&mut kept, b"end").await.unwrap(), b"end");
    for old in &mut mesh.retired {
        assert!(old.exited().await.success(), "a drained proxy ends by itself");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_and_restarted_proxy_refuses_no_connection() {
    let mut mesh = Mesh::start(2, json!({})).await;
    let (client, address, _seen) = pair(&mesh).await;
    for node in 0..2 {
        let ztunnel = &mut mesh.nodes[node].ztunnel;
        ztunnel.child.kill().await.unwrap();
        let waiting = tokio::spawn({
            let client = client.clone();
            async move {
                let mut stream = client.net.dial(address).await.expect("held, not refused");
                exchange(&mut stream, b"patience").await
            }
        });
        let config = ztunnel.config.clone();
        ztunnel.replace(config).await;
        assert_eq!(waiting.await.unwrap().unwrap(), b"patience", "node {node}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_drain_time_connections_are_cut() {
    let mut mesh = Mesh::start(2, json!({ "drainTimeout": "300ms" })).await;
    let (client, address, _seen) = pair(&mesh).await;
    let mut open = client.net.dial(address).await.unwrap();
    assert_eq!(ping(&mut open, b"x").await.unwrap(), b"x");
    assert!(mesh.nodes[0].ztunnel.post("/quitquitquit").await.contains("200 OK"));
    let ended = tokio::time::timeout(LIMIT, open.read_u8()).await.expect("cut");
    assert!(ended.is_err());
    assert!(mesh.nodes[0].ztunnel.exited().await.success());
    let line = mesh.nodes[0].ztunnel.logged("cut", |l| l["direction"] == "outbound").await;
    assert!(line["error"].to_string().contains("drain"), "{line}");
}

/// A process that stands still until this is dropped.
struct Stopped(nix::unistd::Pid);

impl Stopped {
    fn new(ztunnel: &Ztunnel) -> Self {
        let pid = nix::unistd::Pid::from_raw(ztunnel.child.id().unwrap().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It may have ended.
        nix::sys::signal::kill(self.0, nix::sys::signal::Signal::SIGCONT).ok();
    }
}

/// A peer that leaves GOAWAY unanswered and has nothing open is not waited for. Who is busy has the whole time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_tunnels_do_not_delay_the_end_of_a_proxy() {
    let mut mesh = Mesh::start(3, json!({ "drainTimeout": "60s", "drainIdle": "300ms" })).await;
    let (client, address, _seen) = pair(&mesh).await;
    let talker = mesh.pod(2, "talker", "client").await;
    let mut ended = client.net.dial(address).await.unwrap();
    assert_eq!(exchange(&mut ended, b"once").await.unwrap(), b"once");
    let is_over =
        |line: &serde_json::Value| line["direction"] == "inbound" && line["src.workload"] == "client";
    mesh.nodes[1].ztunnel.logged("the end of the tunnel", is_over).await;
    let mut busy = talker.net.dial(address).await.unwrap();
    assert_eq!(ping(&mut busy, b"before").await.unwrap(), b"before");
    let _stopped = Stopped::new(&mesh.nodes[0].ztunnel);
    mesh.nodes[1].ztunnel.terminate();
    for _ in 0..10 {
        assert_eq!(ping(&mut busy, b"meanwhile").await.unwrap(), b"meanwhile");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(exchange(&mut busy, b"end").await.unwrap(), b"end");
    let start = std::time::Instant::now();
    assert!(mesh.nodes[1].ztunnel.exited().await.success());
    assert!(start.elapsed() < Duration::from_secs(5), "waited {:?} for a silent peer", start.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_keeps_open_connections_and_ends_readiness() {
    let mesh = Mesh::start(2, json!({})).await;
    let (client, address, _seen) = pair(&mesh).await;
    let mut open = client.net.dial(address).await.unwrap();
    assert_eq!(ping(&mut open, b"x").await.unwrap(), b"x");
    let ztunnel: &Ztunnel = &mesh.nodes[0].ztunnel;
    assert!(ztunnel.post("/drain_listeners").await.contains("200 OK"));
    eventually("not ready", async || !ztunnel.is_ready().await).await;
    eventually("the agent sees it go", async || mesh.nodes[0].agent.proxies() == 0).await;
    assert_eq!(ping(&mut open, b"y").await.unwrap(), b"y");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_leaves_is_served_no_more_and_the_others_go_on() {
    let mesh = Mesh::start(2, json!({})).await;
    let (client, address, _seen) = pair(&mesh).await;
    let leaving = mesh.pod(0, "leaving", "leaving").await;
    let served = async |count: usize| {
        eventually("pods served", async || {
            mesh.nodes[0].ztunnel.dump().await["pods"].as_array().is_some_and(|pods| pods.len() == count)
        })
        .await;
    };
    served(2).await;
    mesh.nodes[0].agent.remove_pod(&leaving.uid, None).await.unwrap();
    served(1).await;
    let mut stream = client.net.dial(address).await.unwrap();
    assert_eq!(exchange(&mut stream, b"on").await.unwrap(), b"on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accepting_pauses_without_descriptors_and_resumes() {
    let mesh = Mesh::start(2, json!({})).await;
    let (client, address, _seen) = pair(&mesh).await;
    let pid = mesh.nodes[0].ztunnel.child.id().unwrap();
    let open_files = || std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64;
    let limit = open_files() + 10;
    limit_files(pid, limit);
    let mut open = Vec::new();
    for _ in 0..30 {
        open.push(client.net.dial(address).await.unwrap());
    }
    eventually("descriptors run out", async || open_files() >= limit).await;
    limit_files(pid, 4096);
    eventually("shortage counted", async || {
        !mesh.nodes[0].ztunnel.metrics().await.contains("ambit_accept_shortages_total 0")
    })
    .await;
    for stream in &mut open {
        // Some were given up for want of a socket upstream; none may hang, and new ones must work.
        drop(tokio::time::timeout(LIMIT, exchange(stream, b"late")).await.expect("answered or closed"));
    }
    let mut stream = client.net.dial(address).await.unwrap();
    assert_eq!(exchange(&mut stream, b"again").await.unwrap(), b"again");
}

/// Sets the soft limit of open files of a process.
fn limit_files(pid: u32, soft: u64) {
    let done = std::process::Command::new("prlimit")
        .args(["--pid", &pid.to_string(), &format!("--nofile={soft}:")])
        .status()
        .expect("prlimit (util-linux)");
    assert!(done.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recreated_pod_is_reached_before_the_old_one_has_left() {
    let mesh = Mesh::start(1, json!({})).await;
    let client = mesh.pod(0, "client", "client").await;
    let _former = mesh.pod(0, "server", "server").await;
    let mut later = mesh.uncaptured_pod(0, "server", "server").await;
    later.uid = "uid-server-later".to_owned();
    let later = mesh.capture(0, &later).await;
    let _seen = echo(later.net.listen(later.net.v4.into(), 8080).await);
    let mut stream = client.net.dial((later.net.v4, 8080).into()).await.unwrap();
    assert_eq!(exchange(&mut stream, b"later").await.unwrap(), b"later");
    assert!(mesh.nodes[0].ztunnel.metrics().await.contains("ambit_handed_over_total 1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_moves_no_byte_is_closed_after_its_time() {
    let mesh = Mesh::start(2, json!({ "limits": { "connectionIdle": "2s" } })).await;
    let client = mesh.pod(0, "client", "client").await;
    for server in [mesh.pod(0, "near", "server").await, mesh.pod(1, "far", "server").await] {
        let address = SocketAddr::new(server.net.v4.into(), 8080);
        let _seen = echo(server.net.listen(address.ip(), address.port()).await);
        let [mut quiet, mut busy] =
            [client.net.dial(address).await.unwrap(), client.net.dial(address).await.unwrap()];
        assert_eq!(ping(&mut quiet, b"once").await.unwrap(), b"once");
        let mut byte = [0; 1];
        let closed = async {
            loop {
                assert_eq!(ping(&mut busy, b"again").await.unwrap(), b"again");
                let pause = Duration::from_millis(200);
                if let Ok(read) = tokio::time::timeout(pause, AsyncReadExt::read(&mut quiet, &mut byte)).await
                {
                    return read;
                }
            }
        };
        let closed = tokio::time::timeout(LIMIT, closed).await.expect("closed for being idle");
        assert!(closed.is_err(), "closed by a reset, not as if it had ended: {closed:?}");
        assert_eq!(ping(&mut busy, b"still").await.unwrap(), b"still");
    }
    let line = mesh.nodes[0]
        .ztunnel
        .logged("the reason", |line| line["error"].to_string().contains("no byte moved"));
    assert_eq!(line.await["src.workload"], "client");
}
