//! The CNI plugin called as a container runtime calls it, with a real agent and real namespaces. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "the agent's own tests use the rest")]
#[path = "agent/bed.rs"]
mod bed;
#[path = "common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use ambit_node::cni::message::PodRef;
use ambit_node::cni::server::Server;
use ambit_node::enrol::Reason;
use ambit_node::kubernetes::{PodSource, SourceError, Verdict, WantedPod};
use ambit_node::redirect::{self, Options, Stage, plan};
use ambit_node::{PodState, nft};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;

use bed::{Running, lasting_path, state};
use common::{Host, pair};

/// Pods whose name begins with `in` are of the mesh; of others the API server knows nothing, or that they are out.
struct Pods;

impl PodSource for Pods {
    async fn verdict(&self, pod: &PodRef) -> Result<Verdict, SourceError> {
        match pod.name.split_once('-').map(|(prefix, _)| prefix) {
            Some("in") => Ok(Verdict::In(WantedPod {
                uid: pod.uid.clone(),
                name: pod.name.clone(),
                namespace: pod.namespace.clone(),
                service_account: "reviews".into(),
                ips: Vec::new(),
                options: Options::default(),
            })),
            Some("out") => Ok(Verdict::Out(Reason::NotLabelled)),
            _ => Err(SourceError::Late),
        }
    }

    fn announce(&self, _: &str) {}
}

/// An agent with the socket that the plugin dials.
struct Node {
    running: Running,
    server: JoinHandle<()>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Node {
    async fn start() -> Self {
        let running = Running::start(|_| {}).await;
        let path = running.directory.path().join("cni.sock");
        let server = Server::bind(&path, running.agent.clone(), Pods, Duration::from_millis(500)).unwrap();
        Self { running, server: tokio::spawn(server.run()) }
    }

    fn call<'a>(&self, command: &'static str, pod: &'a Host) -> Call<'a> {
        Call::new(command, pod, self.running.directory.path())
    }
}

/// One call of the plugin.
struct Call<'a> {
    command: &'static str,
    pod: &'a Host,
    socket: PathBuf,
    namespace: &'static str,
    name: &'static str,
    sandbox: &'static str,
    version: &'static str,
    extra: Value,
}

impl<'a> Call<'a> {
    fn new(command: &'static str, pod: &'a Host, directory: &Path) -> Self {
        Self {
            command,
            pod,
            socket: directory.join("cni.sock"),
            namespace: "shop",
            name: "in-reviews",
            sandbox: "s1",
            version: "1.1.0",
            extra: json!({}),
        }
    }

    fn previous(&self) -> Value {
        let netns = lasting_path(&self.pod.netns);
        json!({
            "cniVersion": self.version,
            "interfaces": [{ "name": "veth1" }, { "name": "eth0", "sandbox": netns }],
            "ips": [
                { "address": format!("{}/24", self.pod.v4), "interface": 1 },
                { "address": format!("{}/64", self.pod.v6), "interface": 1 },
            ],
            "vendor": true,
        })
    }

    /// Returns what the plugin wrote, and whether it succeeded.
    async fn run(&self) -> (Value, bool) {
        let mut config = json!({
            "cniVersion": self.version,
            "name": "net",
            "type": "ambit-cni",
            "socket": self.socket,
            "excludedNamespaces": ["kube-system", "ambit-system"],
            "prevResult": self.previous(),
        });
        config.as_object_mut().unwrap().extend(self.extra.as_object().unwrap().clone());
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID=a",
            self.namespace, self.name, self.sandbox
        );
        let mut plugin = tokio::process::Command::new(env!("CARGO_BIN_EXE_ambit-cni"))
            .env_clear()
            .env("CNI_COMMAND", self.command)
            .env("CNI_CONTAINERID", self.sandbox)
            .env("CNI_NETNS", lasting_path(&self.pod.netns))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", arguments)
            .env("CNI_PATH", "/opt/cni/bin")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        plugin.stdin.take().unwrap().write_all(config.to_string().as_bytes()).await.unwrap();
        let output = plugin.wait_with_output().await.unwrap();
        let written = match output.stdout.is_empty() {
            true => Value::Null,
            false => serde_json::from_slice(&output.stdout).unwrap(),
        };
        (written, output.status.success())
    }

    async fn fails_with(&self, code: u32) -> Value {
        let (written, succeeded) = self.run().await;
        assert!(!succeeded);
        assert_eq!(
            (&written["code"], &written["cniVersion"]),
            (&code.into(), &self.version.into()),
            "{written}"
        );
        written
    }
}

async fn has_rules(pod: &Host) -> bool {
    nft::tables(&pod.netns).await.unwrap().iter().any(|table| table == redirect::TABLE)
}

#[tokio::test]
async fn add_succeeds_once_a_proxy_serves_the_pod() {
    let (_outside, pod) = pair().await;
    let node = Node::start().await;
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let mut proxy = node.running.proxy(true).await;
        let call = Call { version, ..node.call("ADD", &pod) };
        let ((written, succeeded), ()) = tokio::join!(call.run(), async {
            loop {
                if matches!(proxy.obey().await, bed::Payload::Add(_)) {
                    return;
                }
            }
        });
        assert!(succeeded, "{written}");
        assert_eq!(written, call.previous());
        assert_eq!(redirect::verify(&pod.netns, &plan(&Options::default(), Stage::In)).await.unwrap(), []);
        assert_eq!(state(&node.running.agent, "a").await, Some(PodState::Enabled));
        // The next version enrols it anew.
        assert!(node.call("DEL", &pod).run().await.1);
        assert_eq!(node.running.agent.status("a"), None);
    }
}

#[tokio::test]
async fn add_fails_for_now_while_no_proxy_serves_the_pod() {
    let (_outside, pod) = pair().await;
    let node = Node::start().await;
    let written = node.call("ADD", &pod).fails_with(11).await;
    assert!(written["details"].as_str().unwrap().contains("no node proxy"), "{written}");
    assert!(has_rules(&pod).await, "nothing passes meanwhile");
}

#[tokio::test]
async fn add_fails_for_now_while_the_api_server_says_nothing() {
    let (_outside, pod) = pair().await;
    let node = Node::start().await;
    Call { name: "unknown", ..node.call("ADD", &pod) }.fails_with(11).await;
    assert!(!has_rules(&pod).await);
}

#[tokio::test]
async fn a_pod_outside_the_mesh_starts_without_rules() {
    let (_outside, pod) = pair().await;
    let node = Node::start().await;
    let call = Call { name: "out-details", ..node.call("ADD", &pod) };
    assert_eq!(call.run().await, (call.previous(), true));
    assert!(!has_rules(&pod).await);
}

#[tokio::test]
async fn without_an_agent_only_excluded_namespaces_start() {
    let (_outside, pod) = pair().await;
    let directory = tempfile::tempdir().unwrap();
    let call = Call::new("ADD", &pod, directory.path());
    call.fails_with(11).await;
    for namespace in ["kube-system", "ambit-system"] {
        let call = Call { namespace, ..Call::new("ADD", &pod, directory.path()) };
        assert_eq!(call.run().await, (call.previous(), true));
    }
    // A pod can end, and a runtime learns that it may start pods at all.
    for command in ["DEL", "GC", "STATUS"] {
        assert_eq!(Call::new(command, &pod, directory.path()).run().await, (Value::Null, true), "{command}");
    }
}

#[tokio::test]
async fn a_late_agent_is_waited_for() {
    let (_outside, pod) = pair().await;
    let running = Running::start(|_| {}).await;
    let path = running.directory.path().join("cni.sock");
    let call = Call { name: "out-details", ..Call::new("ADD", &pod, running.directory.path()) };
    let server = async {
        // Long enough for the plugin to find nobody; it passes just as well if it does not.
        tokio::time::sleep(Duration::from_millis(300)).await;
        Server::bind(&path, running.agent.clone(), Pods, Duration::ZERO).unwrap().run().await;
    };
    tokio::select! {
        (written, succeeded) = call.run() => assert!(succeeded, "{written}"),
        () = server => {}
    }
}

#[tokio::test]
async fn del_of_an_old_sandbox_leaves_the_new_one() {
    let (_outside, pod) = pair().await;
    let node = Node::start().await;
    Call { sandbox: "new", ..node.call("ADD", &pod) }.fails_with(11).await;
    assert!(Call { sandbox: "old", ..node.call("DEL", &pod) }.run().await.1);
    assert_eq!(state(&node.running.agent, "a").await, Some(PodState::Pending));
    let gc = json!({ "cni.dev/valid-attachments": [{ "containerID": "other", "ifname": "eth0" }] });
    assert!(Call { extra: gc, ..node.call("GC", &pod) }.run().await.1);
    assert_eq!(state(&node.running.agent, "a").await, Some(PodState::Pending), "its namespace lives");
    assert!(Call { sandbox: "new", ..node.call("DEL", &pod) }.run().await.1);
    assert_eq!(state(&node.running.agent, "a").await, None);
}

#[tokio::test]
async fn check_notices_rules_that_are_gone() {
    let (_outside, pod) = pair().await;
    let node = Node::start().await;
    node.call("CHECK", &pod).fails_with(100).await;
    node.call("ADD", &pod).fails_with(11).await;
    assert_eq!(node.call("CHECK", &pod).run().await, (Value::Null, true));
    nft::remove(&pod.netns, redirect::TABLE).await.unwrap();
    node.call("CHECK", &pod).fails_with(100).await;
    let out = Call { name: "out-details", ..node.call("CHECK", &pod) };
    assert_eq!(out.run().await, (Value::Null, true));
}

#[tokio::test]
async fn the_plugin_says_which_versions_it_speaks() {
    let (_outside, pod) = pair().await;
    let directory = tempfile::tempdir().unwrap();
    let (written, succeeded) = Call::new("VERSION", &pod, directory.path()).run().await;
    assert!(succeeded);
    assert_eq!(written["supportedVersions"], json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    let call = |command| Call::new(command, &pod, directory.path());
    let older = Call { version: "0.2.0", ..call("ADD") };
    older.fails_with(1).await;
    // Pods outside the mesh's reach start and end with any version.
    let excluded = Call { namespace: "kube-system", ..Call { version: "0.2.0", ..call("ADD") } };
    assert_eq!(excluded.run().await, (excluded.previous(), true));
    for command in ["DEL", "GC", "STATUS"] {
        let older = Call { version: "0.2.0", ..call(command) };
        assert_eq!(older.run().await, (Value::Null, true), "{command}");
    }
    Call::new("FROB", &pod, directory.path()).fails_with(4).await;
}
