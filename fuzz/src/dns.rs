//! DNS: questions of pods, answers of resolvers, and the file that names resolvers.

use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use ambit_api::workload::{
    Address, NetworkAddress, Port, PortList, Service, TunnelProtocol, Workload, address,
};
use ambit_directory::{Directory, Snapshot, Update};
use ambit_runtime::resolv_conf::ResolvConf;
use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::RData;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use ztunnel::dns::message::{MAX_UDP, Question, Unreadable};
use ztunnel::dns::resolver::{Outcome, Resolver};
use ztunnel::dns::wire;

use crate::pieces::cut;

/// Endpoints of the service without an address: more than fit into the smallest answer.
const ENDPOINTS: u8 = 60;

/// A service of each kind that DNS distinguishes.
static WORLD: LazyLock<Arc<Snapshot>> = LazyLock::new(|| {
    let (mut directory, reader) = Directory::new();
    let endpoints = (0..ENDPOINTS).map(|number| {
        let port = Port { service_port: 80, target_port: 8080, app_protocol: 1 };
        let ports = PortList { ports: vec![port], ..PortList::default() };
        let workload = Workload {
            uid: format!("Kubernetes//Pod/shop/peer-{number}"),
            name: format!("peer-{number}"),
            namespace: "shop".into(),
            addresses: vec![vec![10, 0, 0, number].into()],
            tunnel_protocol: TunnelProtocol::Hbone.into(),
            hostname: if number == 0 { "machine.example.org".into() } else { String::new() },
            services: [("shop/peers.shop.svc.cluster.local".to_owned(), ports)].into(),
            ..Workload::default()
        };
        address::Type::Workload(workload)
    });
    let service = |namespace: &str, hostname: &str, addresses: &[&[u8]]| {
        let address =
            |bytes: &&[u8]| NetworkAddress { address: bytes.to_vec().into(), ..NetworkAddress::default() };
        address::Type::Service(Service {
            namespace: namespace.into(),
            hostname: hostname.into(),
            addresses: addresses.iter().map(address).collect(),
            ports: vec![Port { service_port: 80, target_port: 8080, app_protocol: 1 }],
            ..Service::default()
        })
    };
    let v6: &[u8] = &[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let services = [
        service("shop", "db.shop.svc.cluster.local", &[&[10, 0, 1, 1], v6]),
        service("shop", "peers.shop.svc.cluster.local", &[]),
        service("shop", "api.example.com", &[]),
        service("shop", "*.example.net", &[&[10, 0, 1, 2]]),
    ];
    let update = |kind| Update::Address { name: String::new(), address: Address { r#type: Some(kind) } };
    let rejected = directory.apply(endpoints.chain(services).map(update));
    assert!(rejected.is_empty(), "{rejected:?}");
    reader.snapshot()
});

/// A question, after a byte that says whether it came by TCP and from which namespace. What is answered fits, belongs
/// to the question, can be read, and names addresses of the directory only.
pub(crate) fn question(data: &[u8]) {
    let Some((flags, query)) = data.split_first() else { return };
    let question = match Question::read(query) {
        Ok(question) => question,
        Err(Unreadable::Ignore) => return,
        Err(Unreadable::Refuse(refusal)) => {
            assert_ne!(response_to(query, &refusal).metadata.response_code, ResponseCode::NoError);
            return assert!(refusal.len() <= MAX_UDP);
        }
    };
    assert!((512..=MAX_UDP).contains(&question.udp_limit));
    let failure = question.fail(ResponseCode::ServFail).expect("a failure can be encoded");
    assert_eq!(response_to(query, &failure).metadata.response_code, ResponseCode::ServFail);
    let namespace = if flags & 2 == 0 { "shop" } else { "street" };
    let resolver = Resolver { snapshot: &WORLD, namespace, network: "", cluster_domain: "cluster.local" };
    let outcome = resolver.resolve(&question.query, &mut SmallRng::seed_from_u64(1));
    let Outcome::Answer(answer) = outcome else { return };
    let limit = if flags & 1 == 0 { question.udp_limit } else { wire::MAX_MESSAGE };
    let (bytes, cut) = question.answer(answer, limit).expect("an answer that fits");
    assert!(bytes.len() <= limit);
    let response = response_to(query, &bytes);
    assert_eq!(response.metadata.truncation, cut);
    for record in response.answers.iter().chain(&response.additionals) {
        let ip: IpAddr = match &record.data {
            RData::A(a) => a.0.into(),
            RData::AAAA(aaaa) => aaaa.0.into(),
            _ => continue,
        };
        let known = WORLD.workload_at("", ip).is_some() || WORLD.service_at("", ip, "shop").is_some();
        assert!(known, "{ip} is nobody's");
    }
}

/// A response as another reader has it.
fn response_to(query: &[u8], bytes: &[u8]) -> Message {
    let response = Message::from_vec(bytes).expect("a response that can be read");
    assert_eq!(response.metadata.message_type, MessageType::Response);
    assert_eq!(Some(response.metadata.id), wire::id(query));
    if wire::question(query).is_some() && !response.queries.is_empty() {
        assert!(wire::answers(query, bytes), "its own question is not recognised");
    }
    response
}

/// A query and what a resolver made of it. What is passed on carries the query's id and question; what is cut stays readable.
pub(crate) fn answer(data: &[u8]) {
    let parts = cut(data);
    let (query, response) = (parts[0], parts.get(1).copied().unwrap_or_default());
    let readable = Message::from_vec(response);
    if wire::answers(query, response) {
        assert_eq!(wire::id(query), wire::id(response));
        if let (Ok(asked), Ok(answered)) = (Message::from_vec(query), &readable) {
            assert_eq!(answered.metadata.message_type, MessageType::Response);
            match (asked.queries.as_slice(), answered.queries.as_slice()) {
                ([asked], [answered]) => {
                    assert!(asked.name().eq_ignore_root(answered.name()) || asked.name() == answered.name());
                    assert_eq!(asked.query_type(), answered.query_type());
                }
                (_, answered_queries) => {
                    assert!(answered_queries.is_empty());
                    assert_ne!(answered.metadata.response_code, ResponseCode::NoError);
                }
            }
        }
    }
    if let Some(cut) = wire::truncated(response) {
        assert!(cut.len() <= 512, "{} bytes after the cut", cut.len());
        if readable.is_ok() {
            let cut = Message::from_vec(&cut).expect("what was cut can be read");
            assert!(cut.metadata.truncation && cut.answers.is_empty() && cut.additionals.is_empty());
        }
    }
    let other = wire::with_id(response, 7);
    assert_eq!(other.get(2..), response.get(2..));
}

/// Resolvers are addresses of the file, each once, none of this host alone.
pub(crate) fn resolv_conf(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let found = ResolvConf::parse(text).reachable_from_pods();
    let named = |ip: IpAddr| text.split_whitespace().any(|word| word.parse() == Ok(ip));
    for (index, server) in found.iter().enumerate() {
        assert_eq!(server.port(), 53);
        assert!(!server.ip().is_loopback() && named(server.ip()));
        assert!(!found[..index].contains(server));
    }
}
