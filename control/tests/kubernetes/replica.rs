//! A replica of the control plane: its binary, with an API server as its source.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use ambit_api::security::Authorization;
use ambit_api::workload::{Address, Service, Workload, address};
use ambit_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use ambit_identity::{CertificateRequest, ControlPlane, ControlPlaneConfig, GrpcIssuer, Issuer, SpiffeId};
use ambit_xds::{Client, ClientConfig, Update, ztunnel_node};
use parking_lot::Mutex;
use serde_json::Value;
use tonic::service::interceptor::InterceptedService;

use crate::api_server::{ApiServer, DEADLINE};

/// A running replica.
pub(crate) struct Replica {
    directory: tempfile::TempDir,
    address: SocketAddr,
    metrics: SocketAddr,
    child: Child,
    log: Arc<Mutex<Vec<Value>>>,
}

impl Replica {
    /// Starts one with the rights of the control plane's service account, and waits until it serves.
    pub(crate) async fn start(server: &ApiServer) -> Replica {
        Self::start_with(server, &[]).await
    }

    /// The same with further arguments.
    pub(crate) async fn start_with(server: &ApiServer, arguments: &[&str]) -> Replica {
        let directory = tempfile::tempdir().unwrap();
        let mut child = spawn(&server.kubeconfig().await, directory.path(), arguments);
        let log = follow(&mut child);
        let listening = async |purpose: &str| {
            let line = line(&log, |line| line["message"] == "listening" && line["purpose"] == purpose).await;
            line["address"].as_str().unwrap().parse::<SocketAddr>().unwrap()
        };
        let (metrics, address) = (listening("metrics").await, listening("xDS and certificates").await);
        line(&log, |line| line["message"] == "serving").await;
        Replica { directory, address, metrics, child, log }
    }

    /// Waits for a line of the program's log, those already written included.
    pub(crate) async fn log_line(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        line(&self.log, wanted).await
    }

    /// The answer of the metrics server, head included.
    pub(crate) fn metrics_answer(&self, path: &str) -> String {
        request(self.metrics, "GET", path)
    }

    /// The answer of an admin interface that was started on every address.
    pub(crate) async fn admin_answer(&self, method: &str, path: &str) -> String {
        self.answer_at("the admin interface", method, path).await
    }

    /// The answer of the port of this purpose.
    pub(crate) async fn answer_at(&self, purpose: &str, method: &str, path: &str) -> String {
        let line = self.log_line(|line| line["message"] == "listening" && line["purpose"] == purpose).await;
        let address: SocketAddr = line["address"].as_str().unwrap().parse().unwrap();
        request(SocketAddr::from(([127, 0, 0, 1], address.port())), method, path)
    }

    /// The value of a metric.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let body = request(self.metrics, "GET", "/metrics");
        let line = body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} is not in\n{body}")).parse().unwrap()
    }

    /// The roots that it publishes.
    pub(crate) fn roots(&self) -> String {
        std::fs::read_to_string(self.root_file()).unwrap()
    }

    fn root_file(&self) -> PathBuf {
        self.directory.path().join("root-cert.pem")
    }

    /// What a caller with this token knows of the program.
    pub(crate) fn caller(&self, token: &str) -> ControlPlane {
        let file = tempfile::NamedTempFile::new_in(self.directory.path()).unwrap().keep().unwrap().1;
        std::fs::write(&file, token).unwrap();
        let config = ControlPlaneConfig {
            address: self.address.to_string(),
            root_file: self.root_file(),
            server_name: ControlPlaneConfig::DEFAULT_SERVER_NAME.to_owned(),
            token_file: Some(file),
            cluster_id: "Kubernetes".to_owned(),
        };
        ControlPlane::new(config).unwrap()
    }

    /// Asks for the certificate of another identity; the error is the refusal's text.
    pub(crate) async fn ask(&self, token: &str, identity: &str) -> Result<Vec<String>, String> {
        let identity: SpiffeId = identity.parse().unwrap();
        let request = CertificateRequest::new(&identity).unwrap();
        let issuer = GrpcIssuer::impersonating(self.caller(token));
        let issued = issuer.issue(&identity, request.csr_pem(), Duration::from_secs(3600)).await;
        issued.map_err(|error| error.to_string())
    }

    /// Subscribes to everything with this token; the client must be held for the stream to go on.
    pub(crate) fn subscribe(&self, token: &str) -> (Client, Held) {
        let (caller, held) = (self.caller(token), Held::default());
        let node = ztunnel_node("10.0.0.2".parse().unwrap(), "ztunnel-a", "ambit-system", BTreeMap::new());
        let apply = |batch: &mut dyn Iterator<Item = ()>| {
            batch.for_each(drop);
            Vec::new()
        };
        let (client, driver) = Client::builder(ClientConfig::new(node), apply)
            .wildcard::<Authorization>(AUTHORIZATION_TYPE_URL, keep(&held.policies))
            .wildcard::<Address>(ADDRESS_TYPE_URL, keep(&held.addresses))
            .build(move || {
                std::future::ready(Ok(InterceptedService::new(caller.channel(), caller.credentials())))
            });
        tokio::spawn(driver.run());
        (client, held)
    }

    /// Asks the program to end, and waits until it did.
    pub(crate) fn terminate(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }

    /// Ends the program as a crash does.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }
}

/// What a subscriber holds.
#[derive(Clone, Default)]
pub(crate) struct Held {
    addresses: Resources<Address>,
    policies: Resources<Authorization>,
}

type Resources<M> = Arc<Mutex<BTreeMap<String, (M, usize)>>>;

/// Keeps what a subscriber is sent, and how often it was sent.
fn keep<M: Send + 'static>(held: &Resources<M>) -> impl Fn(Update<M>) + Send + 'static {
    let held = held.clone();
    move |update| match update {
        Update::Upsert { name, resource } => {
            let mut held = held.lock();
            let times = held.get(&name).map_or(0, |(_, times)| *times);
            held.insert(name, (resource, times + 1));
        }
        Update::Remove { name } => drop(held.lock().remove(&name)),
    }
}

impl Held {
    /// A pod's workload.
    pub(crate) fn workload(&self, namespace: &str, name: &str) -> Option<Workload> {
        let addresses = self.addresses.lock();
        match addresses.get(&format!("Kubernetes//Pod/{namespace}/{name}"))?.0.r#type.clone()? {
            address::Type::Workload(workload) => Some(workload),
            address::Type::Service(_) => None,
        }
    }

    /// A service.
    pub(crate) fn service(&self, name: &str) -> Option<Service> {
        match self.addresses.lock().get(name)?.0.r#type.clone()? {
            address::Type::Service(service) => Some(service),
            address::Type::Workload(_) => None,
        }
    }

    /// Whether a service or policy is there, by its name on the wire.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.addresses.lock().contains_key(name) || self.policies.lock().contains_key(name)
    }

    /// A policy.
    pub(crate) fn policy(&self, name: &str) -> Option<Authorization> {
        self.policies.lock().get(name).map(|(policy, _)| policy.clone())
    }

    /// How often anything was sent.
    pub(crate) fn sent(&self) -> usize {
        let addresses: usize = self.addresses.lock().values().map(|(_, times)| times).sum();
        addresses + self.policies.lock().values().map(|(_, times)| times).sum::<usize>()
    }
}

fn spawn(kubeconfig: &Path, directory: &Path, arguments: &[&str]) -> Child {
    // It ends with the test, however that ends.
    Command::new("setpriv")
        .args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_ambit-control")])
        .args(["--source", &format!("kubernetes:{}", kubeconfig.display())])
        .args(["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"])
        .args(["--root-out", &directory.join("root-cert.pem").display().to_string()])
        .args(["--log-format", "json"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Collects the program's log, line by line; what is not JSON is shown.
fn follow(child: &mut Child) -> Arc<Mutex<Vec<Value>>> {
    let log: Arc<Mutex<Vec<Value>>> = Arc::default();
    let (lines, stderr) = (log.clone(), BufReader::new(child.stderr.take().unwrap()));
    std::thread::spawn(move || {
        for line in stderr.lines().map_while(Result::ok) {
            match serde_json::from_str(&line) {
                Ok(value) => lines.lock().push(value),
                Err(_) => eprintln!("ambit-control: {line}"),
            }
        }
    });
    log
}

async fn line(log: &Mutex<Vec<Value>>, wanted: impl Fn(&Value) -> bool) -> Value {
    let found = tokio::time::timeout(DEADLINE, async {
        loop {
            if let Some(line) = log.lock().iter().find(|line| wanted(line)) {
                return line.clone();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    found.await.unwrap_or_else(|_| panic!("the log never said so; it said {:#?}", log.lock()))
}

fn request(address: SocketAddr, method: &str, path: &str) -> String {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    write!(stream, "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
