//! Ingresses and their classes: requests of clients outside the mesh, as Kubernetes itself describes them.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::networking::v1;

use super::meta::{Invalid, Meta, annotation, name};
use crate::object::{
    AllowedNamespaces, CertificateRef, Listener, ListenerProtocol, ListenerTls, NamespacedName,
};

/// The controller that IngressClasses of the mesh name.
pub const INGRESS_CONTROLLER: &str = "ambit.dev/ingress-controller";
/// The port that TLS of Ingresses is taken on.
pub const HTTPS: u16 = 443;
/// Annotation that named the class before the field did. Kubernetes: it comes before the field.
const CLASS: &str = "kubernetes.io/ingress.class";
const IS_DEFAULT: &str = "ingressclass.kubernetes.io/is-default-class";

/// An Ingress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ingress {
    /// Name, labels and age.
    pub meta: Meta,
    /// Its class; `None`: it names none.
    pub class: Option<Arc<str>>,
    /// What has no effect of it, one sentence each.
    pub faults: Vec<String>,
    /// Paths by host, in order.
    pub rules: Vec<IngressRule>,
    /// Where requests go that no rule matches.
    pub default_backend: Option<IngressBackend>,
    /// Listeners for the hosts that it has certificates for.
    pub listeners: Vec<Listener>,
}

/// Paths of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IngressRule {
    /// In lower case, `*.` in front for all names with one more label; `None`: all hosts.
    pub host: Option<Arc<str>>,
    /// Its paths, in order.
    pub paths: Vec<IngressPath>,
}

/// A path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IngressPath {
    /// As written.
    pub path: String,
    /// Whether it is the whole path; else whole segments at its beginning.
    pub is_exact: bool,
    /// Where requests go.
    pub backend: IngressBackend,
}

/// Where requests go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IngressBackend {
    /// A Service beside the Ingress.
    Service {
        /// Its name.
        name: Arc<str>,
        /// Its port.
        port: BackendPort,
    },
    /// What can't be sent requests, as written.
    Other(Arc<str>),
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendPort {
    /// By number.
    Number(u16),
    /// By name.
    Name(Arc<str>),
}

impl Ingress {
    /// The Services that it sends requests to.
    pub fn services(&self) -> BTreeSet<NamespacedName> {
        let of_rules = self.rules.iter().flat_map(|rule| &rule.paths).map(|path| &path.backend);
        let service = |backend: &IngressBackend| match backend {
            IngressBackend::Service { name, .. } => {
                Some(NamespacedName::new(self.meta.id.namespace.clone(), name.clone()))
            }
            IngressBackend::Other(_) => None,
        };
        of_rules.chain(&self.default_backend).filter_map(service).collect()
    }

    /// The hosts that it has certificates for; empty for all.
    pub fn tls_hosts(&self) -> impl Iterator<Item = &str> {
        self.listeners.iter().map(|listener| listener.hostname.as_deref().unwrap_or_default())
    }
}

impl TryFrom<v1::Ingress> for Ingress {
    type Error = Invalid;

    fn try_from(object: v1::Ingress) -> Result<Ingress, Invalid> {
        let meta = Meta::read(&object.metadata)?;
        let spec = object.spec.unwrap_or_default();
        let mut faults = Vec::new();
        let legacy = annotation(&object.metadata, CLASS);
        if let (Some(legacy), Some(class)) = (legacy, &spec.ingress_class_name)
            && legacy != class
        {
            faults.push(format!(
                "spec.ingressClassName {class}: annotation {CLASS} says {legacy}, which counts"
            ));
        }
        let class = legacy.map(str::to_owned).or(spec.ingress_class_name).filter(|class| !class.is_empty());
        let rule = |rule: v1::IngressRule| IngressRule {
            host: rule.host.filter(|host| !host.is_empty()).map(|host| host.to_ascii_lowercase().into()),
            paths: rule.http.map(|http| http.paths).unwrap_or_default().into_iter().map(path).collect(),
        };
        let listeners = listeners(&meta.id, spec.tls.unwrap_or_default(), &mut faults);
        Ok(Ingress {
            class: class.map(Arc::from),
            faults,
            rules: spec.rules.unwrap_or_default().into_iter().map(rule).collect(),
            default_backend: spec.default_backend.map(backend),
            listeners,
            meta,
        })
    }
}

fn path(path: v1::HTTPIngressPath) -> IngressPath {
    let written = path.path.unwrap_or_default();
    // What `ImplementationSpecific` means is the controller's choice: here a prefix, with a star at its end as other controllers write it.
    let is_own = path.path_type == "ImplementationSpecific";
    let prefix = written.strip_suffix('*').filter(|_| is_own).unwrap_or(&written);
    IngressPath {
        path: if prefix.is_empty() { "/".to_owned() } else { prefix.to_owned() },
        is_exact: path.path_type == "Exact",
        backend: backend(path.backend),
    }
}

fn backend(backend: v1::IngressBackend) -> IngressBackend {
    match (backend.service, backend.resource) {
        (Some(service), _) => {
            let port = service.port.unwrap_or_default();
            let number = port.number.and_then(|number| u16::try_from(number).ok()).filter(|port| *port != 0);
            match (number, port.name.filter(|name| !name.is_empty())) {
                (Some(number), _) => {
                    IngressBackend::Service { name: service.name.into(), port: BackendPort::Number(number) }
                }
                (None, Some(name)) => IngressBackend::Service {
                    name: service.name.into(),
                    port: BackendPort::Name(name.into()),
                },
                (None, None) => {
                    IngressBackend::Other(format!("Service {} without a port", service.name).into())
                }
            }
        }
        (None, Some(resource)) => {
            IngressBackend::Other(format!("{} {}", resource.kind, resource.name).into())
        }
        (None, None) => IngressBackend::Other("nothing".into()),
    }
}

/// A listener for each host that there is a certificate for.
fn listeners(id: &NamespacedName, tls: Vec<v1::IngressTLS>, faults: &mut Vec<String>) -> Vec<Listener> {
    let mut listeners: Vec<Listener> = Vec::new();
    for (at, tls) in tls.into_iter().enumerate() {
        let Some(secret) = tls.secret_name.filter(|secret| !secret.is_empty()) else {
            faults.push(format!("spec.tls[{at}] names no Secret, and has no effect"));
            continue;
        };
        let hosts = tls.hosts.filter(|hosts| !hosts.is_empty()).unwrap_or_else(|| vec![String::new()]);
        for host in hosts {
            let hostname = Some(host.to_ascii_lowercase()).filter(|host| !host.is_empty()).map(Arc::from);
            if listeners.iter().any(|known| known.hostname == hostname) {
                faults.push(format!("spec.tls[{at}]: there is a Secret for {host:?} already"));
                continue;
            }
            let certificate = CertificateRef {
                is_secret: true,
                kind_name: "Secret".into(),
                name: NamespacedName::new(id.namespace.clone(), secret.as_str()),
            };
            listeners.push(Listener {
                name: hostname.clone().unwrap_or_else(|| "all".into()),
                port: HTTPS,
                protocol: ListenerProtocol::Https,
                hostname,
                tls: Some(ListenerTls { passthrough: false, certificates: vec![certificate] }),
                namespaces: AllowedNamespaces::All,
                kinds: Vec::new(),
                filters: Ok(Vec::new()),
            });
        }
    }
    listeners
}

/// An IngressClass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IngressClass {
    /// Its name.
    pub name: Arc<str>,
    /// Whether its controller is the mesh.
    pub is_ours: bool,
    /// Whether it is that of Ingresses that name none.
    pub is_default: bool,
    /// The Gateway that serves it; `None`: that which the control plane makes. Or what is wrong with its parameters.
    pub gateway: Result<Option<NamespacedName>, String>,
}

impl TryFrom<v1::IngressClass> for IngressClass {
    type Error = Invalid;

    fn try_from(object: v1::IngressClass) -> Result<IngressClass, Invalid> {
        let spec = object.spec.unwrap_or_default();
        let gateway = match spec.parameters {
            None => Ok(None),
            Some(parameters) => {
                let is_gateway = parameters.api_group.as_deref() == Some("gateway.networking.k8s.io")
                    && parameters.kind == "Gateway";
                let namespace = parameters.namespace.filter(|namespace| !namespace.is_empty());
                match namespace.filter(|_| is_gateway) {
                    Some(namespace) => Ok(Some(NamespacedName::new(namespace, parameters.name))),
                    None => Err(format!(
                        "spec.parameters names {} {}, not a Gateway with its namespace",
                        parameters.kind, parameters.name
                    )),
                }
            }
        };
        Ok(IngressClass {
            name: name(&object.metadata)?,
            is_ours: spec.controller.as_deref() == Some(INGRESS_CONTROLLER),
            is_default: annotation(&object.metadata, IS_DEFAULT) == Some("true"),
            gateway,
        })
    }
}
