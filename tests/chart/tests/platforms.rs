//! The chart as rendered for each platform, beside golden files.

use ambit_chart::{Object, template};

const PLATFORMS: [&str; 8] = ["gke", "eks", "aks", "openshift", "k3s", "microk8s", "kind", "minikube"];

/// Most CRDs are those of others (`charts/crds.sh`); a hundred thousand lines show nothing.
const WITHOUT_CRDS: &str = "crds.ambit=false,crds.gatewayApi=false,crds.istio=false";

fn golden(objects: &[Object]) -> String {
    let mut texts: Vec<String> = objects.iter().map(|object| object.text.clone()).collect();
    texts.sort();
    texts.join("\n---\n")
}

#[test]
fn the_chart_renders_as_its_golden_file() {
    insta::assert_snapshot!("default", golden(&template(&[WITHOUT_CRDS]).unwrap()));
}

/// Each golden file has what differs from the default.
#[test]
fn each_platform_renders_as_its_golden_file() {
    let usual = template(&[WITHOUT_CRDS]).unwrap();
    for platform in PLATFORMS {
        let objects = template(&[WITHOUT_CRDS, &format!("platform={platform}")]).unwrap();
        let gone: Vec<String> = usual.iter().map(Object::id).filter(|id| !has(&objects, id)).collect();
        assert!(gone.is_empty(), "{platform}: {gone:?}");
        let other: Vec<Object> = objects.into_iter().filter(|object| !usual.contains(object)).collect();
        insta::assert_snapshot!(platform, golden(&other));
    }
}

#[test]
fn every_option_renders_as_its_golden_file() {
    let usual = template(&[WITHOUT_CRDS]).unwrap();
    let options = [
        WITHOUT_CRDS,
        "monitoring.monitors=true,monitoring.alerts=true,monitoring.labels.release=prometheus",
        "node.removeTaint=false,node.uninstall=true,resourceQuota.enabled=true,logFormat=json,trustDomainAliases={old.local}",
        "image.registry=registry.example.com/mirror,image.pullSecrets={mirror},ztunnel.image.tag=0.1.1",
        "control.autoscaling.enabled=false,control.env.A=b,ztunnel.config.sameNode=tunnel,ztunnel.labels.team=mesh",
        "networkPolicy.debugFrom[0].namespaceSelector.matchLabels.team=kiali",
    ];
    let objects = template(&options).unwrap();
    let other: Vec<Object> = objects.into_iter().filter(|object| !usual.contains(object)).collect();
    insta::assert_snapshot!("options", golden(&other));
}

#[test]
fn what_is_switched_off_is_not_there() {
    let usual = template(&[]).unwrap();
    for (setting, id) in [
        ("control.autoscaling.enabled=false", "HorizontalPodAutoscaler ambit-control"),
        ("control.podDisruptionBudget.enabled=false", "PodDisruptionBudget ambit-control"),
        ("control.admissionPolicy=false", "ValidatingAdmissionPolicy ambit-control-waypoints"),
        ("networkPolicy.enabled=false", "NetworkPolicy ztunnel"),
        ("node.admissionPolicy=false", "ValidatingAdmissionPolicy ambit-node-pods"),
        ("istioLabels=false", "ConfigMap istio"),
        ("crds.istio=false", "CustomResourceDefinition serviceentries.networking.istio.io"),
        ("crds.ambit=false", "CustomResourceDefinition trafficpolicies.ambit.dev"),
        ("crds.gatewayApi=false", "CustomResourceDefinition gateways.gateway.networking.k8s.io"),
    ] {
        assert!(has(&usual, id), "{id} is there by default");
        assert!(!has(&template(&[setting]).unwrap(), id), "{setting}");
    }
    let off = template(&["platform=gke,resourceQuota.enabled=false", WITHOUT_CRDS]).unwrap();
    assert!(!has(&off, "ResourceQuota ambit-critical-pods"));
}

fn has(objects: &[Object], id: &str) -> bool {
    objects.iter().any(|object| object.id() == id)
}
