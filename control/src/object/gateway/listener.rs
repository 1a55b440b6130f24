//! Listeners of Gateways, as far as they can be read without other objects.

use std::sync::Arc;

use serde::Deserialize;

use super::external_auth::{ExternalAuth, Filters};
use super::route::TargetKind;
use super::{AllowedNamespaces, AllowedRoutes, allowed};
use crate::object::{Kind, NamespacedName};

/// A listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Its name, unique in its Gateway.
    pub name: Arc<str>,
    /// Its port.
    pub port: u16,
    /// What it takes.
    pub protocol: ListenerProtocol,
    /// The host that it is for, in lower case, `*.` in front for all below; `None`: all.
    pub hostname: Option<Arc<str>>,
    /// What is done with TLS.
    pub tls: Option<ListenerTls>,
    /// From which namespaces routes may be attached.
    pub namespaces: AllowedNamespaces,
    /// The kinds of routes that may be attached, by group and kind; none: all that fit the protocol.
    pub kinds: Vec<(Arc<str>, Arc<str>)>,
    /// Whom its requests are asked about before they are routed; or why its filters can't be followed.
    pub filters: Result<Vec<ExternalAuth>, Arc<str>>,
}

impl Listener {
    /// The Services that its filters ask, as an object in `namespace` means them.
    pub fn asked(&self, namespace: &Arc<str>) -> impl Iterator<Item = NamespacedName> {
        let filters = self.filters.iter().flatten();
        let services = filters.filter(|filter| filter.backend.kind == TargetKind::Service);
        services.map(|filter| filter.backend.name_in(namespace))
    }
}

/// What a listener takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenerProtocol {
    /// Requests.
    Http,
    /// Requests over TLS.
    Https,
    /// Connections that begin with TLS.
    Tls,
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
    /// Tunnels of the mesh: the listener of a waypoint.
    Hbone,
    /// Anything else, as written.
    Other(Arc<str>),
}

impl ListenerProtocol {
    fn of(text: &str) -> ListenerProtocol {
        match text {
            "HTTP" => ListenerProtocol::Http,
            "HTTPS" => ListenerProtocol::Https,
            "TLS" => ListenerProtocol::Tls,
            "TCP" => ListenerProtocol::Tcp,
            "UDP" => ListenerProtocol::Udp,
            "HBONE" => ListenerProtocol::Hbone,
            other => ListenerProtocol::Other(other.into()),
        }
    }
}

/// What a listener does with TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerTls {
    /// It is passed on unread; else it ends at the gateway.
    pub passthrough: bool,
    /// The certificates that it ends with.
    pub certificates: Vec<CertificateRef>,
}

/// A reference to a certificate with its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateRef {
    /// Whether it is one to a Secret.
    pub is_secret: bool,
    /// Its kind as written.
    pub kind_name: Arc<str>,
    /// The object.
    pub name: NamespacedName,
}

/// A listener as written.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Manifest {
    #[serde(default)]
    name: String,
    pub(super) port: i32,
    pub(super) protocol: String,
    hostname: Option<String>,
    tls: Option<Tls>,
    #[serde(default)]
    pub(super) allowed_routes: AllowedRoutes,
    #[serde(default)]
    filters: Filters,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Tls {
    mode: Option<String>,
    #[serde(default)]
    certificate_refs: Vec<Certificate>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Certificate {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: String,
}

/// A kind of routes as `allowedRoutes.kinds` has it.
#[derive(Debug, Deserialize)]
pub(super) struct RouteKind {
    group: Option<String>,
    kind: String,
}

impl Manifest {
    /// The listener of a Gateway in `namespace`; `None` if its port is none.
    pub(super) fn read(self, namespace: &Arc<str>) -> Option<Listener> {
        let Manifest { name, port, protocol, hostname, tls, allowed_routes, filters } = self;
        let port = u16::try_from(port).ok().filter(|port| *port != 0)?;
        let kinds = allowed_routes.kinds.into_iter().map(|RouteKind { group, kind }| {
            let group = group.map_or_else(|| Arc::from(Kind::HttpRoute.group()), Arc::from);
            (group, kind.into())
        });
        Some(Listener {
            name: name.into(),
            port,
            protocol: ListenerProtocol::of(&protocol),
            hostname: hostname.filter(|host| !host.is_empty()).map(|host| host.to_ascii_lowercase().into()),
            tls: tls.map(|tls| tls.read(namespace)),
            kinds: kinds.collect(),
            namespaces: allowed(allowed_routes.namespaces),
            filters: filters.read(),
        })
    }
}

impl Tls {
    fn read(self, namespace: &Arc<str>) -> ListenerTls {
        let certificates = self.certificate_refs.into_iter().map(|certificate| certificate.read(namespace));
        ListenerTls {
            passthrough: self.mode.as_deref() == Some("Passthrough"),
            certificates: certificates.collect(),
        }
    }
}

impl Certificate {
    /// What is meant in an object of `namespace`.
    pub(super) fn read(self, namespace: &Arc<str>) -> CertificateRef {
        let Certificate { group, kind, namespace: of, name } = self;
        let kind = kind.unwrap_or_else(|| "Secret".to_owned());
        let is_core = group.is_none_or(|group| group.is_empty() || group == "core");
        CertificateRef {
            is_secret: is_core && kind == "Secret",
            kind_name: kind.into(),
            name: NamespacedName::new(of.map_or_else(|| namespace.clone(), Arc::from), name),
        }
    }
}
