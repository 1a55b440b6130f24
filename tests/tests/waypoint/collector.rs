//! The collector of OpenTelemetry itself, built from its Go modules (`tests/go/collector`), takes what a waypoint sends. Needs Go.

use std::fs;
use std::path::{Path, PathBuf};

use ambit_local::{Command, PodOptions};
use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};

use crate::bed::{PORT, Waypoints};
use crate::http;

/// The Go toolchain; any Go since 1.21 fetches it.
const TOOLCHAIN: &str = "go1.27.1";

/// Goes on where [`crate::telemetry::PROVIDERS`] ends.
pub(crate) const PROVIDERS: &str = "
- name: real-grpc
  opentelemetry: {service: otel-real.shop.svc.cluster.local, port: 80}
- name: real-http
  opentelemetry: {service: otel-real-http.shop.svc.cluster.local, port: 80, http: {path: /v1/traces, headers: [{name: x-key, value: a}]}}
- name: real-logs
  envoyOtelAls: {service: otel-real.shop.svc.cluster.local, port: 80, logName: mesh}
";

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("the collector of OpenTelemetry takes spans and logs by gRPC and HTTP", async |bed| {
        takes(bed).await;
    });
}

/// Builds the collector, once for each version.
fn build() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("go/collector");
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/collector");
    let program = target.join("collector");
    let read = |name: &str| fs::read_to_string(source.join(name)).unwrap();
    let wanted = [read("go.mod"), read("go.sum"), read("main.go")].concat();
    let stamp = target.join("stamp");
    if fs::read_to_string(&stamp).is_ok_and(|known| known == wanted) && program.exists() {
        return program;
    }
    fs::create_dir_all(&target).unwrap();
    let built = std::process::Command::new("go")
        .args(["build", "-trimpath", "-ldflags", "-s -w", "-o"])
        .arg(&program)
        .arg(".")
        .current_dir(&source)
        .env("CGO_ENABLED", "0")
        .env("GOTOOLCHAIN", TOOLCHAIN)
        .output()
        .expect("Go, which this test needs");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    fs::write(stamp, wanted).unwrap();
    program
}

async fn takes(bed: &Waypoints) {
    let program = tokio::task::spawn_blocking(build).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let app =
        |name: &str| PodOptions::new("shop", name).service_account("otel-real").label("app", "otel-real");
    let pod = bed.cluster.pod(app("otel-real").node(1)).await.unwrap();
    let (config, log) = (directory.path().join("config.yaml"), directory.path().join("log"));
    let text = format!(
        "receivers: {{otlp: {{protocols: {{grpc: {{endpoint: '{ip}:{PORT}'}}, http: {{endpoint: '{ip}:{web}'}}}}}}}}\n\
         exporters: {{debug: {{verbosity: detailed}}}}\n\
         service:\n  telemetry: {{metrics: {{level: none}}}}\n  pipelines:\n    \
         traces: {{receivers: [otlp], exporters: [debug]}}\n    logs: {{receivers: [otlp], exporters: [debug]}}\n",
        ip = pod.ip(),
        web = PORT + 1,
    );
    fs::write(&config, text).unwrap();
    let command = Command::new(&program).arg(format!("--config={}", config.display())).log_file(&log);
    let collector = pod.spawn(command).await.unwrap();
    for (name, port, target) in [("otel-real", "grpc", PORT), ("otel-real-http", "http", PORT + 1)] {
        bed.apply(&format!(
            "apiVersion: v1\nkind: Service\n\
             metadata: {{name: {name}, namespace: shop, labels: {{istio.io/use-waypoint: none}}}}\n\
             spec: {{selector: {{app: otel-real}}, ports: [{{name: {port}, port: 80, targetPort: {target}}}]}}\n"
        ))
        .await;
    }
    for provider in ["real-grpc", "real-http"] {
        let to = bed.service(&format!("to-{provider}")).await;
        let spec = format!(
            "tracing: [{{providers: [{{name: {provider}}}], randomSamplingPercentage: 100}}], \
             accessLogging: [{{providers: [{{name: real-logs}}]}}]"
        );
        crate::telemetry::telemetry(bed, &format!("to-{provider}"), &spec).await;
        crate::telemetry::in_force(bed, to).await;
        let path = format!("/{provider}");
        let answer = http::get(&bed.cli, to, &path, "").await.unwrap();
        assert_eq!(answer.status, 200);
        let trace = answer.sent("traceparent").unwrap().split('-').nth(1).unwrap().to_owned();
        let said = || fs::read_to_string(&log).unwrap_or_default();
        let has_all = || {
            let said = said();
            // Two spans and a log record of the trace.
            said.matches(&format!("Trace ID       : {trace}")).count() >= 2
                && said.contains(&format!("Trace ID: {trace}"))
                && said.contains(&format!("url.path: Str({path})"))
                && said.contains("log_name: Str(mesh)")
                && said.contains("istio.destination_workload: Str(")
                && said.contains("service.name: Str(waypoint.shop)")
        };
        wait::until("the collector has all", SOON, || async { has_all() }).await;
        bed.cluster.delete("Telemetry", "shop", &format!("to-{provider}")).await.unwrap();
    }
    drop(collector);
}
