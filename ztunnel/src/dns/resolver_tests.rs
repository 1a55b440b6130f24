//! Questions against a directory, as a table of cases.

use std::net::IpAddr;

use ambit_api::workload as wire;
use ambit_directory::{Directory, Reader, Update};
use hickory_proto::op::Query;
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::resolver::{Answer, Outcome, Resolver, TTL};

fn network_address(network: &str, address: &str) -> wire::NetworkAddress {
    wire::NetworkAddress { network: network.into(), address: octets(address), length: None }
}

fn octets(address: &str) -> bytes::Bytes {
    match address.parse().unwrap() {
        IpAddr::V4(address) => address.octets().to_vec().into(),
        IpAddr::V6(address) => address.octets().to_vec().into(),
    }
}

/// A service with its host's namespace and VIPs in our network.
fn service(namespace: &str, hostname: &str, vips: &[&str]) -> wire::Service {
    wire::Service {
        name: hostname.split('.').next().unwrap().into(),
        namespace: namespace.into(),
        hostname: hostname.into(),
        addresses: vips.iter().map(|vip| network_address("", vip)).collect(),
        ports: vec![
            wire::Port {
                service_port: 80,
                target_port: 8080,
                app_protocol: wire::AppProtocol::Http11.into(),
            },
            wire::Port {
                service_port: 9090,
                target_port: 9090,
                app_protocol: wire::AppProtocol::Grpc.into(),
            },
        ],
        ..wire::Service::default()
    }
}

fn workload(name: &str, addresses: &[&str], services: &[&str]) -> wire::Workload {
    wire::Workload {
        uid: format!("c//Pod/shop/{name}"),
        name: name.into(),
        namespace: "shop".into(),
        service_account: "default".into(),
        addresses: addresses.iter().map(|address| octets(address)).collect(),
        services: services.iter().map(|service| ((*service).to_owned(), wire::PortList::default())).collect(),
        ..wire::Workload::default()
    }
}

const CLUSTER: &str = "shop.svc.cluster.local";

pub(super) fn directory() -> Reader {
    let (mut directory, reader) = Directory::new();
    let headless = format!("shop/db.{CLUSTER}");
    let mut sick = workload("db-9", &["10.0.0.9"], &[&headless]);
    sick.status = wire::WorkloadStatus::Unhealthy.into();
    let mut distant = workload("db-8", &["10.0.0.8"], &[&headless]);
    distant.network = "other".into();
    let mut named = workload("vm", &["10.5.5.5"], &[]);
    named.hostname = "vm.example.com".into();
    let mut hidden = service("other", "hidden.other.svc.cluster.local", &["10.96.9.9"]);
    hidden.visibility = wire::service::Visibility::Namespace.into();
    let services = [
        service("shop", &format!("reviews.{CLUSTER}"), &["10.96.0.1", "fd00:96::1"]),
        service("shop", &format!("v4.{CLUSTER}"), &["10.96.0.2"]),
        service("other", "reviews.other.svc.cluster.local", &["10.96.1.1"]),
        service("shop", &format!("db.{CLUSTER}"), &[]),
        service("shop", &format!("empty.{CLUSTER}"), &[]),
        service("shop", "api.example.com", &["240.240.0.1"]),
        service("shop", "unplaced.example.com", &[]),
        service("shop", "*.wild.example.com", &["240.240.0.2"]),
        hidden,
    ];
    let workloads = [
        workload("db-0", &["10.0.0.1", "fd00::1"], &[&headless]),
        workload("db-1", &["10.0.0.2"], &[&headless]),
        sick,
        distant,
        named,
    ];
    let services = services.into_iter().map(|service| {
        (format!("{}/{}", service.namespace, service.hostname), wire::address::Type::Service(service))
    });
    let workloads =
        workloads.into_iter().map(|workload| (workload.uid.clone(), wire::address::Type::Workload(workload)));
    let all = services.chain(workloads);
    let rejected =
        directory.apply(all.map(|(name, address)| Update::Address {
            name,
            address: wire::Address { r#type: Some(address) },
        }));
    assert!(rejected.is_empty(), "{rejected:?}");
    reader
}

fn resolve(name: &str, kind: RecordType) -> Outcome {
    let reader = directory();
    let snapshot = reader.snapshot();
    let resolver =
        Resolver { snapshot: &snapshot, namespace: "shop", network: "", cluster_domain: "cluster.local" };
    let query = Query::query(Name::from_ascii(name).unwrap(), kind);
    resolver.resolve(&query, &mut StdRng::seed_from_u64(1))
}

fn answer(name: &str, kind: RecordType) -> Answer {
    match resolve(name, kind) {
        Outcome::Answer(answer) => answer,
        Outcome::Forward => panic!("{name} {kind} was forwarded"),
    }
}

fn addresses(records: &[Record]) -> Vec<String> {
    let mut found: Vec<_> = records
        .iter()
        .filter_map(|record| record.data.ip_addr())
        .map(|address| address.to_string())
        .collect();
    found.sort();
    found
}

#[test]
fn a_service_is_found_by_every_name_that_a_client_may_use() {
    for name in [
        "reviews.shop.svc.cluster.local.",
        "reviews.shop.svc.cluster.local",
        "REVIEWS.Shop.svc.cluster.local.",
        "reviews.",
        "reviews.shop.",
        "reviews.shop.svc.",
        "reviews.shop.svc.cluster.local.shop.svc.cluster.local.",
    ] {
        assert_eq!(addresses(&answer(name, RecordType::A).answers), ["10.96.0.1"], "{name}");
        assert_eq!(addresses(&answer(name, RecordType::AAAA).answers), ["fd00:96::1"], "{name}");
    }
}

#[test]
fn an_answer_has_the_asked_name_and_a_ttl_of_30_seconds() {
    let answer = answer("ReViews.", RecordType::A);
    assert_eq!(answer.answers[0].name.to_ascii(), "ReViews.");
    assert_eq!(answer.answers[0].ttl, TTL);
}

#[test]
fn a_service_of_another_namespace_needs_its_name() {
    assert_eq!(addresses(&answer("reviews.other.", RecordType::A).answers), ["10.96.1.1"]);
}

#[test]
fn a_service_that_the_client_may_not_see_is_left_to_resolvers() {
    assert_eq!(resolve("hidden.other.svc.cluster.local.", RecordType::A), Outcome::Forward);
}

#[test]
fn a_missing_family_is_an_empty_answer_and_not_forwarded() {
    let answer = answer("v4.shop.svc.cluster.local.", RecordType::AAAA);
    assert!(answer.answers.is_empty());
    let RData::SOA(soa) = &answer.authorities[0].data else { panic!("no SOA") };
    assert_eq!((soa.minimum, answer.authorities[0].ttl), (TTL, TTL));
    assert_eq!(answer.authorities[0].name.to_ascii(), "cluster.local.");
}

#[test]
fn a_headless_service_is_its_healthy_endpoints_in_this_network() {
    assert_eq!(
        addresses(&answer("db.shop.svc.cluster.local.", RecordType::A).answers),
        ["10.0.0.1", "10.0.0.2"]
    );
    assert_eq!(addresses(&answer("db.", RecordType::AAAA).answers), ["fd00::1"]);
}

#[test]
fn an_endpoint_of_a_headless_service_has_a_name_of_its_own() {
    for name in ["db-0.db.shop.svc.cluster.local.", "db-0.db.shop.", "10-0-0-1.db.shop.svc.cluster.local."] {
        assert_eq!(addresses(&answer(name, RecordType::A).answers), ["10.0.0.1"], "{name}");
    }
    assert_eq!(resolve("db-9.db.shop.svc.cluster.local.", RecordType::A), Outcome::Forward);
    assert_eq!(resolve("x.reviews.shop.svc.cluster.local.", RecordType::A), Outcome::Forward);
}

#[test]
fn a_headless_service_without_endpoints_has_no_addresses() {
    assert!(answer("empty.shop.svc.cluster.local.", RecordType::A).answers.is_empty());
}

#[test]
fn an_outside_host_is_found_as_it_is_and_under_search_domains() {
    for name in
        ["api.example.com.", "api.example.com.shop.svc.cluster.local.", "api.example.com.cluster.local."]
    {
        assert_eq!(addresses(&answer(name, RecordType::A).answers), ["240.240.0.1"], "{name}");
    }
    assert_eq!(addresses(&answer("any.wild.example.com.", RecordType::A).answers), ["240.240.0.2"]);
}

#[test]
fn what_only_resolvers_can_know_is_forwarded() {
    for (name, kind) in [
        ("unplaced.example.com.", RecordType::A),
        ("nowhere.example.com.", RecordType::A),
        ("nothing.shop.svc.cluster.local.", RecordType::A),
        ("api.example.com.", RecordType::TXT),
        ("1.0.96.10.in-addr.arpa.", RecordType::PTR),
        (".", RecordType::NS),
    ] {
        assert_eq!(resolve(name, kind), Outcome::Forward, "{name} {kind}");
    }
}

#[test]
fn other_types_of_a_cluster_name_are_empty() {
    for kind in [RecordType::TXT, RecordType::MX, RecordType::HTTPS, RecordType::ANY] {
        assert!(answer("reviews.shop.svc.cluster.local.", kind).answers.is_empty(), "{kind}");
    }
}

#[test]
fn a_question_of_another_class_is_forwarded() {
    let reader = directory();
    let snapshot = reader.snapshot();
    let resolver =
        Resolver { snapshot: &snapshot, namespace: "shop", network: "", cluster_domain: "cluster.local" };
    let mut query = Query::query(Name::from_ascii("reviews.").unwrap(), RecordType::A);
    query.set_query_class(DNSClass::CH);
    assert_eq!(resolver.resolve(&query, &mut StdRng::seed_from_u64(1)), Outcome::Forward);
}

#[test]
fn a_workload_with_a_host_name_is_found_by_it() {
    assert_eq!(addresses(&answer("vm.example.com.", RecordType::A).answers), ["10.5.5.5"]);
}

fn targets(answer: &Answer) -> Vec<(String, u16)> {
    let mut found: Vec<_> = answer
        .answers
        .iter()
        .filter_map(|record| match &record.data {
            RData::SRV(srv) => Some((srv.target.to_ascii(), srv.port)),
            _ => None,
        })
        .collect();
    found.sort();
    found
}

#[test]
fn srv_names_the_port_of_a_service_by_protocol_or_number() {
    let target = "reviews.shop.svc.cluster.local.".to_owned();
    for name in [
        "_http._tcp.reviews.shop.svc.cluster.local.",
        "_80._tcp.reviews.shop.svc.cluster.local.",
        "_http._tcp.reviews.",
    ] {
        let answer = answer(name, RecordType::SRV);
        assert_eq!(targets(&answer), [(target.clone(), 80)], "{name}");
        assert_eq!(addresses(&answer.additionals), ["10.96.0.1", "fd00:96::1"]);
    }
    let all = answer("reviews.shop.svc.cluster.local.", RecordType::SRV);
    assert_eq!(targets(&all), [(target.clone(), 80), (target, 9090)]);
}

#[test]
fn srv_of_a_headless_service_lists_endpoints_and_ports() {
    let answer = answer("_http._tcp.db.shop.svc.cluster.local.", RecordType::SRV);
    let expected = [
        ("10-0-0-1.db.shop.svc.cluster.local.".to_owned(), 8080),
        ("10-0-0-2.db.shop.svc.cluster.local.".to_owned(), 8080),
    ];
    assert_eq!(targets(&answer), expected);
    assert_eq!(addresses(&answer.additionals), ["10.0.0.1", "10.0.0.2", "fd00::1"]);
}

#[test]
fn srv_of_a_port_known_by_name_only_is_left_to_resolvers() {
    assert_eq!(resolve("_metrics._tcp.reviews.shop.svc.cluster.local.", RecordType::SRV), Outcome::Forward);
    assert_eq!(resolve("_sip._udp.reviews.shop.svc.cluster.local.", RecordType::SRV), Outcome::Forward);
}
