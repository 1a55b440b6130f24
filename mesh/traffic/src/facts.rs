//! What is known of a request, and how expressions name it.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::OnceLock;

use cel::common::types::{CelInt, CelMap, CelMapKey, CelString};
use cel::common::value::{CowVal, Val};
use cel::context::VariableResolver;
use http::HeaderMap;
use serde_json::{Map, Value};

use crate::expression::Names;

/// A request, or a connection whose bytes are passed on unread.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The request; none for a connection.
    pub request: Option<RequestFacts<'a>>,
    /// Who sends it.
    pub source: SourceFacts<'a>,
    /// What it is for.
    pub destination: DestinationFacts<'a>,
}

/// The request itself, in the form in which it is matched.
#[derive(Debug, Clone, Copy)]
pub struct RequestFacts<'a> {
    /// The method.
    pub method: &'a str,
    /// The normalised path without the query.
    pub path: &'a str,
    /// The query.
    pub query: Option<&'a str>,
    /// The host without port, in lower case.
    pub host: &'a str,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// The headers.
    pub headers: &'a HeaderMap,
    /// `<iss>/<sub>` of its token, if it has a valid one.
    pub principal: Option<&'a str>,
    /// The claims of its token, if it has a valid one.
    pub claims: Option<&'a Map<String, Value>>,
}

/// The client.
#[derive(Debug, Clone, Copy)]
pub struct SourceFacts<'a> {
    /// Its SPIFFE id, if it proved one.
    pub identity: Option<&'a str>,
    /// Its namespace by that identity.
    pub namespace: Option<&'a str>,
    /// Its address; none where a trusted forwarder says something of it that can't be read.
    pub address: Option<IpAddr>,
    /// The address that the connection came from.
    pub peer_address: IpAddr,
}

/// The destination.
#[derive(Debug, Clone, Copy)]
pub struct DestinationFacts<'a> {
    /// Host of the service; empty where it is none.
    pub host: &'a str,
    /// Its namespace; empty where it has none.
    pub namespace: &'a str,
    /// The port that was dialled.
    pub port: u16,
}

/// The rule of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RouteId<'a> {
    /// Kind of the route.
    pub kind: &'a str,
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// The rule's number.
    pub rule: u32,
}

/// Names that expressions about requests may use.
pub(crate) static OF_REQUESTS: Names = Names { variables: &VARIABLES, maps: &MAPS };

const VARIABLES: [&str; 14] = [
    "request.method",
    "request.path",
    "request.query",
    "request.host",
    "request.scheme",
    "request.headers",
    "request.auth.principal",
    "request.auth.claims",
    "source.identity",
    "source.namespace",
    "source.address",
    "destination.host",
    "destination.namespace",
    "destination.port",
];
const MAPS: [&str; 3] = ["request.query", "request.headers", "request.auth.claims"];

/// The variables of one evaluation. Maps are made where an expression asks for one, once.
pub(crate) struct Variables<'a> {
    facts: &'a Facts<'a>,
    headers: OnceLock<CelMap<'static>>,
    query: OnceLock<CelMap<'static>>,
    claims: OnceLock<Box<dyn Val>>,
}

impl fmt::Debug for Variables<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Variables").field("facts", self.facts).finish_non_exhaustive()
    }
}

impl<'a> Variables<'a> {
    pub(crate) fn new(facts: &'a Facts<'a>) -> Self {
        let (headers, query, claims) = Default::default();
        Self { facts, headers, query, claims }
    }
}

impl VariableResolver for Variables<'_> {
    fn resolve<'b>(&'b self, variable: &str) -> Option<CowVal<'b, 'b>> {
        let Facts { request, source, destination } = self.facts;
        let text = |text: &'b str| Some(CowVal::owned(CelString::from(text)));
        let request = request.as_ref();
        match variable {
            "request.method" => text(request?.method),
            "request.path" => text(request?.path),
            "request.host" => text(request?.host),
            "request.scheme" => text(request?.scheme),
            "request.auth.principal" => text(request?.principal.unwrap_or_default()),
            "request.headers" => {
                let headers = request?.headers;
                Some(CowVal::Borrowed(self.headers.get_or_init(|| of_headers(headers))))
            }
            "request.query" => {
                let query = request?.query.unwrap_or_default();
                Some(CowVal::Borrowed(self.query.get_or_init(|| of_query(query))))
            }
            "request.auth.claims" => {
                let claims = request?.claims;
                Some(CowVal::Borrowed(&**self.claims.get_or_init(|| of_claims(claims))))
            }
            "source.identity" => text(source.identity.unwrap_or_default()),
            "source.namespace" => text(source.namespace.unwrap_or_default()),
            "source.address" => {
                let address = source.address?.to_canonical().to_string();
                Some(CowVal::owned(CelString::from(address)))
            }
            "destination.host" => text(destination.host),
            "destination.namespace" => text(destination.namespace),
            "destination.port" => Some(CowVal::owned(CelInt::from(i64::from(destination.port)))),
            _ => None,
        }
    }
}

/// RFC 9110 §5.3: lines of one name are one list, joined with commas. Bytes beyond ASCII become U+FFFD where they are no UTF-8.
pub(crate) fn of_headers(headers: &HeaderMap) -> CelMap<'static> {
    let mut joined: HashMap<String, String> = HashMap::new();
    for (name, value) in headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        append(&mut joined, name.as_str().to_owned(), &value);
    }
    map(joined)
}

fn of_query(query: &str) -> CelMap<'static> {
    let mut joined: HashMap<String, String> = HashMap::new();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        append(&mut joined, name.into_owned(), &value);
    }
    map(joined)
}

fn append(joined: &mut HashMap<String, String>, name: String, value: &str) {
    joined
        .entry(name)
        .and_modify(|before| {
            before.push(',');
            before.push_str(value);
        })
        .or_insert_with(|| value.to_owned());
}

fn map(entries: HashMap<String, String>) -> CelMap<'static> {
    let entries = entries.into_iter().map(|(name, value)| {
        let value: Box<dyn Val> = Box::new(CelString::from(value));
        (CelMapKey::from(name), value)
    });
    entries.collect::<HashMap<_, _>>().into()
}

/// Without a token, and where a claim can't be a value of CEL, there are none.
fn of_claims(claims: Option<&Map<String, Value>>) -> Box<dyn Val> {
    let value = claims.and_then(|claims| cel::to_value(claims).ok());
    let value = value.and_then(|value| <Box<dyn Val>>::try_from(value).ok());
    value.unwrap_or_else(|| Box::new(map(HashMap::new())))
}
