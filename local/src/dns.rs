//! The cluster DNS, which answers as CoreDNS does. Pods outside the mesh use it, and the mesh's own DNS forwards to it.
//!
//! It answers for services, pods of headless services and names added by calls. The cluster has no route to the outside, so
//! every other name does not exist.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, SOA, SRV};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use parking_lot::RwLock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::error::{Error, Result};
use crate::sandbox::Sandbox;
use crate::services::ServiceView;

/// Time to live of answers, seconds, as CoreDNS in a cluster gives it.
const TTL: u32 = 5;
/// The cluster's domain.
pub(crate) const CLUSTER_DOMAIN: &str = "cluster.local";
/// TCP connections that are served at once; others wait to be accepted.
const TCP_CONNECTIONS: usize = 256;
/// How long a TCP client may be silent.
const TCP_IDLE: Duration = Duration::from_secs(10);
/// Largest UDP answer without EDNS, bytes (RFC 1035 §4.2.1).
const UDP_PLAIN: u16 = 512;

/// All names the DNS knows.
#[derive(Debug, Default)]
pub(crate) struct Zone {
    names: HashMap<String, Entry>,
}

#[derive(Debug, Default, Clone)]
struct Entry {
    addresses: Vec<IpAddr>,
    /// Port and target name.
    services: Vec<(u16, String)>,
    /// The name that it is another name of, with the last dot.
    alias: Option<String>,
}

impl Zone {
    /// Names of services, and further `records`, by full name without the last dot.
    pub(crate) fn new(services: &[ServiceView], records: &BTreeMap<String, Vec<IpAddr>>) -> Self {
        let mut zone = Self::default();
        for service in services {
            zone.add_service(service);
        }
        for (name, addresses) in records {
            zone.entry(&format!("{}.", name.trim_end_matches('.'))).addresses.extend(addresses);
        }
        zone
    }

    /// Adds services of type ExternalName: namespace, name, and the name that each stands for (Kubernetes DNS-Based Service
    /// Discovery 1.1.0, §2.5).
    pub(crate) fn with_external_names(mut self, external: &[(String, String, String)]) -> Self {
        for (namespace, name, target) in external {
            let host = format!("{name}.{namespace}.svc.{CLUSTER_DOMAIN}.");
            let target = target.trim_end_matches('.').to_ascii_lowercase();
            self.entry(&host).alias = Some(format!("{target}."));
        }
        self
    }

    fn entry(&mut self, name: &str) -> &mut Entry {
        self.names.entry(name.to_ascii_lowercase()).or_default()
    }

    /// The names of the specification "Kubernetes DNS-Based Service Discovery" 1.1.0, §2.3 and §2.4.
    fn add_service(&mut self, service: &ServiceView) {
        let ServiceView { namespace, name, vips, ports, endpoints } = service;
        let host = format!("{name}.{namespace}.svc.{CLUSTER_DOMAIN}.");
        let headless = vips.is_empty();
        // The name exists even without endpoints.
        let entry = self.entry(&host);
        if headless {
            entry.addresses.extend(endpoints.iter().map(|(_, address)| *address));
        } else {
            entry.addresses.extend(vips);
        }
        let mut targets = Vec::new();
        for (hostname, address) in endpoints.iter().filter(|_| headless) {
            let label = hostname.clone().unwrap_or_else(|| address.to_string().replace(['.', ':'], "-"));
            let target = format!("{label}.{host}");
            self.entry(&target).addresses.push(*address);
            if !targets.contains(&target) {
                targets.push(target);
            }
        }
        for port in ports.iter().filter(|port| !port.name.is_empty()) {
            let protocol = port.protocol.to_ascii_lowercase();
            let entry = self.entry(&format!("_{}._{protocol}.{host}", port.name));
            if headless {
                entry.services.extend(targets.iter().map(|target| (port.port, target.clone())));
            } else {
                entry.services.push((port.port, host.clone()));
            }
        }
    }

    /// Answers one question message.
    pub(crate) fn answer(&self, question: &Message) -> Message {
        let mut answer = Message::new(question.metadata.id, MessageType::Response, question.metadata.op_code);
        answer.metadata = Metadata::response_from_request(&question.metadata);
        answer.metadata.authoritative = true;
        answer.metadata.recursion_available = true;
        if question.edns.is_some() {
            answer.edns = Some(Edns::new());
        }
        let (OpCode::Query, [query]) = (question.metadata.op_code, question.queries.as_slice()) else {
            answer.metadata.response_code = ResponseCode::NotImp;
            return answer;
        };
        answer.add_query(query.clone());
        match self.names.get(&query.name().to_ascii().to_ascii_lowercase()) {
            Some(entry) => self.fill(&mut answer, query, entry),
            None => answer.metadata.response_code = ResponseCode::NXDomain,
        }
        if answer.answers.is_empty()
            && let Some(authority) = authority()
        {
            answer.authorities.push(authority);
        }
        answer
    }

    fn fill(&self, answer: &mut Message, query: &Query, entry: &Entry) {
        let wanted = query.query_type();
        if let Some(target) = &entry.alias {
            self.fill_alias(answer, query, target);
            return;
        }
        answer.answers = address_records(query.name(), entry, wanted);
        if matches!(wanted, RecordType::SRV | RecordType::ANY) {
            for (port, target) in &entry.services {
                let Ok(name) = Name::from_ascii(target) else { continue };
                let record = SRV::new(0, 100, *port, name.clone());
                answer.answers.push(Record::from_rdata(query.name().clone(), TTL, RData::SRV(record)));
                if let Some(behind) = self.names.get(target) {
                    answer.additionals.extend(address_records(&name, behind, RecordType::ANY));
                }
            }
        }
    }
}

impl Zone {
    /// A CNAME, and the addresses behind it where this zone has them (RFC 1034 §3.6.2).
    fn fill_alias(&self, answer: &mut Message, query: &Query, target: &str) {
        let Ok(name) = Name::from_ascii(target) else { return };
        let alias = RData::CNAME(CNAME(name.clone()));
        answer.answers.push(Record::from_rdata(query.name().clone(), TTL, alias));
        if let Some(behind) = self.names.get(target) {
            answer.answers.extend(address_records(&name, behind, query.query_type()));
        }
    }
}

fn address_records(name: &Name, entry: &Entry, wanted: RecordType) -> Vec<Record> {
    let any = wanted == RecordType::ANY;
    let data = entry.addresses.iter().filter_map(|address| match address {
        IpAddr::V4(ip) if any || wanted == RecordType::A => Some(RData::A(A(*ip))),
        IpAddr::V6(ip) if any || wanted == RecordType::AAAA => Some(RData::AAAA(AAAA(*ip))),
        _ => None,
    });
    data.map(|data| Record::from_rdata(name.clone(), TTL, data)).collect()
}

/// RFC 2308 §3: a negative answer carries the zone's SOA, whose minimum says how long to remember it.
fn authority() -> Option<Record> {
    let zone = Name::from_ascii(format!("{CLUSTER_DOMAIN}.")).ok()?;
    let server = Name::from_ascii(format!("ns.dns.{CLUSTER_DOMAIN}.")).ok()?;
    let contact = Name::from_ascii(format!("hostmaster.{CLUSTER_DOMAIN}.")).ok()?;
    let soa = SOA::new(server, contact, 1, 7200, 1800, 86_400, TTL);
    Some(Record::from_rdata(zone, TTL, RData::SOA(soa)))
}

/// The running server. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Dns {
    zone: Arc<RwLock<Arc<Zone>>>,
    tasks: JoinSet<()>,
}

impl Dns {
    /// Serves UDP and TCP on each of `addresses` inside a sandbox.
    ///
    /// # Errors
    /// When a port is taken or the namespace is gone.
    pub(crate) async fn start(sandbox: &Sandbox, addresses: Vec<SocketAddr>) -> Result<Self> {
        let mut dns = Self { zone: Arc::default(), tasks: JoinSet::new() };
        for address in addresses {
            let attempt = format!("serve DNS on {address} in {}", sandbox.name());
            let sockets = sandbox.on(move || {
                let udp = std::net::UdpSocket::bind(address)?;
                let tcp = std::net::TcpListener::bind(address)?;
                udp.set_nonblocking(true)?;
                tcp.set_nonblocking(true)?;
                Ok((UdpSocket::from_std(udp)?, TcpListener::from_std(tcp)?))
            });
            let (udp, tcp) = sockets.await?.map_err(Error::system(attempt))?;
            dns.tasks.spawn(serve_udp(udp, Arc::clone(&dns.zone)));
            dns.tasks.spawn(serve_tcp(tcp, Arc::clone(&dns.zone)));
        }
        Ok(dns)
    }

    /// Puts another zone in place; questions from now on are answered from it.
    pub(crate) fn publish(&self, zone: Zone) {
        *self.zone.write() = Arc::new(zone);
    }
}

async fn serve_udp(socket: UdpSocket, zone: Arc<RwLock<Arc<Zone>>>) {
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        // An ICMP error of an earlier answer is returned by this call; the socket can still be used.
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
        let datagram = buffer.get(..length).unwrap_or_default();
        if let Some(answer) = respond(datagram, &zone, true) {
            socket.send_to(&answer, client).await.ok();
        }
    }
}

async fn serve_tcp(listener: TcpListener, zone: Arc<RwLock<Arc<Zone>>>) {
    let permits = Arc::new(Semaphore::new(TCP_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let zone = Arc::clone(&zone);
                connections.spawn(async move {
                    // An error concerns only this client.
                    tokio::time::timeout(TCP_IDLE, serve_stream(stream, &zone)).await.ok();
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a DNS connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

/// RFC 1035 §4.2.2: each message follows its length in two bytes.
async fn serve_stream(mut stream: TcpStream, zone: &RwLock<Arc<Zone>>) -> std::io::Result<()> {
    loop {
        let length = stream.read_u16().await?;
        let mut question = vec![0; usize::from(length)];
        stream.read_exact(&mut question).await?;
        let Some(answer) = respond(&question, zone, false) else { return Ok(()) };
        let Ok(length) = u16::try_from(answer.len()) else { return Ok(()) };
        stream.write_all(&[&length.to_be_bytes(), answer.as_slice()].concat()).await?;
    }
}

/// An unreadable question gets no answer, since not even its id is known to be right.
fn respond(question: &[u8], zone: &RwLock<Arc<Zone>>, udp: bool) -> Option<Vec<u8>> {
    let question = Message::from_vec(question).ok()?;
    if question.metadata.message_type != MessageType::Query {
        return None;
    }
    let zone = Arc::clone(&zone.read());
    let answer = zone.answer(&question);
    let bytes = answer.to_vec().ok()?;
    let limit = question.edns.as_ref().map_or(UDP_PLAIN, Edns::max_payload);
    if udp && bytes.len() > usize::from(limit) { answer.truncate().to_vec().ok() } else { Some(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::PortView;
    use std::collections::BTreeSet;

    fn service(name: &str, vips: &[&str], endpoints: &[(Option<&str>, &str)]) -> ServiceView {
        let address = |ip: &&str| ip.parse().expect("a valid address");
        ServiceView {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            vips: vips.iter().map(address).collect(),
            ports: vec![PortView {
                name: "http".to_owned(),
                protocol: "TCP".to_owned(),
                port: 80,
                targets: BTreeSet::new(),
            }],
            endpoints: endpoints.iter().map(|(name, ip)| (name.map(str::to_owned), address(ip))).collect(),
        }
    }

    fn ask(name: &str, kind: RecordType) -> Message {
        let services = [
            service("web", &["10.96.1.0", "fd00:10:96::100"], &[(None, "10.244.1.2")]),
            service("db", &[], &[(Some("zero"), "10.244.1.3"), (None, "10.244.1.4")]),
        ];
        let records = [("outside.example".to_owned(), vec![IpAddr::from([192, 0, 2, 1])])].into();
        let mut question = Message::query();
        question.add_query(Query::query(Name::from_ascii(name).expect("a valid name"), kind));
        let external = |name: &str, target: &str| ("shop".to_owned(), name.to_owned(), target.to_owned());
        let external = [external("ext", "Outside.example"), external("far", "elsewhere.example.")];
        Zone::new(&services, &records).with_external_names(&external).answer(&question)
    }

    fn data(message: &Message) -> Vec<String> {
        message.answers.iter().map(|record| record.data.to_string()).collect()
    }

    #[test]
    fn a_service_resolves_to_its_vips_by_family() {
        assert_eq!(data(&ask("Web.shop.svc.cluster.local.", RecordType::A)), ["10.96.1.0"]);
        assert_eq!(data(&ask("web.shop.svc.cluster.local.", RecordType::AAAA)), ["fd00:10:96::100"]);
    }

    #[test]
    fn an_external_name_is_answered_with_its_cname() {
        let known = ask("ext.shop.svc.cluster.local.", RecordType::A);
        assert_eq!(data(&known), ["outside.example.", "192.0.2.1"]);
        let unknown = ask("far.shop.svc.cluster.local.", RecordType::AAAA);
        assert_eq!(data(&unknown), ["elsewhere.example."]);
        assert_eq!(unknown.metadata.response_code, ResponseCode::NoError);
    }

    #[test]
    fn a_headless_service_resolves_to_its_pods_and_names_them() {
        assert_eq!(data(&ask("db.shop.svc.cluster.local.", RecordType::A)), ["10.244.1.4", "10.244.1.3"]);
        assert_eq!(data(&ask("zero.db.shop.svc.cluster.local.", RecordType::A)), ["10.244.1.3"]);
        let answer = ask("_http._tcp.db.shop.svc.cluster.local.", RecordType::SRV);
        assert_eq!(answer.answers.len(), 2);
        assert_eq!(answer.additionals.len(), 2);
    }

    #[test]
    fn a_known_name_without_the_type_is_not_nxdomain() {
        let empty = ask("db.shop.svc.cluster.local.", RecordType::AAAA);
        assert_eq!(empty.metadata.response_code, ResponseCode::NoError);
        assert_eq!((empty.answers.len(), empty.authorities.len()), (0, 1));
        let unknown = ask("nobody.shop.svc.cluster.local.", RecordType::A);
        assert_eq!(unknown.metadata.response_code, ResponseCode::NXDomain);
    }

    #[test]
    fn a_given_record_is_answered() {
        assert_eq!(data(&ask("outside.example.", RecordType::A)), ["192.0.2.1"]);
    }
}
