//! The local cluster by itself, without a mesh: namespaces, links, DNS, VIPs, pods as processes.
//!
//! These tests make network namespaces, so they need root.

#![allow(clippy::expect_used, reason = "a test says what it needs and fails without it")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ambit_local::{Cluster, Command, Pod, PodOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const LIMIT: Duration = Duration::from_secs(10);

async fn plain() -> Cluster {
    Cluster::builder().mesh(false).start().await.expect("a cluster needs root and starts")
}

/// Answers every connection with `text` until the pod is gone.
async fn serve(pod: &Pod, port: u16, text: &'static str) {
    for ip in [IpAddr::from([0, 0, 0, 0]), IpAddr::from([0_u16; 8])] {
        let address = SocketAddr::new(ip, port);
        let listener = match pod.listen(address).await {
            Ok(listener) => listener,
            // The IPv6 wildcard holds the port for both families where bindv6only is off.
            Err(_) if ip.is_ipv6() => continue,
            Err(error) => panic!("{pod} can't listen on {address}: {error}"),
        };
        tokio::spawn(async move {
            while let Ok((mut stream, peer)) = listener.accept().await {
                let answer = format!("{text} {}", peer.ip());
                stream.write_all(answer.as_bytes()).await.ok();
            }
        });
    }
}

async fn ask(client: &Pod, target: SocketAddr) -> std::io::Result<String> {
    let mut stream = client.connect_within(target, Duration::from_secs(2)).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_two_nodes_reach_each_other_over_both_families() {
    let cluster = plain().await;
    let client = cluster.pod(PodOptions::new("shop", "client").node(0)).await.expect("a pod");
    let server = cluster.pod(PodOptions::new("shop", "server").node(1)).await.expect("a pod");
    serve(&server, 8080, "hello").await;
    for (from, to) in client.ips().into_iter().zip(server.ips()) {
        if to.is_ipv6() {
            continue;
        }
        let answer = ask(&client, SocketAddr::new(to, 8080)).await.expect("an answer");
        assert_eq!(answer, format!("hello {from}"), "the client's own address arrives");
    }
    let v6 = server.ipv6().expect("a dual-stack cluster");
    let listener = server.listen(SocketAddr::new(IpAddr::V6(v6), 8081)).await.expect("a port");
    let connected = client.connect_within(SocketAddr::new(IpAddr::V6(v6), 8081), LIMIT).await;
    connected.expect("a connection over IPv6");
    let (_, peer) = listener.accept().await.expect("a connection");
    assert_eq!(peer.ip(), IpAddr::V6(client.ipv6().expect("a dual-stack cluster")));
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_is_found_by_name_and_led_to_all_its_ready_pods() {
    let cluster = plain().await;
    cluster
        .apply(
            "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: peers, namespace: shop}\nspec: {clusterIP: None, selector: {app: web}, ports: [{port: 80}]}\n",
        )
        .await
        .expect("sound manifests");
    let client = cluster.pod(PodOptions::new("shop", "client").node(0)).await.expect("a pod");
    let vip = cluster.service_ips("shop", "web")[0];
    let refused = ask(&client, SocketAddr::new(vip, 80)).await.expect_err("nobody is behind it");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    let mut servers = Vec::new();
    for (name, text) in [("one", "one"), ("two", "two")] {
        let node = servers.len();
        let pod =
            cluster.pod(PodOptions::new("shop", name).node(node).label("app", "web")).await.expect("a pod");
        serve(&pod, 8080, text).await;
        servers.push(pod);
    }
    assert!(client.resolve("web").await.expect("the name resolves").contains(&vip));
    assert!(
        client.resolve("web.shop.svc.cluster.local").await.expect("the full name resolves").contains(&vip)
    );
    client.resolve("nobody.shop").await.expect_err("no such service");
    let mut peers = client.resolve("peers.shop").await.expect("the headless name resolves");
    peers.sort();
    let mut expected: Vec<IpAddr> = servers.iter().flat_map(Pod::ips).collect();
    expected.sort();
    assert_eq!(peers, expected);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..40 {
        let answer = ask(&client, SocketAddr::new(vip, 80)).await.expect("an answer");
        seen.extend(answer.split(' ').next().map(str::to_owned));
    }
    assert_eq!(seen.len(), 2, "both pods answer");
    let own = ask(&servers[0], SocketAddr::new(vip, 80)).await.expect("a pod reaches itself and its peer");
    assert!(own.starts_with("one") || own.starts_with("two"));
    cluster.delete_pod(&servers[1]).await.expect("it ends");
    for _ in 0..10 {
        let answer = ask(&client, SocketAddr::new(vip, 80)).await.expect("an answer");
        assert!(answer.starts_with("one"), "a deleted pod gets nothing");
    }
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_runs_as_processes_and_a_crash_is_shown() {
    let cluster = plain().await;
    cluster
        .apply(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: sleeper, namespace: shop}\nspec:\n  replicas: 3\n  selector: {matchLabels: {app: s}}\n  template:\n    metadata: {labels: {app: s}}\n    spec: {terminationGracePeriodSeconds: 1, containers: [{name: c, image: any, command: [sleep, '1000']}]}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: crasher, namespace: shop}\nspec: {containers: [{name: c, image: any, command: [sh, -c, 'echo no luck; exit 3']}]}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: missing, namespace: shop}\nspec: {containers: [{name: c, image: 'no/such-image:1'}]}\n",
        )
        .await
        .expect("sound manifests");
    cluster.wait_ready("shop", "sleeper", LIMIT).await.expect("all three run");
    let sleepers = cluster.pods_of("shop", "app", "s");
    assert_eq!(sleepers.len(), 3);
    let nodes: std::collections::BTreeSet<_> = sleepers.iter().map(Pod::node).collect();
    assert_eq!(nodes.len(), 2, "they are spread over the nodes");
    let crasher = cluster.find_pod("shop", "crasher").expect("it is listed");
    crasher
        .wait_for("a second crash", LIMIT, |view| {
            view.restarts() >= 1 && view.summary().contains("exit code 3")
        })
        .await
        .expect("it crashes again and again");
    assert!(crasher.view().summary().contains("CrashLoopBackOff"));
    assert!(crasher.view().summary().contains("no luck"));
    let missing = cluster.find_pod("shop", "missing").expect("it is listed");
    missing
        .wait_for("its fault", LIMIT, |view| view.summary().starts_with("ImageNotFound"))
        .await
        .expect("the missing image is named");
    let victim = &sleepers[0];
    let pid = victim.process(0).expect("it runs").pid();
    cluster.delete_pod(victim).await.expect("it ends");
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "its process is gone");
    cluster.wait_ready("shop", "sleeper", LIMIT).await.expect("another takes its place");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn editing_a_manifest_changes_the_running_cluster() {
    let manifests = tempfile::tempdir().expect("a directory");
    let file = manifests.path().join("app.yaml");
    let deployment = |replicas: u32, seconds: u32| {
        format!(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: app}}\nspec:\n  replicas: {replicas}\n  selector: {{matchLabels: {{app: a}}}}\n  template:\n    metadata: {{labels: {{app: a}}}}\n    spec: {{terminationGracePeriodSeconds: 0, containers: [{{name: c, image: any, command: [sleep, '{seconds}']}}]}}\n"
        )
    };
    std::fs::write(&file, deployment(1, 1000)).expect("the file can be written");
    let cluster =
        Cluster::builder().mesh(false).manifests(manifests.path()).start().await.expect("it starts");
    cluster.wait_ready("default", "app", LIMIT).await.expect("it runs");
    let first = cluster.pods_of("default", "app", "a")[0].clone();
    std::fs::write(&file, deployment(2, 2000)).expect("the file can be written");
    cluster
        .wait_until("the rollout", LIMIT, async || {
            let pods = cluster.pods_of("default", "app", "a");
            pods.len() == 2 && pods.iter().all(|pod| pod.is_ready() && pod.uid() != first.uid())
        })
        .await
        .expect("the new template replaces the old one");
    std::fs::write(&file, "kind: [").expect("the file can be written");
    cluster
        .wait_until("the fault", LIMIT, async || !cluster.problems().is_empty())
        .await
        .expect("the fault is reported");
    assert_eq!(cluster.pods_of("default", "app", "a").len(), 2, "the last good state stays");
    std::fs::remove_file(&file).expect("the file can be removed");
    cluster
        .wait_until("the end", LIMIT, async || cluster.pods_of("default", "app", "a").is_empty())
        .await
        .expect("what is not in the directory any more goes");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_sees_the_fabric_and_no_traffic_within_a_node() {
    let cluster = plain().await;
    let client = cluster.pod(PodOptions::new("shop", "client").node(0)).await.expect("a pod");
    let near = cluster.pod(PodOptions::new("shop", "near").node(0)).await.expect("a pod");
    let far = cluster.pod(PodOptions::new("shop", "far").node(1)).await.expect("a pod");
    serve(&near, 8080, "said-nearby").await;
    serve(&far, 8080, "said-across").await;
    let capture = cluster.capture().await.expect("a capture needs root");
    for pod in [&near, &far] {
        ask(&client, SocketAddr::new(IpAddr::V4(pod.ip()), 8080)).await.expect("an answer");
    }
    let captured = capture.stop().await.expect("what was captured");
    assert_eq!(captured.dropped, 0);
    assert_eq!(captured.find(b"said-across").len(), 1);
    assert!(captured.find(b"said-nearby").is_empty());
    cluster.set_link(1, false).await.expect("the link goes down");
    let cut = ask(&client, SocketAddr::new(IpAddr::V4(far.ip()), 8080)).await;
    assert_eq!(cut.expect_err("the node is cut off").kind(), std::io::ErrorKind::TimedOut);
    cluster.set_link(1, true).await.expect("the link comes up");
    cluster
        .wait_until("the link", LIMIT, async || {
            ask(&client, SocketAddr::new(IpAddr::V4(far.ip()), 8080)).await.is_ok()
        })
        .await
        .expect("the node is back");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_decide_who_is_ready_and_who_is_restarted() {
    let cluster = plain().await;
    cluster
        .apply(
            "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: shop}\nspec:\n  terminationGracePeriodSeconds: 0\n  containers:\n  - name: c\n    command: [sleep, '1000']\n    readinessProbe: {tcpSocket: {port: 7000}, periodSeconds: 1, failureThreshold: 1}\n    livenessProbe: {exec: {command: [test, '!', -e, DIE]}, periodSeconds: 1, failureThreshold: 1}\n"
                .replace("DIE", &format!("/tmp/ambit-local-test-{}", std::process::id()))
                .as_str(),
        )
        .await
        .expect("a sound manifest");
    let pod = cluster.find_pod("shop", "p").expect("it is listed");
    pod.wait_for("it to run", LIMIT, |view| view.phase() == "Running").await.expect("it runs");
    assert!(!pod.is_ready(), "nobody listens yet");
    let listener = pod.listen("0.0.0.0:7000".parse().expect("an address")).await.expect("a port");
    pod.wait_for("readiness", LIMIT, |view| view.is_ready()).await.expect("the probe reaches it");
    drop(listener);
    pod.wait_for("unreadiness", LIMIT, |view| !view.is_ready()).await.expect("the probe fails");
    let die = format!("/tmp/ambit-local-test-{}", std::process::id());
    std::fs::write(&die, "").expect("the file can be written");
    let restarted = pod.wait_for("a restart", LIMIT, |view| view.restarts() >= 1).await;
    std::fs::remove_file(&die).expect("the file can be removed");
    restarted.expect("the liveness probe restarts it");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_sees_its_pods_network_and_ends_with_its_group() {
    let cluster = plain().await;
    let pod = cluster.pod(PodOptions::new("shop", "client").node(0)).await.expect("a pod");
    let command = Command::new("sh").args(["-c", "cat /etc/resolv.conf; sleep 1000 & echo child $!; wait"]);
    let process = pod.spawn(command).await.expect("a shell");
    let line = process.wait_for_line(LIMIT, |line| line.starts_with("child")).await.expect("its output");
    assert!(process.logs().iter().any(|line| line == "nameserver 10.96.0.10"));
    let child = line.trim_start_matches("child ").to_owned();
    process.kill().await.expect("it ends");
    let proc = std::path::PathBuf::from(format!("/proc/{child}/stat"));
    cluster
        .wait_until("the child's end", LIMIT, async || {
            // A zombie that nobody has reaped yet has ended too.
            std::fs::read_to_string(&proc).map_or(true, |stat| stat.contains(") Z "))
        })
        .await
        .expect("what it started ends with it");
    let text = pod
        .run(|| {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
            let address = listener.local_addr().expect("an address");
            let mut client = std::net::TcpStream::connect(address).expect("a connection");
            let (mut server, _) = listener.accept().expect("a connection");
            server.write_all(b"within").expect("it can be written");
            drop(server);
            let mut text = String::new();
            client.read_to_string(&mut text).expect("it can be read");
            text
        })
        .await
        .expect("the closure runs");
    assert_eq!(text, "within");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_external_name_resolves_to_what_it_stands_for() {
    let cluster = plain().await;
    let address = IpAddr::from([192, 0, 2, 7]);
    cluster.set_dns_record("outside.example", vec![address]).await.expect("a pass of the controller");
    let yaml = "apiVersion: v1\nkind: Service\nmetadata: {name: ext, namespace: shop}\nspec: {type: ExternalName, externalName: outside.example}\n";
    cluster.apply(yaml).await.expect("a sound manifest");
    let client = cluster.pod(PodOptions::new("shop", "client")).await.expect("a pod");
    assert_eq!(client.resolve("ext").await.expect("the name resolves"), [address]);
    cluster.shutdown().await;
}
