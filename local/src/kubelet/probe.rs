//! Startup, liveness and readiness probes, asked from the node as a kubelet asks them.
//!
//! HTTP and TCP probes leave the node with the source address that stands for kubelets (redirection contract),
//! so they reach a pod past its redirection whatever the policies say.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container, Probe as Specification};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpSocket;

use crate::addresses::{PROBE_V4, PROBE_V6};
use crate::error::Error;
use crate::kubelet::plan::PlanError;
use crate::process::{Command, Process};
use crate::sandbox::Sandbox;

/// How often a container that was not ready yet is asked, however long its period.
const FIRST_PERIOD: Duration = Duration::from_millis(200);

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Check {
    /// `GET` answered with a status of 200 to 399.
    Http {
        /// Port on the pod's address.
        port: u16,
        /// Path with query.
        path: String,
        /// Header fields to send.
        headers: Vec<(String, String)>,
    },
    /// A TCP connection is accepted.
    Tcp {
        /// Port on the pod's address.
        port: u16,
    },
    /// A program in the pod ends with 0.
    Exec(Vec<String>),
}

/// A probe with its timing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Probe {
    /// What is asked.
    pub(crate) check: Check,
    initial_delay: Duration,
    period: Duration,
    timeout: Duration,
    successes: u32,
    failures: u32,
}

impl Probe {
    /// Reads a probe of a container's specification, with the defaults of Kubernetes.
    ///
    /// # Errors
    /// When it asks in a way that is not known here, or names a port that the container does not have.
    pub(crate) fn read(container: &Container, probe: &Specification) -> Result<Self, PlanError> {
        let seconds = |value: Option<i32>, default: u32| {
            Duration::from_secs(u64::from(
                value.and_then(|value| u32::try_from(value).ok()).unwrap_or(default),
            ))
        };
        let count = |value: Option<i32>, default: u32| {
            value.and_then(|value| u32::try_from(value).ok()).filter(|value| *value > 0).unwrap_or(default)
        };
        Ok(Self {
            check: Check::read(container, probe)?,
            initial_delay: seconds(probe.initial_delay_seconds, 0),
            period: seconds(probe.period_seconds, 10).max(Duration::from_secs(1)),
            timeout: seconds(probe.timeout_seconds, 1).max(Duration::from_secs(1)),
            successes: count(probe.success_threshold, 1),
            failures: count(probe.failure_threshold, 3),
        })
    }

    /// Probes repeatedly and reports each change of the result, which starts as `initially`. Runs until `report` returns
    /// false.
    pub(crate) async fn watch(
        &self,
        prober: &Prober,
        initially: bool,
        mut report: impl FnMut(bool, Option<String>) -> bool,
    ) {
        tokio::time::sleep(self.initial_delay).await;
        let mut tally = Tally { holds: initially, run: 0, ever: false };
        loop {
            let answer = prober.ask(&self.check, self.timeout).await;
            if tally.handle(answer.is_ok(), self.successes, self.failures)
                && !report(tally.holds, answer.err())
            {
                return;
            }
            let eager = !tally.holds && !tally.ever;
            tokio::time::sleep(if eager { self.period.min(FIRST_PERIOD) } else { self.period }).await;
        }
    }
}

impl Probe {
    /// Probes until the first result, as for a container that starts.
    ///
    /// # Errors
    /// The last answer, when enough failures came in a row.
    pub(crate) async fn decide(&self, prober: &Prober) -> Result<(), String> {
        tokio::time::sleep(self.initial_delay).await;
        let (mut successes, mut failures) = (0, 0);
        loop {
            match prober.ask(&self.check, self.timeout).await {
                Ok(()) => (successes, failures) = (successes + 1, 0),
                Err(why) if failures + 1 >= self.failures => return Err(why),
                Err(_) => (successes, failures) = (0, failures + 1),
            }
            if successes >= self.successes {
                return Ok(());
            }
            tokio::time::sleep(self.period).await;
        }
    }
}

/// Combines answers to a result.
#[derive(Debug)]
struct Tally {
    holds: bool,
    /// Consecutive answers that contradict the result.
    run: u32,
    /// Whether it ever held because of an answer.
    ever: bool,
}

impl Tally {
    /// Counts an answer; true when the verdict changed.
    fn handle(&mut self, success: bool, successes: u32, failures: u32) -> bool {
        self.ever |= success;
        if success == self.holds {
            self.run = 0;
            return false;
        }
        self.run += 1;
        let changes = self.run >= if success { successes } else { failures };
        if changes {
            self.holds = success;
            self.run = 0;
        }
        changes
    }
}

impl Check {
    fn read(container: &Container, probe: &Specification) -> Result<Self, PlanError> {
        let refuse = |message: String| PlanError { reason: "CreateContainerConfigError", message };
        if let Some(http) = &probe.http_get {
            if http.scheme.as_deref().is_some_and(|scheme| scheme != "HTTP") {
                return Err(refuse(format!("a probe of container {} speaks HTTPS", container.name)));
            }
            let headers = http.http_headers.iter().flatten();
            return Ok(Self::Http {
                port: port(container, &http.port).map_err(refuse)?,
                path: http.path.clone().unwrap_or_else(|| "/".to_owned()),
                headers: headers.map(|header| (header.name.clone(), header.value.clone())).collect(),
            });
        }
        if let Some(tcp) = &probe.tcp_socket {
            return Ok(Self::Tcp { port: port(container, &tcp.port).map_err(refuse)? });
        }
        match &probe.exec {
            Some(exec) => Ok(Self::Exec(exec.command.clone().unwrap_or_default())),
            None => Err(refuse(format!(
                "a probe of container {} is neither httpGet, tcpSocket nor exec",
                container.name
            ))),
        }
    }
}

fn port(container: &Container, port: &IntOrString) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => {
            let mut ports = container.ports.iter().flatten();
            ports.find(|port| port.name.as_deref() == Some(name)).map(|port| port.container_port)
        }
    };
    number
        .and_then(|number| u16::try_from(number).ok())
        .ok_or_else(|| format!("a probe of container {} names port {port:?}", container.name))
}

/// Sends probes as the kubelet of a pod.
#[derive(Debug, Clone)]
pub(crate) struct Prober {
    /// Where HTTP and TCP probes come from.
    pub(crate) node: Sandbox,
    /// Where programs run.
    pub(crate) pod: Sandbox,
    /// Where HTTP and TCP probes go.
    pub(crate) address: IpAddr,
}

impl Prober {
    /// Asks once.
    ///
    /// # Errors
    /// A sentence for a person when the answer was no, or none came within `limit`.
    pub(crate) async fn ask(&self, check: &Check, limit: Duration) -> Result<(), String> {
        let asking = async {
            match check {
                Check::Http { port, path, headers } => self.get(*port, path, headers).await,
                Check::Tcp { port } => self.dial(*port).await.map(drop),
                Check::Exec(command) => self.execute(command, limit).await,
            }
        };
        match tokio::time::timeout(limit, asking).await {
            Ok(answer) => answer,
            Err(_) => Err(format!("no answer within {limit:?}")),
        }
    }

    async fn dial(&self, port: u16) -> Result<tokio::net::TcpStream, String> {
        let target = SocketAddr::new(self.address, port);
        let source = match target {
            SocketAddr::V4(_) => SocketAddr::new(IpAddr::V4(PROBE_V4), 0),
            SocketAddr::V6(_) => SocketAddr::new(IpAddr::V6(PROBE_V6), 0),
        };
        let socket = self.node.on(move || {
            let socket = Socket::new(Domain::for_address(target), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            socket.bind(&source.into())?;
            Ok::<_, std::io::Error>(TcpSocket::from_std_stream(socket.into()))
        });
        let failed = |error: std::io::Error| format!("connect to {target}: {error}");
        let socket = socket.await.map_err(|error| error.to_string())?.map_err(failed)?;
        socket.connect(target).await.map_err(failed)
    }

    async fn get(&self, port: u16, path: &str, headers: &[(String, String)]) -> Result<(), String> {
        let stream = self.dial(port).await?;
        let failed = |error: hyper::Error| format!("GET {path}: {error}");
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
        let mut request = Request::get(path).header("user-agent", "kube-probe/ambit-local");
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            request = request.header("host", SocketAddr::new(self.address, port).to_string());
        }
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|error| format!("GET {path}: {error}"))?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(failed)?;
            let status = response.status();
            if (200..400).contains(&status.as_u16()) {
                Ok(())
            } else {
                Err(format!("GET {path}: status {status}"))
            }
        };
        tokio::select! {
            answer = exchange => answer,
            ended = connection => Err(format!("GET {path}: the connection ended ({ended:?})")),
        }
    }

    async fn execute(&self, words: &[String], limit: Duration) -> Result<(), String> {
        let (program, args) =
            words.split_first().ok_or_else(|| "an exec probe without command".to_owned())?;
        let said = |error: Error| error.to_string();
        let command = Command::new(program).args(args);
        let process = Process::start("an exec probe", &self.pod, command).await.map_err(said)?;
        let status = process.wait_within(limit).await.map_err(said)?;
        if status.success() { Ok(()) } else { Err(format!("{program}: {status}")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container() -> Container {
        serde_saphyr::from_str("{name: c, ports: [{name: http, containerPort: 9080}]}").expect("a container")
    }

    fn read(yaml: &str) -> Result<Probe, PlanError> {
        Probe::read(&container(), &serde_saphyr::from_str(yaml).expect("a probe's shape"))
    }

    #[test]
    fn a_port_may_be_named() {
        let probe = read("{httpGet: {path: /health, port: http}, periodSeconds: 2}").expect("it is sound");
        assert_eq!(probe.check, Check::Http { port: 9080, path: "/health".to_owned(), headers: vec![] });
        assert_eq!(probe.period, Duration::from_secs(2));
        assert_eq!((probe.successes, probe.failures), (1, 3));
        assert!(read("{tcpSocket: {port: grpc}}").is_err());
    }

    #[test]
    fn a_verdict_changes_only_after_enough_answers_in_a_row() {
        let mut tally = Tally { holds: true, run: 0, ever: false };
        let answers = [false, false, true, false, false, false, true];
        let changes: Vec<_> = answers.iter().map(|answer| tally.handle(*answer, 1, 3)).collect();
        assert_eq!(changes, [false, false, false, false, false, true, true]);
    }

    #[test]
    fn an_unknown_way_to_ask_is_refused() {
        assert!(read("{grpc: {port: 1}}").is_err());
        assert!(read("{httpGet: {port: 1, scheme: HTTPS}}").is_err());
    }
}
