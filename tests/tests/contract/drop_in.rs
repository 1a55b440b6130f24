//! Our node proxy under Istio's chart, with its image replaced: the chart's arguments and environment.

use crate::grpc::DISCOVERY;
use crate::istiod::{Istiod, Ztunnel, opening};

/// The chart's environment, for a control plane of a test.
fn chart(istiod: &Istiod) -> Vec<(&'static str, String)> {
    let path = |name: &str| istiod.path(name).display().to_string();
    let address = istiod.server.address().to_string();
    vec![
        ("XDS_ADDRESS", address.clone()),
        ("CA_ADDRESS", address),
        ("XDS_ROOT_CA", path("root-cert.pem")),
        ("CA_ROOT_CA", path("root-cert.pem")),
        ("ALT_XDS_HOSTNAME", crate::istiod::NAME.to_owned()),
        ("AUTH_TOKEN", path("istio-token")),
        ("INPOD_UDS", path("zds.sock")),
        ("NODE_NAME", "node-1".to_owned()),
        ("POD_NAME", "ztunnel-a".to_owned()),
        ("POD_NAMESPACE", "istio-system".to_owned()),
        ("INSTANCE_IP", "10.0.0.9".to_owned()),
        ("SERVICE_ACCOUNT", "ztunnel".to_owned()),
        ("CLUSTER_ID", "c1".to_owned()),
        ("NETWORK", "net-1".to_owned()),
        ("ISTIO_META_DNS_CAPTURE", "true".to_owned()),
        ("ISTIO_META_ENABLE_HBONE", "true".to_owned()),
        ("RUST_LOG", "info".to_owned()),
        ("LOG_FORMAT", "json".to_owned()),
        ("ZTUNNEL_CPU_LIMIT", "2".to_owned()),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30".to_owned()),
        ("PACKET_MARK", "1337".to_owned()),
        ("KEEPALIVE_TIME", "10s".to_owned()),
    ]
}

fn start(istiod: &Istiod) -> Ztunnel {
    let variables = chart(istiod);
    let variables: Vec<(&str, &str)> =
        variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Ztunnel::start(istiod, &["proxy", "ztunnel"], &variables)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_charts_environment_and_arguments_are_honoured() {
    let mut istiod = Istiod::start().await;
    let ztunnel = start(&istiod);
    let mut stream = istiod.server.accept(DISCOVERY).await;
    assert_eq!(stream.headers["clusterid"], "c1");
    let [first, _] = opening(&mut stream).await;
    assert_eq!(first["node"]["id"], "ztunnel~10.0.0.9~ztunnel-a.istio-system~istio-system.svc.cluster.local");
    let metadata = &first["node"]["metadata"]["fields"];
    for (key, value) in
        [("NODE_NAME", "node-1"), ("CLUSTER_ID", "c1"), ("NETWORK", "net-1"), ("ENABLE_HBONE", "true")]
    {
        assert_eq!(metadata[key]["string_value"], value, "{metadata}");
    }
    let config = ztunnel.until("the dump", |dump| dump["config"].is_object()).await["config"].take();
    assert_eq!((&config["workers"], &config["drainTimeout"]), (&2.into(), &"28s".into()), "{config:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_effect_is_named_in_one_warning_and_logs_are_json() {
    let mut istiod = Istiod::start().await;
    let ztunnel = start(&istiod);
    let mut stream = istiod.server.accept(DISCOVERY).await;
    opening(&mut stream).await;
    ztunnel.until("the dump", |dump| dump["config"].is_object()).await;
    let log = ztunnel.log();
    let lines: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    let named: Vec<String> =
        lines.iter().map(ToString::to_string).filter(|line| line.contains("PACKET_MARK")).collect();
    assert!(named.len() == 1 && named[0].contains("KEEPALIVE_TIME"), "{named:?}");
    assert!(!named[0].contains("XDS_ADDRESS"), "{named:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dashboards_metrics_have_their_names() {
    let mut istiod = Istiod::start().await;
    let ztunnel = start(&istiod);
    let mut stream = istiod.server.accept(DISCOVERY).await;
    opening(&mut stream).await;
    crate::istiod::send(&mut stream, crate::ADDRESS, crate::istiod::VERSION, &[], &[]);
    stream.until("DeltaDiscoveryRequest", |it| !it["response_nonce"].is_null()).await;
    stream.finish();
    let mut stream = istiod.server.accept(DISCOVERY).await;
    opening(&mut stream).await;
    let metrics = ztunnel.metrics().await;
    for line in [
        "istio_build{component=\"ztunnel\"",
        "istio_dns_requests_total 0",
        "istio_dns_upstream_requests_total 0",
        "istio_xds_connection_terminations_total{reason=\"Complete\"} 1",
        "istio_xds_message_total{url=\"type.googleapis.com/istio.workload.Address\"} 1",
        "workload_manager_active_proxy_count 0",
        "workload_manager_pending_proxy_count 0",
        "istio_tcp_sockets_open 0",
        "process_open_fds ",
    ] {
        assert!(metrics.lines().any(|known| known.starts_with(line)), "{line} is not in\n{metrics}");
    }
}

/// Every further variable that the chart may set either changes a setting or is named as one without effect.
#[tokio::test(flavor = "multi_thread")]
async fn every_variable_is_honoured_or_named() {
    let mut istiod = Istiod::start().await;
    let honoured = [
        ("CLUSTER_DOMAIN", "corp.example", "/dns/clusterDomain", "corp.example"),
        ("SECRET_TTL", "2h", "/certificates/lifetime", "2h"),
        ("XDS_ON_DEMAND", "true", "/xds/onDemand", "true"),
        ("DNS_CAPTURE", "false", "/dns/enabled", "false"),
        ("CRL_PATH", "/tmp/none.crl", "/crlFile", "/tmp/none.crl"),
        ("CONNECTION_TERMINATION_DEADLINE", "7s", "/drainTimeout", "7s"),
        ("POOL_UNUSED_RELEASE_TIMEOUT", "30s", "/limits/poolIdle", "30s"),
        ("ZTUNNEL_WORKER_THREADS", "1", "/workers", "1"),
    ];
    let named = [
        "POOL_MAX_STREAMS_PER_CONNECTION",
        "KEEPALIVE_TIME",
        "KEEPALIVE_INTERVAL",
        "KEEPALIVE_RETRIES",
        "KEEPALIVE_ENABLED",
        "PACKET_MARK",
        "ENABLE_ORIG_SRC",
        "PREFERED_SERVICE_NAMESPACE",
        "LOCALHOST_APP_TUNNEL",
        "ENABLE_RESPONSE_BAGGAGE",
        "LOCAL_XDS_PATH",
        "ZTUNNEL_RESOURCE_CPU_REQUEST",
    ];
    let chart = chart(&istiod);
    let mut variables: Vec<(&str, &str)> = chart
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .filter(|(name, _)| !named.contains(name))
        .collect();
    variables.extend(honoured.iter().map(|(name, value, _, _)| (*name, *value)));
    variables.extend(named.iter().map(|name| (*name, "1")));
    let ztunnel = Ztunnel::start(&istiod, &["proxy", "ztunnel"], &variables);
    let mut stream = istiod.server.accept(DISCOVERY).await;
    opening(&mut stream).await;
    let config = ztunnel.until("the dump", |dump| dump["config"].is_object()).await["config"].take();
    for (name, _, pointer, expected) in honoured {
        let value = config.pointer(pointer).unwrap_or_else(|| panic!("{name}: no {pointer} in {config:#}"));
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        assert_eq!(text, expected, "{name}");
    }
    let log = ztunnel.log();
    let warnings: Vec<&str> = log.lines().filter(|line| line.contains("no effect here")).collect();
    assert_eq!(warnings.len(), 1, "{log}");
    for name in named {
        assert!(warnings[0].contains(name), "{name} is not in {}", warnings[0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_may_be_named_by_the_nodes_metadata() {
    let mut istiod = Istiod::start().await;
    let chart = chart(&istiod);
    let mut variables: Vec<(&str, &str)> = chart
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .filter(|(name, _)| *name != "CLUSTER_ID")
        .collect();
    variables.push(("ISTIO_META_CLUSTER_ID", "c2"));
    let _ztunnel = Ztunnel::start(&istiod, &["proxy", "ztunnel"], &variables);
    let stream = istiod.server.accept(DISCOVERY).await;
    assert_eq!(stream.headers["clusterid"], "c2");
}
