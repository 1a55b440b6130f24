//! Every message of the contracts against bytes put together by hand: field numbers and wire types are
//! what other implementations rely on.

#![allow(clippy::unwrap_used, reason = "a failed expectation fails the test")]

use std::collections::BTreeMap;
use std::fmt::Debug;

use ambit_api::workload::{self, zds};
use ambit_api::{ca, core, discovery, rpc, security};
use bytes::Bytes;
use prost::Message;
use prost_types::{Any, Struct, Value, value::Kind};

/// Protobuf's base-128 numbers.
fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let low = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            bytes.push(low);
            return bytes;
        }
        bytes.push(low | 0x80);
    }
}

/// A number under `field`: wire type 0.
fn int(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

/// Bytes, a string or a message under `field`: wire type 2.
fn len(field: u64, content: impl AsRef<[u8]>) -> Vec<u8> {
    let content = content.as_ref();
    [varint(field << 3 | 2), varint(content.len() as u64), content.to_vec()].concat()
}

/// Numbers under one repeated field, packed.
fn packed(field: u64, values: &[u64]) -> Vec<u8> {
    len(field, values.iter().flat_map(|value| varint(*value)).collect::<Vec<_>>())
}

/// The message encodes to exactly these parts, and they decode to it.
fn golden<M: Message + Default + PartialEq + Debug>(message: &M, parts: &[Vec<u8>]) -> Vec<u8> {
    let expected = parts.concat();
    assert_eq!(message.encode_to_vec(), expected, "{message:?}");
    assert_eq!(&M::decode(expected.as_slice()).unwrap(), message);
    expected
}

fn any() -> (Any, Vec<u8>) {
    let any = Any { type_url: "t/T".into(), value: vec![1, 2] };
    let bytes = golden(&any, &[len(1, "t/T"), len(2, [1, 2])]);
    (any, bytes)
}

fn workload_extension() -> (workload::Extension, Vec<u8>) {
    let (config, any) = any();
    let extension = workload::Extension { name: "e".into(), config: Some(config) };
    let bytes = golden(&extension, &[len(1, "e"), len(2, any)]);
    (extension, bytes)
}

fn network_address() -> (workload::NetworkAddress, Vec<u8>) {
    let address = workload::NetworkAddress {
        network: "n".into(),
        address: Bytes::from_static(&[10, 0, 0, 1]),
        length: Some(0),
    };
    // `length` is optional: a present zero is written.
    let bytes = golden(&address, &[len(1, "n"), len(2, [10, 0, 0, 1]), int(3, 0)]);
    (address, bytes)
}

fn gateway_by_name() -> (workload::GatewayAddress, Vec<u8>) {
    let host = workload::NamespacedHostname { namespace: "ns".into(), hostname: "h".into() };
    let host_bytes = golden(&host, &[len(1, "ns"), len(2, "h")]);
    let destination = Some(workload::gateway_address::Destination::Hostname(host));
    let gateway = workload::GatewayAddress { destination, hbone_mtls_port: 15008 };
    let bytes = golden(&gateway, &[len(1, host_bytes), int(3, 15008)]);
    (gateway, bytes)
}

fn gateway_by_address() -> (workload::GatewayAddress, Vec<u8>) {
    let (address, address_bytes) = network_address();
    let destination = Some(workload::gateway_address::Destination::Address(address));
    let gateway = workload::GatewayAddress { destination, hbone_mtls_port: 1 };
    let bytes = golden(&gateway, &[len(2, address_bytes), int(3, 1)]);
    (gateway, bytes)
}

fn port() -> (workload::Port, Vec<u8>) {
    let port = workload::Port { service_port: 80, target_port: 8080, app_protocol: 2 };
    let bytes = golden(&port, &[int(1, 80), int(2, 8080), int(3, 2)]);
    (port, bytes)
}

#[test]
fn service() {
    let (address, address_bytes) = network_address();
    let (port, port_bytes) = port();
    let (waypoint, waypoint_bytes) = gateway_by_name();
    let (other, other_bytes) = gateway_by_address();
    let (extension, extension_bytes) = workload_extension();
    let balancing = workload::LoadBalancing { routing_preference: vec![6, 1, 4], mode: 2, health_policy: 1 };
    let balancing_bytes = golden(&balancing, &[packed(1, &[6, 1, 4]), int(2, 2), int(3, 1)]);
    let weighted = workload::WeightedWaypoint { destination: Some(other), weight: 300 };
    let weighted_bytes = golden(&weighted, &[len(1, other_bytes), int(2, 300)]);
    let service = workload::Service {
        name: "reviews".into(),
        namespace: "default".into(),
        hostname: "reviews.default.svc.cluster.local".into(),
        addresses: vec![address],
        ports: vec![port],
        subject_alt_names: vec!["spiffe://td/ns/a/sa/b".into()],
        waypoint: Some(waypoint),
        load_balancing: Some(balancing),
        ip_families: 3,
        extensions: vec![extension],
        canonical: true,
        ingress_use_waypoint: true,
        weighted_waypoints: vec![weighted],
        visibility: 1,
        udp_ports: vec![port],
    };
    let bytes = golden(
        &service,
        &[
            len(1, "reviews"),
            len(2, "default"),
            len(3, "reviews.default.svc.cluster.local"),
            len(4, address_bytes),
            len(5, port_bytes.clone()),
            len(6, "spiffe://td/ns/a/sa/b"),
            len(7, waypoint_bytes),
            len(8, balancing_bytes),
            int(9, 3),
            len(10, extension_bytes),
            int(11, 1),
            int(12, 1),
            len(13, weighted_bytes),
            int(14, 1),
            len(100, port_bytes),
        ],
    );
    let address = workload::Address { r#type: Some(workload::address::Type::Service(service)) };
    golden(&address, &[len(2, bytes)]);
}

#[test]
fn workload() {
    let (port, port_bytes) = port();
    let (waypoint, waypoint_bytes) = gateway_by_name();
    let (gateway, gateway_bytes) = gateway_by_address();
    let (extension, extension_bytes) = workload_extension();
    let list = workload::PortList { ports: vec![port], ..workload::PortList::default() };
    let list_bytes = golden(&list, &[len(1, port_bytes)]);
    let tunnel = workload::ApplicationTunnel { protocol: 1, port: 15088 };
    let tunnel_bytes = golden(&tunnel, &[int(1, 1), int(2, 15088)]);
    let locality = workload::Locality { region: "r".into(), zone: "z".into(), subzone: "s".into() };
    let locality_bytes = golden(&locality, &[len(1, "r"), len(2, "z"), len(3, "s")]);
    let workload = workload::Workload {
        name: "pod".into(),
        namespace: "ns".into(),
        addresses: vec![Bytes::from_static(&[10, 0, 0, 1]), Bytes::from_static(&[0xfd; 16])],
        network: "net".into(),
        tunnel_protocol: 1,
        trust_domain: "td".into(),
        service_account: "sa".into(),
        waypoint: Some(waypoint),
        node: "node".into(),
        canonical_name: "cn".into(),
        canonical_revision: "cr".into(),
        workload_type: 3,
        workload_name: "wn".into(),
        native_tunnel: true,
        authorization_policies: vec!["ns/p".into()],
        status: 1,
        cluster_id: "c".into(),
        network_gateway: Some(gateway),
        uid: "c//Pod/ns/pod".into(),
        hostname: "h".into(),
        services: BTreeMap::from([("ns/a".to_owned(), list.clone()), ("ns/b".to_owned(), list)]),
        application_tunnel: Some(tunnel),
        locality: Some(locality),
        network_mode: 1,
        extensions: vec![extension],
        capacity: Some(7),
        serving_while_terminating: true,
        created: 1_700_000_000,
    };
    let entry = |key: &str| len(22, [len(1, key), len(2, &list_bytes)].concat());
    let bytes = golden(
        &workload,
        &[
            len(1, "pod"),
            len(2, "ns"),
            len(3, [10, 0, 0, 1]),
            len(3, [0xfd; 16]),
            len(4, "net"),
            int(5, 1),
            len(6, "td"),
            len(7, "sa"),
            len(8, waypoint_bytes),
            len(9, "node"),
            len(10, "cn"),
            len(11, "cr"),
            int(12, 3),
            len(13, "wn"),
            int(14, 1),
            len(16, "ns/p"),
            int(17, 1),
            len(18, "c"),
            len(19, gateway_bytes),
            len(20, "c//Pod/ns/pod"),
            len(21, "h"),
            entry("ns/a"),
            entry("ns/b"),
            len(23, tunnel_bytes),
            len(24, locality_bytes),
            int(25, 1),
            len(26, extension_bytes),
            len(27, int(1, 7)),
            int(100, 1),
            int(101, 1_700_000_000),
        ],
    );
    let address = workload::Address { r#type: Some(workload::address::Type::Workload(workload)) };
    golden(&address, &[len(1, bytes)]);
}

#[test]
fn authorization() {
    use security::string_match::MatchType;
    let matching = |match_type| security::StringMatch { match_type: Some(match_type) };
    let exact = matching(MatchType::Exact("e".into()));
    let prefix = matching(MatchType::Prefix("p".into()));
    let suffix = matching(MatchType::Suffix("s".into()));
    let presence = matching(MatchType::Presence(()));
    let exact_bytes = golden(&exact, &[len(1, "e")]);
    let prefix_bytes = golden(&prefix, &[len(2, "p")]);
    let suffix_bytes = golden(&suffix, &[len(3, "s")]);
    let presence_bytes = golden(&presence, &[len(4, "")]);
    let address = security::Address { address: Bytes::from_static(&[10, 0, 0, 0]), length: 8 };
    let address_bytes = golden(&address, &[len(1, [10, 0, 0, 0]), int(2, 8)]);
    let account = security::ServiceAccountMatch { namespace: "n".into(), service_account: "a".into() };
    let account_bytes = golden(&account, &[len(1, "n"), len(2, "a")]);
    let (config, config_bytes) = any();
    let extension = security::Extension { name: "x".into(), config: Some(config) };
    let extension_bytes = golden(&extension, &[len(1, "x"), len(2, config_bytes)]);
    let one = security::Match {
        namespaces: vec![exact],
        not_namespaces: vec![prefix],
        principals: vec![suffix],
        not_principals: vec![presence],
        source_ips: vec![address.clone()],
        not_source_ips: vec![address.clone()],
        destination_ips: vec![address.clone()],
        not_destination_ips: vec![address],
        destination_ports: vec![80, 443],
        not_destination_ports: vec![22],
        service_accounts: vec![account.clone()],
        not_service_accounts: vec![account],
        extensions: vec![extension.clone()],
    };
    let one_bytes = golden(
        &one,
        &[
            len(1, exact_bytes),
            len(2, prefix_bytes),
            len(3, suffix_bytes),
            len(4, presence_bytes),
            len(5, &address_bytes),
            len(6, &address_bytes),
            len(7, &address_bytes),
            len(8, &address_bytes),
            packed(9, &[80, 443]),
            packed(10, &[22]),
            len(11, &account_bytes),
            len(12, &account_bytes),
            len(13, &extension_bytes),
        ],
    );
    let clause = security::Clause { matches: vec![one] };
    let clause_bytes = golden(&clause, &[len(2, one_bytes)]);
    let rule = security::Rule { clauses: vec![clause] };
    let rule_bytes = golden(&rule, &[len(1, clause_bytes)]);
    let policy = security::Authorization {
        name: "p".into(),
        namespace: "ns".into(),
        scope: 2,
        action: 1,
        rules: vec![rule],
        dry_run: true,
        extensions: vec![extension],
    };
    golden(
        &policy,
        &[
            len(1, "p"),
            len(2, "ns"),
            int(3, 2),
            int(4, 1),
            len(5, rule_bytes),
            int(6, 1),
            len(7, extension_bytes),
        ],
    );
}

#[test]
fn node_agent_to_proxy() {
    let hello = zds::ZdsHello { version: 1, takes_listeners: true };
    golden(&hello, &[int(1, 1), int(100, 1)]);
    let info = zds::WorkloadInfo { name: "n".into(), namespace: "ns".into(), service_account: "sa".into() };
    let info_bytes = golden(&info, &[len(1, "n"), len(2, "ns"), len(3, "sa")]);
    let listener = zds::Listener { port: 15053, udp: true, ipv6: true };
    let listener_bytes = golden(&listener, &[int(1, 15053), int(2, 1), int(3, 1)]);
    let add = zds::AddWorkload { uid: "u".into(), workload_info: Some(info), listeners: vec![listener] };
    let add_bytes = golden(&add, &[len(1, "u"), len(2, info_bytes), len(100, listener_bytes)]);
    let keep = zds::KeepWorkload { uid: "u".into() };
    let keep_bytes = golden(&keep, &[len(1, "u")]);
    let del = zds::DelWorkload { uid: "u".into() };
    let del_bytes = golden(&del, &[len(2, "u")]);
    use zds::workload_request::Payload;
    for (payload, field, bytes) in [
        (Payload::Add(add), 1, add_bytes),
        (Payload::Del(del), 2, del_bytes),
        (Payload::SnapshotSent(zds::SnapshotSent {}), 3, Vec::new()),
        (Payload::Keep(keep), 5, keep_bytes),
    ] {
        golden(&zds::WorkloadRequest { payload: Some(payload) }, &[len(field, bytes)]);
    }
    let ack = zds::Ack { error: "no".into() };
    let ack_bytes = golden(&ack, &[len(1, "no")]);
    let payload = Some(zds::workload_response::Payload::Ack(ack));
    golden(&zds::WorkloadResponse { payload }, &[len(1, ack_bytes)]);
    // An empty ack is success, and is not an empty packet.
    let payload = Some(zds::workload_response::Payload::Ack(zds::Ack::default()));
    golden(&zds::WorkloadResponse { payload }, &[vec![0x0a, 0]]);
}

#[test]
fn discovery_request() {
    let metadata = Struct {
        fields: BTreeMap::from([("K".to_owned(), Value { kind: Some(Kind::StringValue("v".into())) })]),
    };
    let metadata_bytes = golden(&metadata, &[len(1, [len(1, "K"), len(2, len(3, "v"))].concat())]);
    let locality = core::Locality { region: "r".into(), zone: "z".into(), sub_zone: "s".into() };
    let locality_bytes = golden(&locality, &[len(1, "r"), len(2, "z"), len(3, "s")]);
    let node = core::Node {
        id: "i".into(),
        cluster: "c".into(),
        metadata: Some(metadata),
        locality: Some(locality),
    };
    let node_bytes =
        golden(&node, &[len(1, "i"), len(2, "c"), len(3, metadata_bytes), len(4, locality_bytes)]);
    let (detail, detail_bytes) = any();
    let status = rpc::Status { code: 3, message: "m".into(), details: vec![detail] };
    let status_bytes = golden(&status, &[int(1, 3), len(2, "m"), len(3, detail_bytes)]);
    let request = discovery::DeltaDiscoveryRequest {
        node: Some(node),
        type_url: "t".into(),
        resource_names_subscribe: vec!["*".into(), "a".into()],
        resource_names_unsubscribe: vec!["b".into()],
        initial_resource_versions: BTreeMap::from([("n".to_owned(), "v1".to_owned())]),
        response_nonce: "x".into(),
        error_detail: Some(status),
    };
    golden(
        &request,
        &[
            len(1, node_bytes),
            len(2, "t"),
            len(3, "*"),
            len(3, "a"),
            len(4, "b"),
            len(5, [len(1, "n"), len(2, "v1")].concat()),
            len(6, "x"),
            len(7, status_bytes),
        ],
    );
}

#[test]
fn discovery_response() {
    let (body, body_bytes) = any();
    let resource = discovery::Resource {
        version: "v".into(),
        resource: Some(body),
        name: "n".into(),
        aliases: vec!["a".into()],
        ttl: Some(prost_types::Duration { seconds: 5, nanos: 6 }),
        cache_control: Some(discovery::resource::CacheControl { do_not_cache: true }),
    };
    let resource_bytes = golden(
        &resource,
        &[
            len(1, "v"),
            len(2, body_bytes),
            len(3, "n"),
            len(4, "a"),
            len(6, [int(1, 5), int(2, 6)].concat()),
            len(7, int(1, 1)),
        ],
    );
    let response = discovery::DeltaDiscoveryResponse {
        system_version_info: "s".into(),
        resources: vec![resource],
        type_url: "t".into(),
        nonce: "o".into(),
        removed_resources: vec!["r".into()],
    };
    golden(&response, &[len(1, "s"), len(2, resource_bytes), len(4, "t"), len(5, "o"), len(6, "r")]);
}

#[test]
fn certificates() {
    let request = ca::IstioCertificateRequest {
        csr: "csr".into(),
        validity_duration: 86_400,
        metadata: Some(Struct::default()),
    };
    golden(&request, &[len(1, "csr"), int(3, 86_400), len(4, "")]);
    let response = ca::IstioCertificateResponse { cert_chain: vec!["leaf".into(), "root".into()] };
    golden(&response, &[len(1, "leaf"), len(1, "root")]);
}

#[test]
fn enum_values() {
    use security::{Action, Scope as PolicyScope};
    use workload::load_balancing::{HealthPolicy, Mode, Scope};
    let numbers = [
        (zds::Version::NotUsed as i32, 0),
        (zds::Version::V1 as i32, 1),
        (PolicyScope::Global as i32, 0),
        (PolicyScope::Namespace as i32, 1),
        (PolicyScope::WorkloadSelector as i32, 2),
        (Action::Allow as i32, 0),
        (Action::Deny as i32, 1),
        (workload::service::Visibility::Public as i32, 0),
        (workload::service::Visibility::Namespace as i32, 1),
        (workload::IpFamilies::Automatic as i32, 0),
        (workload::IpFamilies::Ipv4Only as i32, 1),
        (workload::IpFamilies::Ipv6Only as i32, 2),
        (workload::IpFamilies::Dual as i32, 3),
        (workload::NetworkMode::Standard as i32, 0),
        (workload::NetworkMode::HostNetwork as i32, 1),
        (Scope::UnspecifiedScope as i32, 0),
        (Scope::Region as i32, 1),
        (Scope::Zone as i32, 2),
        (Scope::Subzone as i32, 3),
        (Scope::Node as i32, 4),
        (Scope::Cluster as i32, 5),
        (Scope::Network as i32, 6),
        (Mode::UnspecifiedMode as i32, 0),
        (Mode::Strict as i32, 1),
        (Mode::Failover as i32, 2),
        (Mode::Passthrough as i32, 3),
        (HealthPolicy::OnlyHealthy as i32, 0),
        (HealthPolicy::AllowAll as i32, 1),
        (workload::WorkloadStatus::Healthy as i32, 0),
        (workload::WorkloadStatus::Unhealthy as i32, 1),
        (workload::WorkloadType::Deployment as i32, 0),
        (workload::WorkloadType::Cronjob as i32, 1),
        (workload::WorkloadType::Pod as i32, 2),
        (workload::WorkloadType::Job as i32, 3),
        (workload::AppProtocol::Unknown as i32, 0),
        (workload::AppProtocol::Http11 as i32, 1),
        (workload::AppProtocol::Http2 as i32, 2),
        (workload::AppProtocol::Grpc as i32, 3),
        (workload::AppProtocol::Tcp as i32, 4),
        (workload::AppProtocol::Tls as i32, 5),
        (workload::TunnelProtocol::None as i32, 0),
        (workload::TunnelProtocol::Hbone as i32, 1),
        (workload::TunnelProtocol::LegacyIstioMtls as i32, 2),
        (workload::application_tunnel::Protocol::None as i32, 0),
        (workload::application_tunnel::Protocol::Proxy as i32, 1),
    ];
    for (at, (ours, contract)) in numbers.into_iter().enumerate() {
        assert_eq!(ours, contract, "entry {at}");
    }
}

#[test]
fn names_on_the_wire() {
    assert_eq!(ambit_api::ADDRESS_TYPE_URL, "type.googleapis.com/istio.workload.Address");
    assert_eq!(ambit_api::AUTHORIZATION_TYPE_URL, "type.googleapis.com/istio.security.Authorization");
    let discovery = discovery::aggregated_discovery_service_server::SERVICE_NAME;
    assert_eq!(discovery, "envoy.service.discovery.v3.AggregatedDiscoveryService");
    assert_eq!(ca::istio_certificate_service_server::SERVICE_NAME, "istio.v1.auth.IstioCertificateService");
}

#[test]
fn equal_messages_encode_equally_in_any_order_of_insertion() {
    let entries: Vec<_> = (0..50).map(|n| (format!("ns/s{n}"), workload::PortList::default())).collect();
    let forward = workload::Workload { services: entries.iter().cloned().collect(), ..Default::default() };
    let backward = workload::Workload { services: entries.into_iter().rev().collect(), ..Default::default() };
    assert_eq!(forward.encode_to_vec(), backward.encode_to_vec());
}
