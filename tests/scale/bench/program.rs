//! `ambit-control` as a process, with keys of its own.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ambit_scale::machine;
use ambit_scale::objects::NODES;
use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::subscriber::Caller;
use crate::tokens::Signer;

/// Address of the first subscriber.
const FIRST_CALLER: Ipv4Addr = Ipv4Addr::new(127, 1, 0, 1);

/// By then it must be ready.
const PATIENCE: Duration = Duration::from_secs(60);

/// The control plane's own files: its authority, its roots, and the key set of its callers' tokens.
pub(crate) struct Keys {
    directory: tempfile::TempDir,
    signer: Signer,
}

impl Keys {
    /// Makes the key of the callers' tokens.
    pub(crate) fn new() -> Result<Self> {
        let directory = tempfile::tempdir().context("making a directory")?;
        let keys = Self { directory, signer: Signer::new()? };
        std::fs::write(keys.path("jwks.json"), &keys.signer.jwks).context("writing the key set")?;
        Ok(keys)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The proxy of a node, counted from 0, at an address of its own (127.1.0.1 and up).
    pub(crate) fn caller(&self, number: u32) -> Result<Caller> {
        let node = format!("node-{}", number % NODES);
        let address = Ipv4Addr::from_bits(FIRST_CALLER.to_bits() + number);
        Ok(Caller { address, token: self.signer.node_proxy(&node)?, node })
    }

    /// The roots of the control plane's certificate, once it runs.
    pub(crate) fn roots(&self) -> PathBuf {
        self.path("root-cert.pem")
    }
}

/// A running `ambit-control`.
pub(crate) struct Control {
    child: Child,
    /// Where discovery is served.
    pub(crate) address: SocketAddr,
    /// From the start of the process until it served.
    pub(crate) until_ready: Duration,
}

impl Control {
    /// Starts the program over a source and waits until it serves.
    pub(crate) fn start(program: &Path, source: &str, keys: &Keys) -> Result<Self> {
        let start = Instant::now();
        let mut child = Command::new(program)
            .args(["--source", source, "--listen", "127.0.0.1:0", "--log-format", "json"])
            .arg("--ca-dir")
            .arg(keys.path("ca"))
            .arg("--jwks")
            .arg(keys.path("jwks.json"))
            .arg("--root-out")
            .arg(keys.roots())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let log = child.stderr.take().context("the log of the control plane")?;
        let (found, address) = std::sync::mpsc::channel();
        std::thread::spawn(move || follow(log, &found));
        let Ok(address) = address.recv_timeout(PATIENCE) else {
            child.kill().context("stopping a control plane that did not become ready")?;
            bail!("the control plane was not ready after {PATIENCE:?}");
        };
        Ok(Self { child, address, until_ready: start.elapsed() })
    }

    /// CPU seconds used so far.
    pub(crate) fn cpu(&self) -> Result<f64> {
        machine::cpu_seconds(self.child.id())
    }

    /// Resident bytes.
    pub(crate) fn resident(&self) -> Result<f64> {
        Ok(machine::resident(self.child.id())? as f64)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("the control plane could not be stopped: {error}");
        }
    }
}

/// Says where discovery is served once it is, and reads the log to its end: a full pipe would hold the program up.
fn follow(log: impl std::io::Read, found: &std::sync::mpsc::Sender<SocketAddr>) {
    for line in BufReader::new(log).lines().map_while(Result::ok) {
        let Ok(entry) = serde_json::from_str::<Value>(&line) else {
            eprintln!("{line}");
            continue;
        };
        if entry["message"] == "serving"
            && let Some(address) = entry["address"].as_str().and_then(|text| text.parse().ok())
        {
            // Nobody waits any more when it took too long.
            found.send(address).unwrap_or_default();
        }
        if matches!(entry["level"].as_str(), Some("WARN" | "ERROR")) {
            eprintln!("{line}");
        }
    }
}
