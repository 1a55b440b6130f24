//! Addresses of host names that are not of the mesh: endpoints that only DNS can locate, and names that SOCKS5 clients ask for.
//!
//! Answers are cached for as long as they say, whatever the number of connections. Lookups run on the control runtime and
//! leave from the proxy's own namespace. A name means to a pod what its `resolv.conf` makes of it, so its namespace's search
//! path is tried too.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts,
};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use smallvec::SmallVec;
use tokio::runtime::Handle;
use tokio_util::task::AbortOnDropHandle;

/// Answers that are kept.
const CACHE_SIZE: u64 = 4096;
/// How long an answer is kept at most, whatever it says.
const LONGEST: Duration = Duration::from_secs(3600);
/// How long it is remembered that there is no such name, at most.
const LONGEST_NEGATIVE: Duration = Duration::from_secs(30);
/// How long one resolver may take to answer.
const ATTEMPT: Duration = Duration::from_secs(2);
/// Descriptors that one lookup takes: a question for each family.
pub const LOOKUP_DESCRIPTORS: u64 = 2;
/// Addresses of one name that are tried, at most.
const MAX_ADDRESSES: usize = 8;

/// Addresses of a name.
pub type Addresses = SmallVec<[IpAddr; MAX_ADDRESSES]>;

/// Why a name has no address.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LookupError {
    /// No resolver is configured.
    #[error("{name}: no resolver is known")]
    NoResolver {
        /// The name.
        name: String,
    },
    /// There is no such name, or it has no addresses.
    #[error("{name} has no address")]
    NotFound {
        /// The name.
        name: String,
    },
    /// No resolver answered.
    #[error("{name}: {source}")]
    Failed {
        /// The name.
        name: String,
        /// What went wrong last.
        source: NetError,
    },
    /// The resolvers did not answer in time.
    #[error("{name}: no answer within {limit:?}")]
    TimedOut {
        /// The name.
        name: String,
        /// The time that was allowed.
        limit: Duration,
    },
}

/// Resolves names, with a cache for the whole process.
#[derive(Debug)]
pub struct Hostnames {
    /// None if no resolver is known.
    resolver: Option<TokioResolver>,
    runtime: Handle,
    cluster_domain: Box<str>,
    /// Domains of the node that pods search after those of the cluster.
    node_search: Box<[String]>,
}

impl Hostnames {
    /// Asks `nameservers`; `search` is the proxy's own search path. Lookups run on the calling runtime.
    ///
    /// # Errors
    /// [`NetError`], if the resolver can't be made.
    pub fn new(
        nameservers: &[SocketAddr],
        search: &[String],
        cluster_domain: &str,
    ) -> Result<Self, NetError> {
        let in_cluster = |domain: &&String| {
            domain.strip_suffix(cluster_domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        Ok(Self {
            resolver: (!nameservers.is_empty()).then(|| resolver(nameservers)).transpose()?,
            runtime: Handle::current(),
            cluster_domain: cluster_domain.into(),
            node_search: search.iter().filter(|domain| !in_cluster(domain)).cloned().collect(),
        })
    }

    /// The addresses of `name` as a pod of `namespace` would find them, those of the family of `like` first. The lookup ends
    /// with the returned future; `held` is kept until then.
    ///
    /// # Errors
    /// [`LookupError`].
    pub async fn lookup(
        &self,
        name: &str,
        namespace: &str,
        like: IpAddr,
        limit: Duration,
        held: impl Send + 'static,
    ) -> Result<Addresses, LookupError> {
        let resolver =
            self.resolver.clone().ok_or_else(|| LookupError::NoResolver { name: name.to_owned() })?;
        let names = candidates(name, namespace, &self.cluster_domain, &self.node_search);
        let asked = name.to_owned();
        let looking_up = AbortOnDropHandle::new(self.runtime.spawn(async move {
            let _held = held;
            first_known(&resolver, &names, asked).await
        }));
        let mut addresses = match tokio::time::timeout(limit, looking_up).await {
            Ok(Ok(found)) => found?,
            // The runtime is going down, or nothing came in time.
            Ok(Err(_)) | Err(_) => return Err(LookupError::TimedOut { name: name.to_owned(), limit }),
        };
        addresses.sort_by_key(|address| address.is_ipv4() != like.is_ipv4());
        addresses.truncate(MAX_ADDRESSES);
        Ok(addresses)
    }
}

async fn first_known(
    resolver: &TokioResolver,
    names: &[String],
    asked: String,
) -> Result<Addresses, LookupError> {
    for name in names {
        match resolver.lookup_ip(name.as_str()).await {
            Ok(found) => {
                let addresses: Addresses = found.iter().map(|address| address.to_canonical()).collect();
                if !addresses.is_empty() {
                    return Ok(addresses);
                }
            }
            Err(error) if error.is_no_records_found() => {}
            // Another name may be somebody else's: only a definite answer leads on to it.
            Err(source) => return Err(LookupError::Failed { name: asked, source }),
        }
    }
    Err(LookupError::NotFound { name: asked })
}

fn resolver(nameservers: &[SocketAddr]) -> Result<TokioResolver, NetError> {
    let servers = nameservers.iter().map(|server| {
        let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
            connection.port = server.port();
            connection
        });
        NameServerConfig::new(server.ip(), true, connections.into())
    });
    let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
    let mut options = ResolverOpts::default();
    options.timeout = ATTEMPT;
    options.attempts = 2;
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    options.cache_size = CACHE_SIZE;
    options.use_hosts_file = ResolveHosts::Never;
    options.positive_max_ttl = Some(LONGEST);
    options.negative_max_ttl = Some(LONGEST_NEGATIVE);
    TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()).with_options(options).build()
}

/// Full names to look for, in order. A name with a dot is first taken as it is: hosts of endpoints are full names by their
/// API, and each name of the search path before it would cost a question.
fn candidates(name: &str, namespace: &str, cluster_domain: &str, node_search: &[String]) -> Vec<String> {
    let full = format!("{}.", name.trim_end_matches('.'));
    if name.ends_with('.') {
        return vec![full];
    }
    let own = [
        format!("{namespace}.svc.{cluster_domain}"),
        format!("svc.{cluster_domain}"),
        cluster_domain.to_owned(),
    ];
    let mut names: Vec<String> =
        own.iter().chain(node_search).map(|domain| format!("{name}.{domain}.")).collect();
    names.insert(if name.contains('.') { 0 } else { names.len() }, full);
    names
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::{Arc, Mutex};

    use hickory_proto::op::{Message, ResponseCode};
    use hickory_proto::rr::rdata::{A, AAAA};
    use hickory_proto::rr::{RData, Record, RecordType};
    use tokio::net::UdpSocket;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    /// A resolver of some names; counts what it is asked.
    async fn server(zone: &'static [(&'static str, &'static [&'static str])]) -> (SocketAddr, QueryCounts) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let asked = QueryCounts::default();
        let counts = asked.0.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 4096];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
                let query = Message::from_vec(&buffer[..length]).unwrap();
                let question = query.queries[0].clone();
                let name = question.name().to_ascii().to_ascii_lowercase();
                *counts.lock().unwrap().entry((name.clone(), question.query_type())).or_default() += 1;
                let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
                answer.add_query(question.clone());
                match zone.iter().find(|(known, _)| *known == name) {
                    None => answer.metadata.response_code = ResponseCode::NXDomain,
                    Some((_, addresses)) => {
                        for address in *addresses {
                            let data = match (address.parse().unwrap(), question.query_type()) {
                                (IpAddr::V4(ip), RecordType::A) => RData::A(A(ip)),
                                (IpAddr::V6(ip), RecordType::AAAA) => RData::AAAA(AAAA(ip)),
                                _ => continue,
                            };
                            answer.add_answer(Record::from_rdata(question.name().clone(), 60, data));
                        }
                    }
                }
                socket.send_to(&answer.to_vec().unwrap(), peer).await.unwrap();
            }
        });
        (address, asked)
    }

    #[derive(Default)]
    struct QueryCounts(Arc<Mutex<HashMap<(String, RecordType), usize>>>);

    impl QueryCounts {
        fn total(&self) -> usize {
            self.0.lock().unwrap().values().sum()
        }
    }

    fn addresses(texts: &[&str]) -> Addresses {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[tokio::test]
    async fn both_families_are_found_the_dialled_one_first_and_cached() {
        let (server, asked) =
            server(&[("db.example.com.", &["192.0.2.1", "192.0.2.2", "2001:db8::1"])]).await;
        let hostnames = Hostnames::new(&[server], &[], "cluster.local").unwrap();
        let (v4, v6) = ("0.0.0.0".parse().unwrap(), "::".parse().unwrap());
        let found = hostnames.lookup("db.example.com", "shop", v4, LIMIT, ()).await.unwrap();
        assert_eq!(found, addresses(&["192.0.2.1", "192.0.2.2", "2001:db8::1"]));
        for _ in 0..100 {
            let found = hostnames.lookup("db.example.com", "shop", v6, LIMIT, ()).await.unwrap();
            assert_eq!(found[0], addresses(&["2001:db8::1"])[0]);
        }
        assert_eq!(asked.total(), 2, "one question a family");
    }

    #[tokio::test]
    async fn a_name_is_looked_for_in_the_search_path_of_the_pod() {
        let (server, _asked) = server(&[
            ("db.shop.svc.cluster.local.", &["10.0.0.1"]),
            ("db.other.svc.cluster.local.", &["10.0.0.2"]),
            ("printer.office.example.", &["10.0.0.3"]),
        ])
        .await;
        let own = ["ambit-system.svc.cluster.local".to_owned(), "office.example".to_owned()];
        let hostnames = Hostnames::new(&[server], &own, "cluster.local").unwrap();
        let like = "0.0.0.0".parse().unwrap();
        for (name, namespace, address) in [
            ("db", "shop", "10.0.0.1"),
            ("db", "other", "10.0.0.2"),
            ("db.other", "shop", "10.0.0.2"),
            ("printer", "shop", "10.0.0.3"),
        ] {
            let found = hostnames.lookup(name, namespace, like, LIMIT, ()).await.unwrap();
            assert_eq!(found, addresses(&[address]), "{name} in {namespace}");
        }
        let missing = hostnames.lookup("db", "ambit-system", like, LIMIT, ()).await;
        assert!(matches!(missing, Err(LookupError::NotFound { .. })), "{missing:?}");
    }

    #[tokio::test]
    async fn a_lookup_ends_with_its_waiter() {
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let hostnames = Hostnames::new(&[silent.local_addr().unwrap()], &[], "cluster.local").unwrap();
        let held = Arc::new(());
        let like = IpAddr::from([0, 0, 0, 0]);
        let waiting = hostnames.lookup("db.example.com", "shop", like, LIMIT, Arc::clone(&held));
        assert!(tokio::time::timeout(Duration::from_millis(50), waiting).await.is_err());
        let ended = async {
            while Arc::strong_count(&held) > 1 {
                tokio::task::yield_now().await;
            }
        };
        // Long before the resolver is given up.
        tokio::time::timeout(Duration::from_secs(1), ended).await.expect("the lookup ends");
    }

    #[tokio::test]
    async fn a_silent_resolver_costs_no_more_than_the_limit() {
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let hostnames = Hostnames::new(&[silent.local_addr().unwrap()], &[], "cluster.local").unwrap();
        let limit = Duration::from_millis(50);
        let outcome = hostnames.lookup("db.example.com", "shop", [0, 0, 0, 0].into(), limit, ()).await;
        assert!(matches!(outcome, Err(LookupError::TimedOut { .. })), "{outcome:?}");
        let none = Hostnames::new(&[], &[], "cluster.local").unwrap();
        let outcome = none.lookup("db.example.com", "shop", [0, 0, 0, 0].into(), limit, ()).await;
        assert!(matches!(outcome, Err(LookupError::NoResolver { .. })), "{outcome:?}");
    }
}
