//! However objects came, changed and went, the index holds what one built from the survivors holds.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use ambit_control::index::{Changes, Index, PodPlacement, Resource, ResourceChanges, ResourceType, Settings};
use ambit_control::object::{Change, NamespacedName, Object, ObjectRef, TrafficPolicy};
use ambit_control::source;
use proptest::prelude::*;

/// With an authorizer for CUSTOM policies to ask, and a collector.
fn settings() -> Settings {
    let providers = "extensionProviders: [{name: asked, envoyExtAuthzGrpc: {service: s1.a.svc.cluster.local, port: 80}},\
         {name: otel, opentelemetry: {service: s2.a.svc.cluster.local, port: 80}}]";
    let mesh = ambit_control::mesh_config::parse(providers).unwrap();
    Settings { authorizers: mesh.authorizers, telemetry: mesh.telemetry, ..Settings::default() }
}

/// Every combination of one of each alternatives, put into a template at `$0`, `$1`, ….
fn combine(template: &str, alternatives: &[&[&str]]) -> Vec<String> {
    let mut texts = vec![template.to_owned()];
    for (i, alternatives) in alternatives.iter().enumerate() {
        let place = format!("${i}");
        texts = texts
            .iter()
            .flat_map(|text| alternatives.iter().map(|a| text.replace(&place, a)).collect::<Vec<_>>())
            .collect();
    }
    texts
}

/// Variants of few objects, so that random choices meet often.
static OBJECTS: LazyLock<Vec<Object>> = LazyLock::new(|| {
    let mut texts = Vec::new();
    texts.extend(combine(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: $0, labels: {team: $1, $2}, annotations: {networking.istio.io/traffic-distribution: $3}}",
        &[&["a", "b"], &["x", "y"], &["other: v", "istio.io/use-waypoint: w", "'istio.io/use-waypoint': w, 'istio.io/use-waypoint-namespace': b", "topology.istio.io/network: n2"], &["Any", "PreferClose"]],
    ));
    texts.extend(combine(
        "apiVersion: v1\nkind: Node\nmetadata: {name: n, labels: {topology.kubernetes.io/zone: $0}}\nstatus: {addresses: [{type: InternalIP, address: $1}]}",
        &[&["z1", "z2"], &["10.0.0.9", "10.9.9.9"]],
    ));
    texts.extend(combine(
        "apiVersion: apps/v1\nkind: ReplicaSet\nmetadata: {name: rs, namespace: a, ownerReferences: [{apiVersion: apps/v1, kind: $0, name: d, uid: u}]}\nspec: {selector: {}}",
        &[&["Deployment", "Rollout"]],
    ));
    texts.extend(combine(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: $0, namespace: $1, labels: {app: $2, $3}, ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: rs, uid: r}]}\n\
         spec: {nodeName: n, containers: [{name: c, ports: [{name: web, containerPort: 8080}]}]}\nstatus: {podIP: $4}",
        &[&["p1", "p2"], &["a", "b"], &["x", "y"], &["tier: t", "istio.io/use-waypoint: w", "gateway.networking.k8s.io/gateway-name: w", "topology.istio.io/network: n2"], &["10.0.0.1", "10.0.0.2"]],
    ));
    texts.extend(combine(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p1, namespace: a, labels: {app: x}}\nspec: {nodeName: n, containers: [], hostNetwork: $0}\nstatus: {phase: $1, podIP: 10.0.0.1}",
        &[&["true", "false"], &["Running", "Failed"]],
    ));
    texts.extend(combine(
        "apiVersion: v1\nkind: Service\nmetadata: {name: $0, namespace: a}\nspec: {$1, $2, ports: [{name: http, port: $3, targetPort: web}]}",
        &[&["s1", "s2"], &["clusterIP: 10.96.0.1", "clusterIP: 10.0.0.9", "type: ExternalName", "publishNotReadyAddresses: true"], &["selector: {app: x}", "selector: {app: y, tier: t}", "sessionAffinity: None"], &["80", "81"]],
    ));
    texts.extend(combine(
        "apiVersion: v1\nkind: Service\nmetadata: {name: s1, namespace: a, labels: {$0}, annotations: {ambit.dev/require-waypoint: $1}}\n\
         spec: {clusterIP: 10.96.0.1, selector: {app: x}, ports: [{name: http, port: 80, targetPort: web}]}",
        &[&["other: v", "istio.io/use-waypoint: w", "istio.io/use-waypoint: none", "gateway.networking.k8s.io/gateway-name: w"], &["'true'", "'false'"]],
    ));
    texts.extend(combine(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: {istio.io/use-waypoint: w}, annotations: {ambit.dev/require-waypoint: $0}}",
        &[&["'true'", "'false'"]],
    ));
    texts.extend(combine(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p2, namespace: a, labels: {gateway.networking.k8s.io/gateway-name: w}}\n\
         spec: {nodeName: n, serviceAccountName: $0, containers: []}\nstatus: {podIP: 10.0.0.2}",
        &[&["w", "v"]],
    ));
    texts.extend(combine(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: $0, namespace: a, labels: {kubernetes.io/service-name: $1}}\naddressType: IPv4\n\
         ports: [{name: http, port: 9000}]\nendpoints: [{addresses: [$2]$3}]",
        &[&["e1", "e2"], &["s1", "s2"], &["10.0.0.1", "10.0.0.9", "10.96.0.1"], &["", ", targetRef: {kind: Pod, name: p1}", ", targetRef: {kind: Pod, name: p2}", ", nodeName: n"]],
    ));
    texts.extend(combine(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: $0\nmetadata: {name: r, namespace: $1}\n\
         spec: {parentRefs: [{group: $2, kind: $3, name: $4, namespace: a}], rules: [{backendRefs: [{name: $5, namespace: a, port: 80}]}]}",
        &[&["HTTPRoute", "GRPCRoute", "TCPRoute", "TLSRoute", "UDPRoute"], &["a", "b"], &["''", "networking.istio.io"], &["Service", "ServiceEntry"], &["s1", "se1"], &["s1", "s2"]],
    ));
    texts.extend(combine(
        "apiVersion: ambit.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: $0, namespace: a}\n\
         spec: {targetRefs: [{group: $1, sectionName: $2}], conditions: [{expression: $3}]}",
        &[
            &["t1", "t2"],
            &[
                "'', kind: Service, name: s1",
                "networking.istio.io, kind: ServiceEntry, name: se1",
                "gateway.networking.k8s.io, kind: HTTPRoute, name: r",
                "gateway.networking.k8s.io, kind: Gateway, name: w",
            ],
            &["''", "http"],
            &["'true'", "'false'"],
        ],
    ));
    texts.extend(combine(
        "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {name: $0, namespace: $1, $2}\nspec: {$3 tracing: [{providers: [{name: $4}]}]}",
        &[
            &["t1", "t2"],
            &["a", "b", "ambit-system"],
            &["labels: {a: b}", "creationTimestamp: '2026-01-01T00:00:00Z'"],
            &[
                "",
                "targetRefs: [{kind: Service, name: s1}],",
                "targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: se1}],",
                "targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: w}],",
                "targetRefs: [{group: gateway.networking.k8s.io, kind: GatewayClass, name: ambit-waypoint}],",
                "selector: {matchLabels: {app: x}},",
            ],
            &["otel", "none"],
        ],
    ));
    texts.extend(combine(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: ReferenceGrant\nmetadata: {name: g, namespace: a}\n\
         spec: {from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: b}], to: [{group: '', kind: Service$0}]}",
        &[&["", ", name: s1"]],
    ));
    texts.extend(combine(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: BackendTLSPolicy\nmetadata: {name: $0, namespace: a}\n\
         spec: {targetRefs: [{group: $1, kind: $2, name: $3}], validation: {hostname: x, caCertificateRefs: [{group: '', kind: ConfigMap, name: c}, {group: certificates.k8s.io, kind: ClusterTrustBundle, name: c}]}}",
        &[&["t1", "t2"], &["''", "networking.istio.io"], &["Service", "ServiceEntry"], &["s1", "se1"]],
    ));
    texts.extend(combine(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c, namespace: a}\ndata: {$0: text}",
        &[&["ca.crt", "other"]],
    ));
    texts.extend(combine(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: $0, namespace: $1, $2}\n\
         spec: {$3, http: [{match: [{sourceLabels: {app: x}}], route: [{destination: {host: $4}}]}, {delegate: {name: v3, namespace: a}}]}",
        &[
            &["v1", "v2"],
            &["a", "b"],
            &["labels: {a: b}", "creationTimestamp: '2026-01-01T00:00:00Z'"],
            &["hosts: [s1.a]", "hosts: ['*.a.svc.cluster.local']", "hosts: [h.example], exportTo: ['.']"],
            &["s2.a.svc.cluster.local", "h.example"],
        ],
    ));
    texts.extend(combine(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: v3, namespace: a}\n\
         spec: {exportTo: [$0], http: [{route: [{destination: {host: $1}}]}]}",
        &[&["'*'", "'.'"], &["s1", "s2"]],
    ));
    texts.extend(combine(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: $0, namespace: $1}\n\
         spec: {$2, jwtRules: [{issuer: 'https://i', $3}]}",
        &[
            &["r1", "r2"],
            &["a", "b", "ambit-system"],
            &[
                "targetRefs: [{kind: Service, name: s1}]",
                "targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: w}]",
                "selector: {matchLabels: {app: x}}",
            ],
            &["jwksUri: 'http://keys'", "audiences: [x]"],
        ],
    ));
    texts.extend(combine(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: $0, namespace: $1}\n\
         spec: {host: $2, subsets: [{name: v, labels: {$3: x}}]$4}",
        &[
            &["d1", "d2"],
            &["a", "b", "ambit-system"],
            &["s1", "s1.a.svc.cluster.local", "h.example", "'*.local'"],
            &["app", "tier"],
            &["", ", exportTo: ['.']", ", workloadSelector: {}"],
        ],
    ));
    texts.extend(combine(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: z, namespace: $0}\nspec: {action: $1, $2, rules: [{to: [{operation: {$3}}]}]}",
        &[&["a", "ambit-system"], &["ALLOW", "DENY", "CUSTOM, provider: {name: asked}"], &["selector: {matchLabels: {app: x}}", "selector: {matchLabels: {tier: t, app: y}}", "targetRefs: [{kind: Service, name: s1}]", "selector: {}"], &["ports: ['80']", "methods: [GET]"]],
    ));
    texts.extend(combine(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: $0, namespace: $1}\nspec: {mtls: {mode: $2}$3}",
        &[&["pa1", "pa2"], &["a", "ambit-system"], &["STRICT", "PERMISSIVE", "UNSET"], &["", ", selector: {matchLabels: {app: x}}", ", selector: {matchLabels: {app: x}}, portLevelMtls: {80: {mode: PERMISSIVE}, 81: {mode: STRICT}}"]],
    ));
    texts.extend(combine(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: $0, namespace: $1, $5}\nspec: {hosts: [$2], resolution: $3, ports: [{number: 80, name: web, protocol: HTTP}], $4}",
        &[
            &["se1", "se2"],
            &["a", "b"],
            &["h.example", "s1.a.svc.cluster.local"],
            &["STATIC", "DNS"],
            &[
                "workloadSelector: {labels: {app: x}}",
                "endpoints: [{address: 10.0.0.9, labels: {app: x}}, {address: 10.0.0.1}]",
                "exportTo: ['.'], addresses: [10.0.0.2, 240.0.0.1]",
                "exportTo: ['~']",
                "addresses: [10.0.0.1, 240.0.0.1, 10.96.0.1, 10.0.0.0/24]",
            ],
            &["labels: {a: b}", "creationTimestamp: '2026-01-01T00:00:00Z'"],
        ],
    ));
    texts.extend(combine(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {name: w1, namespace: $3, labels: {app: $0}, $4}\nspec: {address: $1, network: $2}",
        &[
            &["x", "y"],
            &["10.0.0.8", "10.0.0.1", "10.0.0.9", "10.9.9.9", "240.0.0.1", "host.example"],
            &["''", "n2", "n3"],
            &["a", "b"],
            &["annotations: {}", "creationTimestamp: '2026-02-01T00:00:00Z'"],
        ],
    ));
    texts.extend(combine(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: w, namespace: $0, labels: {istio.io/waypoint-for: $1, $2}}\n\
         spec: {gatewayClassName: $3, addresses: [{value: 10.9.9.9}], listeners: [{port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: $4, selector: {matchLabels: {team: x}}}}}]}\n\
         status: {addresses: [$5]}",
        &[&["a", "b"], &["all", "service"], &["l: v", "topology.istio.io/network: n2"], &["ambit-waypoint", "ambit-remote", "other"], &["Same", "All", "Selector"], &["", "{value: 10.9.0.1}"]],
    ));
    texts.extend(combine(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: $0, namespace: ambit-system}\n\
         spec: {gatewayClassName: ambit, listeners: [{name: http, port: 80, protocol: HTTP, hostname: $1}]}\n\
         status: {addresses: [$2]}",
        &[&["ambit-ingress", "g"], &["''", "'*.b'"], &["", "{value: 10.9.0.2}"]],
    ));
    texts.extend(combine(
        "apiVersion: networking.k8s.io/v1\nkind: IngressClass\nmetadata: {name: $0, annotations: {ingressclass.kubernetes.io/is-default-class: '$1'}}\n\
         spec: {controller: $2}",
        &[
            &["ambit", "c"],
            &["true", "false"],
            &[
                "ambit.dev/ingress-controller",
                "other",
                "ambit.dev/ingress-controller, parameters: {apiGroup: gateway.networking.k8s.io, kind: Gateway, namespace: ambit-system, name: g}",
            ],
        ],
    ));
    texts.extend(combine(
        "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {name: $0, namespace: $1, $2}\n\
         spec: {$3 tls: [$4], rules: [{host: $5, http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: s1, port: {number: 80}}}}]}}]}",
        &[
            &["i1", "i2"],
            &["a", "b"],
            &["annotations: {}", "creationTimestamp: '2026-02-01T00:00:00Z'"],
            &["", "ingressClassName: ambit,", "ingressClassName: c,"],
            &["", "{hosts: [a.b], secretName: cert}", "{secretName: cert}"],
            &["a.b", "'*.b'", "''"],
        ],
    ));
    texts.extend(combine(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: $0\nmetadata: {name: w, namespace: $1}\n\
         spec: {gatewayClassName: ambit, parentRef: {name: w}, allowedListeners: {namespaces: {from: Same}}, \
         listeners: [{name: http, port: 80, protocol: HTTP, filters: {requests: [{type: ExternalAuth, \
         externalAuth: {protocol: GRPC, backendRef: {name: $2, namespace: a, port: 80}}}]}}]}",
        &[&["Gateway", "ListenerSet"], &["a", "b"], &["s1", "s2"]],
    ));
    texts.extend(combine(
        "apiVersion: certificates.k8s.io/v1\nkind: ClusterTrustBundle\nmetadata: {name: c}\nspec: {trustBundle: $0}",
        &[&["one", "two"]],
    ));
    let readable = texts.iter().map(|text| parse(text)).chain(certificates());
    readable.chain([lost_policy("a"), lost_policy("ambit-system")]).collect()
});

/// Secrets with a certificate, in the namespaces of the others.
fn certificates() -> Vec<Object> {
    let case = include_str!("translation/cases/l7-ingress/objects.yaml");
    let secret = case.split("---\n").find(|text| text.contains("kind: Secret")).unwrap();
    ["a", "b"]
        .map(|namespace| parse(&secret.replace("namespace: shop", &format!("namespace: {namespace}"))))
        .into()
}

/// A TrafficPolicy of which nobody knows what it is for.
fn lost_policy(namespace: &str) -> Object {
    let manifest = serde_json::json!({ "metadata": { "name": "t1", "namespace": namespace }, "spec": {} });
    Object::TrafficPolicy(Arc::new(TrafficPolicy::unreadable(&manifest, "it has no targets").unwrap()))
}

fn parse(text: &str) -> Object {
    let (mut objects, problems) = source::parse(Path::new("pool.yaml"), text);
    assert!(problems.is_empty() && objects.len() == 1, "{problems:?} in\n{text}");
    objects.remove(0)
}

fn a_change() -> impl Strategy<Value = Change> {
    let object = any::<prop::sample::Index>().prop_map(|index| index.get(&OBJECTS).clone());
    (object, prop::bool::weighted(0.25)).prop_map(|(object, deletes)| match deletes {
        true => Change::Delete(object.reference()),
        false => Change::Apply(object),
    })
}

type Resources = BTreeMap<(ResourceType, Arc<str>), Resource>;

/// What somebody holds who only ever heard of changes.
#[derive(Default)]
struct Follower {
    resources: Resources,
    placements: BTreeMap<NamespacedName, PodPlacement>,
}

impl Follower {
    fn follow(&mut self, changes: Changes) {
        self.take(ResourceType::Authorization, changes.policies);
        self.take(ResourceType::Address, changes.addresses);
        self.take(ResourceType::Gateway, changes.gateways);
        self.take(ResourceType::Listener, changes.listeners);
        self.take(ResourceType::KeyPair, changes.key_pairs);
        self.take(ResourceType::Policy, changes.waypoint_policies);
        self.take(ResourceType::BackendPolicy, changes.backend_policies);
        self.take(ResourceType::Route, changes.routes);
        self.take(ResourceType::StreamRoute, changes.stream_routes);
        for (pod, placement) in changes.placements {
            match placement {
                Some(placement) => self.placements.insert(pod, placement),
                None => self.placements.remove(&pod),
            };
        }
    }

    fn take(&mut self, kind: ResourceType, changes: ResourceChanges) {
        for name in changes.removals {
            assert!(
                self.resources.remove(&(kind, name.clone())).is_some(),
                "{name} was removed but never there"
            );
        }
        for resource in changes.upserts {
            let before = self.resources.insert((kind, resource.name.clone()), resource.clone());
            assert_ne!(before.as_ref(), Some(&resource), "a change that changes nothing");
        }
    }
}

fn from_scratch(objects: &BTreeMap<ObjectRef, Object>) -> (Index, Follower) {
    let mut index = Index::new(settings());
    let mut follower = Follower::default();
    follower.follow(index.apply(objects.values().cloned().map(Change::Apply)));
    (index, follower)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn an_index_after_any_edits_equals_one_built_from_what_is_left(
        batches in prop::collection::vec(prop::collection::vec(a_change(), 1..5), 1..24),
    ) {
        let mut index = Index::new(settings());
        let mut follower = Follower::default();
        let mut objects = BTreeMap::new();
        for batch in batches {
            for change in &batch {
                match change {
                    Change::Apply(object) => objects.insert(object.reference(), object.clone()),
                    Change::Delete(reference) => objects.remove(reference),
                };
            }
            follower.follow(index.apply(batch));
        }
        let (scratch, fresh) = from_scratch(&objects);
        prop_assert_eq!(index.resources(), scratch.resources());
        prop_assert_eq!(index.findings(), scratch.findings());
        prop_assert_eq!(&follower.resources, &index.resources());
        prop_assert_eq!(&follower.placements, &fresh.placements);
    }
}

#[test]
fn the_variants_cover_every_kind_that_has_an_effect() {
    let kinds: std::collections::BTreeSet<_> = OBJECTS.iter().map(Object::kind).collect();
    assert_eq!(kinds.len(), 29, "{kinds:?}");
    let (index, _) = from_scratch(&OBJECTS.iter().map(|o| (o.reference(), o.clone())).collect());
    assert!(index.resources().len() > 10);
}
