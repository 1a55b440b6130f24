//! VirtualServices: where requests to hosts go, as Istio's API says it.
//!
//! A rule is kept as it is written, since rules of a delegate are joined with those of another object before they mean
//! anything ([`super::virtual_service_delegate`]). [`super::virtual_service_http`] makes a rule of a waypoint of one.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::Value;

use super::virtual_service_http::Http;
use super::virtual_service_tcp::{ReadTcp, Tcp};
use super::{NamespacedName, virtual_service_fields};
use crate::object::meta::{Invalid, Meta};

/// The name that stands for the clients in the mesh among `gateways`.
const MESH: &str = "mesh";

/// A VirtualService.
#[derive(Clone, Debug, PartialEq)]
pub struct VirtualService {
    /// Name, labels and age.
    pub meta: Meta,
    /// Hosts that it is for, in lower case, as written; none: it is a delegate.
    pub hosts: Vec<Arc<str>>,
    /// Whether it is for clients in the mesh.
    pub for_mesh: bool,
    /// Who sees it.
    pub export: Export,
    /// Rules for HTTP, in order. Each is read by itself: a bad one spoils no other.
    pub http: Vec<ReadRule>,
    /// Rules for connections that are passed on unread, in order.
    pub tcp: Vec<ReadTcp>,
    /// Rules for connections that begin with TLS, by the name that they ask for, in order. They come before those of `tcp`.
    pub tls: Vec<ReadTcp>,
    /// Fields that have no effect, each with what to write instead.
    pub without_effect: Vec<String>,
}

/// A rule, as far as it could be read.
#[derive(Clone, Debug, PartialEq)]
pub struct ReadRule {
    /// The rule; its matches alone where the rest could not be read, so that it takes no other requests than its own.
    pub rule: Http,
    /// Why its requests are answered with 500.
    pub fault: Option<String>,
}

/// Which namespaces see a VirtualService (`exportTo`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Export {
    /// All of them.
    Everywhere,
    /// These.
    To(Vec<Arc<str>>),
}

impl Export {
    fn of(list: &[String], own: &Arc<str>) -> Export {
        if list.is_empty() || list.iter().any(|item| item == "*") {
            return Export::Everywhere;
        }
        let namespace = |item: &String| if item == "." { own.clone() } else { item.as_str().into() };
        Export::To(list.iter().map(namespace).collect())
    }

    /// Whether a namespace is among them.
    pub fn includes(&self, namespace: &str) -> bool {
        match self {
            Export::Everywhere => true,
            Export::To(namespaces) => namespaces.iter().any(|known| **known == *namespace),
        }
    }
}

/// Where requests go.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Destination {
    /// A host, as written.
    pub host: String,
    /// A part of its endpoints, by the name that a DestinationRule gives it.
    #[serde(default)]
    pub subset: String,
    /// Its port.
    #[serde(default)]
    pub port: Option<PortSelector>,
}

/// A port by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct PortSelector {
    /// The number.
    pub number: u16,
}

impl VirtualService {
    /// The VirtualServices whose rules it takes over.
    pub fn delegates(&self) -> impl Iterator<Item = NamespacedName> {
        self.http.iter().filter_map(|read| read.rule.delegate(&self.meta.id.namespace))
    }

    /// Every destination that its rules name.
    pub fn destinations(&self) -> impl Iterator<Item = &Destination> {
        let http = self.http.iter().flat_map(|read| read.rule.destinations());
        let streams = self.tcp.iter().chain(&self.tls);
        http.chain(streams.flat_map(|read| read.rule.destinations()))
    }
}

/// The manifest. Rules are read one by one.
#[derive(Debug, Deserialize)]
pub(crate) struct Manifest {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Value,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    hosts: Vec<String>,
    gateways: Vec<String>,
    export_to: Vec<String>,
    http: Vec<Value>,
    tcp: Vec<Value>,
    tls: Vec<Value>,
}

impl TryFrom<Manifest> for VirtualService {
    type Error = Invalid;

    fn try_from(manifest: Manifest) -> Result<VirtualService, Invalid> {
        let Manifest { metadata, spec: written } = manifest;
        let meta = Meta::read(&metadata)?;
        let spec: Spec = match &written {
            Value::Null => Spec::default(),
            written => serde_path_to_error::deserialize(written)
                .map_err(|error| Invalid::new(format!("spec.{}", error.path()), error.inner().to_string()))?,
        };
        let http: Vec<ReadRule> = spec.http.iter().map(read_rule).collect();
        let tcp: Vec<ReadTcp> = spec.tcp.iter().map(|rule| Tcp::read(rule, false)).collect();
        let tls: Vec<ReadTcp> = spec.tls.iter().map(|rule| Tcp::read(rule, true)).collect();
        let mut without_effect = virtual_service_fields::unknown(&written);
        for (at, read) in http.iter().enumerate() {
            without_effect.extend(read.rule.without_effect().map(|text| format!("http[{at}].{text}")));
        }
        Ok(VirtualService {
            for_mesh: is_for_mesh(&spec.gateways),
            export: Export::of(&spec.export_to, &meta.id.namespace),
            hosts: spec.hosts.iter().map(|host| host.to_ascii_lowercase().into()).collect(),
            meta,
            http,
            tcp,
            tls,
            without_effect,
        })
    }
}

fn read_rule(value: &Value) -> ReadRule {
    match serde_path_to_error::deserialize(value) {
        Ok(rule) => ReadRule { rule, fault: None },
        Err(error) => ReadRule { rule: Http::with_matches_of(value), fault: Some(error.to_string()) },
    }
}

/// Whether a list of gateways, none standing for all, has the mesh.
pub(super) fn is_for_mesh(gateways: &[String]) -> bool {
    gateways.is_empty() || gateways.iter().any(|gateway| gateway == MESH)
}
