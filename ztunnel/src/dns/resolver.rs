//! What to answer: a pure function of a directory snapshot, the client and a question.

use std::net::IpAddr;
use std::sync::Arc;

use ambit_directory::{AppProtocol, HealthPolicy, Service, Snapshot, Vip, Workload};
use hickory_proto::op::Query;
use hickory_proto::rr::rdata::{A, AAAA, SOA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use rand::Rng;
use rand::seq::SliceRandom;

use super::names::{candidates, dashed};

/// How long a client may keep an answer, in seconds: as short as cluster resolvers have it.
pub const TTL: u32 = 30;
/// Records in one answer, at most; of more endpoints a random choice is given.
const MAX_RECORDS: usize = 1000;

/// What is to be done with a question.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The directory knows the name.
    Answer(Answer),
    /// It does not.
    Forward,
}

/// The sections of an answer. Without answers, `authorities` says for how long there will be none.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// What was asked for.
    pub answers: Vec<Record>,
    /// For how long an empty answer holds.
    pub authorities: Vec<Record>,
    /// Addresses of the answers' targets.
    pub additionals: Vec<Record>,
}

/// Who asks, and what is known.
#[derive(Debug, Clone, Copy)]
pub struct Resolver<'a> {
    /// What is known.
    pub snapshot: &'a Snapshot,
    /// The client's namespace.
    pub namespace: &'a str,
    /// The client's network.
    pub network: &'a str,
    /// The domain of the cluster's names, lower case, no dot at its ends.
    pub cluster_domain: &'a str,
}

/// What a name was found to be.
enum Found<'a> {
    Service(&'a Arc<Service>),
    /// One endpoint of a headless service, or a workload with a name of its own.
    Workload(&'a Arc<Workload>),
}

impl<'a> Resolver<'a> {
    /// Decides on one question; `rng` orders the endpoints of headless services.
    pub fn resolve(&self, question: &Query, rng: &mut impl Rng) -> Outcome {
        if question.query_class() != DNSClass::IN {
            return Outcome::Forward;
        }
        let name = question.name().to_lowercase().to_ascii();
        let name = name.trim_end_matches('.');
        if question.query_type() == RecordType::SRV {
            return self.srv(question.name(), name, rng);
        }
        let Some(found) = self.find(name) else { return Outcome::Forward };
        let addresses = match found {
            Found::Service(service) => self.service_addresses(service, rng),
            Found::Workload(workload) => workload.addresses.to_vec(),
        };
        let in_cluster = match found {
            Found::Service(service) => self.is_cluster_name(&service.host.hostname),
            Found::Workload(_) => true,
        };
        // The directory knows an outside host without knowing where it is: resolvers do.
        if addresses.is_empty() && !in_cluster {
            return Outcome::Forward;
        }
        let answers = match question.query_type() {
            kind @ (RecordType::A | RecordType::AAAA) => {
                let of_kind =
                    addresses.into_iter().filter(|address| address.is_ipv4() == (kind == RecordType::A));
                of_kind.map(|address| address_record(question.name(), address)).collect()
            }
            // Only resolvers know what else there is of an outside host.
            _ if !in_cluster => return Outcome::Forward,
            _ => Vec::new(),
        };
        Outcome::Answer(self.with_authority(answers, question.name(), in_cluster))
    }

    fn find(&self, name: &str) -> Option<Found<'a>> {
        candidates(name, self.namespace, self.cluster_domain).iter().find_map(|name| {
            let service = self.snapshot.service_named(name, self.namespace).map(Found::Service);
            service.or_else(|| self.named_workload(name)).or_else(|| self.endpoint(name))
        })
    }

    /// A workload with a host name and addresses of its own.
    fn named_workload(&self, name: &str) -> Option<Found<'a>> {
        let workloads = self.snapshot.workloads_named(name).iter();
        let mut reachable = workloads.filter(|workload| self.is_reachable(workload));
        reachable.find(|workload| !workload.addresses.is_empty()).map(Found::Workload)
    }

    /// `<endpoint>.<headless service>`: an endpoint by its pod's name or its address with dashes.
    fn endpoint(&self, name: &str) -> Option<Found<'a>> {
        let (label, rest) = name.split_once('.')?;
        let service = self.snapshot.service_named(rest, self.namespace)?;
        // A wildcard service has no endpoints of their own names.
        if !service.is_headless() || &*service.host.hostname != rest {
            return None;
        }
        let called = |workload: &&Arc<Workload>| {
            &*workload.name == label || workload.addresses.iter().any(|address| dashed(*address) == label)
        };
        self.endpoints(service).find(called).map(Found::Workload)
    }

    /// The endpoints that clients should see.
    fn endpoints(&self, service: &'a Service) -> impl Iterator<Item = &'a Arc<Workload>> {
        let endpoints = self.snapshot.endpoints(service.host.as_ref());
        let all = service.load_balancing.health == HealthPolicy::AllowAll;
        endpoints
            .into_iter()
            .flat_map(|endpoints| endpoints.iter())
            .map(|endpoint| &endpoint.workload)
            .filter(move |workload| all || workload.is_healthy())
            .filter(|workload| self.is_reachable(workload))
    }

    /// Addresses of another network mean nothing here.
    fn is_reachable(&self, workload: &Workload) -> bool {
        *workload.network == *self.network
    }

    /// The service's own addresses, or its endpoints' in random order.
    fn service_addresses(&self, service: &Service, rng: &mut impl Rng) -> Vec<IpAddr> {
        if !service.is_headless() {
            let vips = service.vips.iter().filter_map(|vip| match vip {
                Vip::Address(vip) => (*vip.network == *self.network).then_some(vip.address),
                Vip::Net { .. } => None,
            });
            return vips.collect();
        }
        let mut addresses: Vec<IpAddr> = match self.snapshot.service(service.host.as_ref()) {
            Some(service) => {
                self.endpoints(service).flat_map(|workload| workload.addresses.iter().copied()).collect()
            }
            None => Vec::new(),
        };
        addresses.shuffle(rng);
        addresses.truncate(MAX_RECORDS);
        addresses
    }

    fn is_cluster_name(&self, hostname: &str) -> bool {
        hostname.strip_suffix(self.cluster_domain).is_some_and(|rest| rest.ends_with('.'))
    }

    /// `_<port>._tcp.<service>`, or the service alone for all its ports.
    fn srv(&self, asked: &Name, name: &str, rng: &mut impl Rng) -> Outcome {
        let (port, service) = match split_srv(name) {
            Some((port, rest)) => (Some(port), rest),
            None => (None, name),
        };
        let Some(Found::Service(service)) = self.find(service) else { return Outcome::Forward };
        let ports: Vec<u16> = service
            .ports
            .iter()
            .filter(|mapping| port.is_none_or(|port| means(port, mapping.service_port, mapping.app_protocol)))
            .map(|mapping| mapping.service_port)
            .collect();
        // Port names are not part of the contract; if protocol and number are not sufficient, the question goes to the resolvers.
        if ports.is_empty() {
            return Outcome::Forward;
        }
        let mut answer = Answer::default();
        if service.is_headless() {
            self.srv_of_endpoints(asked, service, &ports, rng, &mut answer);
        } else {
            self.srv_of_service(asked, service, &ports, rng, &mut answer);
        }
        if answer.answers.is_empty() {
            return Outcome::Answer(self.with_authority(Vec::new(), asked, true));
        }
        Outcome::Answer(answer)
    }

    fn srv_of_service(
        &self,
        asked: &Name,
        service: &Service,
        ports: &[u16],
        rng: &mut impl Rng,
        answer: &mut Answer,
    ) {
        let Ok(target) = fully_qualified(&service.host.hostname) else { return };
        for port in ports {
            answer.answers.push(srv_record(asked, *port, &target));
        }
        let addresses = self.service_addresses(service, rng);
        answer.additionals.extend(addresses.into_iter().map(|address| address_record(&target, address)));
    }

    fn srv_of_endpoints(
        &self,
        asked: &Name,
        service: &Arc<Service>,
        ports: &[u16],
        rng: &mut impl Rng,
        answer: &mut Answer,
    ) {
        let Some(endpoints) = self.snapshot.endpoints(service.host.as_ref()) else { return };
        let all = service.load_balancing.health == HealthPolicy::AllowAll;
        let mut endpoints: Vec<_> = endpoints
            .iter()
            .filter(|endpoint| all || endpoint.workload.is_healthy())
            .filter(|endpoint| self.is_reachable(&endpoint.workload))
            .collect();
        endpoints.shuffle(rng);
        endpoints.truncate(MAX_RECORDS);
        for endpoint in endpoints {
            let Some(first) = endpoint.workload.addresses.first() else { continue };
            let Ok(target) = fully_qualified(&format!("{}.{}", dashed(*first), service.host.hostname)) else {
                continue;
            };
            for port in ports.iter().filter_map(|port| endpoint.target_port(service, *port)) {
                answer.answers.push(srv_record(asked, port, &target));
            }
            let addresses = endpoint.workload.addresses.iter();
            answer.additionals.extend(addresses.map(|address| address_record(&target, *address)));
        }
    }

    /// RFC 2308 §3: an answer without records says for how long.
    fn with_authority(&self, answers: Vec<Record>, asked: &Name, in_cluster: bool) -> Answer {
        let mut answer = Answer { answers, ..Answer::default() };
        if answer.answers.is_empty() {
            let zone = if in_cluster { fully_qualified(self.cluster_domain).ok() } else { None };
            let zone = zone.unwrap_or_else(|| asked.clone());
            answer.authorities.extend(soa_record(zone));
        }
        answer
    }
}

/// Takes `_port._tcp.` off.
fn split_srv(name: &str) -> Option<(&str, &str)> {
    let (port, rest) = name.strip_prefix('_')?.split_once('.')?;
    let rest = rest.strip_prefix("_tcp.")?;
    Some((port, rest))
}

/// Whether a port's label in a SRV name means this port: by number, or by what is spoken there.
fn means(label: &str, port: u16, protocol: AppProtocol) -> bool {
    if label.parse() == Ok(port) {
        return true;
    }
    match protocol {
        AppProtocol::Http11 => label == "http",
        AppProtocol::Http2 => matches!(label, "http2" | "h2c"),
        AppProtocol::Grpc => label == "grpc",
        AppProtocol::Tcp => label == "tcp",
        AppProtocol::Tls => matches!(label, "tls" | "https"),
        AppProtocol::Unknown => false,
    }
}

fn fully_qualified(name: &str) -> Result<Name, hickory_proto::ProtoError> {
    let mut name = Name::from_ascii(name)?;
    name.set_fqdn(true);
    Ok(name)
}

fn address_record(name: &Name, address: IpAddr) -> Record {
    let data = match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    };
    Record::from_rdata(name.clone(), TTL, data)
}

fn srv_record(name: &Name, port: u16, target: &Name) -> Record {
    /// As cluster resolvers have it: all alike.
    const WEIGHT: u16 = 100;
    Record::from_rdata(name.clone(), TTL, RData::SRV(SRV::new(0, WEIGHT, port, target.clone())))
}

fn soa_record(zone: Name) -> Option<Record> {
    let primary = Name::from_ascii("ns.dns").ok()?.append_domain(&zone).ok()?;
    let mailbox = Name::from_ascii("hostmaster").ok()?.append_domain(&zone).ok()?;
    let soa = SOA::new(primary, mailbox, 1, 7200, 1800, 86_400, TTL);
    Some(Record::from_rdata(zone, TTL, RData::SOA(soa)))
}
