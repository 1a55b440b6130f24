//! Spans and log records for collectors, as Telemetry objects want them: real collectors in pods, in the mesh and outside of it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use ambit_api::otlp::collector::logs::v1::logs_service_server::{LogsService, LogsServiceServer};
use ambit_api::otlp::collector::logs::v1::{ExportLogsServiceRequest, ExportLogsServiceResponse};
use ambit_api::otlp::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use ambit_api::otlp::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use ambit_api::otlp::common::v1::KeyValue;
use ambit_api::otlp::common::v1::any_value::Value;
use ambit_api::otlp::trace::v1::Span;
use ambit_api::otlp::trace::v1::span::SpanKind;
use ambit_local::PodOptions;
use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::bed::{PORT, Waypoints};
use crate::http;

/// Goes on where [`crate::external::MESH_CONFIG`] ends.
pub(crate) const PROVIDERS: &str = "
- name: otel
  opentelemetry: {service: otel.shop.svc.cluster.local, port: 80}
- name: otel-contexts
  opentelemetry: {service: otel-contexts.shop.svc.cluster.local, port: 80}
- name: otel-tries
  opentelemetry: {service: otel-tries.shop.svc.cluster.local, port: 80}
- name: logs
  envoyOtelAls: {service: otel-logs.shop.svc.cluster.local, port: 80, logName: mesh}
- name: spans-of-logs
  opentelemetry: {service: otel-logs.shop.svc.cluster.local, port: 80}
- name: otel-dead
  opentelemetry: {service: otel-dead.shop.svc.cluster.local, port: 80, grpc: {timeout: 300ms}}
";

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("a request is a span with the attributes of Istio's", async |bed| spans(bed).await);
    trials.add("a trace goes on in the form that it came in", async |bed| contexts(bed).await);
    trials.add("each try of a request is a span", async |bed| tries(bed).await);
    trials.add("a dead collector delays no request", async |bed| dead(bed).await);
    trials.add("logs go where a Telemetry says, as its filter says", async |bed| logs(bed).await);
}

/// Attributes by name.
type Texts = BTreeMap<String, String>;

/// What a collector got: spans with the attributes of who reported them.
#[derive(Clone, Default)]
struct Collected(Arc<Mutex<Vec<(Texts, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collected {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for all in request.into_inner().resource_spans {
            let resource = attributes(&all.resource.unwrap_or_default().attributes);
            let spans = all.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.0.lock().extend(spans.map(|span| (resource.clone(), span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// The log records that a collector got, as texts of their attributes, with the ids of their trace.
#[derive(Clone, Default)]
struct Logged(Arc<Mutex<Vec<(String, Texts)>>>);

#[tonic::async_trait]
impl LogsService for Logged {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        for all in request.into_inner().resource_logs {
            let records = all.scope_logs.into_iter().flat_map(|scope| scope.log_records);
            self.0
                .lock()
                .extend(records.map(|record| (hex(&record.trace_id), attributes(&record.attributes))));
        }
        Ok(Response::new(ExportLogsServiceResponse::default()))
    }
}

/// As texts, whatever their type.
fn attributes(all: &[KeyValue]) -> BTreeMap<String, String> {
    let value = |it: &KeyValue| match it.value.as_ref().and_then(|value| value.value.clone()) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    all.iter().map(|it| (it.key.clone(), value(it))).collect()
}

/// A collector in a pod of the mesh. It ends with the test.
struct Collector {
    collected: Collected,
    logged: Logged,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Collector {
    async fn start(bed: &Waypoints, name: &str) -> Self {
        let options = PodOptions::new("shop", name).service_account(name).label("app", name);
        let pod = bed.cluster.pod(options.node(1)).await.unwrap();
        let listener = pod.listen(SocketAddr::new(pod.ip().into(), PORT)).await.unwrap();
        let collected = Collected::default();
        let logged = Logged::default();
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(collected.clone()))
            .add_service(LogsServiceServer::new(logged.clone()));
        let serving = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        crate::external::service(bed, name, "grpc").await;
        Self { collected, logged, serving }
    }

    /// The spans of requests for a path, once there are so many.
    async fn spans(&self, path: &str, count: usize) -> Vec<(BTreeMap<String, String>, Span)> {
        let of_path = || -> Vec<(BTreeMap<String, String>, Span)> {
            let all = self.collected.0.lock();
            let is_its =
                |span: &Span| attributes(&span.attributes).get("url.path").is_some_and(|it| it == path);
            all.iter().filter(|(_, span)| is_its(span)).cloned().collect()
        };
        wait::until("the collector has the spans", SOON, || async { of_path().len() >= count }).await;
        of_path()
    }
}

fn of_kind(spans: &[(BTreeMap<String, String>, Span)], kind: SpanKind) -> Vec<Span> {
    spans.iter().map(|(_, span)| span.clone()).filter(|span| span.kind() == kind).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A Telemetry for a service of the bed.
pub(crate) async fn telemetry(bed: &Waypoints, service: &str, spec: &str) {
    bed.apply(&format!(
        "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {{name: {service}, namespace: shop}}\n\
         spec: {{targetRefs: [{{group: '', kind: Service, name: {service}}}], {spec}}}\n"
    ))
    .await;
}

/// Asks until a request belongs to a trace that the waypoint began.
pub(crate) async fn in_force(bed: &Waypoints, to: SocketAddr) {
    bed.eventually(to, "/probe", "", |answer| answer.sent("traceparent").is_some()).await;
}

async fn spans(bed: &Waypoints) {
    let collector = Collector::start(bed, "otel").await;
    let to = bed.service("recorded").await;
    let tags = "customTags: {env: {literal: {value: prod}}, user: {header: {name: x-user}}, none: {header: {name: x-none}}}";
    telemetry(
        bed,
        "recorded",
        &format!("tracing: [{{providers: [{{name: otel}}], randomSamplingPercentage: 100, {tags}}}]"),
    )
    .await;
    in_force(bed, to).await;
    let answer = http::get(&bed.cli, to, "/a?b=c", "user-agent: curl\r\nx-user: anna\r\n").await.unwrap();
    assert_eq!(answer.status, 200);
    let all = collector.spans("/a", 2).await;
    let (servers, clients) = (of_kind(&all, SpanKind::Server), of_kind(&all, SpanKind::Client));
    let ([server], [client]) = (&*servers, &*clients) else { panic!("{all:?}") };
    assert_eq!(server.name, "recorded.shop.svc.cluster.local:80/*");
    assert_eq!(client.parent_span_id, server.span_id);
    assert_eq!(client.trace_id, server.trace_id);
    assert!(server.parent_span_id.is_empty(), "it begins the trace");
    assert!(server.start_time_unix_nano <= client.start_time_unix_nano);
    assert!(client.end_time_unix_nano <= server.end_time_unix_nano);
    let endpoint = answer.sent("traceparent").unwrap();
    assert_eq!(endpoint, format!("00-{}-{}-01", hex(&client.trace_id), hex(&client.span_id)));
    let (found, tried) = (attributes(&server.attributes), attributes(&client.attributes));
    for (key, value) in [
        ("component", "proxy"),
        ("http.method", "GET"),
        ("http.url", "http://app.example/a?b=c"),
        ("http.status_code", "200"),
        ("http.response.status_code", "200"),
        ("response_flags", "-"),
        ("user_agent", "curl"),
        ("upstream_cluster", "inbound-vip|80|http|recorded.shop.svc.cluster.local"),
        ("istio.mesh_id", "cluster.local"),
        ("istio.namespace", "shop"),
        ("istio.canonical_service", "waypoint"),
        ("istio.source_workload", "cli"),
        ("istio.source_namespace", "shop"),
        ("istio.source_canonical_service", "cli"),
        ("istio.destination_workload", "recorded"),
        ("istio.destination_namespace", "shop"),
        ("istio.destination_instance_name", "recorded"),
        ("env", "prod"),
        ("user", "anna"),
    ] {
        assert_eq!(found.get(key).map(String::as_str), Some(value), "{key} in {found:#?}");
    }
    assert!(!found.contains_key("none"));
    assert_eq!(found.get("guid:x-request-id").map(String::as_str), answer.sent("x-request-id"));
    assert!(found["node_id"].starts_with("waypoint~"), "{found:?}");
    assert_eq!(tried.get("istio.destination_workload").map(String::as_str), Some("recorded"));
    let (resource, _) = &all[0];
    assert_eq!(resource.get("service.name").map(String::as_str), Some("waypoint.shop"), "{resource:?}");
    // None of it comes for a service without one.
    let untraced = bed.service("untraced").await;
    let answer = http::get(&bed.cli, untraced, "/untraced", "").await.unwrap();
    assert_eq!(answer.sent("traceparent"), None);
    let metrics = bed.metrics().await;
    let exported =
        metrics.lines().find(|line| line.starts_with("ambit_otlp_spans_total{outcome=\"exported\"}"));
    assert!(exported.is_some_and(|line| !line.ends_with(" 0")), "{exported:?}");
    // And when it is switched off again, a trace passes as it came.
    telemetry(bed, "recorded", "tracing: [{disableSpanReporting: true}]").await;
    bed.eventually(to, "/off", "", |answer| answer.sent("traceparent").is_none()).await;
    bed.cluster.delete("Telemetry", "shop", "recorded").await.unwrap();
}

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";

async fn contexts(bed: &Waypoints) {
    let collector = Collector::start(bed, "otel-contexts").await;
    let to = bed.service("contexts").await;
    let spec = "tracing: [{providers: [{name: otel-contexts}], randomSamplingPercentage: 0}]";
    telemetry(bed, "contexts", spec).await;
    let w3c = |flags: &str| format!("traceparent: 00-{TRACE}-{SPAN}-{flags}\r\ntracestate: v=1\r\n");
    bed.eventually(to, "/probe", &w3c("01"), |answer| {
        answer.sent("traceparent").is_some_and(|it| !it.contains(SPAN))
    })
    .await;
    // Who began the trace has decided that it is not recorded, and nobody has begun one here.
    let answer = http::get(&bed.cli, to, "/not", &w3c("00")).await.unwrap();
    assert_eq!(answer.sent("traceparent"), Some(&*format!("00-{TRACE}-{SPAN}-00")));
    assert_eq!(http::get(&bed.cli, to, "/none", "").await.unwrap().sent("traceparent"), None);

    let answer = http::get(&bed.cli, to, "/w3c", &w3c("01")).await.unwrap();
    let all = collector.spans("/w3c", 2).await;
    let server = of_kind(&all, SpanKind::Server).remove(0);
    let client = of_kind(&all, SpanKind::Client).remove(0);
    assert_eq!((hex(&server.trace_id), hex(&server.parent_span_id)), (TRACE.to_owned(), SPAN.to_owned()));
    assert_eq!((server.trace_state.as_str(), answer.sent("tracestate")), ("v=1", Some("v=1")));
    assert_eq!(answer.sent("traceparent"), Some(&*format!("00-{TRACE}-{}-01", hex(&client.span_id))));

    let answer = http::get(&bed.cli, to, "/single", &format!("b3: {TRACE}-{SPAN}-1\r\n")).await.unwrap();
    let all = collector.spans("/single", 2).await;
    let client = of_kind(&all, SpanKind::Client).remove(0);
    let server = of_kind(&all, SpanKind::Server).remove(0);
    assert_eq!(hex(&server.parent_span_id), SPAN);
    let (own, above) = (hex(&client.span_id), hex(&server.span_id));
    assert_eq!(answer.sent("b3"), Some(&*format!("{TRACE}-{own}-1-{above}")));

    let fields = format!("x-b3-traceid: {TRACE}\r\nx-b3-spanid: {SPAN}\r\nx-b3-sampled: 1\r\n");
    let answer = http::get(&bed.cli, to, "/multi", &fields).await.unwrap();
    let all = collector.spans("/multi", 2).await;
    let client = of_kind(&all, SpanKind::Client).remove(0);
    assert_eq!(answer.sent("x-b3-traceid"), Some(TRACE));
    assert_eq!(answer.sent("x-b3-spanid"), Some(&*hex(&client.span_id)));
    bed.cluster.delete("Telemetry", "shop", "contexts").await.unwrap();
}

async fn tries(bed: &Waypoints) {
    let collector = Collector::start(bed, "otel-tries").await;
    // Fails the first time that it sees a path.
    let seen: Mutex<Vec<String>> = Mutex::default();
    let answer: http::Answer = Arc::new(move |name, head, body| {
        let line = head.lines().next().unwrap_or_default().to_owned();
        let is_new = !seen.lock().contains(&line);
        if is_new && line.contains("/twice") {
            seen.lock().push(line);
            return http::answer("503 Service Unavailable", "", "");
        }
        http::mirror()(name, head, body)
    });
    let to = bed.service_with("tries", answer).await;
    bed.route(
        "tries",
        "  - retry: {attempts: 2, codes: [503], backoff: 1ms}\n    backendRefs: [{name: tries, port: 80}]\n",
    )
    .await;
    telemetry(bed, "tries", "tracing: [{providers: [{name: otel-tries}], randomSamplingPercentage: 100}]")
        .await;
    in_force(bed, to).await;
    let answer = http::get(&bed.cli, to, "/twice", "").await.unwrap();
    assert_eq!(answer.status, 200);
    let all = collector.spans("/twice", 3).await;
    let server = of_kind(&all, SpanKind::Server).remove(0);
    let mut clients = of_kind(&all, SpanKind::Client);
    clients.sort_by_key(|span| span.start_time_unix_nano);
    let [first, second] = &*clients else { panic!("{clients:?}") };
    let status = |span: &Span| attributes(&span.attributes).get("http.status_code").cloned();
    assert_eq!((status(first).as_deref(), status(second).as_deref()), (Some("503"), Some("200")));
    assert!(first.end_time_unix_nano <= second.start_time_unix_nano);
    assert!(clients.iter().all(|span| span.parent_span_id == server.span_id));
    assert_ne!(first.span_id, second.span_id);
    assert_eq!(status(&server).as_deref(), Some("200"));
    assert!(attributes(&server.attributes)["ambit.route"].contains("HTTPRoute"), "{server:?}");
    // An answer of the waypoint's own has no try.
    bed.route(
        "tries",
        "  - matches: [{path: {value: /other}}]\n    backendRefs: [{name: tries, port: 80}]\n",
    )
    .await;
    bed.eventually(to, "/lost", "", |answer| answer.status == 404).await;
    // Requests before the route was in force have tries.
    let refused = || {
        let all = collector.collected.0.lock();
        let spans = all.iter().map(|(_, span)| attributes(&span.attributes));
        let has =
            |it: &BTreeMap<String, String>, key: &str, value: &str| it.get(key).is_some_and(|it| it == value);
        spans.into_iter().find(|it| has(it, "url.path", "/lost") && has(it, "response_flags", "NR"))
    };
    wait::until("the refused request is a span", SOON, || async { refused().is_some() }).await;
    assert_eq!(refused().unwrap()["http.status_code"], "404");
}

async fn dead(bed: &Waypoints) {
    // Connections to it are taken, and nothing is ever answered.
    bed.by_hand("otel-dead", |stream| async move {
        let _open = stream;
        std::future::pending().await
    })
    .await;
    crate::external::service(bed, "otel-dead", "grpc").await;
    let to = bed.service("undelayed").await;
    telemetry(bed, "undelayed", "tracing: [{providers: [{name: otel-dead}], randomSamplingPercentage: 100}]")
        .await;
    in_force(bed, to).await;
    let dropped = async || {
        let metrics = bed.metrics().await;
        http::metric(&metrics, "ambit_otlp_spans_total{outcome=\"dropped\"}")
    };
    let before = dropped().await;
    // More than the queues of both workers hold.
    let mut client = http::Client::connect(&bed.cli, to).await.unwrap();
    let mut slowest = std::time::Duration::ZERO;
    for _ in 0..5000 {
        let start = std::time::Instant::now();
        let answer = client.send(b"GET /q HTTP/1.1\r\nhost: app.example\r\n\r\n").await;
        match answer {
            Ok(answer) => assert_eq!(answer.status, 200),
            // The waypoint of the tests closes connections after so many requests.
            Err(_) => client = http::Client::connect(&bed.cli, to).await.unwrap(),
        }
        slowest = slowest.max(start.elapsed());
    }
    assert!(dropped().await > before, "nothing was dropped");
    assert!(slowest < std::time::Duration::from_secs(2), "{slowest:?}");
    bed.cluster.delete("Telemetry", "shop", "undelayed").await.unwrap();
}

async fn logs(bed: &Waypoints) {
    let collector = Collector::start(bed, "otel-logs").await;
    let to = bed.service("logged").await;
    let written = |path: &str| bed.logs().iter().any(|line| line.contains(&format!("path=\"{path}\"")));
    http::get(&bed.cli, to, "/before", "").await.unwrap();
    wait::until("it is in the waypoint's own log", SOON, || async { written("/before") }).await;
    let filter =
        "filter: {expression: \"request.url_path != '/hidden' && request.headers['x-user'] == 'anna'\"}";
    let tracing = "tracing: [{providers: [{name: spans-of-logs}], randomSamplingPercentage: 100}]";
    telemetry(
        bed,
        "logged",
        &format!("{tracing}, accessLogging: [{{providers: [{{name: logs}}], {filter}}}]"),
    )
    .await;
    in_force(bed, to).await;
    let user = "x-user: anna\r\n";
    http::get(&bed.cli, to, "/hidden", user).await.unwrap();
    http::get(&bed.cli, to, "/nobody", "").await.unwrap();
    let shown = http::get(&bed.cli, to, "/shown?a=b", user).await.unwrap();
    let of = |path: &str| -> Vec<(String, BTreeMap<String, String>)> {
        let all = collector.logged.0.lock();
        all.iter().filter(|(_, it)| it.get("path").is_some_and(|known| known == path)).cloned().collect()
    };
    wait::until("the collector has the record", SOON, || async { !of("/shown").is_empty() }).await;
    let (trace, record) = of("/shown").remove(0);
    assert_eq!(Some(&*trace), shown.sent("traceparent").and_then(|it| it.split('-').nth(1)));
    for (key, value) in [
        ("log_name", "mesh"),
        ("method", "GET"),
        ("response_code", "200"),
        ("src.workload", "cli"),
        ("dst.service", "logged.shop.svc.cluster.local"),
    ] {
        assert_eq!(record.get(key).map(String::as_str), Some(value), "{key} in {record:?}");
    }
    assert!(of("/hidden").is_empty() && of("/nobody").is_empty());
    assert!(!written("/shown"), "the waypoint's own log is not among the providers");
    let counted = async || {
        let metrics = bed.metrics().await;
        let is_its = |line: &&str| {
            line.starts_with("istio_requests_total") && line.contains("destination_service_name=\"logged\"")
        };
        metrics
            .lines()
            .filter(is_its)
            .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
            .sum::<u64>()
    };
    telemetry(bed, "logged", &format!("{tracing}, metrics: [{{overrides: [{{disabled: true}}]}}]")).await;
    let uncounted = async || {
        let before = counted().await;
        http::get(&bed.cli, to, "/uncounted", "").await.unwrap();
        wait::until("it is in the log", SOON, || async { written("/uncounted") }).await;
        counted().await == before
    };
    wait::until("requests are not counted", SOON, uncounted).await;
    // Switched off for the service, and back to the default without an object.
    telemetry(bed, "logged", "accessLogging: [{disabled: true}]").await;
    bed.eventually(to, "/probe", "", |answer| answer.sent("traceparent").is_none()).await;
    http::get(&bed.cli, to, "/silent", "").await.unwrap();
    bed.cluster.delete("Telemetry", "shop", "logged").await.unwrap();
    let shows = async || {
        http::get(&bed.cli, to, "/again", "").await.unwrap();
        written("/again")
    };
    wait::until("the waypoint's own log is back", SOON, shows).await;
    assert!(!written("/silent"));
}
