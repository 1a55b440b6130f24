//! From records to flows.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Instant;

use ambit_telemetry::access::{Dialled, RequestTexts};

use super::*;
use crate::configuration::Span;

fn party(workload: &str, address: &str) -> Party {
    Party {
        addr: Some(address.parse().unwrap()),
        workload: Some(format!("{workload}-1").into()),
        namespace: Some("shop".into()),
        identity: Some(format!("spiffe://td/ns/shop/sa/{workload}").into()),
        owner: Some(workload.into()),
    }
}

fn entry(status: Status) -> Entry {
    Entry {
        source: party("cli", "10.0.0.1:4000"),
        destination: party("web", "10.0.0.2:15008"),
        hbone_addr: Some("10.0.0.2:8080".into()),
        service: Some("web.shop.svc.cluster.local".into()),
        dialled: Dialled {
            namespace: Some("shop".into()),
            host: Some("web.shop.svc.cluster.local".into()),
            port: 80,
        },
        is_udp: false,
        direction: Direction::Inbound,
        status,
        bytes_sent: 1,
        bytes_received: 2,
        duration: Duration::ZERO,
        error: None,
        was_observed: false,
    }
}

fn settings() -> FlowSettings {
    FlowSettings { enabled: true, keep: Span::from_secs(3600), memory: 1 << 20 }
}

/// The flows, once so many connections were counted.
fn counted(flows: &Flows, connections: u64) -> Report {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let report = flows.report();
        let count: u64 = report.flows.iter().map(|flow| flow.allowed + flow.denied).sum();
        if count >= connections {
            return report;
        }
        assert!(Instant::now() < deadline, "{report:?}");
        std::thread::yield_now();
    }
}

#[test]
fn connections_of_a_node_are_counted_by_workload_and_port() {
    let (log, flows, counter) = Flows::observe(AccessLog::disabled(), settings(), Observer::Node).unwrap();
    assert!(log.is_enabled(), "records are wanted although no line is written");
    for status in [Status::Ok, Status::Ok, Status::Denied, Status::Failed] {
        log.log(entry(status));
    }
    let report = counted(&flows, 4);
    let [flow] = report.flows.as_slice() else { panic!("{report:?}") };
    assert_eq!((flow.kind, flow.port), (Kind::Inbound, 8080));
    assert_eq!((flow.allowed, flow.denied, flow.failed), (3, 1, 1));
    assert_eq!((&*flow.source.workload, &*flow.destination.workload), ("cli", "web"));
    assert_eq!(&*flow.source.identity, "spiffe://td/ns/shop/sa/cli");
    assert_eq!(report.lost, Lost::default());
    drop(counter);
}

#[test]
fn a_connection_is_counted_when_it_opens_and_not_again_at_its_end() {
    let (log, flows, _counter) = Flows::observe(AccessLog::disabled(), settings(), Observer::Node).unwrap();
    assert!(log.is_observed());
    for status in [Status::Ok, Status::Failed, Status::Denied] {
        log.observe_open(entry(Status::Ok));
        log.log(Entry { was_observed: true, ..entry(status) });
    }
    let report = counted(&flows, 4);
    let [flow] = report.flows.as_slice() else { panic!("{report:?}") };
    assert_eq!((flow.allowed, flow.denied, flow.failed), (3, 1, 1));
}

#[test]
fn a_waypoint_counts_what_was_dialled_and_not_the_endpoint() {
    let (log, flows, _counter) =
        Flows::observe(AccessLog::disabled(), settings(), Observer::Waypoint).unwrap();
    log.log(entry(Status::Ok));
    let request = |path: &str, destination| RequestEntry {
        source: party("cli", "10.0.0.1:4000").into(),
        destination: Arc::new(destination),
        service: Some("web-v2.shop.svc.cluster.local".into()),
        dialled: entry(Status::Ok).dialled.into(),
        status: Status::Ok,
        protocol: "HTTP/1.1",
        method: http::Method::GET,
        texts: RequestTexts::new("web:80", path, None, None),
        code: 200,
        grpc_status: None,
        flags: "-",
        route: None,
        audited_by: None,
        attempts: 1,
        bytes_sent: 0,
        bytes_received: 0,
        duration: Duration::ZERO,
        error: None,
        was_observed: false,
    };
    log.log_request(request("/users/1", party("web-v1", "10.0.0.2:8080")));
    // A long one is counted while it is in progress, and not again at its end.
    log.observe_open_request(request("/users/2", party("web-v2", "10.0.0.3:8080")));
    let ended = request("/users/2", party("web-v2", "10.0.0.3:8080"));
    log.log_request(RequestEntry { was_observed: true, ..ended });
    log.log_request(request("/last", party("web-v2", "10.0.0.3:8080")));
    let report = counted(&flows, 4);
    let [connection, _, requests] = report.flows.as_slice() else { panic!("{report:?}") };
    assert_eq!((connection.kind, connection.port), (Kind::WaypointConnection, 80));
    assert_eq!((requests.kind, requests.port, requests.allowed), (Kind::Request, 80, 2));
    assert_eq!((&*requests.method, &*requests.path), ("GET", "/users/{*}"));
    assert_eq!(requests.service.as_ref().map(|it| &*it.host), Some("web.shop.svc.cluster.local"));
}

#[test]
fn requests_that_are_alike_are_counted_together_and_others_apart() {
    let request = |source: &Arc<Party>, path: &str, status| RequestEntry {
        source: source.clone(),
        destination: Arc::new(party("web", "10.0.0.2:8080")),
        service: None,
        dialled: Arc::default(),
        status,
        protocol: "HTTP/1.1",
        method: http::Method::GET,
        texts: RequestTexts::new("web", path, None, None),
        code: 200,
        grpc_status: None,
        flags: "-",
        route: None,
        audited_by: None,
        attempts: 1,
        bytes_sent: 0,
        bytes_received: 0,
        duration: Duration::ZERO,
        error: None,
        was_observed: false,
    };
    let (one, other) = (Arc::new(party("cli", "10.0.0.1:1")), Arc::new(party("job", "10.0.0.3:1")));
    let first = request(&one, "/a", Status::Ok);
    let alike = RequestEntry { texts: RequestTexts::new("web", "/a", Some("7"), None), ..first.clone() };
    let entries = [
        first.clone(),
        alike,
        request(&other, "/a", Status::Ok),
        first.clone(),
        RequestEntry { texts: RequestTexts::new("web", "/b", None, None), ..first.clone() },
        RequestEntry { status: Status::Denied, ..first.clone() },
        first,
    ];
    let (mut runs, mut counted) = (Runs::default(), Vec::new());
    let mut count = |record: &Record, several| {
        let Ended::Request(entry) = &record.ended else { panic!("a connection") };
        let owner = entry.source.owner.as_deref().unwrap();
        counted.push(format!("{owner} {} {:?} {several}", entry.texts.path(), entry.status));
    };
    for entry in entries {
        let ended = Ended::Request(entry);
        runs.add(Arc::new(Record { ended, is_open: false, time: UNIX_EPOCH }), &mut count);
    }
    runs.end(&mut count);
    counted.sort();
    assert_eq!(counted, ["cli /a Denied 1", "cli /a Ok 1", "cli /a Ok 3", "cli /b Ok 1", "job /a Ok 1"]);
}

#[test]
fn flows_that_are_switched_off_cost_nothing_and_say_so() {
    let settings = FlowSettings { enabled: false, ..settings() };
    let (log, flows, counter) = Flows::observe(AccessLog::disabled(), settings, Observer::Node).unwrap();
    assert!(!log.is_enabled() && counter.is_none() && !flows.report().enabled);
}
