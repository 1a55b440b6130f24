//! The mesh's programs on this cluster: how `ambit-control` and the `ztunnel`s are configured and started.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use ambit_api::ports;
use serde_json::{Map, Value, json};

use crate::addresses::CONTROL_V4;
use crate::cluster::create::{self, NewPod};
use crate::cluster::program::{Listeners, Program};
use crate::cluster::shared::Shared;
use crate::error::{Error, Result};
use crate::pod::{Pod, PodOptions};
use crate::process::Command;
use crate::token::{Subject, replace};

/// Namespace of the mesh's own pods.
pub const SYSTEM_NAMESPACE: &str = "ambit-system";
/// The cluster's name in workload uids and credentials.
pub const CLUSTER_ID: &str = "Kubernetes";
/// DNS name in the control plane's certificate.
const CONTROL_NAME: &str = "ambit-control.ambit-system.svc";

/// Locations of the programs, and settings that tests and users change.
#[derive(Debug, Clone, Default)]
pub(crate) struct MeshOptions {
    pub(crate) control: PathBuf,
    pub(crate) ztunnel: PathBuf,
    pub(crate) control_args: Vec<String>,
    pub(crate) control_env: BTreeMap<String, String>,
    /// Keys of every ztunnel's configuration file, which override the defaults.
    pub(crate) ztunnel_config: Map<String, Value>,
    /// The same for single nodes.
    pub(crate) ztunnel_config_of: BTreeMap<usize, Map<String, Value>>,
    pub(crate) ztunnel_env: BTreeMap<String, String>,
    /// Environment variables of every waypoint.
    pub(crate) waypoint_env: BTreeMap<String, String>,
    pub(crate) manifests: Option<PathBuf>,
    pub(crate) log_dir: Option<PathBuf>,
}

/// A node proxy with the pod it runs in. It derefs to its [`Program`].
#[derive(Debug, Clone)]
pub struct Ztunnel {
    pod: Pod,
    program: Program,
}

impl Ztunnel {
    /// The pod it runs in.
    #[must_use]
    pub fn pod(&self) -> &Pod {
        &self.pod
    }
}

impl std::ops::Deref for Ztunnel {
    type Target = Program;

    fn deref(&self) -> &Program {
        &self.program
    }
}

impl MeshOptions {
    /// Whether a node's proxy is configured to serve SOCKS5.
    pub(crate) fn serves_socks5(&self, index: usize) -> bool {
        let of_node = self.ztunnel_config_of.get(&index).and_then(|config| config.get("socks5"));
        let value = of_node.or_else(|| self.ztunnel_config.get("socks5"));
        value.and_then(Value::as_bool).unwrap_or(false)
    }

    /// The control plane as a program that is not started yet.
    ///
    /// # Errors
    /// When its directories and key set can't be written.
    pub(crate) fn control(&self, shared: &Shared) -> Result<Program> {
        let directory = &shared.directory;
        let jwks = directory.join("jwks.json");
        replace(&jwks, shared.signer.jwks().as_bytes())?;
        let metrics = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::METRICS));
        let readiness = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::READINESS));
        let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, ports::ADMIN));
        let mut command = Command::new(&self.control);
        // The published copy of an object overrides the one in the manifests, because the cluster has completed it.
        for source in [&directory.join("objects")].into_iter().chain(&self.manifests) {
            command = command.arg("--source").arg(format!("dir:{}", source.display()));
        }
        command = command
            .args(["--listen", &format!("0.0.0.0:{}", ports::CONTROL_PLANE)])
            .arg("--ca-dir")
            .arg(directory.join("ca"))
            .arg("--jwks")
            .arg(&jwks)
            .arg("--root-out")
            .arg(root_file(shared))
            .args(["--trust-domain", &shared.trust_domain])
            .args(["--cluster-id", CLUSTER_ID])
            .args(["--system-namespace", SYSTEM_NAMESPACE])
            .args(["--metrics", &metrics.to_string()])
            .args(["--readiness", &readiness.to_string()])
            .args(["--admin", &admin.to_string()])
            .args(&self.control_args);
        for (name, value) in &self.control_env {
            command = command.env(name, value);
        }
        if let Some(logs) = &self.log_dir {
            command = command.log_file(logs.join("ambit-control.log"));
        }
        let listeners = Listeners { readiness, metrics, admin: Some(admin) };
        Ok(Program::new("ambit-control".to_owned(), shared.control_node.sandbox.clone(), command, listeners))
    }

    /// Makes a pod for a node proxy on a node, starts the proxy in it, and does not wait until it is ready.
    ///
    /// # Errors
    /// When the pod can't be made or the program can't be executed.
    pub(crate) async fn start_ztunnel(&self, shared: &Arc<Shared>, index: usize) -> Result<Ztunnel> {
        let node = shared.node(index)?;
        let suffix: String = create::fresh_uid().chars().take(5).collect();
        let name = format!("ztunnel-{suffix}");
        let options = PodOptions::new(SYSTEM_NAMESPACE, &name)
            .service_account("ztunnel")
            .label("app", "ztunnel")
            .label("istio.io/dataplane-mode", "none");
        let pod = create::create(shared, NewPod::of(&options, index)).await?;
        // The CA issues certificates only to pods that it knows, so the object must be published first.
        shared.settle().await?;
        let directory = shared.directory.join(&name);
        std::fs::create_dir_all(&directory)
            .map_err(Error::system(format!("make directory {}", directory.display())))?;
        let token = directory.join("token");
        let subject = Subject {
            namespace: SYSTEM_NAMESPACE.to_owned(),
            service_account: "ztunnel".to_owned(),
            pod: Some((name.clone(), pod.uid().to_owned())),
            node: Some(node.name.clone()),
        };
        shared.signer.write(&subject, shared.token_lifetime, &token)?;
        shared.tokens.lock().push((subject, token.clone()));
        let config = directory.join("ztunnel.yaml");
        // JSON is YAML.
        let text = serde_json::to_vec_pretty(&self.config(shared, index, &pod, &token))
            .map_err(|error| Error::program(&name, format!("its configuration can't be written: {error}")))?;
        replace(&config, &text)?;
        let mut command = Command::new(&self.ztunnel).arg("--config").arg(&config);
        for (name, value) in &self.ztunnel_env {
            command = command.env(name, value);
        }
        if let Some(logs) = &self.log_dir {
            command = command.log_file(logs.join(format!("{}-{name}.log", node.name)));
        }
        let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let listeners = Listeners {
            readiness: at(ports::READINESS),
            metrics: at(ports::METRICS),
            admin: Some(at(ports::ADMIN)),
        };
        let label = format!("{name} of {}", node.name);
        let program = Program::new(label, pod.inner.sandbox.clone(), command, listeners);
        program.start().await?;
        let ztunnel = Ztunnel { pod, program };
        node.ztunnels.lock().push(ztunnel.clone());
        Ok(ztunnel)
    }

    fn config(&self, shared: &Shared, index: usize, pod: &Pod, token: &std::path::Path) -> Value {
        let mut config = Map::new();
        let mut set = |key: &str, value: Value| {
            config.insert(key.to_owned(), value);
        };
        set("node", json!(pod.node_name()));
        set("clusterId", json!(CLUSTER_ID));
        set("trustDomain", json!(shared.trust_domain));
        set("controlPlane", json!(SocketAddr::new(IpAddr::V4(CONTROL_V4), ports::CONTROL_PLANE).to_string()));
        set("controlPlaneRoot", json!(root_file(shared)));
        set("workloadRoot", json!(root_file(shared)));
        set("controlPlaneServerName", json!(CONTROL_NAME));
        set("tokenFile", json!(token));
        set("zdsSocket", json!(zds_socket(shared, index)));
        set("podName", json!(pod.name()));
        set("podNamespace", json!(pod.namespace()));
        set("instanceIp", json!(pod.ip()));
        for (key, value) in
            self.ztunnel_config.iter().chain(self.ztunnel_config_of.get(&index).into_iter().flatten())
        {
            set(key, value.clone());
        }
        Value::Object(config)
    }
}

/// Where the control plane writes the roots that its own certificate chains to.
pub(crate) fn root_file(shared: &Shared) -> PathBuf {
    shared.directory.join("root-cert.pem")
}

/// The socket between a node's agent and its proxies.
pub(crate) fn zds_socket(shared: &Shared, index: usize) -> PathBuf {
    zds_socket_in(&shared.directory, index)
}

/// The same, before the cluster is complete.
pub(crate) fn zds_socket_in(directory: &std::path::Path, index: usize) -> PathBuf {
    directory.join(format!("zds-{index}.sock"))
}
