//! GRPCRoutes: a call is a POST to `/<service>/<method>`.

use ambit_api::l7;
use serde::Deserialize;

use super::http::{Backend, FieldMatch, Filter, escape, lower_backends, lower_fields, lower_filters};
use super::route::{self, Route, RouteProtocol, RouteRule};
use super::session::SessionPersistence;
use crate::object::meta::Invalid;

/// The manifest.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(crate) struct Manifest(route::Manifest);

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    #[serde(default)]
    name: String,
    #[serde(default)]
    matches: Vec<Match>,
    #[serde(default)]
    filters: Vec<Filter>,
    #[serde(default)]
    backend_refs: Vec<Backend>,
    session_persistence: Option<SessionPersistence>,
}

#[derive(Debug, Deserialize)]
struct Match {
    method: Option<Method>,
    #[serde(default)]
    headers: Vec<FieldMatch>,
}

#[derive(Debug, Deserialize)]
struct Method {
    #[serde(rename = "type", default)]
    kind: MethodKind,
    service: Option<String>,
    method: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
enum MethodKind {
    #[default]
    Exact,
    RegularExpression,
}

impl TryFrom<Manifest> for Route {
    type Error = Invalid;

    fn try_from(Manifest(manifest): Manifest) -> Result<Route, Invalid> {
        manifest.read(RouteProtocol::Grpc, Vec::new(), Rule::lower)
    }
}

impl Rule {
    fn lower(self) -> Result<RouteRule, String> {
        let Rule { name, matches, filters, backend_refs, session_persistence } = self;
        let matches = matches.into_iter().map(Match::lower).collect();
        let session = session_persistence.map(SessionPersistence::lower).transpose()?;
        let own = l7::Rule { name, matches, session, ..l7::Rule::default() };
        let filters = lower_filters(filters)?;
        Ok(RouteRule { own, filters, backends: lower_backends(backend_refs)? })
    }
}

impl Match {
    fn lower(self) -> l7::Match {
        l7::Match {
            path: self.method.and_then(Method::lower),
            headers: lower_fields(self.headers, str::to_ascii_lowercase),
            ..l7::Match::default()
        }
    }
}

impl Method {
    fn lower(self) -> Option<l7::PathMatch> {
        use l7::path_match::Kind;
        let is_set = |text: &String| !text.is_empty();
        let (service, method) = (self.service.filter(is_set), self.method.filter(is_set));
        let kind = match (self.kind, service, method) {
            (_, None, None) => return None,
            (MethodKind::Exact, Some(service), Some(method)) => Kind::Exact(format!("/{service}/{method}")),
            (MethodKind::Exact, Some(service), None) => Kind::Prefix(format!("/{service}")),
            (MethodKind::Exact, None, Some(method)) => Kind::Regex(format!("/[^/]+/{}", escape(&method))),
            (MethodKind::RegularExpression, service, method) => {
                let any = || "[^/]+".to_owned();
                let (service, method) = (service.unwrap_or_else(any), method.unwrap_or_else(any));
                Kind::Regex(format!("/(?:{service})/(?:{method})"))
            }
        };
        Some(l7::PathMatch { kind: Some(kind), ..l7::PathMatch::default() })
    }
}
