//! etcd, API server, controller manager and scheduler: each a process that can be stopped and started.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ambit_local::{Command, Process, Sandbox, isolate};
use tokio::sync::Mutex;

use super::forward::API_PORT;
use super::network::Network;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::pki::{self, Authority, Subject};
use crate::plan::{Plan, SERVICES_PREFIX};
use crate::wait;

/// What serves the API, in the order in which it starts.
const SERVERS: [&str; 2] = ["etcd", "kube-apiserver"];
/// What works on its objects: not started on a cluster without nodes, whose pods nobody would run.
const CONTROLLERS: [&str; 2] = ["kube-controller-manager", "kube-scheduler"];
/// The API server records what the mesh's own service accounts do, so that a case can compare it with their rights.
const AUDIT_POLICY: &str = "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules:\n\
                            - {level: Metadata, userGroups: [\"system:serviceaccounts:ambit-system\"]}\n- {level: None}\n";
/// How long the API server may take on a busy machine.
const START: Duration = Duration::from_secs(180);
/// How long a program may take to end.
const GRACE: Duration = Duration::from_secs(10);
/// How long one call of `kubectl` may take.
const CALL: Duration = Duration::from_secs(120);

/// The programs' commands, and the processes that run.
#[derive(Debug)]
pub(crate) struct ControlPlane {
    commands: BTreeMap<&'static str, Command>,
    controllers: &'static [&'static str],
    running: Mutex<BTreeMap<String, Process>>,
    kubectl: PathBuf,
    kubeconfig: PathBuf,
}

impl ControlPlane {
    /// Signs certificates and makes the commands.
    pub(crate) fn prepare(layout: &Layout, cluster: &str, plan: Plan, authority: &Authority) -> Result<Self> {
        let directory = PathBuf::from(isolate::DIRECTORY);
        sign_certificates(plan, authority)?;
        let server = server(plan);
        for (file, certificate) in [("admin", "admin"), ("kcm", "kcm"), ("scheduler", "scheduler")] {
            let path = directory.join(format!("{file}.kubeconfig"));
            pki::write_private(&path, &authority.kubeconfig(certificate, &server))?;
        }
        let logs = layout.run(cluster).join("log");
        let audit = Audit { policy: directory.join("audit.yaml"), log: logs.join("audit.log") };
        pki::write_private(&audit.policy, AUDIT_POLICY)?;
        let command = |name: &'static str, args: Vec<String>| {
            let program = if name == "etcd" { PathBuf::from("/usr/bin/etcd") } else { layout.program(name) };
            (name, Command::new(program).args(args).log_file(logs.join(name)))
        };
        let commands = BTreeMap::from([
            command("etcd", etcd(&directory)),
            command("kube-apiserver", api_server(plan, authority, &audit)),
            command("kube-controller-manager", controller_manager(authority, &directory)),
            command("kube-scheduler", scheduler(&directory)),
        ]);
        Ok(Self {
            commands,
            controllers: if plan.nodes == 0 { &[] } else { &CONTROLLERS },
            running: Mutex::default(),
            kubectl: layout.program("kubectl"),
            kubeconfig: directory.join("admin.kubeconfig"),
        })
    }

    /// Starts every program.
    pub(crate) async fn start_all(&self, network: &Network) -> Result<()> {
        for program in SERVERS.iter().chain(self.controllers) {
            self.start(network, program).await?;
        }
        Ok(())
    }

    /// Starts a program unless it runs.
    pub(crate) async fn start(&self, network: &Network, program: &str) -> Result<()> {
        let command = self.commands.get(program).ok_or_else(|| unknown(program))?;
        let mut running = self.running.lock().await;
        if running.get(program).is_none_or(|process| !process.is_running()) {
            let process = Process::start(program, network.control(), command.clone()).await?;
            running.insert(program.to_owned(), process);
        }
        Ok(())
    }

    /// Ends a program.
    pub(crate) async fn stop(&self, program: &str) -> Result<()> {
        let process = self.running.lock().await.remove(program).ok_or_else(|| unknown(program))?;
        process.terminate(GRACE).await?;
        Ok(())
    }

    /// Waits until the API server answers. The scheduler and the controllers try again by themselves.
    pub(crate) async fn wait_until_ready(&self, network: &Network) -> Result<()> {
        wait::until("the API server is ready", START, async || {
            for program in self.controllers {
                // They end when the API server was not there within their own patience.
                self.start(network, program).await.map_err(|error| error.to_string())?;
            }
            let answer = self.kubectl(network.control(), &["get", "--raw", "/readyz"]).await;
            answer.map(drop).map_err(|error| error.to_string())
        })
        .await
    }

    /// Runs `kubectl` beside the API server.
    pub(crate) async fn kubectl(&self, sandbox: &Sandbox, args: &[&str]) -> Result<String> {
        let command = Command::new(&self.kubectl).arg("--kubeconfig").arg(&self.kubeconfig).args(args);
        let process = Process::start("kubectl", sandbox, command).await?;
        let status = process.wait_within(CALL).await?;
        let output = process.logs().join("\n");
        if status.success() {
            Ok(output)
        } else {
            Err(Error::program(format!("kubectl {}", args.join(" ")), format!("{status}: {output}")))
        }
    }
}

/// Where the API server listens, as an URL.
pub(crate) fn server(plan: Plan) -> String {
    format!("https://{}:{API_PORT}", plan.control())
}

fn unknown(program: &str) -> Error {
    Error::Local(ambit_local::Error::Unknown(format!("running program {program} of the control plane")))
}

fn sign_certificates(plan: Plan, authority: &Authority) -> Result<()> {
    let addresses: [IpAddr; 3] = plan.api_addresses();
    let hosts = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"];
    let server = Subject { user: "kube-apiserver", hosts: &hosts, addresses: &addresses, group: None };
    let client = |user, group| Subject { user, group, ..Subject::default() };
    authority.sign("apiserver", server)?;
    authority.sign("admin", client("admin", Some("system:masters")))?;
    authority.sign("kcm", client("system:kube-controller-manager", None))?;
    authority.sign("scheduler", client("system:kube-scheduler", None))?;
    authority.sign("proxy", client("system:kube-proxy", None))?;
    authority.sign("kubelet-client", client("apiserver-kubelet", Some("system:masters")))?;
    authority.sign("front", client("front-proxy", None))
}

fn flags<const N: usize>(pairs: [(&str, String); N]) -> Vec<String> {
    pairs.into_iter().map(|(flag, value)| format!("--{flag}={value}")).collect()
}

fn etcd(directory: &Path) -> Vec<String> {
    let client = "http://127.0.0.1:2379".to_owned();
    let mut args = flags([
        ("data-dir", directory.join("etcd").display().to_string()),
        ("listen-client-urls", client.clone()),
        ("advertise-client-urls", client),
        ("listen-peer-urls", "http://127.0.0.1:2380".to_owned()),
    ]);
    // The data lies in memory.
    args.push("--unsafe-no-fsync".to_owned());
    args
}

/// What the API server records, and where.
struct Audit {
    policy: PathBuf,
    log: PathBuf,
}

fn api_server(plan: Plan, authority: &Authority, audit: &Audit) -> Vec<String> {
    let file = |name: &str| authority.path(name);
    let text = str::to_owned;
    flags([
        ("etcd-servers", text("http://127.0.0.1:2379")),
        ("advertise-address", plan.control().to_string()),
        ("secure-port", API_PORT.to_string()),
        ("tls-cert-file", file("apiserver.crt")),
        ("tls-private-key-file", file("apiserver.key")),
        ("client-ca-file", file("ca.crt")),
        ("service-account-issuer", text("https://kubernetes.default.svc.cluster.local")),
        ("service-account-key-file", file("sa.pub")),
        ("service-account-signing-key-file", file("sa.key")),
        ("service-cluster-ip-range", format!("{}/{SERVICES_PREFIX}", plan.services())),
        ("authorization-mode", text("Node,RBAC")),
        ("enable-admission-plugins", text("NodeRestriction")),
        ("allow-privileged", text("true")),
        ("kubelet-client-certificate", file("kubelet-client.crt")),
        ("kubelet-client-key", file("kubelet-client.key")),
        ("kubelet-certificate-authority", file("ca.crt")),
        // Otherwise exec and logs look for the nodes' names in DNS.
        ("kubelet-preferred-address-types", text("InternalIP")),
        // Otherwise webhooks go to cluster IPs, which only nodes translate.
        ("enable-aggregator-routing", text("true")),
        ("requestheader-client-ca-file", file("ca.crt")),
        ("requestheader-allowed-names", text("front-proxy")),
        ("requestheader-extra-headers-prefix", text("X-Remote-Extra-")),
        ("requestheader-group-headers", text("X-Remote-Group")),
        ("requestheader-username-headers", text("X-Remote-User")),
        ("proxy-client-cert-file", file("front.crt")),
        ("proxy-client-key-file", file("front.key")),
        ("audit-policy-file", audit.policy.display().to_string()),
        ("audit-log-path", audit.log.display().to_string()),
        ("audit-log-maxsize", text("2000")),
    ])
}

fn controller_manager(authority: &Authority, directory: &Path) -> Vec<String> {
    flags([
        ("kubeconfig", directory.join("kcm.kubeconfig").display().to_string()),
        ("service-account-private-key-file", authority.path("sa.key")),
        ("root-ca-file", authority.path("ca.crt")),
        ("use-service-account-credentials", "true".to_owned()),
        ("cluster-signing-cert-file", authority.path("ca.crt")),
        ("cluster-signing-key-file", authority.path("ca.key")),
        ("leader-elect", "false".to_owned()),
    ])
}

fn scheduler(directory: &Path) -> Vec<String> {
    flags([
        ("kubeconfig", directory.join("scheduler.kubeconfig").display().to_string()),
        ("leader-elect", "false".to_owned()),
    ])
}
