//! A real API server with its etcd, as a process of the test's own; no controllers and no nodes.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::api::{DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};

use crate::{namespace, until};

/// The account of the control plane and its rights, as the chart gives them.
static RIGHTS: LazyLock<Vec<Value>> = LazyLock::new(|| {
    let objects =
        ambit_chart::template(&["crds.ambit=false,crds.gatewayApi=false,crds.istio=false"]).unwrap();
    let kinds = ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"];
    let is_right = |object: &Value| {
        kinds.iter().any(|kind| object["kind"] == *kind) && object["metadata"]["name"] == "ambit-control"
    };
    let rights: Vec<Value> = objects.into_iter().map(|object| object.value).filter(is_right).collect();
    assert_eq!(rights.len(), kinds.len(), "{rights:?}");
    rights
});
const ADMIN: &str = "the-test-itself";

/// An API server. Its data outlive [`ApiServer::stop`].
pub(crate) struct ApiServer {
    directory: tempfile::TempDir,
    ports: [u16; 3],
    arguments: Vec<String>,
    etcd: Child,
    server: Option<Child>,
    /// May do everything.
    pub(crate) admin: Client,
}

impl ApiServer {
    /// Starts one with the namespace `ambit-system` and the control plane's rights in it.
    pub(crate) async fn start() -> ApiServer {
        Self::start_with(&[]).await
    }

    /// The same with further arguments of the program.
    pub(crate) async fn start_with(arguments: &[&str]) -> ApiServer {
        let directory = tempfile::tempdir().unwrap();
        let ports = free_ports();
        write_keys(directory.path());
        let etcd = start_etcd(directory.path(), ports);
        let kubeconfig = directory.path().join("admin.kubeconfig");
        write_kubeconfig(directory.path(), &kubeconfig, ports[0], ADMIN);
        let admin = ambit_control::api_server::connect(Some(&kubeconfig)).await.unwrap();
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let mut server = ApiServer { directory, ports, arguments, etcd, server: None, admin };
        server.resume().await;
        let metadata = json!({ "name": "istio-ca-secret", "namespace": "ambit-system" });
        server.apply_value(namespace("ambit-system")).await;
        server.apply_value(json!({ "apiVersion": "v1", "kind": "Secret", "metadata": metadata })).await;
        for right in RIGHTS.iter() {
            server.apply_value(right.clone()).await;
        }
        server
    }

    /// Starts the API server again, and waits until it is ready.
    pub(crate) async fn resume(&mut self) {
        self.server = Some(start_server(self.directory.path(), self.ports, &self.arguments));
        let admin = self.admin.clone();
        let log = self.directory.path().join("apiserver.log");
        until("the API server is ready", async || {
            if let Some(server) = &mut self.server
                && let Some(status) = server.try_wait().unwrap()
            {
                panic!("the API server ended: {status}\n{}", std::fs::read_to_string(&log).unwrap());
            }
            let request = http::Request::get("/readyz").body(Vec::new()).unwrap();
            admin.request_text(request).await.ok()
        })
        .await;
    }

    /// Ends the API server at once; etcd stays.
    pub(crate) fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().unwrap();
            server.wait().unwrap();
        }
    }

    /// Applies objects of YAML.
    pub(crate) async fn apply(&self, yaml: &str) {
        for document in yaml.split("\n---\n").filter(|document| !document.trim().is_empty()) {
            self.apply_value(serde_saphyr::from_str(document).unwrap()).await;
        }
    }

    /// Applies one object, and its status where it has one.
    pub(crate) async fn apply_value(&self, mut object: Value) {
        let status = object.as_object_mut().unwrap().remove("status");
        let (api, name) = self.api(&object);
        let parameters = PatchParams::apply("test").force();
        // A definition that was just applied is served a moment later.
        until(&format!("{name} is applied"), async || {
            match api.patch(&name, &parameters, &Patch::Apply(&object)).await {
                Ok(_) => Some(()),
                Err(kube::Error::Api(status)) if status.code == 404 => None,
                Err(error) => panic!("{object}: {error}"),
            }
        })
        .await;
        if let Some(status) = status {
            object["status"] = status;
            self.set_status(object).await;
        }
    }

    /// Changes the status of an object.
    pub(crate) async fn set_status(&self, object: Value) {
        let (api, name) = self.api(&object);
        let patch = Patch::Merge(json!({ "status": object["status"] }));
        api.patch_status(&name, &PatchParams::default(), &patch).await.unwrap();
    }

    /// Merges fields into an object of the core group.
    pub(crate) async fn merge(&self, kind: &str, namespace: &str, name: &str, fields: Value) {
        let metadata = json!({ "namespace": namespace, "name": name });
        let (api, name) = self.api(&json!({ "apiVersion": "v1", "kind": kind, "metadata": metadata }));
        api.patch(&name, &PatchParams::default(), &Patch::Merge(fields)).await.unwrap();
    }

    /// Reads an object.
    pub(crate) async fn get(
        &self,
        api_version: &str,
        kind: &str,
        namespace: &str,
        name: &str,
    ) -> Option<Value> {
        let metadata = json!({ "namespace": namespace, "name": name });
        let (api, name) = self.api(&json!({ "apiVersion": api_version, "kind": kind, "metadata": metadata }));
        api.get_opt(&name).await.unwrap().map(|object| serde_json::to_value(object).unwrap())
    }

    /// Deletes an object at once.
    pub(crate) async fn delete(&self, api_version: &str, kind: &str, namespace: &str, name: &str) {
        let metadata = json!({ "namespace": namespace, "name": name });
        let (api, name) = self.api(&json!({ "apiVersion": api_version, "kind": kind, "metadata": metadata }));
        api.delete(&name, &kube::api::DeleteParams::default().grace_period(0)).await.unwrap();
    }

    fn api(&self, object: &Value) -> (Api<DynamicObject>, String) {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let (group, version) = text("/apiVersion").split_once('/').unwrap_or(("", text("/apiVersion")));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, text("/kind")));
        let api = match text("/metadata/namespace") {
            "" => Api::all_with(self.admin.clone(), &resource),
            namespace => Api::namespaced_with(self.admin.clone(), namespace, &resource),
        };
        (api, text("/metadata/name").to_owned())
    }

    /// A pod of a service account on a node, running.
    pub(crate) async fn run_pod(
        &self,
        namespace: &str,
        name: &str,
        account: &str,
        node: &str,
        address: &str,
    ) -> Pod {
        self.apply_value(json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": { "name": account, "namespace": namespace },
        }))
        .await;
        self.apply_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "namespace": namespace, "labels": { "app": account },
                "annotations": { "ambient.istio.io/redirection": "enabled" },
            },
            "spec": {
                "nodeName": node, "serviceAccountName": account, "automountServiceAccountToken": false,
                "containers": [{ "name": "app", "image": "app:1" }],
            },
            "status": {
                "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }],
                "conditions": [{ "type": "Ready", "status": "True" }],
            },
        }))
        .await;
        Api::<Pod>::namespaced(self.admin.clone(), namespace).get(name).await.unwrap()
    }

    /// A token of a service account, bound to a pod if one is given.
    pub(crate) async fn token(
        &self,
        namespace: &str,
        account: &str,
        audience: &str,
        pod: Option<&Pod>,
    ) -> String {
        let bound = pod.map(|pod| {
            let (name, uid) = (&pod.metadata.name, &pod.metadata.uid);
            json!({ "apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid })
        });
        let audiences = if audience.is_empty() { json!([]) } else { json!([audience]) };
        let request: TokenRequest = serde_json::from_value(json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": { "audiences": audiences, "boundObjectRef": bound, "expirationSeconds": 3600 },
        }))
        .unwrap();
        let api: Api<ServiceAccount> = Api::namespaced(self.admin.clone(), namespace);
        let answer = api.create_token_request(account, &PostParams::default(), &request).await.unwrap();
        answer.status.unwrap().token
    }

    /// A kubeconfig of the control plane's own service account.
    pub(crate) async fn kubeconfig(&self) -> PathBuf {
        let token = self.token("ambit-system", "ambit-control", "", None).await;
        let path = self.directory.path().join("control.kubeconfig");
        write_kubeconfig(self.directory.path(), &path, self.ports[0], &token);
        path
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.stop();
        self.etcd.kill().unwrap();
        self.etcd.wait().unwrap();
    }
}

/// Ports for the API server and etcd's two.
fn free_ports() -> [u16; 3] {
    let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

/// Keys and certificates of the server and of service accounts.
fn write_keys(directory: &Path) {
    let write = |name: &str, text: String| std::fs::write(directory.join(name), text).unwrap();
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(vec![]).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    write("ca.crt", ca.self_signed(&ca_key).unwrap().pem());
    let issuer = Issuer::new(ca, ca_key);
    let key = KeyPair::generate().unwrap();
    let names = vec!["127.0.0.1".to_owned(), "kubernetes.default.svc".to_owned()];
    let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
    write("server.crt", certificate.pem());
    write("server.key", key.serialize_pem());
    let accounts = KeyPair::generate().unwrap();
    write("accounts.key", accounts.serialize_pem());
    write("accounts.pub", accounts.public_key_pem());
    write("tokens.csv", format!("{ADMIN},admin,admin,system:masters\n"));
}

fn write_kubeconfig(directory: &Path, path: &Path, port: u16, token: &str) {
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
        "clusters": [{ "name": "c", "cluster": {
            "server": format!("https://127.0.0.1:{port}"),
            "certificate-authority": directory.join("ca.crt"),
        } }],
        "users": [{ "name": "u", "user": { "token": token } }],
    });
    std::fs::write(path, kubeconfig.to_string()).unwrap();
}

/// A program that ends with the test, however that ends.
fn program(path: &Path, log: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(path).stdin(Stdio::null());
    let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
    command.stdout(log.try_clone().unwrap()).stderr(log);
    command
}

fn start_etcd(directory: &Path, ports: [u16; 3]) -> Child {
    let url = |port: u16| format!("http://127.0.0.1:{port}");
    program(Path::new("/usr/bin/etcd"), &directory.join("etcd.log"))
        .arg("--data-dir")
        .arg(directory.join("etcd"))
        .args(["--listen-client-urls", &url(ports[1]), "--advertise-client-urls", &url(ports[1])])
        .args(["--listen-peer-urls", &url(ports[2]), "--unsafe-no-fsync"])
        .spawn()
        .unwrap()
}

fn start_server(directory: &Path, ports: [u16; 3], arguments: &[String]) -> Child {
    let file = |flag: &str, name: &str| format!("--{flag}={}", directory.join(name).display());
    program(&binary(), &directory.join("apiserver.log"))
        .arg(format!("--etcd-servers=http://127.0.0.1:{}", ports[1]))
        .arg(format!("--secure-port={}", ports[0]))
        .args(["--bind-address=127.0.0.1", "--advertise-address=127.0.0.1"])
        .args([file("tls-cert-file", "server.crt"), file("tls-private-key-file", "server.key")])
        .arg(file("token-auth-file", "tokens.csv"))
        .args([
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.96.0.0/16",
        ])
        .args([
            file("service-account-key-file", "accounts.pub"),
            file("service-account-signing-key-file", "accounts.key"),
        ])
        .args(["--authorization-mode=RBAC", "--endpoint-reconciler-type=none"])
        .args(arguments)
        .spawn()
        .unwrap()
}

/// The API server's program, as the test cluster builds it.
fn binary() -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_ambit-control"));
    let built = program.ancestors().map(|target| target.join("cluster/bin/kube-apiserver"));
    let found = built.into_iter().find(|path| path.exists());
    found.expect("kube-apiserver is not built; `cargo run -p ambit-cluster -- build` builds it")
}

/// Time in which the condition of a test must come true.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
