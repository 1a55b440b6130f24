//! The pods' DNS, asked as programs ask: through the redirection, over UDP and TCP, by short names and long.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ambit_local::Pod;
use ambit_tests::add_trials;
use ambit_tests::beds::Trials;
use ambit_tests::{dns, wait};
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{Extensions, ip_of};

/// The cluster DNS, which pods' `resolv.conf` names.
const RESOLVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 53);
/// Time to live of the mesh's own answers, seconds; the cluster DNS behind it gives another.
const MESH_TTL: u32 = 30;

fn question(name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::new(0x4d1, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message.to_vec().unwrap()
}

/// Asks over TCP.
async fn ask_tcp(pod: &Pod, resolver: SocketAddr, name: &str, kind: RecordType) -> Message {
    let asking = async {
        let mut stream = pod.connect(resolver).await.unwrap();
        let message = question(name, kind);
        stream.write_u16(u16::try_from(message.len()).unwrap()).await.unwrap();
        stream.write_all(&message).await.unwrap();
        let mut answer = vec![0; stream.read_u16().await.unwrap().into()];
        stream.read_exact(&mut answer).await.unwrap();
        Message::from_vec(&answer).unwrap()
    };
    tokio::time::timeout(wait::SOON, asking).await.expect("an answer in time")
}

/// Asks over UDP; the answer must come from the resolver that was asked.
async fn ask_udp(pod: &Pod, resolver: SocketAddr, name: &str, kind: RecordType) -> Message {
    let socket = pod.udp((Ipv4Addr::UNSPECIFIED, 0).into()).await.unwrap();
    socket.connect(resolver).await.unwrap();
    socket.send(&question(name, kind)).await.unwrap();
    let mut answer = vec![0; 4096];
    let received = tokio::time::timeout(wait::SOON, socket.recv(&mut answer)).await;
    let length = received.expect("an answer in time").unwrap();
    Message::from_vec(&answer[..length]).unwrap()
}

fn addresses(message: &Message) -> Vec<IpAddr> {
    let of = |data: &RData| match data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
        _ => None,
    };
    message.answers.iter().chain(&message.additionals).filter_map(|record| of(&record.data)).collect()
}

/// As a program in the pod would ask: short, with namespace, with `svc`, in full, from another namespace's view too.
async fn short_names_lead_to_services_by_the_search_path(bed: &Extensions) {
    let expected = bed.cluster.service_ips("shop", "far");
    for name in
        ["far", "far.shop", "far.shop.svc", "far.shop.svc.cluster.local", "far.shop.svc.cluster.local."]
    {
        let mut found = bed.client.resolve(name).await.unwrap();
        found.sort();
        let mut expected = expected.clone();
        expected.sort();
        assert_eq!(found, expected, "{name}");
    }
    assert!(bed.client.resolve("nobody").await.is_err(), "a name that nobody has was found");
    for name in ["far.shop.svc.cluster.local.", "FAR.Shop.svc.CLUSTER.local."] {
        for (kind, ipv6) in [(RecordType::A, false), (RecordType::AAAA, true)] {
            let answer = ask_udp(&bed.client, RESOLVER, name, kind).await;
            assert_eq!(addresses(&answer), [bed.vip("far", ipv6).ip()], "{name}");
            assert_eq!(answer.answers[0].ttl, MESH_TTL, "the mesh answers itself");
            assert_eq!(answer.answers[0].name.to_ascii(), name, "as it was asked");
        }
    }
}

async fn a_headless_service_leads_to_its_pods_in_both_families(bed: &Extensions) {
    for (kind, ipv6) in [(RecordType::A, false), (RecordType::AAAA, true)] {
        let answer = ask_udp(&bed.client, RESOLVER, "far-pods.shop.svc.cluster.local.", kind).await;
        assert_eq!(addresses(&answer), [ip_of(&bed.far, ipv6)]);
        assert_eq!(answer.answers[0].ttl, MESH_TTL);
        let dashed =
            format!("{}.far-pods.shop.svc.cluster.local.", bed.far.ip().to_string().replace('.', "-"));
        let answer = ask_udp(&bed.client, RESOLVER, &dashed, kind).await;
        assert_eq!(addresses(&answer), [ip_of(&bed.far, ipv6)], "{dashed}");
    }
}

/// RFC 2782: the port and the name behind it, with the addresses of the name.
async fn srv_records_name_port_and_target(bed: &Extensions) {
    let services: [(&str, u16, Vec<IpAddr>); 2] =
        [("far", 80, bed.cluster.service_ips("shop", "far")), ("far-pods", 8080, bed.far.ips())];
    for (service, port, mut expected) in services {
        let name = format!("_tcp._tcp.{service}.shop.svc.cluster.local.");
        for answer in [
            ask_udp(&bed.client, RESOLVER, &name, RecordType::SRV).await,
            ask_tcp(&bed.client, RESOLVER, &name, RecordType::SRV).await,
        ] {
            let targets = answer.answers.iter().filter_map(|record| match &record.data {
                RData::SRV(srv) => Some((srv.port, srv.target.to_ascii())),
                _ => None,
            });
            let targets: Vec<(u16, String)> = targets.collect();
            assert!(!targets.is_empty() && targets.iter().all(|(p, _)| *p == port), "{service}: {targets:?}");
            assert!(answer.answers.iter().all(|record| record.ttl == MESH_TTL), "the mesh answers itself");
            let mut found = addresses(&answer);
            found.sort();
            found.dedup();
            expected.sort();
            assert_eq!(found, expected, "{service}: the addresses come along");
            for (_, target) in targets {
                let led = ask_udp(&bed.client, RESOLVER, &target, RecordType::A).await;
                assert!(
                    addresses(&led).iter().all(|ip| expected.contains(ip)) && !led.answers.is_empty(),
                    "{target}"
                );
            }
        }
    }
    let none =
        ask_udp(&bed.client, RESOLVER, "_none._tcp.far.shop.svc.cluster.local.", RecordType::SRV).await;
    assert!(none.answers.is_empty(), "a port that the service has not got");
}

async fn names_outside_are_asked_of_the_clusters_resolver_over_udp_and_tcp(bed: &Extensions) {
    let given: Vec<IpAddr> = vec!["203.0.113.7".parse().unwrap(), "2001:db8::7".parse().unwrap()];
    bed.cluster.set_dns_record("www.example.com", given.clone()).await.unwrap();
    for (kind, ip) in [(RecordType::A, given[0]), (RecordType::AAAA, given[1])] {
        let udp = ask_udp(&bed.client, RESOLVER, "www.example.com.", kind).await;
        let tcp = ask_tcp(&bed.client, RESOLVER, "www.example.com.", kind).await;
        for answer in [udp, tcp] {
            assert_eq!(addresses(&answer), [ip]);
            assert_ne!(answer.answers[0].ttl, MESH_TTL, "not the mesh's own");
        }
    }
    for answer in [
        ask_udp(&bed.client, RESOLVER, "no.such.example.com.", RecordType::A).await,
        ask_tcp(&bed.client, RESOLVER, "no.such.example.com.", RecordType::A).await,
    ] {
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
        assert_eq!(answer.metadata.id, 0x4d1);
    }
}

/// A resolver that a program asks by its address gets the question, even for a name that the mesh knows.
async fn a_foreign_resolver_that_is_asked_answers_itself(bed: &Extensions) {
    let sign: [IpAddr; 2] =
        [Ipv4Addr::new(192, 0, 2, 77).into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 77).into()];
    for ipv6 in [false, true] {
        let at = SocketAddr::new(ip_of(&bed.gateway, ipv6), 53);
        let _resolver = dns::serve(&bed.gateway, at, sign[usize::from(ipv6)]).await.unwrap();
        for client in [&bed.client, &bed.gazer] {
            for name in ["far.shop.svc.cluster.local.", "www.anything.example."] {
                let answer = dns::ask(client, at, name, ipv6).await.unwrap();
                assert_eq!(answer.addresses, [sign[usize::from(ipv6)]], "{name} asked by {client}");
            }
        }
    }
}

/// With resources on demand, names resolve as usual.
async fn names_are_found_where_resources_come_on_demand(bed: &Extensions) {
    let mut found = bed.gazer.resolve("near.shop").await.unwrap();
    found.sort();
    let mut expected = bed.cluster.service_ips("shop", "near");
    expected.sort();
    assert_eq!(found, expected);
    let answer = bed.answer(&bed.gazer, bed.vip("near", false), b"by name").await;
    assert_eq!(answer, b"by name");
}

pub(crate) fn add(trials: &mut Trials<Extensions>) {
    add_trials!(
        trials, "dns":
        short_names_lead_to_services_by_the_search_path,
        a_headless_service_leads_to_its_pods_in_both_families,
        srv_records_name_port_and_target,
        names_outside_are_asked_of_the_clusters_resolver_over_udp_and_tcp,
        a_foreign_resolver_that_is_asked_answers_itself,
        names_are_found_where_resources_come_on_demand,
    );
}
