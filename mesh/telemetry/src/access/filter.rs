//! Which records a tap wants, as the parameters of a URL say it. Pure.

use std::net::SocketAddr;

use super::{Direction, Ended, Entry, Party, Record, RequestEntry, Status};
use crate::http::Query;

/// What a record must be; what is `None` may be anything. Fields of requests exclude connections.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Namespace of the source or the destination.
    namespace: Option<String>,
    /// The source or the destination.
    workload: Option<Name>,
    source: Option<Name>,
    destination: Option<Name>,
    direction: Option<Direction>,
    host: Option<String>,
    method: Option<String>,
    /// What a path begins with.
    path: Option<String>,
    code: Option<Code>,
    status: Option<Status>,
}

/// A pod, what it belongs to, an address or an identity; a destination also by its service.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Name {
    namespace: Option<String>,
    name: String,
}

/// Statuses of answers: one, or all of a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Code {
    One(u16),
    Class(u16),
}

/// A parameter that can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("parameter {name}: {value:?} is not {expected}")]
pub struct FilterError {
    name: &'static str,
    value: String,
    expected: &'static str,
}

/// The names of the parameters.
const PARAMETERS: [&str; 10] = [
    "namespace",
    "workload",
    "source",
    "destination",
    "direction",
    "host",
    "method",
    "path",
    "code",
    "status",
];

impl Filter {
    /// Reads `namespace`, `workload`, `source`, `destination` (each NAME, NAMESPACE/NAME, an address or a SPIFFE id), `direction`
    /// (`inbound` or `outbound`), `host`, `method`, `path` (a prefix), `code` (`403` or `4xx`) and `status` (`ok`, `denied`, `failed`).
    ///
    /// # Errors
    /// A value that can't be read, or a parameter that is none of these.
    pub fn parse(query: &Query) -> Result<Self, FilterError> {
        let text = |name: &str| query.get(name).filter(|value| !value.is_empty()).map(str::to_owned);
        if let Some((name, _)) = query.iter().find(|(name, _)| !PARAMETERS.contains(name)) {
            return Err(FilterError {
                name: "of the filter",
                value: name.to_owned(),
                expected: "one that there is",
            });
        }
        Ok(Self {
            namespace: text("namespace"),
            workload: text("workload").map(|value| Name::parse(&value)),
            source: text("source").map(|value| Name::parse(&value)),
            destination: text("destination").map(|value| Name::parse(&value)),
            direction: read("direction", text("direction"), "inbound or outbound", |value| match value {
                "inbound" => Some(Direction::Inbound),
                "outbound" => Some(Direction::Outbound),
                _ => None,
            })?,
            host: text("host").map(|host| host.to_ascii_lowercase()),
            method: text("method"),
            path: text("path"),
            code: read("code", text("code"), "a status such as 403 or a class such as 4xx", Code::parse)?,
            status: read("status", text("status"), "ok, denied or failed", |value| {
                [Status::Ok, Status::Denied, Status::Failed].into_iter().find(|it| it.as_str() == value)
            })?,
        })
    }

    /// Whether a record is wanted.
    pub fn matches(&self, record: &Record) -> bool {
        if self.status.is_some_and(|status| status != record.status()) {
            return false;
        }
        match &record.ended {
            Ended::Connection(entry) => self.matches_connection(entry),
            Ended::Request(entry) => self.matches_request(entry),
        }
    }

    fn matches_connection(&self, entry: &Entry) -> bool {
        let of_requests = self.method.is_some() || self.path.is_some() || self.code.is_some();
        !of_requests
            && self.direction.is_none_or(|direction| direction == entry.direction)
            && self.matches_ends(&entry.source, &entry.destination, entry.service.as_deref())
            && self.matches_host(None, entry.service.as_deref())
    }

    fn matches_request(&self, entry: &RequestEntry) -> bool {
        self.direction.is_none()
            && self.method.as_deref().is_none_or(|method| method.eq_ignore_ascii_case(entry.method.as_str()))
            && self.path.as_deref().is_none_or(|path| entry.texts.path().starts_with(path))
            && self.code.is_none_or(|code| code.matches(entry.code))
            && self.matches_ends(&entry.source, &entry.destination, entry.service.as_deref())
            && (self.matches_host(Some(entry.texts.authority()), entry.service.as_deref())
                || self.matches_host(None, entry.dialled.host.as_deref()))
    }

    fn matches_ends(&self, source: &Party, destination: &Party, service: Option<&str>) -> bool {
        let is_in = |party: &Party, namespace: &str| party.namespace.as_deref() == Some(namespace);
        let namespace = self.namespace.as_deref();
        namespace.is_none_or(|namespace| is_in(source, namespace) || is_in(destination, namespace))
            && self.workload.as_ref().is_none_or(|name| name.is(source) || name.is(destination))
            && self.source.as_ref().is_none_or(|name| name.is(source))
            && self.destination.as_ref().is_none_or(|name| name.is(destination) || name.is_service(service))
    }

    fn matches_host(&self, authority: Option<&str>, service: Option<&str>) -> bool {
        let Some(host) = self.host.as_deref() else { return true };
        let asked = authority.map(|authority| {
            authority.rsplit_once(':').map_or(authority, |(name, port)| match port.parse::<u16>() {
                Ok(_) => name,
                Err(_) => authority,
            })
        });
        asked.is_some_and(|asked| asked.eq_ignore_ascii_case(host))
            || service.is_some_and(|it| is_host(it, host))
    }
}

/// Whether `host` is a service's host name or its beginning, up to a dot.
fn is_host(service: &str, host: &str) -> bool {
    service.strip_prefix(host).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn read<T>(
    name: &'static str,
    value: Option<String>,
    expected: &'static str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, FilterError> {
    let Some(value) = value else { return Ok(None) };
    match parse(&value) {
        Some(parsed) => Ok(Some(parsed)),
        None => Err(FilterError { name, value, expected }),
    }
}

impl Name {
    fn parse(text: &str) -> Self {
        match text.split_once('/') {
            Some((namespace, name)) if !text.contains("://") => {
                Self { namespace: Some(namespace.to_owned()), name: name.to_owned() }
            }
            _ => Self { namespace: None, name: text.to_owned() },
        }
    }

    fn is(&self, party: &Party) -> bool {
        let is_in = self.namespace.is_none() || party.namespace.as_deref() == self.namespace.as_deref();
        let names = [&party.workload, &party.owner, &party.identity];
        is_in && (names.iter().any(|it| it.as_deref() == Some(&*self.name)) || self.is_address(party.addr))
    }

    fn is_address(&self, address: Option<SocketAddr>) -> bool {
        let Some(address) = address else { return false };
        self.name.parse() == Ok(address.ip().to_canonical()) || self.name.parse() == Ok(address)
    }

    /// Whether it is a service, by its host name or the beginning of it.
    fn is_service(&self, host: Option<&str>) -> bool {
        let Some(host) = host else { return false };
        match &self.namespace {
            Some(namespace) => is_host(host, &format!("{}.{namespace}", self.name)),
            None => is_host(host, &self.name),
        }
    }
}

impl Code {
    fn parse(text: &str) -> Option<Self> {
        if let Some(class) = text.strip_suffix("xx") {
            return class.parse().ok().filter(|class| (1..=5).contains(class)).map(Self::Class);
        }
        text.parse().ok().filter(|code| *code <= 999).map(Self::One)
    }

    fn matches(self, code: u16) -> bool {
        match self {
            Self::One(wanted) => code == wanted,
            Self::Class(class) => code / 100 == class,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use http::Method;

    use super::super::{Dialled, RequestTexts};
    use super::*;

    fn party(namespace: &str, workload: &str, owner: &str, address: &str) -> Party {
        Party {
            addr: Some(address.parse().unwrap()),
            workload: Some(workload.into()),
            namespace: Some(namespace.into()),
            identity: Some(format!("spiffe://td/ns/{namespace}/sa/{owner}").into()),
            owner: Some(owner.into()),
        }
    }

    fn connection() -> Record {
        let ended = Ended::Connection(Entry {
            source: party("shop", "cli-1", "cli", "10.0.0.1:4000"),
            destination: party("data", "db-1", "db", "10.0.0.2:5432"),
            hbone_addr: None,
            service: Some("db.data.svc.cluster.local".into()),
            dialled: Dialled::default(),
            is_udp: false,
            direction: Direction::Inbound,
            status: Status::Denied,
            bytes_sent: 0,
            bytes_received: 0,
            duration: Duration::ZERO,
            error: Some("denied by policy data/p".into()),
            was_observed: false,
        });
        Record { ended, is_open: false, time: SystemTime::UNIX_EPOCH }
    }

    fn request() -> Record {
        let ended = Ended::Request(RequestEntry {
            source: party("shop", "cli-1", "cli", "10.0.0.1:4000").into(),
            destination: party("shop", "web-1", "web", "10.0.0.3:8080").into(),
            service: Some("web-v2.shop.svc.cluster.local".into()),
            dialled: Dialled { host: Some("web.shop.svc.cluster.local".into()), ..Dialled::default() }.into(),
            status: Status::Ok,
            protocol: "HTTP/1.1",
            method: Method::GET,
            texts: RequestTexts::new("Web.example:8080", "/api/users", None, None),
            code: 404,
            grpc_status: None,
            flags: "-",
            route: None,
            audited_by: None,
            attempts: 1,
            bytes_sent: 0,
            bytes_received: 0,
            duration: Duration::ZERO,
            error: None,
            was_observed: false,
        });
        Record { ended, is_open: false, time: SystemTime::UNIX_EPOCH }
    }

    #[test]
    fn records_are_chosen_by_every_parameter() {
        let (connection, request) = (connection(), request());
        for (query, of_connection, of_request) in [
            ("", true, true),
            ("namespace=data", true, false),
            ("namespace=shop", true, true),
            ("workload=web", false, true),
            ("workload=shop/cli-1", true, true),
            ("workload=data/cli", false, false),
            ("source=10.0.0.1", true, true),
            ("source=10.0.0.1:4001", false, false),
            ("source=spiffe://td/ns/shop/sa/cli", true, true),
            ("destination=db", true, false),
            ("destination=data/db-1", true, false),
            ("destination=shop/web-v2", false, true),
            ("destination=cli", false, false),
            ("direction=inbound", true, false),
            ("direction=outbound", false, false),
            ("host=web.example", false, true),
            ("host=web", false, true),
            ("host=we", false, false),
            ("host=db.data", true, false),
            ("method=get", false, true),
            ("method=POST", false, false),
            ("path=/api", false, true),
            ("path=/b", false, false),
            ("code=404", false, true),
            ("code=4xx", false, true),
            ("code=5xx", false, false),
            ("status=denied", true, false),
            ("status=ok&method=GET", false, true),
        ] {
            let filter = Filter::parse(&Query::parse(query)).expect(query);
            assert_eq!(
                (filter.matches(&connection), filter.matches(&request)),
                (of_connection, of_request),
                "{query}"
            );
        }
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for (query, message) in [
            ("direction=up", "parameter direction: \"up\" is not inbound or outbound"),
            ("code=9xx", "parameter code: \"9xx\" is not a status such as 403 or a class such as 4xx"),
            ("status=no", "parameter status: \"no\" is not ok, denied or failed"),
            ("pod=x", "parameter of the filter: \"pod\" is not one that there is"),
        ] {
            assert_eq!(Filter::parse(&Query::parse(query)).unwrap_err().to_string(), message);
        }
    }
}
