//! Protobuf by the field numbers of the contract, without the types that the programs are built with.
//!
//! Messages are JSON values here; bytes are hexadecimal text. A field that the contract does not name is an error.

use std::collections::HashMap;
use std::sync::LazyLock;

use bytes::{Buf, Bytes};
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};
use serde_json::{Map, Value, json};

/// Messages and enumerations: name, then fields as `name number type`; `rep` and `map` as in the contract.
const CONTRACT: &str = "
message Address: workload 1 Workload, service 2 Service
message Service: name 1 string, namespace 2 string, hostname 3 string, addresses 4 rep NetworkAddress, ports 5 rep Port, subject_alt_names 6 rep string, waypoint 7 GatewayAddress, load_balancing 8 LoadBalancing, ip_families 9 IPFamilies, extensions 10 rep Extension, canonical 11 bool, ingress_use_waypoint 12 bool, weighted_waypoints 13 rep WeightedWaypoint, visibility 14 Visibility
enum Visibility: PUBLIC 0, NAMESPACE 1
enum IPFamilies: AUTOMATIC 0, IPV4_ONLY 1, IPV6_ONLY 2, DUAL 3
enum NetworkMode: STANDARD 0, HOST_NETWORK 1
message LoadBalancing: routing_preference 1 rep LoadBalancingScope, mode 2 Mode, health_policy 3 HealthPolicy
enum LoadBalancingScope: UNSPECIFIED_SCOPE 0, REGION 1, ZONE 2, SUBZONE 3, NODE 4, CLUSTER 5, NETWORK 6
enum Mode: UNSPECIFIED_MODE 0, STRICT 1, FAILOVER 2, PASSTHROUGH 3
enum HealthPolicy: ONLY_HEALTHY 0, ALLOW_ALL 1
message Workload: name 1 string, namespace 2 string, addresses 3 rep bytes, network 4 string, tunnel_protocol 5 TunnelProtocol, trust_domain 6 string, service_account 7 string, waypoint 8 GatewayAddress, node 9 string, canonical_name 10 string, canonical_revision 11 string, workload_type 12 WorkloadType, workload_name 13 string, native_tunnel 14 bool, authorization_policies 16 rep string, status 17 WorkloadStatus, cluster_id 18 string, network_gateway 19 GatewayAddress, uid 20 string, hostname 21 string, services 22 map PortList, application_tunnel 23 ApplicationTunnel, locality 24 Locality, network_mode 25 NetworkMode, extensions 26 rep Extension, capacity 27 UInt32Value, serving_while_terminating 100 bool, created 101 uint32
message Locality: region 1 string, zone 2 string, subzone 3 string
enum WorkloadStatus: HEALTHY 0, UNHEALTHY 1
enum WorkloadType: DEPLOYMENT 0, CRONJOB 1, POD 2, JOB 3
message PortList: ports 1 rep Port
message Port: service_port 1 uint32, target_port 2 uint32, app_protocol 3 AppProtocol
enum AppProtocol: UNKNOWN 0, HTTP11 1, HTTP2 2, GRPC 3, TCP 4, TLS 5
enum TunnelProtocol: NONE 0, HBONE 1, LEGACY_ISTIO_MTLS 2
message ApplicationTunnel: protocol 1 ApplicationProtocol, port 2 uint32
enum ApplicationProtocol: NONE 0, PROXY 1
message GatewayAddress: hostname 1 NamespacedHostname, address 2 NetworkAddress, hbone_mtls_port 3 uint32
message WeightedWaypoint: destination 1 GatewayAddress, weight 2 uint32
message NetworkAddress: network 1 string, address 2 bytes, length 3 uint32
message NamespacedHostname: namespace 1 string, hostname 2 string
message Extension: name 1 string, config 2 Any
message Authorization: name 1 string, namespace 2 string, scope 3 PolicyScope, action 4 Action, rules 5 rep Rule, dry_run 6 bool, extensions 7 rep Extension
enum PolicyScope: GLOBAL 0, NAMESPACE 1, WORKLOAD_SELECTOR 2
enum Action: ALLOW 0, DENY 1
message Rule: clauses 1 rep Clause
message Clause: matches 2 rep Match
message Match: namespaces 1 rep StringMatch, not_namespaces 2 rep StringMatch, principals 3 rep StringMatch, not_principals 4 rep StringMatch, source_ips 5 rep PolicyAddress, not_source_ips 6 rep PolicyAddress, destination_ips 7 rep PolicyAddress, not_destination_ips 8 rep PolicyAddress, destination_ports 9 rep uint32, not_destination_ports 10 rep uint32, service_accounts 11 rep ServiceAccountMatch, not_service_accounts 12 rep ServiceAccountMatch, extensions 13 rep Extension
message PolicyAddress: address 1 bytes, length 2 uint32
message ServiceAccountMatch: namespace 1 string, serviceAccount 2 string
message StringMatch: exact 1 string, prefix 2 string, suffix 3 string, presence 4 Empty
message Empty:
message UInt32Value: value 1 uint32
message Any: type_url 1 string, value 2 bytes
message DeltaDiscoveryRequest: node 1 Node, type_url 2 string, resource_names_subscribe 3 rep string, resource_names_unsubscribe 4 rep string, initial_resource_versions 5 map string, response_nonce 6 string, error_detail 7 Status
message DeltaDiscoveryResponse: system_version_info 1 string, resources 2 rep Resource, type_url 4 string, nonce 5 string, removed_resources 6 rep string
message Resource: version 1 string, resource 2 Any, name 3 string, aliases 4 rep string
message Status: code 1 uint32, message 2 string, details 3 rep Any
message Node: id 1 string, cluster 2 string, metadata 3 Struct
message Struct: fields 1 map StructValue
message StructValue: string_value 3 string
message IstioCertificateRequest: csr 1 string, validity_duration 3 uint32, metadata 4 Struct
message IstioCertificateResponse: cert_chain 1 rep string
message ZdsHello: version 1 Version, takes_listeners 100 bool
enum Version: NOT_USED 0, V1 1
message WorkloadInfo: name 1 string, namespace 2 string, service_account 3 string
message AddWorkload: uid 1 string, workload_info 2 WorkloadInfo, listeners 100 rep Listener
message Listener: port 1 uint32, udp 2 bool, ipv6 3 bool
message KeepWorkload: uid 1 string
message DelWorkload: uid 2 string
message SnapshotSent:
message WorkloadRequest: add 1 AddWorkload, del 2 DelWorkload, snapshot_sent 3 SnapshotSent, keep 5 KeepWorkload
message Ack: error 1 string
message WorkloadResponse: ack 1 Ack
";

struct Field {
    name: &'static str,
    number: u32,
    kind: &'static str,
    form: Form,
}

#[derive(PartialEq)]
enum Form {
    Single,
    Repeated,
    Map,
}

#[derive(Default)]
struct Contract {
    messages: HashMap<&'static str, Vec<Field>>,
    enumerations: HashMap<&'static str, Vec<(&'static str, u64)>>,
}

static TABLE: LazyLock<Contract> = LazyLock::new(|| {
    let mut contract = Contract::default();
    for line in CONTRACT.lines().filter(|line| !line.is_empty()) {
        let (head, body) = line.split_once(':').unwrap();
        let parts = body.split(',').map(str::trim).filter(|part| !part.is_empty());
        match head.split_once(' ').unwrap() {
            ("enum", name) => {
                let value = |part: &'static str| {
                    let (name, number) = part.split_once(' ').unwrap();
                    (name, number.parse().unwrap())
                };
                contract.enumerations.insert(name, parts.map(value).collect());
            }
            (_, name) => drop(contract.messages.insert(name, parts.map(field).collect())),
        }
    }
    contract
});

fn field(part: &'static str) -> Field {
    let words: Vec<&'static str> = part.split(' ').collect();
    let (form, kind) = match words.as_slice() {
        [_, _, "rep", kind] => (Form::Repeated, *kind),
        [_, _, "map", kind] => (Form::Map, *kind),
        [_, _, kind] => (Form::Single, *kind),
        other => panic!("{other:?}"),
    };
    Field { name: words[0], number: words[1].parse().unwrap(), kind, form }
}

fn fields(message: &str) -> &'static [Field] {
    TABLE.messages.get(message).unwrap_or_else(|| panic!("no message {message}"))
}

fn is_number(kind: &str) -> bool {
    matches!(kind, "uint32" | "bool") || TABLE.enumerations.contains_key(kind)
}

/// Encodes a message.
pub(crate) fn encode(message: &str, value: &Value) -> Vec<u8> {
    let mut buffer = Vec::new();
    for (name, value) in value.as_object().unwrap_or_else(|| panic!("{message} is {value}")) {
        let known = fields(message).iter().find(|field| field.name == name);
        let field = known.unwrap_or_else(|| panic!("{message} has no field {name}"));
        match field.form {
            Form::Single => encode_one(field.number, field.kind, value, &mut buffer),
            Form::Repeated => {
                value
                    .as_array()
                    .unwrap()
                    .iter()
                    .for_each(|it| encode_one(field.number, field.kind, it, &mut buffer));
            }
            Form::Map => {
                for (key, value) in value.as_object().unwrap() {
                    let mut entry = Vec::new();
                    encode_one(1, "string", &json!(key), &mut entry);
                    encode_one(2, field.kind, value, &mut entry);
                    delimited(field.number, &entry, &mut buffer);
                }
            }
        }
    }
    buffer
}

fn encode_one(number: u32, kind: &str, value: &Value, buffer: &mut Vec<u8>) {
    if is_number(kind) {
        encode_key(number, WireType::Varint, buffer);
        return encode_varint(number_of(kind, value), buffer);
    }
    match kind {
        "string" => delimited(number, value.as_str().unwrap().as_bytes(), buffer),
        "bytes" => delimited(number, &from_hex(value.as_str().unwrap()), buffer),
        message => delimited(number, &encode(message, value), buffer),
    }
}

fn number_of(kind: &str, value: &Value) -> u64 {
    match value {
        Value::Bool(value) => u64::from(*value),
        Value::String(name) => {
            let values = &TABLE.enumerations[kind];
            values.iter().find(|(known, _)| known == name).unwrap_or_else(|| panic!("{kind} has no {name}")).1
        }
        other => other.as_u64().unwrap(),
    }
}

fn delimited(number: u32, content: &[u8], buffer: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, buffer);
    encode_varint(content.len() as u64, buffer);
    buffer.extend_from_slice(content);
}

/// Decodes a message. What the contract does not name fails, with its number.
pub(crate) fn decode(message: &str, bytes: &[u8]) -> Value {
    let mut bytes = Bytes::copy_from_slice(bytes);
    let mut value = Map::new();
    while bytes.has_remaining() {
        let (number, wire_type) = decode_key(&mut bytes).unwrap();
        let known = fields(message).iter().find(|field| field.number == number);
        let field = known.unwrap_or_else(|| panic!("field {number} of {message} is not in the contract"));
        let is_packed = wire_type == WireType::LengthDelimited && is_number(field.kind);
        let decoded = match wire_type {
            WireType::Varint => vec![shown(field.kind, decode_varint(&mut bytes).unwrap())],
            WireType::LengthDelimited => {
                let length = usize::try_from(decode_varint(&mut bytes).unwrap()).unwrap();
                let mut content = bytes.split_to(length);
                match is_packed {
                    true => std::iter::from_fn(|| {
                        content.has_remaining().then(|| decode_varint(&mut content).unwrap())
                    })
                    .map(|number| shown(field.kind, number))
                    .collect(),
                    false if field.form == Form::Map => vec![entry(field.kind, content)],
                    false => vec![content_of(field.kind, &content)],
                }
            }
            other => panic!("{other:?} for field {number} of {message}"),
        };
        put(&mut value, field, decoded);
    }
    Value::Object(value)
}

fn put(value: &mut Map<String, Value>, field: &Field, decoded: Vec<Value>) {
    match field.form {
        Form::Single => drop(value.insert(field.name.to_owned(), decoded.into_iter().last().unwrap())),
        Form::Repeated => {
            let list = value.entry(field.name).or_insert_with(|| json!([]));
            list.as_array_mut().unwrap().extend(decoded);
        }
        Form::Map => {
            let map = value.entry(field.name).or_insert_with(|| json!({}));
            for entry in decoded {
                map.as_object_mut().unwrap().extend(entry.as_object().unwrap().clone());
            }
        }
    }
}

fn entry(kind: &str, mut content: Bytes) -> Value {
    let (mut key, mut value) = (String::new(), if kind == "string" { json!("") } else { json!({}) });
    while content.has_remaining() {
        let (number, _) = decode_key(&mut content).unwrap();
        let length = usize::try_from(decode_varint(&mut content).unwrap()).unwrap();
        let part = content.split_to(length);
        match number {
            1 => key = String::from_utf8(part.to_vec()).unwrap(),
            2 => value = content_of(kind, &part),
            other => panic!("field {other} of a map's entry"),
        }
    }
    json!({ key: value })
}

fn content_of(kind: &str, content: &[u8]) -> Value {
    match kind {
        "string" => json!(std::str::from_utf8(content).unwrap()),
        "bytes" => json!(hex(content)),
        message => decode(message, content),
    }
}

fn shown(kind: &str, number: u64) -> Value {
    match TABLE.enumerations.get(kind) {
        _ if kind == "bool" => json!(number != 0),
        None => json!(number),
        Some(values) => {
            let known = values.iter().find(|(_, value)| *value == number);
            json!(known.unwrap_or_else(|| panic!("{kind} has no value {number}")).0)
        }
    }
}

/// Bytes as hexadecimal text.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// A resource as the server sends it.
pub(crate) fn resource(message: &str, type_url: &str, name: &str, version: &str, value: &Value) -> Value {
    let body = hex(&encode(message, value));
    json!({ "name": name, "version": version, "resource": { "type_url": type_url, "value": body } })
}

/// The body of a received resource.
pub(crate) fn body(message: &str, resource: &Value) -> Value {
    decode(message, &from_hex(resource["resource"]["value"].as_str().unwrap()))
}
