//! Whatever a control plane sends is applied or rejected, and whatever is dialled then gets an answer.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use ambit_api::security::{Authorization, Clause, Match, Rule, StringMatch, string_match::MatchType};
use ambit_api::workload::{
    Address, Extension, GatewayAddress, LoadBalancing, Locality, NamespacedHostname, NetworkAddress, Port,
    PortList, Service, WeightedWaypoint, Workload, address, gateway_address,
};
use ambit_directory::{
    Authority, ClientRole, Directory, Question, SESSION_AFFINITY_EXTENSION, Update, WorkloadUid, resolve,
};
use common::{pod, service};
use proptest::prelude::*;
use proptest::sample::select;
use rand::SeedableRng;
use rand::rngs::SmallRng;

/// Texts that mean something, and some that do not.
fn text() -> impl Strategy<Value = String> {
    const KNOWN: &[&str] = &[
        "",
        "app",
        "client",
        "web",
        "app/web.app.svc",
        "web.app.svc",
        "*.svc",
        "/",
        "//",
        "a/b/c",
        "\u{0}",
        "ä",
    ];
    prop_oneof![4 => select(KNOWN).prop_map(str::to_owned), 1 => ".{0,20}"]
}

fn octets() -> impl Strategy<Value = bytes::Bytes> {
    const KNOWN: &[&[u8]] = &[&[10, 0, 0, 1], &[10, 96, 0, 1], &[0; 16], &[0, 0, 0, 0], &[]];
    let mapped = [&[0; 10][..], &[255, 255, 10, 0, 0, 1][..]].concat();
    prop_oneof![
        4 => select(KNOWN).prop_map(bytes::Bytes::from_static),
        1 => Just(mapped.into()),
        1 => prop::collection::vec(any::<u8>(), 0..18).prop_map(Into::into),
    ]
}

fn number() -> impl Strategy<Value = u32> {
    prop_oneof![3 => select(&[0u32, 1, 8, 32, 80, 96, 128, 15008, 65535, 65536, u32::MAX][..]), 1 => any::<u32>()]
}

fn enumeration() -> impl Strategy<Value = i32> {
    prop_oneof![9 => 0..4i32, 1 => any::<i32>()]
}

fn network_address() -> impl Strategy<Value = NetworkAddress> {
    (select(&["", "far"][..]), octets(), prop::option::of(number()))
        .prop_map(|(network, address, length)| NetworkAddress { network: network.into(), address, length })
}

fn gateway() -> impl Strategy<Value = Option<GatewayAddress>> {
    let destination = prop_oneof![
        (text(), text()).prop_map(|(namespace, hostname)| {
            gateway_address::Destination::Hostname(NamespacedHostname { namespace, hostname })
        }),
        network_address().prop_map(gateway_address::Destination::Address),
    ];
    let gateway = (prop::option::weighted(0.9, destination), number())
        .prop_map(|(destination, hbone_mtls_port)| GatewayAddress { destination, hbone_mtls_port });
    prop::option::weighted(0.3, gateway)
}

fn ports() -> impl Strategy<Value = Vec<Port>> {
    let port = (number(), number(), enumeration()).prop_map(|(service_port, target_port, app_protocol)| {
        Port { service_port, target_port, app_protocol }
    });
    prop::collection::vec(port, 0..3)
}

fn a_workload() -> impl Strategy<Value = Workload> {
    let names = (text(), text(), text(), text(), select(&["", "far"][..]));
    let numbers = (enumeration(), enumeration(), enumeration(), prop::option::of(number()));
    let services = prop::collection::hash_map(
        text(),
        ports().prop_map(|ports| PortList { ports, ..PortList::default() }),
        0..3,
    );
    (names, numbers, prop::collection::vec(octets(), 0..3), services, gateway(), gateway(), any::<bool>())
        .prop_map(
            |(
                (uid, namespace, account, node, network),
                (tunnel, status, mode, capacity),
                addresses,
                services,
                waypoint,
                gateway,
                base,
            )| {
                let sent = Workload {
                    uid,
                    namespace,
                    service_account: account,
                    node,
                    network: network.into(),
                    tunnel_protocol: tunnel,
                    status,
                    network_mode: mode,
                    capacity,
                    addresses,
                    services: services.into_iter().collect(),
                    waypoint,
                    network_gateway: gateway,
                    locality: Some(Locality::default()),
                    ..Workload::default()
                };
                // Half of them differ from a good one in a few fields only, and so get in.
                let good = pod("web", "10.0.0.2");
                if base {
                    Workload {
                        services: sent.services,
                        capacity: sent.capacity,
                        network: sent.network,
                        ..good
                    }
                } else {
                    sent
                }
            },
        )
}

fn a_service() -> impl Strategy<Value = Service> {
    let waypoints = prop::collection::vec((gateway(), number()), 0..3);
    let balancing = (prop::collection::vec(enumeration(), 0..4), enumeration(), enumeration());
    let addresses = prop::collection::vec(network_address(), 0..3);
    (text(), text(), addresses, ports(), gateway(), waypoints, balancing, any::<bool>()).prop_map(
        |(namespace, hostname, addresses, ports, waypoint, weighted, (scopes, mode, health_policy), base)| {
            let good = service("web", &["10.96.0.1"]);
            let load_balancing = Some(LoadBalancing { routing_preference: scopes, mode, health_policy });
            let weighted =
                weighted.into_iter().map(|(destination, weight)| WeightedWaypoint { destination, weight });
            let extensions = vec![Extension { name: SESSION_AFFINITY_EXTENSION.into(), config: None }];
            if base {
                return Service { load_balancing, waypoint, extensions, ..good };
            }
            Service {
                namespace,
                hostname,
                addresses,
                ports,
                waypoint,
                weighted_waypoints: weighted.collect(),
                load_balancing,
                ..Service::default()
            }
        },
    )
}

fn a_policy() -> impl Strategy<Value = Authorization> {
    let matched = (prop::option::of(text()), octets(), number(), prop::option::of(number())).prop_map(
        |(principal, address, length, port)| Match {
            principals: vec![StringMatch { match_type: principal.map(MatchType::Prefix) }],
            source_ips: vec![ambit_api::security::Address { address, length }],
            destination_ports: port.into_iter().collect(),
            ..Match::default()
        },
    );
    let clause = prop::collection::vec(matched, 0..2).prop_map(|matches| Clause { matches });
    let rule = prop::collection::vec(clause, 0..2).prop_map(|clauses| Rule { clauses });
    (text(), text(), enumeration(), enumeration(), prop::collection::vec(rule, 0..2)).prop_map(
        |(name, namespace, scope, action, rules)| Authorization {
            name,
            namespace,
            scope,
            action,
            rules,
            ..Authorization::default()
        },
    )
}

fn update() -> impl Strategy<Value = Update> {
    let address = |kind: Option<address::Type>| Address { r#type: kind };
    prop_oneof![
        4 => (text(), a_workload()).prop_map(move |(name, it)| Update::Address {
            name,
            address: address(Some(address::Type::Workload(it))),
        }),
        4 => (text(), a_service()).prop_map(move |(name, it)| Update::Address {
            name,
            address: address(Some(address::Type::Service(it))),
        }),
        2 => (text(), a_policy()).prop_map(|(name, policy)| Update::Policy { name, policy }),
        1 => text().prop_map(|name| Update::AddressRemoved { name }),
        1 => text().prop_map(|name| Update::PolicyRemoved { name }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_is_sent_or_dialled_stops_the_directory(
        updates in prop::collection::vec(update(), 0..30),
        dialled in prop::collection::vec((text(), number()), 0..6),
    ) {
        let (mut directory, reader) = Directory::new();
        let client = Update::Address {
            name: "client".into(),
            address: Address { r#type: Some(address::Type::Workload(pod("client", "10.0.0.1"))) },
        };
        let sent = updates.len();
        let rejected = directory.apply(updates);
        prop_assert!(rejected.len() <= sent);
        prop_assert!(directory.apply([client]).is_empty());
        let snapshot = reader.snapshot();
        let client = snapshot.workload("client").unwrap();
        let names = dialled.iter().filter_map(|(host, port)| format!("{host}:{port}").parse::<Authority>().ok());
        let known = ["10.0.0.1:80", "10.0.0.2:80", "10.96.0.1:80", "[::]:80", "web.app.svc:80"];
        for destination in names.chain(known.iter().filter_map(|it| it.parse().ok())) {
            for role in [ClientRole::Workload, ClientRole::Ingress] {
                let question = Question {
                    client,
                    role,
                    source: [10, 0, 0, 1].into(),
                    destination: destination.clone(),
                    exclude: &[],
                };
                let route = resolve(&snapshot, &question, &|_: &WorkloadUid| 0, &mut SmallRng::seed_from_u64(1));
                prop_assert!(!common::say(&route).is_empty());
            }
            let local = client.addresses[0];
            prop_assert!(snapshot.inbound_target(client, local, &destination).map_or(true, |target| target.dial.ip() == local));
        }
        for workload in snapshot.workloads() {
            let verdict = snapshot.authorize(workload, Some(&client.identity), [10, 0, 0, 1].into(), ([10, 0, 0, 2], 80).into());
            prop_assert!(verdict.allowed() || !snapshot.policies().is_empty());
        }
        prop_assert!(serde_json::to_value(&*snapshot).is_ok());
    }
}
