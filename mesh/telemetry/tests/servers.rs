//! Admin, metrics and readiness over real sockets.

#![allow(clippy::unwrap_used, reason = "a failed expectation fails the test")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ambit_telemetry::http::{Router, metrics_router, readiness_router, serve};
use ambit_telemetry::logging::{LogFormat, init};
use ambit_telemetry::{Admin, Readiness, Registry, Target};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(10);

async fn start(router: Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, router));
    addr
}

/// Status and body.
async fn call(addr: SocketAddr, method: &str, path: &str) -> (u16, String) {
    let exchange = async {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = Vec::new();
        stream.read_to_end(&mut response).await.unwrap();
        String::from_utf8_lossy(&response).into_owned()
    };
    let response = timeout(PATIENCE, exchange).await.unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[tokio::test]
async fn metrics_are_served_under_both_paths() {
    let registry = Registry::new();
    registry.counter("ambit_things", "Things").inc();
    let addr = start(metrics_router(&registry)).await;
    for path in ["/metrics", "/stats/prometheus"] {
        let (status, body) = call(addr, "GET", path).await;
        assert_eq!(status, 200);
        assert!(body.contains("ambit_things_total 1\n"), "{body}");
    }
}

#[tokio::test]
async fn readiness_says_what_is_awaited() {
    let readiness = Readiness::new();
    let task = readiness.task("xds");
    let addr = start(readiness_router(&readiness)).await;
    let (status, body) = call(addr, "GET", "/healthz/ready").await;
    assert_eq!((status, body.contains("xds")), (503, true));
    task.done();
    assert_eq!(call(addr, "GET", "/healthz/ready").await.0, 200);
    readiness.start_draining();
    assert_eq!(call(addr, "GET", "/healthz/ready").await.0, 503);
}

#[tokio::test]
async fn the_configuration_is_dumped_whole_or_by_section() {
    let admin = Admin::new()
        .section("workloads", || Ok(json!([{"uid": "a"}])))
        .section("version", || Ok(json!("1.2.3")));
    let addr = start(admin.into_router()).await;
    let (status, body) = call(addr, "GET", "/config_dump").await;
    assert_eq!(status, 200);
    let dump: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(dump, json!({"workloads": [{"uid": "a"}], "version": "1.2.3"}));
    let (_, body) = call(addr, "GET", "/config_dump?section=version").await;
    assert_eq!(serde_json::from_str::<Value>(&body).unwrap(), json!({"version": "1.2.3"}));
}

#[tokio::test]
async fn a_section_that_panics_harms_only_its_dump() {
    let admin = Admin::new().section("bad", || panic!("this is part of the test"));
    let addr = start(admin.into_router()).await;
    assert_eq!(call(addr, "GET", "/config_dump").await.0, 500);
    assert_eq!(call(addr, "GET", "/config_dump?section=none").await.0, 200);
}

#[tokio::test]
async fn quit_and_drain_need_a_post_and_act_once_a_call() {
    let (quits, drains) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (on_quit, on_drain) = (Arc::clone(&quits), Arc::clone(&drains));
    let count = |counter: Arc<AtomicUsize>| {
        move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }
    };
    let admin = Admin::new().on_quit(count(on_quit)).on_drain(count(on_drain));
    let addr = start(admin.into_router()).await;
    assert_eq!(call(addr, "GET", "/quitquitquit").await.0, 405);
    assert_eq!(quits.load(Ordering::SeqCst), 0);
    assert_eq!(call(addr, "POST", "/quitquitquit").await.0, 200);
    assert_eq!(call(addr, "POST", "/drain_listeners").await.0, 200);
    assert_eq!((quits.load(Ordering::SeqCst), drains.load(Ordering::SeqCst)), (1, 1));
    assert_eq!(call(addr, "GET", "/nowhere").await.0, 404);
}

#[tokio::test]
async fn the_log_level_changes_while_the_program_runs() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let logging = init(LogFormat::Json, "info", Target::File(path.clone())).unwrap();
    let addr = start(Admin::new().logging(logging.level.clone()).into_router()).await;
    tracing::debug!("unheard");
    let (status, body) = call(addr, "POST", "/logging?level=info,servers=debug").await;
    assert_eq!((status, body.contains("servers=debug")), (200, true), "{body}");
    tracing::debug!(answer = 42, "heard");
    let (status, body) = call(addr, "POST", "/logging?level=servers=shout").await;
    assert_eq!((status, body.contains("servers=shout")), (400, true), "{body}");
    assert_eq!(call(addr, "POST", "/logging?level=reset").await.1, "current log level is info\n");
    assert_eq!(call(addr, "POST", "/logging?level=warn").await.0, 200);
    for method in ["GET", "POST"] {
        assert_eq!(
            call(addr, method, "/logging").await,
            (200, "current log level is warn\n".to_owned()),
            "{method}"
        );
    }
    assert_eq!(call(addr, "POST", "/logging?reset").await.1, "current log level is info\n");
    tracing::debug!("unheard again");
    drop(logging.writer);
    let text = std::fs::read_to_string(path).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let heard: Vec<_> =
        lines.iter().filter(|line| line["level"] == "DEBUG" && line["target"] == "servers").collect();
    assert_eq!(heard.len(), 1);
    assert_eq!((heard[0]["message"].as_str(), heard[0]["answer"].as_i64()), (Some("heard"), Some(42)));
}

#[tokio::test]
async fn profiles_are_refused_where_they_cannot_be_had() {
    let addr = start(Admin::new().into_router()).await;
    assert_eq!(call(addr, "GET", "/debug/pprof/profile?seconds=x").await.0, 400);
    let (status, body) = call(addr, "GET", "/debug/pprof/heap?seconds=1").await;
    assert_eq!(status, 501, "{body}");
    assert_eq!(call(addr, "GET", "/debug/pprof/profile?seconds=1").await.0, 200);
}

#[tokio::test]
async fn silent_connections_of_one_address_keep_nobody_else_out() {
    let addr = start(metrics_router(&Registry::new())).await;
    let mut silent = Vec::new();
    for _ in 0..100 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        silent.push(socket.connect(addr).await.unwrap());
    }
    // Before the silent ones reach their request timeout.
    let (status, _) = timeout(Duration::from_secs(1), call(addr, "GET", "/metrics")).await.expect("at once");
    assert_eq!(status, 200);
}
