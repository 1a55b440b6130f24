use ambit_balance::Algorithm;

use super::*;

fn settings(port: u32, algorithm: l7::Algorithm) -> l7::PortSettings {
    let balancer = l7::LoadBalancer { algorithm: algorithm.into(), ..l7::LoadBalancer::default() };
    l7::PortSettings { port, load_balancer: Some(balancer), ..l7::PortSettings::default() }
}

fn source(name: &str, host: &str, created: i64, settings: Vec<l7::PortSettings>) -> l7::BackendPolicy {
    let object = l7::ObjectName {
        kind: "DestinationRule".to_owned(),
        namespace: "shop".to_owned(),
        name: name.to_owned(),
    };
    l7::BackendPolicy { object: Some(object), host: host.to_owned(), created, settings, ..Default::default() }
}

fn tls() -> TlsClients {
    TlsClients::new(None).unwrap()
}

fn found(sources: &[l7::BackendPolicy], host: &str, port: u16) -> Option<Algorithm> {
    let service = NamespacedHost { namespace: "shop".into(), hostname: host.into() };
    BackendPolicies::new(1, sources, &tls()).find(&service, port, None).unwrap().policy.algorithm
}

#[test]
fn the_named_host_then_the_longer_wildcard_then_the_mesh_counts() {
    use l7::Algorithm::{Adaptive, LeastRequest, Random, RoundRobin};
    let wide =
        l7::BackendPolicy { mesh_wide: true, ..source("w", "a.shop.local", 1, vec![settings(0, Adaptive)]) };
    let all = [
        wide,
        source("a", "*.local", 1, vec![settings(0, Random)]),
        source("b", "*.shop.local", 2, vec![settings(0, LeastRequest)]),
        source("c", "a.shop.local", 3, vec![settings(0, RoundRobin), settings(81, Random)]),
    ];
    assert_eq!(found(&all, "a.shop.local", 80), Some(Algorithm::RoundRobin));
    assert_eq!(found(&all, "a.shop.local", 81), Some(Algorithm::Random));
    assert_eq!(found(&all, "b.shop.local", 80), Some(Algorithm::LeastRequest));
    assert_eq!(found(&all, "b.other.local", 80), Some(Algorithm::Random));
    assert_eq!(found(&all[..1], "a.shop.local", 80), Some(Algorithm::Adaptive));
    assert_eq!(found(&all, "elsewhere", 80), None);
}

#[test]
fn the_oldest_settings_count_and_subsets_are_joined() {
    let subset = |name: &str, value: &str| l7::Subset {
        name: name.to_owned(),
        labels: [("version".to_owned(), value.to_owned())].into(),
        settings: vec![settings(0, l7::Algorithm::Random)],
    };
    let only_subsets = l7::BackendPolicy {
        subsets: vec![subset("v1", "1")],
        ..source("z", "a", 1, vec![l7::PortSettings::default()])
    };
    let older = l7::BackendPolicy {
        subsets: vec![subset("v1", "other"), subset("v2", "2")],
        ..source("b", "a", 2, vec![settings(0, l7::Algorithm::RoundRobin)])
    };
    let newer = source("a", "a", 3, vec![settings(0, l7::Algorithm::Random)]);
    let policies = BackendPolicies::new(1, &[newer, older, only_subsets], &tls());
    let service = NamespacedHost { namespace: "shop".into(), hostname: "a".into() };
    let labels = |subset| policies.find(&service, 80, Some(subset)).map(|found| found.labels.unwrap());
    assert_eq!(policies.find(&service, 80, None).unwrap().policy.algorithm, Some(Algorithm::RoundRobin));
    assert_eq!(*labels("v1").unwrap(), [("version".into(), "1".into())]);
    assert_eq!(*labels("v2").unwrap(), [("version".into(), "2".into())]);
    assert_eq!(labels("v3").unwrap_err(), "subset v3 of a is not known");
}

#[test]
fn a_rule_that_says_nothing_of_tls_leaves_that_to_another_policy() {
    let wanted = |mode: l7::TlsMode, name: &str| {
        let roots = Some(l7::backend_tls::Roots::System(true));
        l7::BackendTls { mode: mode.into(), server_name: name.into(), roots, ..Default::default() }
    };
    let demands = |port: u32, name: &str| {
        let tls = Some(wanted(l7::TlsMode::Tls, name));
        l7::PortSettings { port, tls, ..l7::PortSettings::default() }
    };
    let demanded = |name: &str, settings: Vec<l7::PortSettings>| {
        let mut policy = source(name, "a", 1, settings);
        policy.object.as_mut().unwrap().kind = "BackendTLSPolicy".to_owned();
        policy
    };
    let off = l7::PortSettings {
        port: 82,
        tls: Some(wanted(l7::TlsMode::Plaintext, "")),
        ..l7::PortSettings::default()
    };
    let rule = source("r", "a", 1, vec![settings(0, l7::Algorithm::Random), demands(81, "rule"), off]);
    let broken = l7::PortSettings { port: 83, invalid: "no root".into(), ..l7::PortSettings::default() };
    let all = [
        rule,
        demanded("all", vec![demands(0, "all")]),
        demanded("port", vec![demands(80, "port")]),
        demanded("broken", vec![broken]),
    ];
    let policies = BackendPolicies::new(1, &all, &tls());
    let service = NamespacedHost { namespace: "shop".into(), hostname: "a".into() };
    let found = |port: u16| policies.find(&service, port, None).unwrap().policy;
    let name = |port: u16| found(port).tls.as_ref().and_then(|tls| tls.server_name().map(str::to_owned));
    assert_eq!(name(80).as_deref(), Some("port"));
    assert_eq!(found(80).algorithm, Some(Algorithm::Random));
    assert_eq!(name(81).as_deref(), Some("rule"));
    assert_eq!(name(82), None);
    assert_eq!((name(83), found(83).invalid.is_some()), (None, true));
    assert_eq!(name(84).as_deref(), Some("all"));
    let other = NamespacedHost { namespace: "other".into(), hostname: "a".into() };
    assert!(policies.find(&other, 80, None).unwrap().policy.tls.is_none());
}

#[test]
fn what_can_not_be_read_is_invalid() {
    let unknown = l7::LoadBalancer { algorithm: 99, ..l7::LoadBalancer::default() };
    let hash = l7::ConsistentHash {
        key: Some(l7::consistent_hash::Key::Header("a b".to_owned())),
        ..l7::ConsistentHash::default()
    };
    let hashed = l7::LoadBalancer {
        algorithm: l7::Algorithm::ConsistentHash.into(),
        hash: Some(hash),
        ..l7::LoadBalancer::default()
    };
    for balancer in [unknown, hashed] {
        let settings = l7::PortSettings { load_balancer: Some(balancer), ..l7::PortSettings::default() };
        assert!(policy(&"DestinationRule/a/b".into(), &settings, &tls()).invalid.is_some());
    }
}
