//! Objects of configuration dumps as tables. Pure.

use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Dump, Kind};
use crate::output::{Palette, bytes, duration, table};

/// What proxies know, for people.
pub(super) fn render(kind: Kind, dumps: &[Dump], now: OffsetDateTime, paint: Palette) -> String {
    let all = || dumps.iter().flat_map(|dump| dump.entries.iter().map(move |entry| (dump, entry)));
    match kind {
        Kind::Workloads => table(
            paint,
            ["NAMESPACE", "NAME", "ADDRESSES", "NODE", "PROTOCOL", "STATUS", "WAYPOINT", "POLICIES"],
            all().map(|(_, entry)| workload(entry)),
        ),
        Kind::Services => table(
            paint,
            ["NAMESPACE", "HOST", "ADDRESSES", "PORTS", "WAYPOINT", "ENDPOINTS"],
            all().map(|(_, entry)| service(entry)),
        ),
        Kind::Policies => table(
            paint,
            ["NAMESPACE", "NAME", "SCOPE", "ACTION", "RULES", "DRY RUN"],
            all().map(|(_, entry)| policy(entry)),
        ),
        Kind::Certificates => table(
            paint,
            ["NODE", "IDENTITY", "STATE", "SERIAL", "EXPIRES IN", "ISSUED", "FAILURES"],
            all().map(|(dump, entry)| certificate(&dump.node, entry, now)),
        ),
        Kind::Connections => table(
            paint,
            ["NODE", "DIRECTION", "SOURCE", "DESTINATION", "WORKLOAD", "PEER", "AGE", "SENT", "RECEIVED"],
            all().map(|(dump, entry)| connection(&dump.node, entry)),
        ),
        Kind::Routes => table(
            paint,
            ["WAYPOINT", "KIND", "NAMESPACE", "NAME", "FOR", "RULES"],
            all().map(|(dump, entry)| route(&dump.proxy, entry)),
        ),
    }
}

fn workload(entry: &Value) -> [String; 8] {
    let fields = ["namespace", "name", "workloadIps", "node", "protocol", "status"];
    let [namespace, name, addresses, node, protocol, status] = fields.map(|key| text(&entry[key]));
    let policies = text(&entry["authorizationPolicies"]);
    [namespace, name, addresses, node, protocol, status, waypoint(entry), policies]
}

fn service(entry: &Value) -> [String; 6] {
    let [namespace, host, addresses] = ["namespace", "hostname", "vips"].map(|key| text(&entry[key]));
    let endpoints = count(&entry["endpoints"]).to_string();
    [namespace, host, addresses, ports(&entry["ports"]), waypoint(entry), endpoints]
}

fn policy(entry: &Value) -> [String; 6] {
    let fields = ["namespace", "name", "scope", "action"];
    let [namespace, name, scope, action] = fields.map(|key| text(&entry[key]));
    let name = name.rsplit('/').next().unwrap_or_default().to_owned();
    let dry_run = if entry["dryRun"] == true { "yes" } else { "" };
    [namespace, name, scope, action, count(&entry["rules"]).to_string(), dry_run.to_owned()]
}

fn connection(node: &str, entry: &Value) -> [String; 9] {
    let fields = ["direction", "source", "destination", "workload", "peer"];
    let [direction, source, destination, workload, peer] = fields.map(|key| text(&entry[key]));
    let size = |key: &str| bytes(entry[key].as_f64().unwrap_or(0.0));
    let age = duration(entry["seconds"].as_i64().unwrap_or(0));
    [node.to_owned(), direction, source, destination, workload, peer, age, size("sent"), size("received")]
}

fn route(proxy: &str, entry: &Value) -> [String; 6] {
    let fields = ["kind", "namespace", "name", "rules"];
    let [kind, namespace, name, rules] = fields.map(|key| text(&entry[key]));
    [proxy.to_owned(), kind, namespace, name, targets(&entry["targets"]), rules]
}

/// Whether a policy binds a workload: it is for all, for the namespace, or listed by the workload.
pub(crate) fn binds(policy: &Value, namespace: &str, workload: Option<&Value>) -> bool {
    let own = text(&policy["namespace"]);
    let name = text(&policy["name"]);
    let name = name.rsplit('/').next().unwrap_or_default();
    match text(&policy["scope"]).to_ascii_lowercase().as_str() {
        "global" => true,
        "namespace" => own == namespace,
        _ => {
            let listed = workload.and_then(|workload| workload["authorizationPolicies"].as_array());
            listed.into_iter().flatten().any(|listed| text(listed) == format!("{own}/{name}"))
        }
    }
}

/// When the first certificate of a chain expires.
pub(crate) fn expiry(certificate: &Value) -> Option<OffsetDateTime> {
    let leaf = certificate["certChain"].as_array()?.first()?;
    OffsetDateTime::parse(leaf["expirationTime"].as_str()?, &Rfc3339).ok()
}

fn certificate(node: &str, certificate: &Value, now: OffsetDateTime) -> [String; 7] {
    let leaf =
        certificate["certChain"].as_array().and_then(|chain| chain.first()).cloned().unwrap_or_default();
    let left = expiry(certificate).map(|at| (at - now).whole_seconds());
    let left = match left {
        None => String::new(),
        Some(seconds) if seconds <= 0 => "expired".to_owned(),
        Some(seconds) => duration(seconds),
    };
    let failures = certificate["failures"].as_u64().filter(|failures| *failures > 0);
    let failures =
        failures.map(|count| format!("{count}: {}", text(&certificate["lastError"]))).unwrap_or_default();
    let [identity, state] = ["identity", "state"].map(|key| text(&certificate[key]));
    let serial: String = text(&leaf["serialNumber"]).chars().take(12).collect();
    [node.to_owned(), identity, state, serial, left, text(&leaf["validFrom"]), failures]
}

/// The waypoint of a workload or service.
pub(crate) fn waypoint(object: &Value) -> String {
    text(&object["waypoint"]["destination"])
}

/// `80→8080`, for both forms of ports.
fn ports(ports: &Value) -> String {
    let pair = |from: &str, to: &str| match to {
        "0" | "" => from.to_owned(),
        to if to == from => from.to_owned(),
        to => format!("{from}→{to}"),
    };
    let pairs: Vec<String> = match ports {
        Value::Object(map) => map.iter().map(|(from, to)| pair(from, &text(to))).collect(),
        Value::Array(list) => {
            list.iter().map(|port| pair(&text(&port["servicePort"]), &text(&port["targetPort"]))).collect()
        }
        _ => Vec::new(),
    };
    pairs.join(",")
}

/// `host:port` of each service that a route is for.
fn targets(targets: &Value) -> String {
    let target = |target: &Value| {
        let host = text(&target["hostname"]);
        match target["port"].as_u64() {
            None | Some(0) => host,
            Some(port) => format!("{host}:{port}"),
        }
    };
    targets.as_array().into_iter().flatten().map(target).collect::<Vec<_>>().join(",")
}

fn count(value: &Value) -> usize {
    match value {
        Value::Array(list) => list.len(),
        Value::Object(map) => map.len(),
        _ => 0,
    }
}

/// A value in one cell: what lists and objects hold, without their keys.
pub(crate) fn text(value: &Value) -> String {
    let join = |all: Vec<String>, by: &str| {
        all.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(by)
    };
    match value {
        Value::Null => String::new(),
        // An address of the only network begins with its empty name.
        Value::String(text) => text.trim_start_matches('/').to_owned(),
        Value::Array(list) => join(list.iter().map(text).collect(), ","),
        Value::Object(map) => join(map.values().map(text).collect(), "/"),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use time::macros::datetime;

    use super::*;

    fn shown(kind: Kind, entries: &Value) -> String {
        let entries = entries.as_array().cloned().unwrap_or_default();
        let dump = Dump { proxy: "ambit-system/ztunnel-x".into(), node: "n1".into(), entries };
        render(kind, &[dump], datetime!(2026-01-01 12:00 UTC), Palette::new(false))
    }

    #[test]
    fn workloads_and_services_are_tables() {
        let workloads = shown(
            Kind::Workloads,
            &json!([{
            "namespace": "shop", "name": "web-0", "workloadIps": ["10.0.0.1", "fd00::1"], "node": "n1",
            "protocol": "HBONE", "status": "Healthy", "authorizationPolicies": ["shop/allow"],
            "waypoint": { "destination": "shop/waypoint.shop.svc.cluster.local", "hboneMtlsPort": 15008 },
        }, { "namespace": "shop", "name": "old", "protocol": "TCP", "status": "Unhealthy" }]),
        );
        let services = shown(
            Kind::Services,
            &json!([{
                "namespace": "shop", "hostname": "web.shop.svc.cluster.local", "vips": ["/10.96.0.1"],
                "ports": { "80": 8080, "443": 443 }, "endpoints": { "a": {}, "b": {} },
            }]),
        );
        insta::assert_snapshot!(format!("{workloads}\n{services}"));
    }

    #[test]
    fn policies_and_routes_are_tables() {
        let policies = shown(
            Kind::Policies,
            &json!([
                { "namespace": "shop", "name": "allow", "scope": "workloadSelector", "action": "allow", "rules": [[], []] },
                { "namespace": "shop", "name": "shop/deny", "scope": "namespace", "action": "deny", "rules": [], "dryRun": true },
            ]),
        );
        let routes = shown(
            Kind::Routes,
            &json!([{
                "kind": "HTTPRoute", "namespace": "shop", "name": "split", "rules": 2,
                "targets": [{ "hostname": "web.shop.svc.cluster.local", "port": 80 }, { "hostname": "api.shop.svc.cluster.local" }],
            }]),
        );
        insta::assert_snapshot!(format!("{policies}\n{routes}"));
    }

    #[test]
    fn certificates_and_connections_are_tables() {
        let identity = "spiffe://cluster.local/ns/shop/sa/web";
        let leaf = |expires: &str| json!([{ "serialNumber": "123456789012345", "validFrom": "2026-01-01T00:00:00Z", "expirationTime": expires }]);
        let certificates = shown(
            Kind::Certificates,
            &json!([
                { "identity": identity, "state": "Available", "certChain": leaf("2026-01-02T00:30:00Z"), "failures": 0 },
                { "identity": identity, "state": "Unavailable: expired", "certChain": leaf("2026-01-01T11:00:00Z"),
                  "failures": 3, "lastError": "no answer" },
            ]),
        );
        let connections = shown(
            Kind::Connections,
            &json!([{
                "direction": "inbound", "source": "10.0.0.2:4000", "destination": "10.0.0.1:8080", "workload": "web-0",
                "peer": identity, "seconds": 75, "sent": 1500, "received": 20,
            }]),
        );
        insta::assert_snapshot!(format!("{certificates}\n{connections}"));
    }

    #[test]
    fn policies_bind_by_scope_and_by_name() {
        let workload = json!({ "authorizationPolicies": ["shop/listed"] });
        let bound = |scope: &str, namespace: &str, name: &str| {
            let policy = json!({ "scope": scope, "namespace": namespace, "name": name });
            binds(&policy, "shop", Some(&workload))
        };
        assert!(bound("Global", "ambit-system", "x"));
        assert!(bound("namespace", "shop", "x") && !bound("namespace", "other", "x"));
        assert!(bound("workloadSelector", "shop", "listed") && !bound("workloadSelector", "shop", "x"));
    }
}
