//! The real program on real sockets, and callers with tokens.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime};

use ambit_identity::{ControlPlane, ControlPlaneConfig};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use rcgen::{KeyPair, PublicKeyData};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};

/// By then the program must have done what a test waits for.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// The API server's part: a signing key and its public half as a key set.
pub(crate) struct TokenSigner {
    key: EncodingKey,
    jwk: Value,
}

impl TokenSigner {
    fn new() -> TokenSigner {
        let pair = KeyPair::generate().unwrap();
        let point = pair.der_bytes();
        let jwk = json!({
            "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": "k1",
            "x": URL_SAFE_NO_PAD.encode(&point[1..33]), "y": URL_SAFE_NO_PAD.encode(&point[33..65]),
        });
        TokenSigner { key: EncodingKey::from_ec_der(&pair.serialize_der()), jwk }
    }

    /// A bound token of the audience of the CA.
    pub(crate) fn token(&self, namespace: &str, account: &str, node: &str) -> String {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let claims = json!({
            "aud": ["istio-ca"], "iss": "https://kubernetes.default.svc", "iat": now, "nbf": now, "exp": now + 600,
            "sub": format!("system:serviceaccount:{namespace}:{account}"),
            "kubernetes.io": {
                "namespace": namespace, "serviceaccount": {"name": account, "uid": "u1"},
                "pod": {"name": format!("{account}-{node}"), "uid": format!("u-{node}")}, "node": {"name": node, "uid": "u3"},
            },
        });
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some("k1".to_owned());
        encode(&header, &claims, &self.key).unwrap()
    }
}

/// A running `ambit-control` with one source directory.
pub(crate) struct World {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) signer: TokenSigner,
    pub(crate) address: SocketAddr,
    metrics: SocketAddr,
    readiness: SocketAddr,
    admin: SocketAddr,
    child: Child,
    log: Receiver<Value>,
}

impl World {
    /// Starts the program on the given files of its source directory and waits until it serves.
    pub(crate) fn start_with(files: &[(&str, &str)], arguments: &[&str]) -> World {
        World::prepare(files, |directory| spawn(Command::new(PROGRAM), directory, arguments))
    }

    /// Starts the program under a soft and hard limit of open files.
    pub(crate) fn start_limited(files: &[(&str, &str)], arguments: &[&str], limit: &str) -> World {
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={limit}")).arg(PROGRAM);
        World::prepare(files, |directory| spawn(command, directory, arguments))
    }

    fn prepare(files: &[(&str, &str)], start: impl FnOnce(&Path) -> Child) -> World {
        let directory = tempfile::tempdir().unwrap();
        let signer = TokenSigner::new();
        std::fs::create_dir(directory.path().join("objects")).unwrap();
        for (name, text) in files {
            std::fs::write(directory.path().join("objects").join(name), text).unwrap();
        }
        std::fs::write(directory.path().join("jwks.json"), json!({ "keys": [signer.jwk] }).to_string())
            .unwrap();
        let mut child = start(directory.path());
        let log = follow(&mut child);
        let listening = |purpose: &str| {
            let line = wait_for(&log, |line| line["message"] == "listening" && line["purpose"] == purpose);
            line["address"].as_str().unwrap().parse::<SocketAddr>().unwrap()
        };
        // In the order in which the program opens them.
        let (readiness, metrics) = (listening("readiness"), listening("metrics"));
        let (address, admin) = (listening("xDS and certificates"), listening("the admin interface"));
        wait_for(&log, |line| line["message"] == "serving");
        World { directory, signer, address, metrics, readiness, admin, child, log }
    }

    /// A file of the source directory.
    pub(crate) fn object_file(&self, name: &str) -> PathBuf {
        self.directory.path().join("objects").join(name)
    }

    /// Puts a file in place at once, as careful writers do.
    pub(crate) fn replace(&self, name: &str, text: &str) {
        let draft = self.object_file(&format!(".{name}.tmp"));
        std::fs::write(&draft, text).unwrap();
        std::fs::rename(draft, self.object_file(name)).unwrap();
    }

    /// Waits for a line of the program's log.
    pub(crate) fn log_line(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        wait_for(&self.log, wanted)
    }

    /// What a caller with this token knows of the program.
    pub(crate) fn caller(&self, token: &str) -> ControlPlane {
        let file = self.directory.path().join(format!("token-{:x}", md(token)));
        std::fs::write(&file, token).unwrap();
        let config = ControlPlaneConfig {
            address: self.address.to_string(),
            root_file: self.directory.path().join("root-cert.pem"),
            server_name: ControlPlaneConfig::DEFAULT_SERVER_NAME.to_owned(),
            token_file: Some(file),
            cluster_id: "Kubernetes".to_owned(),
        };
        ControlPlane::new(config).unwrap()
    }

    /// A caller who is the node proxy of a node.
    pub(crate) fn node_proxy(&self, node: &str) -> ControlPlane {
        self.caller(&self.signer.token("ambit-system", "ztunnel", node))
    }

    /// The program's process; `prlimit` becomes the program.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A TLS connection to the port, for HTTP/2.
    pub(crate) async fn dial(&self) -> tokio_rustls::client::TlsStream<tokio::net::TcpStream> {
        let mut roots = rustls::RootCertStore::empty();
        for root in CertificateDer::pem_file_iter(self.directory.path().join("root-cert.pem")).unwrap() {
            roots.add(root.unwrap()).unwrap();
        }
        let mut config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let socket = tokio::net::TcpStream::connect(self.address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
        connector.connect("localhost".try_into().unwrap(), socket).await.unwrap()
    }

    /// The value of a metric.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let body = get(self.metrics, "/metrics");
        let line =
            body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).map(str::to_owned);
        line.unwrap_or_else(|| panic!("{name} is not in\n{body}")).parse().unwrap()
    }

    /// The answer of the readiness probe.
    pub(crate) fn readiness(&self) -> String {
        get(self.readiness, "/healthz/ready")
    }

    /// A section of the configuration dump.
    pub(crate) fn config_dump(&self, section: &str) -> Value {
        let answer = get(self.admin, &format!("/config_dump?section={section}"));
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        serde_json::from_str::<Value>(body).unwrap()[section].take()
    }

    /// Asks the program to end and waits until it did.
    pub(crate) fn terminate(mut self) -> std::process::ExitStatus {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < DEADLINE, "the program did not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }
}

fn md(text: &str) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

const PROGRAM: &str = env!("CARGO_BIN_EXE_ambit-control");

fn spawn(mut command: Command, directory: &Path, arguments: &[&str]) -> Child {
    let path = |name: &str| directory.join(name).display().to_string();
    command
        .args(["--source", &format!("dir:{}", path("objects"))])
        .args(["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"])
        .args(["--readiness", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
        .args(["--ca-dir", &path("ca"), "--jwks", &path("jwks.json"), "--root-out", &path("root-cert.pem")])
        .args(["--log-format", "json"])
        .args(arguments)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The program's log, line by line; what is not JSON is shown.
fn follow(child: &mut Child) -> Receiver<Value> {
    let (lines, log) = channel();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    std::thread::spawn(move || {
        for line in stderr.lines().map_while(Result::ok) {
            match serde_json::from_str(&line) {
                Ok(value) => drop(lines.send(value)),
                Err(_) => eprintln!("ambit-control: {line}"),
            }
        }
    });
    log
}

fn wait_for(log: &Receiver<Value>, wanted: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + DEADLINE;
    let mut seen = Vec::new();
    loop {
        match log.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) if wanted(&line) => return line,
            Ok(line) => seen.push(line),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                panic!("the log never said so; it said {seen:#?}")
            }
        }
    }
}

fn get(address: SocketAddr, path: &str) -> String {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
