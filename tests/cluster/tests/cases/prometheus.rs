//! A real Prometheus scrapes the mesh by the chart's annotations: the queries of Kiali and of Istio's boards (7639, 7636, 7630, 21306)
//! have data, so have those of the chart's boards, and the chart's alerts can be evaluated and are quiet.

use std::time::Duration;

use ambit_cluster::{Cluster, wait};
use serde_json::{Value, json};

use super::apps::Apps;
use super::mesh::set_mode;
use super::waypoint::put_behind_waypoint;
use super::{Cases, Outcome};

/// How soon a query has data: a few scrapes, on a busy machine.
const SOON: Duration = Duration::from_secs(240);
/// The namespace of this case.
const NAMESPACE: &str = "scraped";
/// Where Prometheus listens in the network of the first node.
const ADDRESS: &str = "127.0.0.1:19090";
/// Its directory on the first node.
const DIRECTORY: &str = "/tmp/prometheus-test";
/// The chart's boards and alerts.
const FILES: &str = "charts/ambit/files";

/// Queries about connections that must have data, and who asks them.
const CONNECTIONS: &[(&str, &str)] = &[
    (
        "Kiali, graph of TCP traffic",
        "round(sum(rate(istio_tcp_sent_bytes_total{reporter=\"source\",source_workload_namespace=\"scraped\"}[1m])) by \
         (source_cluster,source_workload_namespace,source_workload,source_canonical_service,source_canonical_revision,\
         destination_cluster,destination_workload_namespace,destination_service,destination_service_name,\
         destination_service_namespace,destination_workload,destination_canonical_service,destination_canonical_revision,\
         response_flags) > 0,0.001)",
    ),
    (
        "Kiali, mutual TLS of an edge",
        "sum(rate(istio_tcp_connections_opened_total{destination_workload_namespace=\"scraped\",\
         connection_security_policy=\"mutual_tls\"}[1m])) by (source_principal,destination_principal) > 0",
    ),
    ("Kiali, control plane", "sum(pilot_xds{app=\"istiod\"}) > 0"),
    ("7639, components", "sum(istio_build) by (component, tag) > 0"),
    (
        "7639, TCP services",
        "label_join(sum(rate(istio_tcp_received_bytes_total{reporter=~\"source|waypoint\"}[1m])) by \
         (destination_workload, destination_workload_namespace, destination_service), \"destination_workload_var\", \".\", \
         \"destination_workload\", \"destination_workload_namespace\") > 0",
    ),
    ("7639, services", "max(pilot_services) > 0"),
    (
        "7636, bytes received of a service",
        "sum(irate(istio_tcp_received_bytes_total{reporter=\"destination\",connection_security_policy=\"mutual_tls\",\
         destination_service=~\"server.scraped.svc.cluster.local\"}[1m])) by (source_workload, source_workload_namespace) > 0",
    ),
    (
        "7630, bytes sent by a workload",
        "sum(irate(istio_tcp_sent_bytes_total{connection_security_policy=\"mutual_tls\",reporter=\"source\",\
         source_workload_namespace=~\"scraped\",source_workload=~\"client\"}[1m])) by (destination_service) > 0",
    ),
    ("21306, versions", "sum by (tag) (istio_build{component=\"ztunnel\"}) > 0"),
    (
        "21306, connections",
        "sum by (pod) (rate(istio_tcp_connections_opened_total{pod=~\"ztunnel-.*\"}[1m])) > 0",
    ),
    ("21306, DNS", "sum by (pod) (rate(istio_dns_requests_total{pod=~\"ztunnel-.*\"}[1m])) > 0"),
    ("21306, XDS", "sum by (url) (istio_xds_message_total{pod=~\"ztunnel-.*\"}) > 0"),
    ("21306, workloads", "sum by (pod) (workload_manager_active_proxy_count{pod=~\"ztunnel-.*\"}) > 0"),
    (
        "21306, workloads that wait",
        "sum by (pod) (workload_manager_pending_proxy_count{pod=~\"ztunnel-.*\"}) >= 0",
    ),
];

/// The same about requests, which a waypoint counts, and about changes: the waypoint that is made is one.
const REQUESTS: &[(&str, &str)] = &[
    (
        "Kiali, control plane",
        "histogram_quantile(0.99, sum(rate(pilot_proxy_convergence_time_bucket[2m])) by (le)) >= 0",
    ),
    (
        "Kiali, graph of HTTP traffic",
        "round(sum(rate(istio_requests_total{reporter=~\"source|waypoint\",source_workload_namespace=\"scraped\"}[1m])) by \
         (source_cluster,source_workload_namespace,source_workload,source_canonical_service,source_canonical_revision,\
         destination_cluster,destination_workload_namespace,destination_service,destination_service_name,\
         destination_service_namespace,destination_workload,destination_canonical_service,destination_canonical_revision,\
         request_protocol,response_code,grpc_response_status,response_flags) > 0,0.001)",
    ),
    (
        "Kiali, response times of an edge",
        "histogram_quantile(0.95, sum(rate(istio_request_duration_milliseconds_bucket{reporter=~\"source|waypoint\",\
         destination_service_namespace=\"scraped\"}[1m])) by (le,source_workload,destination_service_name)) > 0",
    ),
    (
        "Kiali, request and response sizes",
        "histogram_quantile(0.5, sum(rate(istio_response_bytes_bucket{destination_service_name=\"server\"}[1m])) by (le)) and \
         histogram_quantile(0.5, sum(rate(istio_request_bytes_bucket{destination_service_name=\"server\"}[1m])) by (le))",
    ),
    (
        "7639, success rate",
        "sum(rate(istio_requests_total{reporter=~\"source|waypoint\",response_code!~\"5.*\"}[1m])) / \
         sum(rate(istio_requests_total{reporter=~\"source|waypoint\"}[1m])) > 0",
    ),
    (
        "7639, HTTP services",
        "label_join(sum(rate(istio_requests_total{reporter=~\"source|waypoint\",response_code=\"200\"}[1m])) by \
         (destination_workload, destination_workload_namespace, destination_service), \"destination_workload_var\", \".\", \
         \"destination_workload\", \"destination_workload_namespace\") > 0",
    ),
    (
        "7639, latency",
        "label_join(histogram_quantile(0.5, sum(rate(istio_request_duration_milliseconds_bucket{reporter=~\"source|waypoint\"}\
         [1m])) by (le, destination_workload, destination_workload_namespace)), \"destination_workload_var\", \".\", \
         \"destination_workload\", \"destination_workload_namespace\") > 0",
    ),
    (
        "7636, requests by source and code",
        "sum(irate(istio_requests_total{connection_security_policy=\"mutual_tls\",\
         destination_service=~\"server.scraped.svc.cluster.local\",reporter=~\"source|waypoint\",source_workload=~\"client\",\
         source_workload_namespace=~\"scraped\"}[1m])) by (source_workload, source_workload_namespace, response_code) > 0",
    ),
    (
        "7630, requests of a workload",
        "sum(irate(istio_requests_total{destination_workload_namespace=~\"scraped\",destination_workload=~\"server\",\
         reporter=~\"destination|waypoint\"}[1m])) by (source_workload, response_code) > 0",
    ),
];

/// What queries of the chart's boards ask for that is absent while nothing fails.
const OF_FAILURES: &[&str] = &[
    "ambit_connections_refused_total",
    "ambit_node_enrolment_failures_total",
    "ambit_request_retries_total",
    "istio_tcp_connections_failed_total",
    "response_flags!=\"-\"",
];

pub(crate) fn add(cases: &mut Cases) {
    cases.add("prometheus_has_what_kiali_and_grafana_ask_for", queries);
}

async fn queries(cluster: &Cluster) -> Outcome {
    let apps = Apps::start(cluster, NAMESPACE, ("n1", "n2")).await?;
    set_mode(cluster, NAMESPACE, true).await?;
    start_prometheus(cluster).await?;
    let outcome = ask(cluster, &apps).await;
    run(cluster, &format!("kill $(cat {DIRECTORY}/pid) && rm -r {DIRECTORY}")).await?;
    outcome?;
    Ok(apps.stop(cluster).await?)
}

async fn ask(cluster: &Cluster, apps: &Apps) -> Outcome {
    expect_data(cluster, apps, &owned(CONNECTIONS)).await?;
    put_behind_waypoint(cluster, apps).await?;
    expect_data(cluster, apps, &owned(REQUESTS)).await?;
    expect_data(cluster, apps, &panels(cluster)?).await?;
    expect_quiet_alerts(cluster).await
}

/// Starts Prometheus on the first node, where the pods of every node can be reached.
async fn start_prometheus(cluster: &Cluster) -> Outcome {
    let alerts = std::fs::read_to_string(cluster.layout().repository().join(FILES).join("alerts.yaml"))?;
    let mut write = format!("rm -rf {DIRECTORY}; mkdir -p {DIRECTORY} && cd {DIRECTORY}");
    for (name, text) in [("alerts.yaml", alerts.as_str()), ("prometheus.yaml", CONFIGURATION)] {
        write += &format!("\ncat > {name} <<'END'\n{text}\nEND");
    }
    run(cluster, &write).await?;
    // Processes that are not yet in a session of their own end with the command, so it waits for an answer.
    let start = format!(
        "cd {DIRECTORY}; setsid prometheus --config.file=prometheus.yaml --storage.tsdb.path=data \
         --web.listen-address={ADDRESS} > log 2>&1 < /dev/null & echo $! > {DIRECTORY}/pid; \
         for i in $(seq 600); do curl --silent --fail http://{ADDRESS}/-/ready && exit 0; sleep 0.1; done; cat log; exit 1"
    );
    run(cluster, &start).await
}

/// Writes what there is to scrape, as Istio's example for Prometheus finds it: by annotations of pods, with their labels.
async fn write_targets(cluster: &Cluster) -> Outcome {
    let mut targets = Vec::new();
    for pod in cluster.kubectl().list(&["pods", "--all-namespaces"]).await? {
        let annotation = |key: &str| pod["metadata"]["annotations"][format!("prometheus.io/{key}")].as_str();
        let address = pod["status"]["podIP"].as_str();
        let (Some("true"), Some(port), Some(address)) = (annotation("scrape"), annotation("port"), address)
        else {
            continue;
        };
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let labels = pod["metadata"]["labels"].as_object().into_iter().flatten();
        let mut labels: serde_json::Map<String, Value> =
            labels.map(|(key, value)| (key.replace(|c| !is_plain(c), "_"), value.clone())).collect();
        labels.insert("namespace".to_owned(), pod["metadata"]["namespace"].clone());
        labels.insert("pod".to_owned(), pod["metadata"]["name"].clone());
        labels.insert("__metrics_path__".to_owned(), annotation("path").unwrap_or("/metrics").into());
        targets.push(json!({ "targets": [format!("{address}:{port}")], "labels": labels }));
    }
    let text = Value::from(targets).to_string();
    // Renamed, so that no half of it is read.
    run(cluster, &format!("cd {DIRECTORY}; cat > next <<'END'\n{text}\nEND\nmv next targets.json")).await
}

fn owned(queries: &[(&str, &str)]) -> Vec<(String, String)> {
    queries.iter().map(|(source, query)| ((*source).to_owned(), (*query).to_owned())).collect()
}

/// The queries of the chart's boards.
fn panels(cluster: &Cluster) -> Result<Vec<(String, String)>, Box<dyn std::error::Error>> {
    let mut queries = Vec::new();
    for board in ["control", "node", "waypoint", "ztunnel"] {
        let path = cluster.layout().repository().join(FILES).join(format!("dashboards/{board}.json"));
        let board: Value = serde_json::from_slice(&std::fs::read(path)?)?;
        for panel in board["panels"].as_array().into_iter().flatten() {
            let title = panel["title"].as_str().unwrap_or_default();
            let targets = panel["targets"].as_array().into_iter().flatten();
            let queries_of = targets.filter_map(|target| target["expr"].as_str());
            for query in queries_of.filter(|query| !OF_FAILURES.iter().any(|part| query.contains(part))) {
                let query = query.replace("$pod", ".*").replace("$__rate_interval", "1m");
                queries.push((title.to_owned(), query));
            }
        }
    }
    assert!(queries.len() > 50, "{queries:?}");
    Ok(queries)
}

/// Sends requests until every query has data.
async fn expect_data(cluster: &Cluster, apps: &Apps, queries: &[(String, String)]) -> Outcome {
    let mut waiting = queries.to_vec();
    wait::until("every query has data", SOON, async || {
        write_targets(cluster).await.map_err(|error| error.to_string())?;
        apps.request(cluster).await.map_err(|error| error.to_string())?;
        let mut left = Vec::new();
        for (source, query) in waiting.drain(..) {
            match has_data(cluster, &query).await {
                Ok(true) => {}
                Ok(false) => left.push((source, query)),
                Err(error) => left.push((format!("{source}: {error}"), query)),
            }
        }
        waiting = left;
        if waiting.is_empty() { Ok(()) } else { Err(format!("{waiting:#?}")) }
    })
    .await?;
    Ok(())
}

async fn has_data(cluster: &Cluster, query: &str) -> Result<bool, Box<dyn std::error::Error>> {
    let answer = api(cluster, "query", &format!("query={query}")).await?;
    // A quantile of nothing is no number.
    let is_number = |series: &Value| series["value"][1].as_str().is_some_and(|value| value != "NaN");
    Ok(answer["result"].as_array().is_some_and(|series| series.iter().any(is_number)))
}

/// Every alert of the chart is evaluated without an error, and none fires in a mesh that is well.
async fn expect_quiet_alerts(cluster: &Cluster) -> Outcome {
    wait::until("the alerts are evaluated", SOON, async || {
        let answer = api(cluster, "rules", "type=alert").await.map_err(|error| error.to_string())?;
        let groups = answer["groups"].as_array().into_iter().flatten();
        let rules: Vec<_> =
            groups.flat_map(|group| group["rules"].as_array().into_iter().flatten()).collect();
        let wrong: Vec<_> =
            rules.iter().filter(|rule| rule["health"] != "ok" || rule["state"] == "firing").collect();
        if rules.len() > 10 && wrong.is_empty() {
            Ok(())
        } else {
            Err(format!("{} rules, {wrong:?}", rules.len()))
        }
    })
    .await?;
    Ok(())
}

/// What Prometheus answers.
async fn api(cluster: &Cluster, what: &str, argument: &str) -> Result<Value, Box<dyn std::error::Error>> {
    let url = format!("http://{ADDRESS}/api/v1/{what}");
    let curl = ["curl", "--silent", "--show-error", "--get", &url, "--data-urlencode", argument];
    let ran = cluster.run_on("n1", &curl).await?;
    // One line, which the test bed cuts where it is long.
    let text = ran.output.replace('\n', "");
    let mut answer: Value = serde_json::from_str(&text).map_err(|_| text)?;
    match answer["error"].as_str() {
        Some(error) => Err(error.to_owned().into()),
        None => Ok(answer["data"].take()),
    }
}

async fn run(cluster: &Cluster, command: &str) -> Outcome {
    let ran = cluster.run_on("n1", &["sh", "-c", command]).await?;
    if ran.code == 0 { Ok(()) } else { Err(format!("{ran:?}").into()) }
}

/// Prometheus finds its targets in a file: Debian's cannot ask Kubernetes.
const CONFIGURATION: &str = r#"
global: {scrape_interval: 3s, evaluation_interval: 3s}
rule_files: [/tmp/prometheus-test/alerts.yaml]
scrape_configs:
- job_name: kubernetes-pods
  file_sd_configs: [{files: [/tmp/prometheus-test/targets.json], refresh_interval: 1s}]
"#;
