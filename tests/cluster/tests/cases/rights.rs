//! Least rights: by the API server's audit log, every right that the chart gives was used by one of the cases before or by this
//! one, and none was missing. It runs after every other case of the mesh.

use std::collections::BTreeSet;
use std::time::Duration;

use ambit_cluster::{Cluster, mesh, wait};
use serde_json::Value;

use super::{Cases, Outcome, Stage};

/// How soon the rights that the objects of this case need are used: some are looked at once a minute.
const SOON: Duration = Duration::from_secs(240);
/// The namespace of this case.
const NAMESPACE: &str = "rights";
/// Kinds of RBAC.
const KINDS: &str = "clusterrolebindings,rolebindings,clusterroles,roles";

pub(crate) fn add(cases: &mut Cases) {
    cases.add_to(Stage::Review, "every_right_is_used_and_none_is_missing", least_rights);
}

/// A right: whose, to what, how. `name` is empty where any name will do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    account: String,
    group: String,
    /// With the subresource, as `services/status`.
    resource: String,
    verb: String,
    name: String,
}

impl Right {
    /// As `control: patch services/status`, with group and name where there are any.
    fn text(&self) -> String {
        let Self { account, group, resource, verb, name } = self;
        let dot = if group.is_empty() { "" } else { "." };
        let space = if name.is_empty() { "" } else { " " };
        format!("{account}: {verb} {resource}{dot}{group}{space}{name}")
    }

    /// Whether this right is what was used.
    fn covers(&self, used: &Right) -> bool {
        (&self.account, &self.group, &self.resource, &self.verb)
            == (&used.account, &used.group, &used.resource, &used.verb)
            && (self.name.is_empty() || self.name == used.name)
    }
}

async fn least_rights(cluster: &Cluster) -> Outcome {
    exercise(cluster).await?;
    let given = given(cluster).await?;
    assert!(given.len() > 20, "{given:?}");
    let of_ztunnel: Vec<_> = given.iter().filter(|right| right.account == "ztunnel").collect();
    assert!(of_ztunnel.is_empty(), "the node proxy talks to the API server: {of_ztunnel:?}");
    let outcome = wait::until("every right is used", SOON, async || {
        let (used, _) = read_log(cluster).map_err(|error| error.to_string())?;
        let unused: Vec<String> = unused(&given, &used).iter().map(Right::text).collect();
        if unused.is_empty() { Ok(()) } else { Err(format!("{unused:#?}")) }
    })
    .await;
    let (_, refused) = read_log(cluster)?;
    // The API server may learn of a role a moment after the program that has it started.
    let missing = refused.iter().filter(|refused| !given.iter().any(|right| right.covers(refused)));
    let missing: BTreeSet<String> = missing.map(Right::text).collect();
    assert!(missing.is_empty(), "refused: {missing:#?}");
    outcome?;
    let kubectl = cluster.kubectl();
    kubectl.run(&["delete", "customresourcedefinition", "xmeshes.gateway.networking.x-k8s.io"]).await?;
    kubectl.run(&["delete", "namespace", NAMESPACE, "--wait"]).await?;
    Ok(())
}

/// What no other case does.
async fn exercise(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    kubectl.apply(OBJECTS).await?;
    kubectl.apply(XMESH).await?;
    kubectl.apply(INGRESS).await?;
    // It is reached at the Gateway that was made for its class, which goes with the class.
    let reached = |object: &Value| object["status"]["loadBalancer"]["ingress"][0]["ip"].is_string();
    kubectl.wait_for(SOON, &["ingress", "rights", "--namespace", NAMESPACE], reached).await?;
    kubectl.run(&["delete", "ingressclass", "rights", "--wait"]).await?;
    let is_gone = |list: &Value| {
        let mut gateways = list["items"].as_array().into_iter().flatten();
        gateways.all(|gateway| gateway["metadata"]["name"] != "rights-ingress")
    };
    kubectl.wait_for(SOON, &["gateways", "--namespace", mesh::NAMESPACE], is_gone).await?;
    kubectl.run(&["taint", "node", "n1", "ambit.dev/not-ready=:NoSchedule"]).await?;
    // The control plane has the keys in memory and writes them back.
    kubectl.run(&["delete", "secret", "istio-ca-secret", "--namespace", mesh::NAMESPACE]).await?;
    let exists = |object: &Value| object["metadata"]["uid"].is_string();
    kubectl.wait_for(SOON, &["secret", "istio-ca-secret", "--namespace", mesh::NAMESPACE], exists).await?;
    // A waypoint that is scaled and no longer is.
    let scaler = ["horizontalpodautoscaler", "waypoint", "--namespace", NAMESPACE];
    kubectl.wait_for(SOON, &scaler, exists).await?;
    let unscaled = "[{\"op\": \"remove\", \"path\": \"/spec/infrastructure\"}]";
    let patch =
        ["patch", "gateway", "waypoint", "--namespace", NAMESPACE, "--type=json", "--patch", unscaled];
    kubectl.run(&patch).await?;
    // Waypoints that had a budget and no longer do.
    let budget = ["poddisruptionbudget", "waypoint", "--namespace", NAMESPACE];
    kubectl.wait_for(SOON, &budget, exists).await?;
    let settings = [&mesh::SETTINGS[..], &["waypoint.podDisruptionBudget.enabled=false"]].concat();
    mesh::install(cluster, &settings).await?;
    for part in ["horizontalpodautoscalers", "poddisruptionbudgets"] {
        let none = |list: &Value| list["items"].as_array().is_some_and(Vec::is_empty);
        kubectl.wait_for(SOON, &[part, "--namespace", NAMESPACE], none).await?;
    }
    // A Gateway that becomes another controller's.
    let class = "{\"spec\": {\"gatewayClassName\": \"of-another\"}}";
    let patch = ["patch", "gateway", "waypoint", "--namespace", NAMESPACE, "--type=merge", "--patch", class];
    kubectl.run(&patch).await?;
    let none = |list: &Value| list["items"].as_array().is_some_and(Vec::is_empty);
    kubectl.wait_for(SOON, &["deployments", "--namespace", NAMESPACE], none).await?;
    Ok(())
}

/// The rights of the chart's service accounts, one for each verb and resource.
async fn given(cluster: &Cluster) -> Result<BTreeSet<Right>, Box<dyn std::error::Error>> {
    let objects = cluster.kubectl().list(&[KINDS, "--all-namespaces"]).await?;
    let role = |binding: &Value| {
        let kind_and_name = (&binding["roleRef"]["kind"], &binding["roleRef"]["name"]);
        let is_it = |role: &&Value| {
            (&role["kind"], &role["metadata"]["name"]) == kind_and_name
                && (role["kind"] == "ClusterRole"
                    || role["metadata"]["namespace"] == binding["metadata"]["namespace"])
        };
        objects.iter().find(is_it).cloned().unwrap_or_default()
    };
    let mut rights = BTreeSet::new();
    for binding in &objects {
        let subjects = binding["subjects"].as_array().into_iter().flatten();
        for subject in subjects.filter(|subject| subject["namespace"] == mesh::NAMESPACE) {
            let account = subject["name"].as_str().unwrap_or_default();
            rights.extend(rights_of(account, &role(binding)));
        }
    }
    Ok(rights)
}

fn rights_of(account: &str, role: &Value) -> Vec<Right> {
    let texts = |value: &Value| -> Vec<String> {
        let texts = value.as_array().into_iter().flatten().filter_map(Value::as_str);
        texts.map(str::to_owned).collect()
    };
    let mut rights = Vec::new();
    for rule in role["rules"].as_array().into_iter().flatten() {
        let names = texts(&rule["resourceNames"]);
        let names = if names.is_empty() { vec![String::new()] } else { names };
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                for verb in texts(&rule["verbs"]) {
                    rights.extend(names.iter().map(|name| Right {
                        account: account.to_owned(),
                        group: group.clone(),
                        resource: resource.clone(),
                        verb: verb.clone(),
                        name: name.clone(),
                    }));
                }
            }
        }
    }
    rights
}

/// What the chart's service accounts did, and what they were refused.
fn read_log(cluster: &Cluster) -> Result<(BTreeSet<Right>, BTreeSet<Right>), Box<dyn std::error::Error>> {
    let log = std::fs::read_to_string(cluster.logs().join("audit.log"))?;
    let (mut used, mut refused) = (BTreeSet::new(), BTreeSet::new());
    // The last line may be half written.
    for event in log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let Some(right) = asked_for(&event) else { continue };
        if event["annotations"]["authorization.k8s.io/decision"] != "allow" {
            refused.insert(right);
            continue;
        }
        used.extend(implied(&right, &event));
        used.insert(right);
    }
    Ok((used, refused))
}

/// The right that a request of one of the chart's service accounts needs.
fn asked_for(event: &Value) -> Option<Right> {
    let prefix = format!("system:serviceaccount:{}:", mesh::NAMESPACE);
    let account = event["user"]["username"].as_str()?.strip_prefix(&prefix)?;
    let object = event["objectRef"].as_object()?;
    let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let resource = match text("subresource").as_str() {
        "" => text("resource"),
        subresource => format!("{}/{subresource}", text("resource")),
    };
    let verb = event["verb"].as_str().unwrap_or_default().to_owned();
    Some(Right { account: account.to_owned(), group: text("apiGroup"), resource, verb, name: text("name") })
}

/// What else a request needed: the API server looks at it while it serves the request, or would have on a server that lacks what
/// this one has.
fn implied(right: &Right, event: &Value) -> Vec<Right> {
    let mut also = Vec::new();
    let with = |verb: &str| Right { verb: verb.to_owned(), ..right.clone() };
    let succeeded = event["responseStatus"]["code"].as_u64().is_some_and(|code| code < 300);
    // Server-side apply of what does not exist.
    if right.verb == "patch" && event["responseStatus"]["code"] == 201 {
        also.push(with("create"));
    }
    // A list by a watch; servers before 1.34 refuse that, and it is listed.
    let uri = event["requestURI"].as_str().unwrap_or_default();
    if right.verb == "watch" && uri.contains("sendInitialEvents=true") {
        also.push(with("list"));
    }
    let signer = match right.resource.as_str() {
        "clustertrustbundles" if right.verb == "patch" => Some("attest"),
        "podcertificaterequests/status" => Some("sign"),
        _ => None,
    };
    if let Some(verb) = signer.filter(|_| succeeded) {
        let (resource, name) = ("signers".to_owned(), "ambit.dev/workload".to_owned());
        also.push(Right { resource, name, ..with(verb) });
    }
    also
}

/// The rights that nobody used.
fn unused(given: &BTreeSet<Right>, used: &BTreeSet<Right>) -> Vec<Right> {
    given.iter().filter(|right| !used.iter().any(|used| right.covers(used))).cloned().collect()
}

/// The experimental kind of Gateway API in which a mesh announces its features, as far as it is needed.
const XMESH: &str = r#"
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: xmeshes.gateway.networking.x-k8s.io}
spec:
  group: gateway.networking.x-k8s.io
  names: {kind: XMesh, listKind: XMeshList, plural: xmeshes, singular: xmesh}
  scope: Cluster
  versions:
  - name: v1alpha1
    served: true
    storage: true
    subresources: {status: {}}
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
"#;

/// Objects whose statuses the control plane writes, and a waypoint with parameters.
/// An Ingress, and a class of the mesh for it.
const INGRESS: &str = "\
apiVersion: networking.k8s.io/v1
kind: IngressClass
metadata: {name: rights, annotations: {networking.istio.io/service-type: ClusterIP}}
spec: {controller: ambit.dev/ingress-controller}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: rights, namespace: rights}
spec: {ingressClassName: rights, defaultBackend: {service: {name: absent, port: {number: 80}}}}
";

const OBJECTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: rights}
---
apiVersion: v1
kind: Service
metadata: {name: bound, namespace: rights, labels: {istio.io/use-waypoint: gone}}
spec: {selector: {app: none}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: secured, namespace: rights, labels: {istio.io/use-waypoint: waypoint}}
spec: {selector: {app: none}, ports: [{port: 80}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: entry, namespace: rights}
spec: {hosts: [entry.example.com], resolution: DNS, ports: [{number: 80, name: http, protocol: HTTP}]}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: machine, namespace: rights, labels: {istio.io/use-waypoint: gone}}
spec: {address: 192.0.2.1}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: bound, namespace: rights}
spec: {hosts: [bound], http: [{route: [{destination: {host: bound}}]}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: bound, namespace: rights}
spec: {host: bound}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: policy, namespace: rights}
spec: {action: ALLOW, rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: unbound, namespace: rights}
spec: {jwtRules: [{issuer: issuer.example, jwks: '{"keys": []}'}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: bound, namespace: rights}
spec:
  parentRefs: [{group: "", kind: Service, name: bound, port: 80}]
  rules: [{backendRefs: [{name: bound, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: bound, namespace: rights}
spec:
  parentRefs: [{group: "", kind: Service, name: bound, port: 80}]
  rules: [{backendRefs: [{name: bound, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {name: secured, namespace: rights}
spec:
  targetRefs: [{group: "", kind: Service, name: secured}]
  validation: {hostname: bound.example, wellKnownCACertificates: System}
---
apiVersion: ambit.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: secured, namespace: rights}
spec:
  targetRefs: [{group: "", kind: Service, name: secured}]
  conditions: [{expression: request.method == 'GET'}]
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: quiet, namespace: rights}
spec:
  accessLogging: [{filter: {expression: response.code >= 400}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: bound, namespace: rights}
spec:
  parentRefs: [{group: "", kind: Service, name: bound, port: 80}]
  rules: [{backendRefs: [{name: bound, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: UDPRoute
metadata: {name: bound, namespace: rights}
spec:
  parentRefs: [{group: "", kind: Service, name: bound, port: 80}]
  rules: [{backendRefs: [{name: bound, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: bound, namespace: rights}
spec:
  hostnames: [bound.example.com]
  parentRefs: [{group: "", kind: Service, name: bound, port: 80}]
  rules: [{backendRefs: [{name: bound, port: 80}]}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: scaled, namespace: rights}
data:
  horizontalPodAutoscaler: |
    spec: {minReplicas: 1, maxReplicas: 2}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: rights, labels: {istio.io/waypoint-for: service}}
spec:
  gatewayClassName: ambit-waypoint
  infrastructure: {parametersRef: {group: "", kind: ConfigMap, name: scaled}}
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
# Nothing is deployed for a Gateway of so long a name.
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: gggggggggggggggggggggggggggggggggggggggggggggggggggggggggggggggg, namespace: rights}
spec: {gatewayClassName: ambit, listeners: [{name: http, port: 80, protocol: HTTP}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: ListenerSet
metadata: {name: added, namespace: rights}
spec:
  parentRef: {name: gggggggggggggggggggggggggggggggggggggggggggggggggggggggggggggggg}
  listeners: [{name: http, port: 81, protocol: HTTP}]
"#;
