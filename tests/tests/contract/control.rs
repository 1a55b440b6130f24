//! Istio's node proxy at our control plane.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ambit_local::token::{AUDIENCE, Subject, TokenSigner};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::grpc::{CERTIFICATES, Call, DISCOVERY, call};
use crate::wire::{body, hex};
use crate::{ADDRESS, AUTHORIZATION, program};

pub(crate) const OBJECTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Node
metadata: {name: node-1}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, uid: u-web, labels: {app: web}, annotations: {ambient.istio.io/redirection: enabled}}
spec: {nodeName: node-1, serviceAccountName: web, containers: [{name: web, image: web}]}
status: {phase: Running, podIP: 10.0.0.7, podIPs: [{ip: 10.0.0.7}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.7, clusterIPs: [10.96.0.7], selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
"#;
/// Who runs where, for the certificate of a node proxy.
pub(crate) const PROXY: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: ztunnel-1, namespace: ambit-system, uid: u-zt}
spec: {nodeName: node-1, serviceAccountName: ztunnel, containers: [{name: z, image: z}]}
status: {phase: Running, podIP: 10.0.0.9, podIPs: [{ip: 10.0.0.9}], conditions: [{type: Ready, status: "True"}]}
"#;

fn policy(scope: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: guard, namespace: shop}}\n\
         spec:\n  action: DENY\n{scope}  rules:\n  - from: [{{source: {{principals: [cluster.local/ns/shop/sa/enemy]}}}}]\n    \
         to: [{{operation: {{ports: [\"8080\"]}}}}]\n"
    )
}

/// A running control plane, and what its callers need.
pub(crate) struct Control {
    directory: TempDir,
    signer: TokenSigner,
    address: SocketAddr,
    child: Child,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Control {
    pub(crate) fn start(objects: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        std::fs::create_dir(path("objects")).unwrap();
        for (name, text) in objects {
            std::fs::write(directory.path().join("objects").join(name), text).unwrap();
        }
        let signer = TokenSigner::new().unwrap();
        std::fs::write(path("jwks.json"), signer.jwks()).unwrap();
        let mut child = Command::new(program("ambit-control"))
            .args(["--source", &format!("dir:{}", path("objects")), "--listen", "127.0.0.1:0"])
            .args(["--ca-dir", &path("ca"), "--jwks", &path("jwks.json"), "--root-out", &path("root.pem")])
            .args(["--server-name", "istiod.istio-system.svc", "--log-format", "json"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().expect("the program serves").unwrap();
            let line: Value = serde_json::from_str(&line).unwrap_or_default();
            if line["message"] == "serving" {
                break line["address"].as_str().unwrap().parse().unwrap();
            }
        };
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Self { directory, signer, address, child }
    }

    fn put(&self, name: &str, text: &str) {
        let objects = self.directory.path().join("objects");
        std::fs::write(objects.join(format!(".{name}")), text).unwrap();
        std::fs::rename(objects.join(format!(".{name}")), objects.join(name)).unwrap();
    }

    /// A call of a service account with a pod on node-1; a call with a message sends that one only.
    pub(crate) async fn call(
        &self,
        method: &str,
        caller: (&str, &str),
        message: Option<(&str, &Value)>,
    ) -> Call {
        let authorization = format!("Bearer {}", self.token(caller, AUDIENCE));
        let headers = [("authorization", authorization.as_str()), ("clusterid", "Kubernetes")];
        call(self.address, (&self.roots(), "istiod.istio-system.svc"), method, &headers, message).await
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The roots that the control plane's own certificate leads to.
    pub(crate) fn roots(&self) -> std::path::PathBuf {
        self.directory.path().join("root.pem")
    }

    /// A token of a service account with a pod on node-1.
    pub(crate) fn token(&self, (namespace, account): (&str, &str), audience: &str) -> String {
        let subject = Subject {
            namespace: namespace.to_owned(),
            service_account: account.to_owned(),
            pod: Some(("ztunnel-1".to_owned(), "u-zt".to_owned())),
            node: Some("node-1".to_owned()),
        };
        self.signer.sign(&subject, audience, Duration::from_secs(600)).unwrap()
    }

    async fn discover(&self) -> Call {
        self.call(DISCOVERY, ("ambit-system", "ztunnel"), None).await
    }
}

/// The node of Istio's proxy, as its source has it.
fn node() -> Value {
    let text = |value: &str| json!({ "string_value": value });
    json!({
        "id": "ztunnel~10.0.0.9~ztunnel-1.ambit-system~ambit-system.svc.cluster.local",
        "metadata": { "fields": {
            "NAME": text("ztunnel-1"), "NAMESPACE": text("ambit-system"),
            "INSTANCE_IPS": text("10.0.0.9"), "NODE_NAME": text("node-1"),
        }},
    })
}

fn ask(stream: &mut Call, type_url: &str, rest: &Value) {
    let mut request = json!({ "type_url": type_url, "node": node() });
    request.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
    stream.send("DeltaDiscoveryRequest", &request);
}

fn acknowledge(stream: &mut Call, answer: &Value) {
    let ack = json!({ "type_url": answer["type_url"], "response_nonce": answer["nonce"] });
    stream.send("DeltaDiscoveryRequest", &ack);
}

async fn answer(stream: &mut Call, type_url: &str) -> Value {
    let answer = stream.until("DeltaDiscoveryResponse", |it| it["type_url"] == type_url).await;
    acknowledge(stream, &answer);
    answer
}

fn names(answer: &Value) -> Vec<&str> {
    answer["resources"].as_array().into_iter().flatten().filter_map(|it| it["name"].as_str()).collect()
}

fn has(answer: &Value, name: &str) -> bool {
    names(answer).contains(&name)
}

const POD: &str = "Kubernetes//Pod/shop/web-1";
const SERVICE: &str = "shop/web.shop.svc.cluster.local";

/// Far more than fits into one answer of our own proxies.
fn many_pods() -> String {
    let pod = |number: usize| {
        let (name, ip) = (format!("many-{number}"), format!("10.1.{}.{}", number / 250, number % 250 + 1));
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: u-{name}}}\n\
             spec: {{nodeName: node-1, containers: [{{name: c, image: c}}]}}\n\
             status: {{phase: Running, podIP: {ip}, podIPs: [{{ip: {ip}}}], conditions: [{{type: Ready, status: \"True\"}}]}}\n"
        )
    };
    (0..1_500).map(pod).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_answer_of_each_type_is_its_whole_state() {
    let many = many_pods();
    let control = Control::start(&[("a.yaml", OBJECTS), ("many.yaml", &many), ("p.yaml", &policy(""))]);
    let mut stream = control.discover().await;
    ask(&mut stream, ADDRESS, &json!({}));
    ask(&mut stream, AUTHORIZATION, &json!({}));
    let addresses = answer(&mut stream, ADDRESS).await;
    assert!(has(&addresses, POD) && has(&addresses, SERVICE), "{:?}", names(&addresses).len());
    assert!(names(&addresses).len() >= 1_502, "{}", names(&addresses).len());
    assert!(has(&answer(&mut stream, AUTHORIZATION).await, "shop/guard"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_resource_has_the_contracts_fields() {
    let control = Control::start(&[("a.yaml", OBJECTS), ("p.yaml", &policy(""))]);
    let mut stream = control.discover().await;
    ask(&mut stream, ADDRESS, &json!({}));
    ask(&mut stream, AUTHORIZATION, &json!({}));
    let addresses = answer(&mut stream, ADDRESS).await;
    let named = |name: &str| {
        let all = addresses["resources"].as_array().unwrap();
        all.iter().find(|it| it["name"] == name).unwrap_or_else(|| panic!("no {name}"))
    };
    let pod = named(POD);
    assert_eq!(pod["resource"]["type_url"], ADDRESS);
    assert!(pod["aliases"].as_array().unwrap().contains(&json!("/10.0.0.7")), "{pod}");
    let workload = body("Address", pod)["workload"].take();
    for (field, value) in [
        ("uid", json!(POD)),
        ("name", json!("web-1")),
        ("namespace", json!("shop")),
        ("addresses", json!([hex(&[10, 0, 0, 7])])),
        ("tunnel_protocol", json!("HBONE")),
        ("service_account", json!("web")),
        ("node", json!("node-1")),
        ("cluster_id", json!("Kubernetes")),
        ("canonical_name", json!("web")),
        ("workload_type", json!("POD")),
    ] {
        assert_eq!(workload[field], value, "{field}: {workload}");
    }
    let port = &workload["services"][SERVICE]["ports"][0];
    assert_eq!((&port["service_port"], &port["target_port"]), (&json!(80), &json!(8080)), "{workload}");
    let service = body("Address", named(SERVICE))["service"].take();
    assert_eq!(service["hostname"], "web.shop.svc.cluster.local");
    assert_eq!(service["addresses"][0]["address"], hex(&[10, 96, 0, 7]));
    let policies = answer(&mut stream, AUTHORIZATION).await;
    let guard =
        policies["resources"].as_array().unwrap().iter().find(|it| it["name"] == "shop/guard").unwrap();
    let guard = body("Authorization", guard);
    assert_eq!((&guard["scope"], &guard["action"]), (&json!("NAMESPACE"), &json!("DENY")), "{guard}");
    // Rules are OR'ed, clauses AND'ed, matches OR'ed.
    let clauses = guard["rules"][0]["clauses"].as_array().unwrap();
    let all: Vec<&Value> = clauses.iter().flat_map(|clause| clause["matches"].as_array().unwrap()).collect();
    assert!(all.iter().any(|it| it["principals"][0]["exact"] == "cluster.local/ns/shop/sa/enemy"), "{guard}");
    assert!(all.iter().any(|it| it["destination_ports"] == json!([8080])), "{guard}");
}

#[tokio::test(flavor = "multi_thread")]
async fn subscribe_and_unsubscribe_all_is_on_demand() {
    let control = Control::start(&[("a.yaml", OBJECTS)]);
    let mut stream = control.discover().await;
    let all = ["*"];
    ask(&mut stream, ADDRESS, &json!({ "resource_names_subscribe": all, "resource_names_unsubscribe": all }));
    assert_eq!(names(&answer(&mut stream, ADDRESS).await), [""; 0]);
    for (name, expected) in [("/10.0.0.7", vec![POD]), ("/10.96.0.7", vec![POD, SERVICE])] {
        ask(&mut stream, ADDRESS, &json!({ "resource_names_subscribe": [name] }));
        let found = answer(&mut stream, ADDRESS).await;
        assert!(expected.iter().all(|it| has(&found, it)), "{name}: {:?}", names(&found));
    }
    ask(&mut stream, ADDRESS, &json!({ "resource_names_subscribe": ["/10.9.9.9"] }));
    assert_eq!(answer(&mut stream, ADDRESS).await["removed_resources"], json!(["/10.9.9.9"]));

    // A new stream: what was asked for, and what came, is named among the versions, which are empty.
    let mut stream = control.discover().await;
    let known = json!({ "/10.0.0.7": "", POD: "" });
    let rest = json!({ "resource_names_subscribe": all, "resource_names_unsubscribe": all, "initial_resource_versions": known });
    ask(&mut stream, ADDRESS, &rest);
    let opening = answer(&mut stream, ADDRESS).await;
    assert!(has(&opening, POD), "{opening}");
    assert!(!has(&opening, SERVICE), "{opening}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reconnect_is_sent_only_what_differs() {
    let control = Control::start(&[("a.yaml", OBJECTS), ("p.yaml", &policy(""))]);
    let mut stream = control.discover().await;
    ask(&mut stream, ADDRESS, &json!({}));
    let first = answer(&mut stream, ADDRESS).await;
    let version = |name: &str| {
        let all = first["resources"].as_array().unwrap();
        all.iter().find(|it| it["name"] == name).unwrap()["version"].clone()
    };
    let known = json!({ POD: version(POD), "Kubernetes//Pod/shop/gone": "1", SERVICE: "other" });
    let mut stream = control.discover().await;
    ask(&mut stream, ADDRESS, &json!({ "initial_resource_versions": known }));
    let second = answer(&mut stream, ADDRESS).await;
    assert_eq!(names(&second), [SERVICE]);
    assert_eq!(second["removed_resources"], json!(["Kubernetes//Pod/shop/gone"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_precedes_its_workload_within_a_batch() {
    let control = Control::start(&[("a.yaml", OBJECTS), ("p.yaml", &policy(""))]);
    let mut stream = control.discover().await;
    ask(&mut stream, AUTHORIZATION, &json!({}));
    answer(&mut stream, AUTHORIZATION).await;
    ask(&mut stream, ADDRESS, &json!({}));
    answer(&mut stream, ADDRESS).await;
    control.put("p.yaml", &policy("  selector: {matchLabels: {app: web}}\n"));
    let next = stream.receive("DeltaDiscoveryResponse").await.unwrap();
    assert_eq!(next["type_url"], AUTHORIZATION, "{next}");
    assert_eq!(body("Authorization", &next["resources"][0])["scope"], "WORKLOAD_SELECTOR");
    let last = stream.receive("DeltaDiscoveryResponse").await.unwrap();
    let workload = body("Address", &last["resources"][0])["workload"].take();
    assert_eq!(workload["authorization_policies"], json!(["shop/guard"]));
    // `system_version_info` carries the batch: the first says that more of it follows, the last that it is complete.
    let batch = last["system_version_info"].as_str().unwrap();
    assert_eq!(next["system_version_info"], format!("{batch}+"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nack_leaves_the_stream_and_the_others_alone() {
    let control = Control::start(&[("a.yaml", OBJECTS)]);
    let mut stream = control.discover().await;
    ask(&mut stream, ADDRESS, &json!({}));
    let first = stream.receive("DeltaDiscoveryResponse").await.unwrap();
    let error = json!({ "code": 3, "message": format!("{POD}: no good") });
    let nack = json!({ "type_url": ADDRESS, "response_nonce": first["nonce"], "error_detail": error });
    stream.send("DeltaDiscoveryRequest", &nack);
    control.put(
        "b.yaml",
        &PROXY.replace("ztunnel-1", "another").replace("u-zt", "u-a").replace("10.0.0.9", "10.0.0.8"),
    );
    let second = answer(&mut stream, ADDRESS).await;
    assert_eq!(names(&second), ["Kubernetes//Pod/ambit-system/another"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_node_proxies_see_the_mesh() {
    let control = Control::start(&[("a.yaml", OBJECTS)]);
    let mut stream = control.call(DISCOVERY, ("shop", "web"), None).await;
    assert_eq!(stream.status().await, "7", "PERMISSION_DENIED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_is_leaf_first_and_root_last() {
    let control = Control::start(&[("a.yaml", OBJECTS), ("z.yaml", PROXY)]);
    let csr = csr();
    let identity = json!({ "string_value": "spiffe://cluster.local/ns/shop/sa/web" });
    let request = json!({
        "csr": csr, "validity_duration": 3600, "metadata": { "fields": { "ImpersonatedIdentity": identity } },
    });
    let message = Some(("IstioCertificateRequest", &request));
    let mut stream = control.call(CERTIFICATES, ("ambit-system", "ztunnel"), message).await;
    let response = stream.receive("IstioCertificateResponse").await.expect("a certificate");
    let chain = response["cert_chain"].as_array().unwrap();
    assert!(chain.len() >= 2, "{response}");
    assert!(chain.iter().all(|it| it.as_str().unwrap().matches("BEGIN CERTIFICATE").count() == 1));
    let root = std::fs::read_to_string(control.directory.path().join("root.pem")).unwrap();
    assert!(root.contains(chain.last().unwrap().as_str().unwrap().trim()), "the root is last");
    let der = rustls::pki_types::CertificateDer::from(pem_body(chain[0].as_str().unwrap()));
    let text = String::from_utf8_lossy(&der).into_owned();
    assert!(text.contains("spiffe://cluster.local/ns/shop/sa/web") && !text.contains("/sa/lie"));
}

/// A request with a P-256 key and an empty subject. Its URI SAN is a lie: the one that is signed comes from who asks.
pub(crate) fn csr() -> String {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    let lie = rcgen::SanType::URI("spiffe://cluster.local/ns/shop/sa/lie".try_into().unwrap());
    parameters.subject_alt_names.push(lie);
    parameters.serialize_request(&key).unwrap().pem().unwrap()
}

/// Workloads that are no pods.
const OTHER_WORKLOADS: &str = r#"
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: vm, namespace: shop, creationTimestamp: "2026-01-01T00:00:00Z"}
spec: {address: 10.0.1.1, labels: {app: vm}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: outside, namespace: shop}
spec:
  hosts: [outside.example.com]
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP}]
  endpoints: [{address: 10.0.1.2}]
---
apiVersion: v1
kind: Service
metadata: {name: bare, namespace: shop}
spec: {clusterIP: 10.96.0.8, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: bare-1, namespace: shop, labels: {kubernetes.io/service-name: bare}}
addressType: IPv4
ports: [{name: http, port: 9000}]
endpoints: [{addresses: [10.0.1.3]}]
"#;

#[tokio::test(flavor = "multi_thread")]
async fn uids_are_those_that_peers_compare() {
    let control = Control::start(&[("a.yaml", OBJECTS), ("o.yaml", OTHER_WORKLOADS)]);
    let mut stream = control.discover().await;
    ask(&mut stream, ADDRESS, &json!({}));
    let addresses = answer(&mut stream, ADDRESS).await;
    for uid in [
        POD,
        "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm",
        "Kubernetes/networking.istio.io/ServiceEntry/shop/outside/10.0.1.2",
        "Kubernetes/discovery.k8s.io/EndpointSlice/shop/bare-1/10.0.1.3",
    ] {
        let all = addresses["resources"].as_array().unwrap();
        let found = all.iter().find(|it| it["name"] == uid).unwrap_or_else(|| panic!("no {uid}"));
        let workload = body("Address", found)["workload"].take();
        assert_eq!(workload["uid"], uid);
        let is_slice = uid.contains("EndpointSlice");
        assert_eq!(workload["network_mode"] == "HOST_NETWORK", is_slice, "{workload}");
        if is_slice {
            assert!(
                workload["service_account"].is_null() && workload["tunnel_protocol"].is_null(),
                "{workload}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_opening_state_is_cut_only_for_who_announces_it() {
    let many = many_pods();
    let control = Control::start(&[("a.yaml", OBJECTS), ("many.yaml", &many)]);
    let mut stream = control.discover().await;
    let mut announcing = node();
    announcing["metadata"]["fields"]["AMBIT_PARTIAL_STATE"] = json!({ "string_value": "true" });
    ask(&mut stream, ADDRESS, &json!({ "node": announcing }));
    let (mut parts, mut total) = (0, 0);
    loop {
        let part = answer(&mut stream, ADDRESS).await;
        (parts, total) = (parts + 1, total + names(&part).len());
        if !part["system_version_info"].as_str().unwrap().ends_with('+') {
            break;
        }
    }
    assert!(parts > 1 && total >= 1_502, "{total} resources in {parts} parts");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_discovery_stream_needs_credentials() {
    let control = Control::start(&[("a.yaml", OBJECTS)]);
    let target = (&*control.roots(), "istiod.istio-system.svc");
    let mut stream = call(control.address(), target, DISCOVERY, &[], None).await;
    assert_eq!(stream.status().await, "16", "UNAUTHENTICATED");
}

pub(crate) fn pem_body(pem: &str) -> Vec<u8> {
    use rustls::pki_types::pem::PemObject;
    rustls::pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}
