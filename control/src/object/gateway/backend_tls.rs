//! BackendTLSPolicies: TLS to the endpoints of Services and ServiceEntries.

use std::sync::Arc;

use ambit_api::l7;
use ambit_api::l7::backend_tls::Roots;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::Value;

use super::roots::RootsRef;
use crate::object::meta::{Invalid, Meta};
use crate::object::{Kind, NamespacedName, ObjectRef, subject_name};

/// A BackendTLSPolicy.
#[derive(Clone, Debug, PartialEq)]
pub struct BackendTlsPolicy {
    /// Name and age: of two for one target the older one counts.
    pub meta: Meta,
    /// What it is for.
    pub targets: Vec<TlsTarget>,
    /// What it demands; its roots only where they are the system's.
    pub tls: l7::BackendTls,
    /// Where its roots are.
    pub roots: Vec<RootsRef>,
    /// Why it can't be read; nothing is sent to its targets then.
    pub unreadable: Option<String>,
}

impl BackendTlsPolicy {
    /// What stands for a policy that can't be read: it is for the same targets.
    ///
    /// # Errors
    /// When the object has no name.
    pub fn unreadable(object: &Value, reason: String) -> Result<BackendTlsPolicy, Invalid> {
        let meta = Meta::salvage(object)?;
        let targets = object.pointer("/spec/targetRefs").and_then(Value::as_array);
        let targets = targets.into_iter().flatten().filter_map(|target| Reference::deserialize(target).ok());
        Ok(BackendTlsPolicy {
            targets: targets.map(|target| target.target(&meta.id.namespace)).collect(),
            tls: l7::BackendTls::default(),
            roots: Vec::new(),
            unreadable: Some(reason),
            meta,
        })
    }
}

/// Something whose endpoints a policy is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TlsTarget {
    /// A Service or ServiceEntry; none for anything else.
    pub object: Option<ObjectRef>,
    /// Its kind and name as written.
    pub text: String,
    /// The name of one of its ports; none: all that no other policy names.
    pub section: Option<Arc<str>>,
}

/// The manifest.
#[derive(Debug, Deserialize)]
pub(crate) struct Manifest {
    metadata: ObjectMeta,
    spec: Spec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    target_refs: Vec<Reference>,
    validation: Validation,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Reference {
    #[serde(default)]
    group: String,
    kind: String,
    name: String,
    #[serde(default)]
    section_name: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Validation {
    #[serde(default)]
    ca_certificate_refs: Vec<Reference>,
    #[serde(default, rename = "wellKnownCACertificates")]
    well_known: String,
    hostname: String,
    #[serde(default)]
    subject_alt_names: Vec<AltName>,
}

#[derive(Debug, Deserialize)]
struct AltName {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    hostname: String,
    #[serde(default)]
    uri: String,
}

impl TryFrom<Manifest> for BackendTlsPolicy {
    type Error = Invalid;

    fn try_from(manifest: Manifest) -> Result<BackendTlsPolicy, Invalid> {
        let Manifest { metadata, spec: Spec { target_refs, validation } } = manifest;
        let meta = Meta::read(&metadata)?;
        let Validation { ca_certificate_refs, well_known, hostname, subject_alt_names } = validation;
        let wrong =
            |field: &str, problem: &str| Err(Invalid::new(format!("spec.validation.{field}"), problem));
        if hostname.is_empty() {
            return wrong("hostname", "is empty");
        }
        let roots = match (well_known.as_str(), ca_certificate_refs.is_empty()) {
            ("", false) => None,
            ("System", true) => Some(Roots::System(true)),
            ("", true) => return wrong("caCertificateRefs", "is empty, and so is wellKnownCACertificates"),
            (_, true) => return wrong("wellKnownCACertificates", "is not System"),
            (_, false) => return wrong("wellKnownCACertificates", "excludes caCertificateRefs"),
        };
        let names = subject_alt_names.iter().enumerate();
        let names: Result<Vec<_>, Invalid> = names.map(|(at, name)| name.read(at)).collect();
        let namespace = &meta.id.namespace;
        Ok(BackendTlsPolicy {
            targets: target_refs.into_iter().map(|target| target.target(namespace)).collect(),
            roots: ca_certificate_refs.into_iter().map(|reference| reference.roots(namespace)).collect(),
            tls: l7::BackendTls {
                mode: l7::TlsMode::Tls.into(),
                server_name: hostname.to_ascii_lowercase(),
                names: names?,
                roots,
                ..l7::BackendTls::default()
            },
            unreadable: None,
            meta,
        })
    }
}

impl AltName {
    fn read(&self, at: usize) -> Result<l7::SubjectName, Invalid> {
        use l7::subject_name::Kind;
        match self.kind.as_str() {
            "Hostname" if !self.hostname.is_empty() => Ok(subject_name(&self.hostname)),
            "URI" if !self.uri.is_empty() => Ok(l7::SubjectName { kind: Some(Kind::Uri(self.uri.clone())) }),
            kind => {
                let problem = format!("type {kind:?} without a value, or unknown");
                Err(Invalid::new(format!("spec.validation.subjectAltNames[{at}]"), problem))
            }
        }
    }
}

impl Reference {
    fn target(self, namespace: &Arc<str>) -> TlsTarget {
        let kind = match (self.group.as_str(), self.kind.as_str()) {
            ("" | "core", "Service") => Some(Kind::Service),
            ("networking.istio.io", "ServiceEntry") => Some(Kind::ServiceEntry),
            _ => None,
        };
        let text = format!("{} {}", self.kind, self.name);
        let name = NamespacedName::new(namespace.clone(), self.name);
        let section = self.section_name.filter(|section| !section.is_empty()).map(Arc::from);
        TlsTarget { object: kind.map(|kind| ObjectRef { kind, name }), text, section }
    }

    fn roots(self, namespace: &Arc<str>) -> RootsRef {
        RootsRef::new(&self.group, &self.kind, namespace, &self.name)
    }
}
