//! Filters of listeners: external authorizers that are asked about each request before it is routed (GEP-5093). Others are not
//! followed.

use std::sync::Arc;

use http::uri::PathAndQuery;
use serde::Deserialize;

use super::route::{BackendRef, Reference};

/// The largest body that authorizers see, as with those of the mesh's settings.
const LARGEST: u32 = 1 << 20;

/// An external authorizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalAuth {
    /// Who is asked.
    pub backend: BackendRef,
    /// How.
    pub protocol: ExternalAuthProtocol,
    /// Names of the fields of a request that it sees, in lower case.
    pub seen: Vec<String>,
    /// The largest body that it sees; 0: none.
    pub body: u32,
}

/// How an authorizer is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExternalAuthProtocol {
    /// By Envoy's ext_authz. It sees all fields if none is named.
    Grpc,
    /// By a request like the one that it is asked about.
    Http {
        /// What is put before the path.
        path: String,
        /// Names of the fields of its answer that the request gets, in lower case; none: all.
        returned: Vec<String>,
    },
}

/// The filters of a listener as written.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Filters {
    #[serde(default)]
    requests: Vec<Filter>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Filter {
    #[serde(rename = "type")]
    kind: String,
    external_auth: Option<Manifest>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    protocol: String,
    backend_ref: Reference,
    #[serde(default)]
    grpc: Grpc,
    #[serde(default)]
    http: Http,
    #[serde(default)]
    forward_body: ForwardBody,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Grpc {
    allowed_headers: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Http {
    path: String,
    allowed_headers: Vec<String>,
    allowed_response_headers: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ForwardBody {
    max_size: u32,
}

impl Filters {
    /// The authorizers, in order.
    ///
    /// # Errors
    /// What can't be followed.
    pub(super) fn read(self) -> Result<Vec<ExternalAuth>, Arc<str>> {
        let read = |filter: Filter| match (filter.kind.as_str(), filter.external_auth) {
            ("ExternalAuth", Some(manifest)) => manifest.read(),
            (kind, _) => Err(format!("filters of type {kind} are not supported").into()),
        };
        self.requests.into_iter().map(read).collect()
    }
}

impl Manifest {
    fn read(self) -> Result<ExternalAuth, Arc<str>> {
        let Manifest { protocol, backend_ref, grpc, http, forward_body: ForwardBody { max_size } } = self;
        if max_size > LARGEST {
            return Err(format!("externalAuth.forwardBody.maxSize is more than {LARGEST}").into());
        }
        let names = |names: Vec<String>| names.iter().map(|name| name.to_ascii_lowercase()).collect();
        let (protocol, seen) = match protocol.as_str() {
            "GRPC" => (ExternalAuthProtocol::Grpc, grpc.allowed_headers),
            "HTTP" => {
                let path = http.path;
                let parsed = PathAndQuery::try_from(&path).ok();
                let is_path = parsed.is_some_and(|parsed| parsed.query().is_none() && path.starts_with('/'));
                if !path.is_empty() && !is_path {
                    return Err("externalAuth.http.path is no path".into());
                }
                let returned = names(http.allowed_response_headers);
                (ExternalAuthProtocol::Http { path, returned }, http.allowed_headers)
            }
            other => return Err(format!("externalAuth.protocol {other} is not supported").into()),
        };
        Ok(ExternalAuth { backend: backend_ref.into(), protocol, seen: names(seen), body: max_size })
    }
}
