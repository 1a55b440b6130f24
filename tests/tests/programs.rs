//! Common programs through the mesh, as Debian packages them: PostgreSQL, Redis, nginx and OpenSSH. Their data arrives byte for byte, over mutual TLS where both ends are captured.
//!
//! All tests share one cluster; each has pods of its own. `tests/packages.sh` installs the programs. Needs root.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that can't go on says so and ends"
)]

#[path = "programs/nginx.rs"]
mod nginx;
#[path = "programs/postgres.rs"]
mod postgres;
#[path = "programs/redis.rs"]
mod redis;
#[path = "programs/ssh.rs"]
mod ssh;

use std::error::Error;
use std::fmt::{self, Display};
use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use ambit_local::{Cluster, Command, Pod, PodOptions, Process};
use ambit_tests::access::AccessLog;
use ambit_tests::beds::{Bed, Trials};
use ambit_tests::wait;
use serde_json::Value;

/// How long a program may take for one task, on a machine that does other things too.
const LIMIT: Duration = Duration::from_secs(90);
/// How long a server may take to end.
const GRACE: Duration = Duration::from_secs(10);

/// Where the server is, seen from a captured client on the first node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Captured, on the other node.
    Far,
    /// Captured, on the same node.
    Near,
    /// Not captured, on the other node.
    Outside,
}

impl Place {
    const ALL: [Self; 3] = [Self::Far, Self::Near, Self::Outside];

    fn is_captured(self) -> bool {
        self != Self::Outside
    }

    fn word(self) -> &'static str {
        match self {
            Self::Far => "far",
            Self::Near => "near",
            Self::Outside => "outside",
        }
    }
}

impl Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Far => "to_a_captured_server_on_the_other_node",
            Self::Near => "to_a_captured_server_on_the_same_node",
            Self::Outside => "to_an_uncaptured_server",
        })
    }
}

/// The shared cluster.
struct Programs {
    cluster: Cluster,
    directory: tempfile::TempDir,
}

impl Bed for Programs {
    async fn start() -> Result<Self, Box<dyn Error>> {
        let directory = tempfile::tempdir()?;
        // Servers that give up root look for their files here.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        let mut builder = Cluster::builder().nodes(2);
        for node in 0..2 {
            let log = AccessLog::of(directory.path(), node);
            builder = builder.ztunnel_config_of(node, "accessLog", log.config());
        }
        let cluster = builder.start().await?;
        cluster.namespace("inside", true).await?;
        cluster.namespace("outside", false).await?;
        Ok(Self { cluster, directory })
    }

    async fn stop(self) {
        self.cluster.shutdown().await;
    }
}

/// A client's pod and a server's, with a service before it, made for one test.
struct Talk<'a> {
    bed: &'a Programs,
    place: Place,
    client: Pod,
    server: Pod,
    /// The service's name, as the client's programs resolve it.
    host: String,
    /// Files of this test, which every user may read.
    directory: PathBuf,
}

impl<'a> Talk<'a> {
    /// Makes the pods, and waits until the mesh knows them.
    async fn new(bed: &'a Programs, program: &str, place: Place, port: u16) -> Self {
        let name = format!("{program}-{}", place.word());
        let namespace = if place.is_captured() { "inside" } else { "outside" };
        let directory = bed.directory.path().join(&name);
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        let client = PodOptions::new("inside", format!("{name}-client")).service_account("client").node(0);
        let client = bed.cluster.pod(client).await.unwrap();
        let server = PodOptions::new(namespace, &name).service_account(program).label("app", &name);
        let server = bed.cluster.pod(server.node(usize::from(place != Place::Near))).await.unwrap();
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
             spec: {{selector: {{app: {name}}}, ports: [{{port: {port}}}]}}\n"
        );
        bed.cluster.apply(&service).await.unwrap();
        let talk = Self { bed, place, client, server, host: format!("{name}.{namespace}"), directory };
        talk.be_known().await;
        talk
    }

    async fn be_known(&self) {
        for node in 0..2 {
            let ztunnel = self.bed.cluster.ztunnel(node).unwrap();
            wait::until("both pods and the service are known", wait::SOON, || async {
                let Ok(dump) = ztunnel.config_dump().await else { return false };
                let of = |key: &str| dump[key].as_array().cloned().unwrap_or_default();
                let workloads = of("workloads");
                let is_known = |pod: &Pod, captured: bool| {
                    let protocol = if captured { "HBONE" } else { "TCP" };
                    workloads.iter().any(|w| w["name"] == pod.name() && w["protocol"] == protocol)
                };
                let led = of("services").iter().any(|service| {
                    let name = service["hostname"].as_str().unwrap_or_default();
                    let endpoints = service["endpoints"].as_object();
                    name.starts_with(&self.host) && endpoints.is_some_and(|all| !all.is_empty())
                });
                is_known(&self.client, true) && is_known(&self.server, self.place.is_captured()) && led
            })
            .await;
        }
    }

    /// A file of this test.
    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A file of random bytes, and those.
    fn random_file(&self, name: &str, length: usize) -> (PathBuf, Vec<u8>) {
        let (path, bytes) = (self.file(name), random(length));
        fs::write(&path, &bytes).unwrap();
        (path, bytes)
    }

    /// Starts a server inside the server's pod and waits until it takes connections at `port` there.
    async fn serve(&self, command: Command, port: u16) -> Process {
        let process = self.server.spawn(command).await.unwrap();
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        wait::until("the server takes connections", LIMIT, || async {
            assert!(process.is_running(), "the server ended: {:#?}", process.logs());
            self.server.connect(loopback).await.is_ok()
        })
        .await;
        process
    }

    /// Runs a program inside the client's pod to its end, which must be a good one; what it said.
    async fn ask(&self, command: Command) -> String {
        run(&self.client, &self.directory, command).await
    }

    /// Demands that the node proxies report every connection as it should have been: counted at both ends, ended,
    /// none failed, and with both identities if both ends are captured. What the access log complains about.
    async fn assert_carried(&self, least: usize) -> Vec<String> {
        let mut complaints = Vec::new();
        self.assert_counted("source", self.client.node(), least).await;
        if self.place.is_captured() {
            self.assert_counted("destination", self.server.node(), least).await;
        }
        for node in 0..2 {
            let lines = AccessLog::of(self.bed.directory.path(), node).lines();
            let ours = lines.iter().filter(|line| line["src.workload"] == self.client.name());
            for line in ours.filter(|line| line["dst.workload"] == self.server.name()) {
                complaints.extend(line.get("error").and_then(Value::as_str).map(str::to_owned));
                assert_eq!(
                    line["src.identity"] == self.client.spiffe_id().as_str(),
                    self.place.is_captured()
                );
                assert_eq!(
                    line["dst.identity"] == self.server.spiffe_id().as_str(),
                    self.place.is_captured()
                );
            }
        }
        complaints
    }

    async fn assert_counted(&self, reporter: &str, node: usize, least: usize) {
        let of_pair = [
            ("reporter", reporter),
            ("source_workload", self.client.name()),
            ("destination_workload", self.server.name()),
        ];
        let (own, other) = (self.client.spiffe_id(), self.server.spiffe_id());
        let mut mutual = of_pair.to_vec();
        mutual.extend([
            ("connection_security_policy", "mutual_tls"),
            ("source_principal", own.as_str()),
            ("destination_principal", other.as_str()),
        ]);
        let ztunnel = self.bed.cluster.ztunnel(node).unwrap();
        let (opened, closed) = ("istio_tcp_connections_opened_total", "istio_tcp_connections_closed_total");
        let what = format!("{reporter} counts all connections to their ends");
        let metrics = wait::for_ok(&what, wait::SOON, || async {
            let metrics = ztunnel.metrics().await.map_err(|error| error.to_string())?;
            let (opened, closed) = (metrics.sum(opened, &of_pair), metrics.sum(closed, &of_pair));
            let all_ended = opened >= least as f64 && (opened - closed).abs() < 0.5;
            if all_ended { Ok(metrics) } else { Err(format!("{opened} opened, {closed} closed")) }
        })
        .await;
        let all = metrics.sum(opened, &of_pair);
        let expected = if self.place.is_captured() { all } else { 0.0 };
        let authenticated = metrics.sum(opened, &mutual);
        assert!((authenticated - expected).abs() < 0.5, "{authenticated} of {all} were mutual TLS");
        let failed = metrics.sum("istio_tcp_connections_failed_total", &of_pair);
        assert!(failed < 0.5, "{failed} connections failed, says the {reporter}");
    }

    /// Ends the server, and what the test had.
    async fn end(self, server: Process) {
        server.terminate(GRACE).await.unwrap();
        for pod in [&self.client, &self.server] {
            self.bed.cluster.delete_pod(pod).await.unwrap();
        }
        fs::remove_dir_all(&self.directory).unwrap();
    }
}

/// Runs a program inside a pod to its end, which must be a good one; what it said.
async fn run(pod: &Pod, directory: &Path, command: Command) -> String {
    let output = tempfile::NamedTempFile::new_in(directory).unwrap();
    let shown = format!("{command:?}");
    let process = pod.spawn(command.log_file(output.path())).await.unwrap();
    let status = process.wait_within(LIMIT).await;
    let said = String::from_utf8_lossy(&fs::read(output.path()).unwrap()).into_owned();
    let status = status.unwrap_or_else(|error| panic!("{error}: {said}"));
    assert!(status.success(), "{shown} ended with {status}: {said}");
    said
}

/// A shell's command that fails if any part of a pipe does. `$1` and so on are `args`.
fn shell<const N: usize>(script: &str, args: [&str; N]) -> Command {
    Command::new("bash").args(["-o", "pipefail", "-ec", script, "bash"]).args(args)
}

fn random(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

/// That many letters and digits for every byte pair of randomness.
fn random_words(length: usize) -> String {
    random(length).into_iter().map(|byte| char::from(b'a' + byte % 26)).collect()
}

fn assert_same(got: &[u8], sent: &[u8]) {
    let differs = got.iter().zip(sent).position(|(one, other)| one != other);
    assert!(
        got == sent,
        "{} bytes of {} came, the first different one at {differs:?}",
        got.len(),
        sent.len()
    );
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn main() -> ExitCode {
    let mut trials = Trials::<Programs>::new();
    for place in Place::ALL {
        trials.add(
            format!("postgresql_copies_megabytes_both_ways_and_loses_no_transaction_{place}"),
            async move |bed| {
                postgres::copies_and_counts(bed, place).await;
            },
        );
        trials.add(
            format!("redis_answers_pipelines_with_the_values_that_were_set_{place}"),
            async move |bed| {
                redis::answers_pipelines(bed, place).await;
            },
        );
        trials.add(
            format!("nginx_serves_wrk_without_an_error_and_a_big_file_whole_{place}"),
            async move |bed| {
                nginx::serves(bed, place).await;
            },
        );
        trials.add(format!("sshd_speaks_first_and_carries_files_both_ways_{place}"), async move |bed| {
            ssh::carries_files(bed, place).await;
        });
    }
    trials.run()
}
