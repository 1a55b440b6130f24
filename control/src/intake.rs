//! From what a source holds to objects: `(kind, value)` to an [`Object`] or a [`Fault`].
//!
//! Shared by every source. What an object comes to depends on the object alone, never on what it was before, so that
//! every replica has the same objects after every restart. One that cannot be read is a fault; a policy has a stand-in
//! that fails closed: a DENY denies, an ALLOW allows nothing, and plaintext is refused.

use std::sync::Arc;

use k8s_openapi::api::{apps, core, discovery, networking};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::kind::Kind;
use crate::object::{
    AuthorizationPolicy, BackendTlsPolicy, DEFAULT_NAMESPACE, DestinationRule, EndpointSlice, Gateway,
    Ingress, IngressClass, Invalid, ListenerSet, Namespace, NamespacedName, Node, Object, ObjectRef,
    PeerAuthentication, Pod, ReferenceGrant, ReplicaSet, RequestAuthentication, RootsHolder, Route, Secret,
    Service, ServiceEntry, Telemetry, TrafficPolicy, VirtualService, WorkloadEntry, manifest,
};

/// An object that cannot be read. Its source knows where it comes from.
#[derive(Debug, PartialEq)]
pub struct Fault {
    /// The object, if its identity is known.
    pub object: Option<ObjectRef>,
    /// The field that is wrong, as `spec.ports[0].port`.
    pub field: Option<String>,
    /// Its line, where a text was read that has lines, from 1.
    pub(crate) line: Option<u64>,
    /// What is wrong.
    pub message: String,
    /// What stands for the object: policies fail closed.
    pub stand_in: Option<Box<Object>>,
}

impl Fault {
    /// A fault of something without a known identity.
    pub(crate) fn new(mismatch: Mismatch) -> Fault {
        let Mismatch { line, field, message } = mismatch;
        Fault { object: None, field, line, message, stand_in: None }
    }
}

/// Why a document, or a value in it, does not fit a type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    /// Line within the document, from 1.
    pub(crate) line: Option<u64>,
    /// The field, if reading got that far.
    pub(crate) field: Option<String>,
    /// What is wrong.
    pub(crate) message: String,
}

/// Something that can be read as any type, again and again: a value, or the text of one.
pub(crate) trait Document {
    fn read<T: DeserializeOwned>(&self) -> Result<T, Mismatch>;
}

impl Document for Value {
    fn read<T: DeserializeOwned>(&self) -> Result<T, Mismatch> {
        serde_path_to_error::deserialize(self).map_err(|error| {
            let field = Some(error.path().to_string()).filter(|path| path != ".");
            Mismatch { line: None, field, message: error.into_inner().to_string() }
        })
    }
}

/// Type and name of an object.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Header {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    metadata: Option<Name>,
}

#[derive(Debug, Default, Deserialize)]
struct Name {
    name: Option<String>,
    namespace: Option<String>,
}

/// What an object's type is to the control plane.
pub(crate) enum Recognised {
    /// It is read.
    Kind(Kind),
    /// Its items are objects.
    List,
    /// A kind that is not read.
    Foreign,
    /// A type that cannot be meant.
    Wrong(String),
}

/// Reads an object of a kind from a value of an API.
///
/// # Errors
/// A [`Fault`], with what stands for the object.
pub fn read(kind: Kind, value: &Value) -> Result<Object, Fault> {
    let header = Document::read::<Header>(value).unwrap_or_default();
    read_document(kind, &header, value)
}

/// Reads an object of a kind from a document with this header.
pub(crate) fn read_document(kind: Kind, header: &Header, document: &impl Document) -> Result<Object, Fault> {
    read_object(kind, document).map_err(|Unreadable { mismatch, stand_in }| Fault {
        object: identity(kind, header),
        stand_in: stand_in.map(Box::new),
        ..Fault::new(mismatch)
    })
}

fn identity(kind: Kind, header: &Header) -> Option<ObjectRef> {
    let metadata = header.metadata.as_ref()?;
    let name = metadata.name.as_deref().filter(|name| !name.is_empty())?;
    let namespace = match kind.is_namespaced() {
        true => metadata.namespace.as_deref().filter(|n| !n.is_empty()).unwrap_or(DEFAULT_NAMESPACE),
        false => "",
    };
    Some(ObjectRef { kind, name: NamespacedName::new(namespace, name) })
}

/// What the type of an object is to the control plane.
pub(crate) fn recognise(header: &Header) -> Recognised {
    let (group, version) = header.api_version.split_once('/').unwrap_or(("", &header.api_version));
    if header.kind.is_empty() || header.api_version.is_empty() {
        return Recognised::Wrong("apiVersion and kind must be given".to_owned());
    }
    if group.is_empty() && header.kind.ends_with("List") {
        return Recognised::List;
    }
    let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.as_str() == header.kind) else {
        // Misspelt, an object of ours would silently have no effect.
        let near = |kind: &Kind| {
            // Nobody means one of ours by a word much longer, and comparing takes memory.
            kind.group() == group
                && (6..64).contains(&header.kind.len())
                && strsim::damerau_levenshtein(kind.as_str(), &header.kind) <= 2
        };
        return match Kind::ALL.into_iter().find(near) {
            Some(kind) => Recognised::Wrong(format!("unknown kind {:?}, did you mean {kind}?", header.kind)),
            None => Recognised::Foreign,
        };
    };
    if kind.group() != group {
        // Others have kinds of the same name: a Service of Knative, a Gateway of Istio.
        return Recognised::Foreign;
    }
    let versions = kind.info().versions;
    if !versions.contains(&version) {
        let known = versions.join(", ");
        return Recognised::Wrong(format!("version {version:?} of {kind} is not read (read are: {known})"));
    }
    Recognised::Kind(kind)
}

struct Unreadable {
    mismatch: Mismatch,
    stand_in: Option<Object>,
}

impl From<Mismatch> for Unreadable {
    fn from(mismatch: Mismatch) -> Self {
        Unreadable { mismatch, stand_in: None }
    }
}

#[derive(Deserialize)]
struct MetadataOnly {
    metadata: ObjectMeta,
}

fn read_object(kind: Kind, document: &impl Document) -> Result<Object, Unreadable> {
    Ok(match kind {
        Kind::Namespace => Object::Namespace(typed::<core::v1::Namespace, Namespace>(document)?),
        Kind::Node => Object::Node(typed::<core::v1::Node, Node>(document)?),
        Kind::Pod => Object::Pod(typed::<core::v1::Pod, Pod>(document)?),
        Kind::Service => Object::Service(typed::<core::v1::Service, Service>(document)?),
        Kind::Secret => Object::Secret(typed::<manifest::Secret, Secret>(document)?),
        Kind::EndpointSlice => {
            Object::EndpointSlice(typed::<discovery::v1::EndpointSlice, EndpointSlice>(document)?)
        }
        Kind::ReplicaSet => Object::ReplicaSet(typed::<apps::v1::ReplicaSet, ReplicaSet>(document)?),
        Kind::IngressClass => {
            Object::IngressClass(typed::<networking::v1::IngressClass, IngressClass>(document)?)
        }
        Kind::Ingress => Object::Ingress(typed::<networking::v1::Ingress, Ingress>(document)?),
        Kind::ServiceAccount => Object::ServiceAccount(only_name::<core::v1::ServiceAccount>(document)?),
        Kind::Deployment => Object::Deployment(only_name::<apps::v1::Deployment>(document)?),
        Kind::AuthorizationPolicy => return read_policy(document),
        Kind::PeerAuthentication => return read_authentication(document),
        Kind::ServiceEntry => Object::ServiceEntry(typed::<manifest::ServiceEntry, ServiceEntry>(document)?),
        Kind::WorkloadEntry => {
            Object::WorkloadEntry(typed::<manifest::WorkloadEntry, WorkloadEntry>(document)?)
        }
        Kind::Gateway => Object::Gateway(typed::<manifest::Gateway, Gateway>(document)?),
        Kind::ListenerSet => Object::ListenerSet(typed::<manifest::ListenerSet, ListenerSet>(document)?),
        Kind::HttpRoute => Object::HttpRoute(typed::<manifest::HttpRoute, Route>(document)?),
        Kind::GrpcRoute => Object::GrpcRoute(typed::<manifest::GrpcRoute, Route>(document)?),
        Kind::TcpRoute => Object::TcpRoute(typed::<manifest::TcpRoute, Route>(document)?),
        Kind::UdpRoute => Object::UdpRoute(typed::<manifest::UdpRoute, Route>(document)?),
        Kind::TlsRoute => Object::TlsRoute(typed::<manifest::TlsRoute, Route>(document)?),
        Kind::ReferenceGrant => {
            Object::ReferenceGrant(typed::<manifest::ReferenceGrant, ReferenceGrant>(document)?)
        }
        Kind::VirtualService => {
            Object::VirtualService(typed::<manifest::VirtualService, VirtualService>(document)?)
        }
        Kind::DestinationRule => return read_destination_rule(document),
        Kind::RequestAuthentication => return read_request_authentication(document),
        Kind::ConfigMap => Object::ConfigMap(typed::<core::v1::ConfigMap, RootsHolder>(document)?),
        Kind::ClusterTrustBundle => {
            Object::ClusterTrustBundle(typed::<manifest::ClusterTrustBundle, RootsHolder>(document)?)
        }
        Kind::BackendTlsPolicy => return read_backend_tls_policy(document),
        Kind::TrafficPolicy => return read_traffic_policy(document),
        Kind::Telemetry => Object::Telemetry(typed::<manifest::Telemetry, Telemetry>(document)?),
    })
}

fn typed<M, T>(document: &impl Document) -> Result<Arc<T>, Mismatch>
where
    M: DeserializeOwned,
    T: TryFrom<M, Error = Invalid>,
{
    T::try_from(document.read::<M>()?).map(Arc::new).map_err(invalid)
}

/// Checks the object as a whole and takes its name.
fn only_name<M: DeserializeOwned>(document: &impl Document) -> Result<NamespacedName, Mismatch> {
    document.read::<M>()?;
    crate::object::identity(&document.read::<MetadataOnly>()?.metadata).map_err(invalid)
}

fn read_policy(document: &impl Document) -> Result<Object, Unreadable> {
    let policy = typed::<manifest::AuthorizationPolicy, AuthorizationPolicy>(document);
    policy.map(Object::AuthorizationPolicy).map_err(|mismatch| {
        let loose = document.read::<Value>().ok();
        let stand_in = loose.and_then(|v| AuthorizationPolicy::unreadable(&v, mismatch.message.clone()).ok());
        Unreadable { mismatch, stand_in: stand_in.map(Arc::new).map(Object::AuthorizationPolicy) }
    })
}

fn read_authentication(document: &impl Document) -> Result<Object, Unreadable> {
    let authentication = typed::<manifest::PeerAuthentication, PeerAuthentication>(document);
    authentication.map(Object::PeerAuthentication).map_err(|mismatch| {
        let loose = document.read::<Value>().ok();
        let stand_in = loose.and_then(|v| PeerAuthentication::unreadable(&v).ok());
        Unreadable { mismatch, stand_in: stand_in.map(Arc::new).map(Object::PeerAuthentication) }
    })
}

fn read_request_authentication(document: &impl Document) -> Result<Object, Unreadable> {
    let authentication = typed::<manifest::RequestAuthentication, RequestAuthentication>(document);
    authentication.map(Object::RequestAuthentication).map_err(|mismatch| {
        let loose = document.read::<Value>().ok();
        let stand_in =
            loose.and_then(|v| RequestAuthentication::unreadable(&v, mismatch.message.clone()).ok());
        Unreadable { mismatch, stand_in: stand_in.map(Arc::new).map(Object::RequestAuthentication) }
    })
}

fn read_destination_rule(document: &impl Document) -> Result<Object, Unreadable> {
    let rule = typed::<manifest::DestinationRule, DestinationRule>(document);
    rule.map(Object::DestinationRule).map_err(|mismatch| {
        let loose = document.read::<Value>().ok();
        let stand_in = loose.and_then(|v| DestinationRule::unreadable(&v, mismatch.message.clone()));
        Unreadable { mismatch, stand_in: stand_in.map(Arc::new).map(Object::DestinationRule) }
    })
}

fn read_backend_tls_policy(document: &impl Document) -> Result<Object, Unreadable> {
    let policy = typed::<manifest::BackendTlsPolicy, BackendTlsPolicy>(document);
    policy.map(Object::BackendTlsPolicy).map_err(|mismatch| {
        let loose = document.read::<Value>().ok();
        let stand_in = loose.and_then(|v| BackendTlsPolicy::unreadable(&v, mismatch.message.clone()).ok());
        Unreadable { mismatch, stand_in: stand_in.map(Arc::new).map(Object::BackendTlsPolicy) }
    })
}

fn read_traffic_policy(document: &impl Document) -> Result<Object, Unreadable> {
    let policy = typed::<manifest::TrafficPolicy, TrafficPolicy>(document);
    policy.map(Object::TrafficPolicy).map_err(|mismatch| {
        let loose = document.read::<Value>().ok();
        let reason = match &mismatch.field {
            Some(field) => format!("{field}: {}", mismatch.message),
            None => mismatch.message.clone(),
        };
        let stand_in = loose.and_then(|v| TrafficPolicy::unreadable(&v, &reason).ok());
        Unreadable { mismatch, stand_in: stand_in.map(Arc::new).map(Object::TrafficPolicy) }
    })
}

fn invalid(invalid: Invalid) -> Mismatch {
    Mismatch { line: None, field: Some(invalid.field), message: invalid.problem }
}
