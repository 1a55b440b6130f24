//! Each misconfiguration and what is said about it.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::facts::{AgentReport, Cni, Facts};
use super::probe::{NodeProbe, Report};
use super::*;
use crate::cluster::PodName;
use crate::output::Palette;

fn object<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap_or_else(|error| panic!("an object of the API: {error}"))
}

fn node(kubelet: &str, kernel: &str) -> Value {
    let info = json!({
        "operatingSystem": "linux", "kernelVersion": kernel, "kubeletVersion": kubelet, "architecture": "amd64",
        "bootID": "", "containerRuntimeVersion": "", "kubeProxyVersion": "", "machineID": "", "osImage": "",
        "systemUUID": "",
    });
    json!({ "metadata": { "name": "n1" }, "status": { "nodeInfo": info } })
}

/// A cluster without Ambit, in which nothing is wrong.
fn cluster() -> Facts {
    Facts {
        system: "ambit-system".into(),
        version: (1, 34),
        nodes: vec![object(node("v1.34.0", "6.8.0-45-generic"))],
        namespaces: enrolment([("shop", json!({ "istio.io/dataplane-mode": "ambient" }))]),
        pods: vec![object(
            json!({ "metadata": { "namespace": "shop", "name": "web", "labels": { "app": "web" } } }),
        )],
        now: 1_000_000,
        ..Facts::default()
    }
}

fn enrolment<const N: usize>(namespaces: [(&str, Value); N]) -> crate::enrolment::Namespaces {
    let object = |(name, labels)| object(json!({ "metadata": { "name": name, "labels": labels } }));
    crate::enrolment::by_name(namespaces.into_iter().map(object).collect())
}

fn labels(component: &str) -> Value {
    json!({
        "app.kubernetes.io/name": component, "app.kubernetes.io/part-of": "ambit",
        "app.kubernetes.io/version": env!("CARGO_PKG_VERSION"),
    })
}

/// A DaemonSet of the chart, with one pod that is ready.
fn daemon_set(name: &str) -> Value {
    json!({
        "metadata": { "namespace": "ambit-system", "name": name, "labels": labels(name) },
        "spec": { "selector": {}, "template": { "spec": { "containers": [], "volumes": [
            { "name": "cni-bin", "hostPath": { "path": "/opt/cni/bin" } },
            { "name": "cni-conf", "hostPath": { "path": "/etc/cni/net.d" } },
        ] } } },
        "status": { "desiredNumberScheduled": 1, "numberReady": 1, "currentNumberScheduled": 1, "numberMisscheduled": 0 },
    })
}

fn pod(component: &str) -> Value {
    json!({
        "metadata": { "namespace": "ambit-system", "name": format!("{component}-x"), "labels": labels(component) },
        "spec": { "nodeName": "n1", "containers": [] },
        "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] },
    })
}

/// The same cluster with Ambit, in which nothing is wrong either.
fn installed() -> Facts {
    let report = AgentReport { cni: Cni { installed: true, problem: None }, ..AgentReport::default() };
    let mut report = report;
    report.health.proxies = 1;
    let agent = PodName { namespace: "ambit-system".into(), name: "ambit-node-x".into() };
    let definitions = [
        "trafficpolicies.ambit.dev",
        "gateways.gateway.networking.k8s.io",
        "gatewayclasses.gateway.networking.k8s.io",
        "httproutes.gateway.networking.k8s.io",
        "authorizationpolicies.security.istio.io",
        "peerauthentications.security.istio.io",
        "serviceentries.networking.istio.io",
        "workloadentries.networking.istio.io",
    ];
    let names = ["ambit-control", "ambit-node", "ztunnel"];
    let mut facts = cluster();
    facts.namespaces = enrolment([("shop", json!({})), ("ambit-system", json!({}))]);
    facts.daemon_sets = vec![object(daemon_set("ambit-node")), object(daemon_set("ztunnel"))];
    facts.deployments = vec![object(json!({
        "metadata": { "namespace": "ambit-system", "name": "ambit-control", "labels": labels("ambit-control") },
        "spec": { "replicas": 2, "selector": {}, "template": {} }, "status": { "readyReplicas": 2 },
    }))];
    facts.pods.extend(names.map(|name| object(pod(name))));
    facts.definitions = definitions.map(|name| (name.to_owned(), Default::default())).into();
    facts.lease = Some(object(json!({
        "metadata": { "name": "ambit-control" },
        "spec": { "holderIdentity": "ambit-control-x", "renewTime": "1970-01-12T13:46:35.000000Z" },
    })));
    facts.roots = ["shop", "ambit-system"].map(|name| (name.to_owned(), "PEM".to_owned())).into();
    facts.agents = [(agent, Ok(report))].into();
    facts
}

/// What is said, without what is well.
fn said(facts: &Facts) -> String {
    let wrong: Vec<Section> = sections(facts).into_iter().filter(|s| !s.findings.is_empty()).collect();
    render(&wrong, Palette::new(false))
}

#[test]
fn a_good_cluster_is_ready_and_a_good_mesh_is_well() {
    for (facts, count) in [(cluster(), BEFORE.len()), (installed(), BEFORE.len() + AFTER.len())] {
        assert_eq!(said(&facts), "");
        assert_eq!(sections(&facts).len(), count);
    }
    assert_eq!(summary(&[], true), "Ambit is installed and well.");
}

#[test]
fn a_cluster_that_cannot_have_ambit_is_explained() {
    let mut facts = cluster();
    facts.version = (1, 31);
    facts.nodes = vec![object(node("v1.31.0", "5.4.0-150-generic"))];
    facts
        .namespaces
        .extend(enrolment([("ambit-system", json!({ "pod-security.kubernetes.io/enforce": "baseline" }))]));
    facts.cilium = Some([("kube-proxy-replacement".to_owned(), "true".to_owned())].into());
    insta::assert_snapshot!(said(&facts));
}

#[test]
fn a_policy_that_blocks_15008_is_an_error_for_pods_in_the_mesh() {
    let mut facts = cluster();
    let policy = |namespace: &str| {
        object(json!({
            "metadata": { "namespace": namespace, "name": "web-only" },
            "spec": { "podSelector": { "matchLabels": { "app": "web" } }, "ingress": [{ "ports": [{ "port": 8080 }] }] },
        }))
    };
    facts.network_policies = vec![policy("shop"), policy("plain"), policy("kube-system")];
    insta::assert_snapshot!(said(&facts));
}

#[test]
fn an_installation_for_another_platform_is_explained() {
    let mut facts = installed();
    facts.nodes = vec![object(node("v1.34.1+k3s1", "6.1.0"))];
    let report = AgentReport {
        cni: Cni { installed: false, problem: Some("no network configuration in /host/cni/net.d".into()) },
        ..AgentReport::default()
    };
    facts.agents = facts.agents.into_keys().map(|pod| (pod, Ok(report.clone()))).collect();
    insta::assert_snapshot!(said(&facts));
}

#[test]
fn nodes_that_lack_something_are_explained_by_their_probes() {
    let mut facts = cluster();
    let report = |value: Value| object::<Report>(value);
    let well = json!({ "weaknesses": [], "cniProblems": [] });
    let read_only = json!({
        "missing": "write /proc/sys/net/ipv4/conf/all/route_localnet: Read-only file system",
        "guarantee": "connections of the pod to itself are captured",
        "remedy": "CAP_SYS_ADMIN and no AppArmor profile, so that the agent can make its /proc/sys writable",
    });
    let no_nftables = json!({
        "missing": "write rules: Operation not supported", "guarantee": "pods can be enrolled",
        "remedy": "CAP_NET_ADMIN and the kernel modules nf_tables, nft_nat, nft_redir, nft_ct and nf_conntrack",
    });
    let unreachable = Some(("n2".to_owned(), "no answer".to_owned()));
    let found = |value: Value| NodeProbe { report: report(value), unreachable: None };
    let probes = [
        ("n1", Ok(NodeProbe { unreachable, ..found(well) })),
        (
            "n2",
            Ok(found(
                json!({ "weaknesses": [read_only], "cniProblems": ["no network configuration in /etc/cni/net.d yet"] }),
            )),
        ),
        ("n3", Ok(found(json!({ "weaknesses": [read_only, no_nftables], "cniProblems": [] })))),
        ("n4", Err("ErrImagePull: not found".to_owned())),
    ];
    facts.probes = Some(probes.map(|(node, found)| (node.to_owned(), found)).into());
    insta::assert_snapshot!(said(&facts));
}

#[test]
fn clocks_that_differ_are_explained() {
    let mut facts = cluster();
    let lease = |name: &str, renewed: &str| {
        object(json!({
            "metadata": { "name": name, "managedFields": [{ "manager": "kubelet", "time": "2026-01-01T12:00:00Z" }] },
            "spec": { "renewTime": renewed },
        }))
    };
    facts.node_leases = vec![
        lease("n1", "2026-01-01T12:00:00.400000Z"),
        lease("n2", "2026-01-01T12:00:30.000000Z"),
        lease("n3", "2026-01-01T11:50:00.000000Z"),
    ];
    insta::assert_snapshot!(said(&facts));
}

#[test]
fn a_mesh_in_trouble_is_explained() {
    let mut facts = installed();
    let mut ztunnel = daemon_set("ztunnel");
    ztunnel["status"]["numberReady"] = json!(0);
    facts.daemon_sets = vec![object(daemon_set("ambit-node")), object(ztunnel)];
    let mut old = pod("ztunnel");
    old["metadata"]["labels"]["app.kubernetes.io/version"] = json!("0.0.9");
    old["status"]["conditions"] = json!([]);
    facts.pods.retain(|pod| pod.metadata.name.as_deref() != Some("ztunnel-x"));
    facts.pods.push(object(old));
    facts.definitions.remove("httproutes.gateway.networking.k8s.io");
    facts.now += 3_600;
    facts.roots.remove("shop");
    let report: AgentReport = object(json!({
        "health": { "proxies": 0, "weaknesses": [{
            "missing": "write /proc/sys/net/ipv4/conf/all/route_localnet: read-only",
            "guarantee": "connections of the pod to itself are captured",
            "remedy": "CAP_SYS_ADMIN and no AppArmor profile",
        }] },
        "cni": { "installed": true, "problem": null },
        "pods": { "u": { "namespace": "shop", "name": "web", "state": "failed", "reason": "no such namespace" } },
    }));
    facts.agents = facts.agents.into_keys().map(|pod| (pod, Ok(report.clone()))).collect();
    facts.unread.push(("networkpolicies", "forbidden (403)".into()));
    insta::assert_snapshot!(said(&facts));
}

/// The chart sets the paths; what `ambit check` expects is compared with its template.
#[test]
fn platforms_have_the_paths_of_the_chart() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/ambit/templates/_platform.tpl");
    let template = std::fs::read_to_string(path).unwrap_or_default();
    for platform in platform::PLATFORMS {
        let line = template.lines().find(|line| line.contains(&format!("\"{}\" (dict", platform.name)));
        let line = line.unwrap_or_else(|| panic!("no platform {} in the chart", platform.name));
        for (key, path, usual) in
            [("binDir", platform.bin_dir, "/opt/cni/bin"), ("confDir", platform.conf_dir, "/etc/cni/net.d")]
        {
            let set = format!("\"{key}\" \"{path}\"");
            assert_eq!(line.contains(&set), path != usual, "{}: {set}", platform.name);
        }
    }
}
