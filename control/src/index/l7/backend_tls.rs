//! BackendTLSPolicies as resources: TLS to the endpoints of Services and ServiceEntries, for the waypoints that send requests to them.
//!
//! Of two policies for one port of a target the older one counts. A policy whose roots can't be had is sent all the same, and its
//! requests are answered with 500: nothing goes out in the clear.

use std::collections::BTreeSet;
use std::sync::Arc;

use ambit_api::l7;
use ambit_api::l7::backend_tls::Roots;
use prost::Message;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::gateways::object_name;
use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::{Finding, views};
use crate::object::{BackendTlsPolicy, Kind, NamespacedName, ObjectRef, TlsTarget};

const ACCEPTED: &str = "Accepted";
const RESOLVED: &str = "ResolvedRefs";

/// What a target is to waypoints.
struct Attached {
    hosts: Vec<String>,
    /// 0: all ports.
    port: u16,
    roots: BTreeSet<Arc<str>>,
}

/// Why a policy is not for a target.
struct Refused(&'static str, String);

/// The resources of a policy, one for each host that it is for.
pub(in crate::index) fn of_policy(reader: &Reader<'_>, id: &NamespacedName) -> Vec<(ResourceType, Resource)> {
    let Some(policy) = reader.store.backend_tls_policies.get(id) else { return Vec::new() };
    let demanded = demanded(reader, policy);
    let mut resources = Vec::new();
    for target in &policy.targets {
        let attached = match attach(reader, policy, target) {
            Ok(attached) => attached,
            Err(Refused(reason, message)) => {
                for ancestor in ancestors(reader, target) {
                    reader.find(about(&ancestor, ACCEPTED, false, reason, message.clone()));
                }
                continue;
            }
        };
        for root in &attached.roots {
            report(reader, root, &demanded);
        }
        resources.extend(lowered(policy, &attached, &demanded, resources.len()));
    }
    resources
}

/// What a policy demands, and what is wrong with its references.
struct Demanded {
    tls: Option<l7::BackendTls>,
    unresolved: Option<(&'static str, String)>,
}

fn demanded(reader: &Reader<'_>, policy: &BackendTlsPolicy) -> Demanded {
    if let Some(reason) = &policy.unreadable {
        return Demanded { tls: None, unresolved: Some(("Invalid", reason.clone())) };
    }
    if policy.roots.is_empty() {
        return Demanded { tls: Some(policy.tls.clone()), unresolved: None };
    }
    let mut pem = String::new();
    let mut unresolved = None;
    for reference in &policy.roots {
        let found = match &reference.object {
            None => {
                let message = format!("{} is neither a ConfigMap nor a ClusterTrustBundle", reference.text);
                Err(("InvalidKind", message))
            }
            Some(object) => roots_in(reader, object)
                .map_err(|problem| ("InvalidCACertificateRef", format!("{}: {problem}", reference.text))),
        };
        match found {
            Ok(roots) => {
                pem.push_str(roots);
                pem.push('\n');
            }
            Err(problem) => _ = unresolved.get_or_insert(problem),
        }
    }
    let tls = (!pem.is_empty())
        .then(|| l7::BackendTls { roots: Some(Roots::Pem(pem.into_bytes().into())), ..policy.tls.clone() });
    Demanded { tls, unresolved }
}

pub(super) fn roots_in<'r>(reader: &Reader<'r>, object: &ObjectRef) -> Result<&'r str, &'static str> {
    let holder = reader.roots(object);
    let holder = match object.kind {
        Kind::ConfigMap => holder.ok_or("it does not exist, or has no key ca.crt")?,
        _ => holder.ok_or("it does not exist")?,
    };
    let roots = holder.roots.as_deref().unwrap_or_default();
    check_roots(roots).map(|()| roots)
}

/// Checks that a text has certificates, and nothing that can't be read.
pub(super) fn check_roots(pem: &str) -> Result<(), &'static str> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let certificate = certificate.map_err(|_| "it is not PEM")?;
        roots.add(certificate).map_err(|_| "it has something that is no certificate")?;
    }
    if roots.is_empty() { Err("it has no certificate") } else { Ok(()) }
}

fn attach(reader: &Reader<'_>, policy: &BackendTlsPolicy, target: &TlsTarget) -> Result<Attached, Refused> {
    let Some(object) = &target.object else {
        let message = format!("{} is neither a Service nor a ServiceEntry", target.text);
        return Err(Refused("Invalid", message));
    };
    let missing = || Refused("TargetNotFound", format!("{} does not exist", target.text));
    let section = target.section.as_deref();
    let no_port =
        || Refused("TargetNotFound", format!("{} has no port {}", target.text, section.unwrap_or_default()));
    let Offered { hosts, ports, roots } = offered(reader, object).ok_or_else(missing)?;
    let port = match section {
        None => 0,
        Some(section) => {
            let named = ports.iter().find(|(name, _)| **name == *section);
            named.map(|(_, port)| *port).ok_or_else(no_port)?
        }
    };
    let rivals = reader.tls_policies_of(object).filter(|rival| {
        rival.targets.iter().any(|other| other.object == target.object && other.section == target.section)
    });
    let first = rivals.min_by_key(|rival| rival.meta.seniority());
    match first {
        Some(first) if first.meta.id != policy.meta.id => {
            let message = format!("BackendTLSPolicy {} is older and for {} too", first.meta.id, target.text);
            Err(Refused("Conflicted", message))
        }
        _ => Ok(Attached { hosts, port, roots }),
    }
}

/// A Service or ServiceEntry as far as policies are attached to it.
struct Offered {
    hosts: Vec<String>,
    ports: Vec<(Arc<str>, u16)>,
    /// The waypoints that send requests to it.
    roots: BTreeSet<Arc<str>>,
}

fn offered(reader: &Reader<'_>, object: &ObjectRef) -> Option<Offered> {
    if object.kind == Kind::Service {
        let service = reader.service(&object.name)?;
        return Some(Offered {
            hosts: vec![reader.settings.host_of_service(&object.name)],
            ports: service.ports.iter().map(|port| (port.name.clone(), port.number)).collect(),
            roots: views::of_service(reader, service).into_iter().collect(),
        });
    }
    let entry = reader.service_entry(&object.name)?;
    Some(Offered {
        hosts: entry.hosts.iter().map(ToString::to_string).collect(),
        ports: entry.ports.iter().map(|port| (port.name.clone(), port.number)).collect(),
        roots: entry.hosts.iter().flat_map(|host| views::of_entry(reader, entry, host)).collect(),
    })
}

fn lowered(
    policy: &BackendTlsPolicy,
    attached: &Attached,
    demanded: &Demanded,
    from: usize,
) -> Vec<(ResourceType, Resource)> {
    let id = &policy.meta.id;
    let reason = || match &demanded.unresolved {
        Some((_, message)) => message.clone(),
        None => "there are no roots".to_owned(),
    };
    let settings = l7::PortSettings {
        port: attached.port.into(),
        invalid: if demanded.tls.is_some() { String::new() } else { reason() },
        tls: demanded.tls.clone(),
        ..l7::PortSettings::default()
    };
    let resource = |(at, host): (usize, &String)| {
        let message = l7::BackendPolicy {
            object: Some(object_name(Kind::BackendTlsPolicy, id)),
            created: policy.meta.created.unwrap_or_default(),
            host: host.clone(),
            mesh_wide: false,
            settings: vec![settings.clone()],
            subsets: Vec::new(),
        };
        let resource = Resource {
            name: format!("{}/{id}/{}", Kind::BackendTlsPolicy, from + at).into(),
            aliases: Vec::new(),
            parents: attached.roots.iter().cloned().collect(),
            body: message.encode_to_vec().into(),
            unhealthy: false,
        };
        (ResourceType::BackendPolicy, resource)
    };
    let is_seen = !attached.roots.is_empty();
    attached.hosts.iter().enumerate().filter(|_| is_seen).map(resource).collect()
}

/// What is said of a policy at one of its waypoints.
fn report(reader: &Reader<'_>, root: &str, demanded: &Demanded) {
    let Some(ancestor) = views::gateway_of(root) else { return };
    let accepted = match demanded.tls {
        Some(_) => about(&ancestor, ACCEPTED, true, "Accepted", "followed for requests".to_owned()),
        None if demanded.unresolved.as_ref().is_some_and(|(reason, _)| *reason == "Invalid") => {
            let message = "it can't be read: requests are answered with 500".to_owned();
            about(&ancestor, ACCEPTED, false, "Invalid", message)
        }
        None => {
            let message = "no root can be used: requests are answered with 500".to_owned();
            about(&ancestor, ACCEPTED, false, "NoValidCACertificate", message)
        }
    };
    let resolved = match &demanded.unresolved {
        None => {
            about(&ancestor, RESOLVED, true, "ResolvedRefs", "every reference leads somewhere".to_owned())
        }
        Some((reason, message)) => about(&ancestor, RESOLVED, false, reason, message.clone()),
    };
    reader.find(accepted);
    reader.find(resolved);
}

/// Where it is said that a policy is not for a target: at its waypoints, else at the target.
fn ancestors(reader: &Reader<'_>, target: &TlsTarget) -> Vec<ObjectRef> {
    let Some(object) = &target.object else { return Vec::new() };
    let roots = offered(reader, object).map(|offered| offered.roots).unwrap_or_default();
    let gateways: BTreeSet<ObjectRef> = roots.iter().filter_map(|root| views::gateway_of(root)).collect();
    if gateways.is_empty() { vec![object.clone()] } else { gateways.into_iter().collect() }
}

fn about(
    ancestor: &ObjectRef,
    condition: &'static str,
    met: bool,
    reason: &'static str,
    message: String,
) -> Finding {
    Finding::new(condition, met, reason, message).relative_to(ancestor.kind, &ancestor.name)
}
