//! Flows and objects of a small shop, for tests.

use ambit_control::index::Settings;
use ambit_flows::{Flow, Kind, Lost, Report, ServiceName, Side};

use super::observed::Observed;
use super::world::World;
use crate::analyze::read_text;

const OBJECTS: &str = include_str!("shop.yaml");

/// The shop with further objects, and with given policies.
pub(super) fn shop(more: &str, given: &str) -> World {
    let objects = read_text("shop.yaml", &format!("{OBJECTS}\n---\n{more}"));
    World::new(objects, read_text("given.yaml", given), Settings::default())
        .expect("objects that can be read")
}

fn side(namespace: &str, workload: &str, account: &str) -> Side {
    let identity = format!("spiffe://cluster.local/ns/{namespace}/sa/{account}");
    Side {
        namespace: namespace.into(),
        workload: workload.into(),
        identity: if account.is_empty() { "".into() } else { identity.into() },
    }
}

fn flow(kind: Kind, source: Side, destination: Side, port: u16, counts: (u64, u64)) -> Flow {
    Flow {
        kind,
        source,
        destination,
        service: None,
        port,
        method: "".into(),
        path: "".into(),
        example_path: "".into(),
        example_host: "".into(),
        allowed: counts.0,
        denied: counts.1,
        failed: 0,
        first_seen: 1_000,
        last_seen: 2_000,
    }
}

/// Connections to a workload of the shop, allowed and denied.
pub(super) fn connections(client: (&str, &str, &str), workload: &str, port: u16, counts: (u64, u64)) -> Flow {
    let (namespace, source, account) = client;
    let destination = side("shop", workload, "any");
    flow(Kind::Inbound, side(namespace, source, account), destination, port, counts)
}

/// Requests at the shop's waypoint, for its service `web`.
pub(super) fn requests(client: (&str, &str, &str), method: &str, path: &str, counts: (u64, u64)) -> Flow {
    let (namespace, source, account) = client;
    Flow {
        service: Some(ServiceName { namespace: "shop".into(), host: "web.shop.svc.cluster.local".into() }),
        method: method.into(),
        path: path.into(),
        example_path: path.replace("{*}", "17").replace("{**}", "x/y").into(),
        example_host: "web".into(),
        ..flow(Kind::Request, side(namespace, source, account), Side::default(), 80, counts)
    }
}

/// What the proxies of the shop saw.
pub(super) fn observed(flows: Vec<Flow>) -> Observed {
    let mut observed = Observed::default();
    let report = Report {
        enabled: true,
        since: 500,
        keep: 86_400,
        bytes: 0,
        limit: 1 << 20,
        lost: Lost::default(),
        flows,
    };
    observed.add("node n1", report, 500);
    observed.sort();
    observed
}

/// A day of the shop.
pub(super) fn day() -> Observed {
    let (cli, batch) = (("shop", "cli", "cli"), ("shop", "batch", "batch"));
    let waypoint = ("shop", "waypoint", "waypoint");
    let mut observed = observed(vec![
        requests(cli, "GET", "/", (812, 0)),
        requests(cli, "GET", "/users/{*}", (64, 0)),
        requests(cli, "POST", "/users/{*}", (7, 0)),
        requests(batch, "GET", "/", (24, 0)),
        requests(batch, "DELETE", "/users/{*}", (0, 3)),
        requests(("", "", ""), "GET", "/", (5, 0)),
        connections(waypoint, "web-v1", 8080, (500, 0)),
        connections(waypoint, "web-v2", 8080, (300, 0)),
        connections(("shop", "web-v1", "web"), "db", 5432, (40, 0)),
        connections(("other", "scan", "scan"), "db", 5432, (0, 2)),
        connections(("legacy", "report", ""), "db", 5432, (1, 0)),
        connections(cli, "waypoint-1", 80, (900, 0)),
    ]);
    observed.gaps.push("node n2 was not asked: no answer within 20s".to_owned());
    observed
}
