//! The flows between workloads: the metrics of node proxies and waypoints, joined to one row for each pair of workloads.

use std::collections::{BTreeMap, BTreeSet};

use ambit_local::{Cluster, Metrics, Sample};

use crate::up::requests::{self, AllRequests};

/// One end of a flow.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Party {
    /// Workload name.
    pub(crate) workload: String,
    /// Its namespace.
    pub(crate) namespace: String,
    /// Its authenticated identity; empty when it has none.
    pub(crate) principal: String,
}

/// Key of a row.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Pair {
    /// The client.
    pub(crate) source: Party,
    /// The server.
    pub(crate) destination: Party,
    /// The service; empty if the pod was dialled directly.
    pub(crate) service: String,
}

/// One row: what the source's node proxy reported, and whether the destination's agrees.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Flow {
    /// Connections opened, as the source's proxy counts them.
    pub(crate) opened: f64,
    /// Connections that failed or were refused, counted by either.
    pub(crate) failed: f64,
    /// Bytes from source to destination.
    pub(crate) requests: f64,
    /// Bytes from destination to source.
    pub(crate) responses: f64,
    /// Both proxies that reported called it mutual TLS.
    pub(crate) mutual_tls: bool,
    /// Connections opened, as the destination's proxy counts them with the same two identities.
    pub(crate) confirmed: f64,
}

/// All connections.
pub(crate) type Connections = BTreeMap<Pair, Flow>;

/// All rows.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Flows {
    /// Connections, as node proxies report them.
    pub(crate) connections: Connections,
    /// Requests, as waypoints report them.
    pub(crate) requests: AllRequests,
}

/// What a waypoint reports.
struct OfWaypoint {
    /// Its own identity.
    principal: String,
    metrics: Metrics,
}

/// Reads the metrics of every node proxy and waypoint.
pub(crate) async fn read(cluster: &Cluster) -> Flows {
    let mut all = Vec::new();
    for node in 0..cluster.nodes() {
        let Ok(ztunnel) = cluster.ztunnel(node) else { continue };
        match ztunnel.metrics().await {
            Ok(metrics) => all.push(metrics),
            Err(error) => tracing::warn!(node, %error, "no metrics"),
        }
    }
    let mut waypoints = Vec::new();
    for pod in cluster.waypoints() {
        match cluster.waypoint_metrics(&pod).await {
            Ok(metrics) => waypoints.push(OfWaypoint { principal: pod.spiffe_id(), metrics }),
            // A waypoint that starts or ends has none.
            Err(error) => tracing::debug!(%pod, %error, "no metrics"),
        }
    }
    let mut flows = Flows { connections: join(&all), requests: AllRequests::new() };
    for waypoint in &waypoints {
        for sample in &waypoint.metrics.samples {
            requests::add(&mut flows.requests, sample);
        }
    }
    confirm(&mut flows.connections, &waypoints);
    flows
}

/// A waypoint is an end of its connections as a node proxy is, but reports requests: the client of each one is authenticated,
/// and so is the endpoint that it was sent to.
fn confirm(flows: &mut Connections, waypoints: &[OfWaypoint]) {
    for OfWaypoint { principal, metrics } in waypoints {
        let (mut clients, mut servers) = (BTreeMap::<Party, f64>::new(), BTreeSet::new());
        for sample in metrics.select("istio_requests_total", &[("connection_security_policy", "mutual_tls")])
        {
            *clients.entry(party(sample, "source")).or_default() += sample.value;
            servers.insert(party(sample, "destination"));
        }
        for (pair, flow) in flows.iter_mut() {
            if pair.destination.principal == *principal {
                flow.confirmed = flow.confirmed.max(clients.get(&pair.source).copied().unwrap_or_default());
            }
            if pair.source.principal == *principal && servers.contains(&pair.destination) {
                flow.opened = flow.opened.max(flow.confirmed);
                flow.mutual_tls = flow.confirmed > 0.0;
            }
        }
    }
}

/// Joins the metrics of several proxies.
fn join(all: &[Metrics]) -> Connections {
    let mut flows = Connections::new();
    for sample in all.iter().flat_map(|metrics| &metrics.samples) {
        let Some(pair) = pair(sample) else { continue };
        let label = |name: &str| sample.labels.get(name).map(String::as_str).unwrap_or_default();
        let at_source = label("reporter") == "source";
        let secure = label("connection_security_policy") == "mutual_tls";
        match (sample.name.as_str(), at_source) {
            ("istio_tcp_connections_opened_total", true) => {
                let flow = flows.entry(pair).or_default();
                // A single plaintext connection makes the whole pair plaintext.
                flow.mutual_tls = secure && (flow.mutual_tls || flow.opened == 0.0);
                flow.opened += sample.value;
            }
            ("istio_tcp_connections_opened_total", false) => {
                let flow = flows.entry(pair).or_default();
                if secure {
                    flow.confirmed += sample.value;
                }
            }
            // The metrics are from the destination's point of view: received bytes are requests.
            ("istio_tcp_received_bytes_total", true) => {
                flows.entry(pair).or_default().requests += sample.value;
            }
            ("istio_tcp_sent_bytes_total", true) => {
                flows.entry(pair).or_default().responses += sample.value;
            }
            ("istio_tcp_connections_failed_total", _) => {
                flows.entry(pair).or_default().failed += sample.value;
            }
            _ => {}
        }
    }
    flows
}

fn pair(sample: &Sample) -> Option<Pair> {
    if !sample.name.starts_with("istio_tcp_") {
        return None;
    }
    let service = label(sample, "destination_service_name");
    Some(Pair { source: party(sample, "source"), destination: party(sample, "destination"), service })
}

/// The client or the server of a sample: `source` or `destination`.
fn party(sample: &Sample, side: &str) -> Party {
    Party {
        workload: label(sample, &format!("{side}_workload")),
        namespace: label(sample, &format!("{side}_workload_namespace")),
        principal: label(sample, &format!("{side}_principal")),
    }
}

/// The value of a label; empty if it is not known.
fn label(sample: &Sample, name: &str) -> String {
    let value = sample.labels.get(name).map(String::as_str).unwrap_or_default();
    if value == "unknown" { String::new() } else { value.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABELS: &str = "source_workload=\"a\",source_workload_namespace=\"n\",source_principal=\"spiffe://x/a\",destination_workload=\"b\",destination_workload_namespace=\"n\",destination_principal=\"spiffe://x/b\",destination_service_name=\"b\"";

    fn metrics(lines: &[(&str, &str, &str, u32)]) -> Metrics {
        let text: String = lines
            .iter()
            .map(|(name, reporter, security, value)| {
                format!("{name}{{reporter=\"{reporter}\",connection_security_policy=\"{security}\",{LABELS}}} {value}\n")
            })
            .collect();
        Metrics::parse(&text)
    }

    #[test]
    fn what_both_proxies_report_becomes_one_row() {
        let source = metrics(&[
            ("istio_tcp_connections_opened_total", "source", "mutual_tls", 3),
            ("istio_tcp_sent_bytes_total", "source", "mutual_tls", 70),
        ]);
        let destination = metrics(&[
            ("istio_tcp_connections_opened_total", "destination", "mutual_tls", 3),
            ("istio_tcp_connections_failed_total", "destination", "mutual_tls", 1),
        ]);
        let flows = join(&[source, destination]);
        let (_, flow) = flows.first_key_value().expect("one row");
        let expected = Flow {
            opened: 3.0,
            failed: 1.0,
            responses: 70.0,
            mutual_tls: true,
            confirmed: 3.0,
            ..Flow::default()
        };
        assert_eq!((flows.len(), flow), (1, &expected));
    }

    #[test]
    fn a_waypoint_confirms_its_clients_and_its_servers() {
        let party = |name: &str| Party {
            workload: name.to_owned(),
            namespace: "n".to_owned(),
            principal: format!("spiffe://x/{name}"),
        };
        let pair = |from: &str, to: &str| Pair {
            source: party(from),
            destination: party(to),
            service: String::new(),
        };
        let at_client = Flow { opened: 3.0, mutual_tls: true, ..Flow::default() };
        let at_server = Flow { confirmed: 2.0, ..Flow::default() };
        let mut flows: Connections = [
            (pair("a", "w"), at_client),
            (pair("stranger", "w"), at_client),
            (pair("w", "b"), at_server),
            (pair("w", "other"), at_server),
        ]
        .into();
        let text = format!("istio_requests_total{{connection_security_policy=\"mutual_tls\",{LABELS}}} 7\n");
        confirm(
            &mut flows,
            &[OfWaypoint { principal: "spiffe://x/w".to_owned(), metrics: Metrics::parse(&text) }],
        );
        assert_eq!(flows[&pair("a", "w")].confirmed, 7.0);
        assert_eq!(flows[&pair("stranger", "w")].confirmed, 0.0);
        assert!(flows[&pair("w", "b")].mutual_tls && flows[&pair("w", "b")].opened > 0.0);
        assert!(!flows[&pair("w", "other")].mutual_tls);
    }

    #[test]
    fn one_connection_in_the_clear_shows() {
        for order in [["mutual_tls", "unknown"], ["unknown", "mutual_tls"]] {
            let lines = order.map(|security| ("istio_tcp_connections_opened_total", "source", security, 1));
            let flows = join(&[metrics(&lines)]);
            assert!(flows.values().all(|flow| !flow.mutual_tls), "{order:?}");
        }
    }
}
