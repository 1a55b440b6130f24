//! External authorizers of listeners as their gateways get them, and which gateways ask a Service.

use std::sync::Arc;

use ambit_api::l7;
use ambit_api::security::{StringMatch, string_match::MatchType};

use super::listeners::Owner;
use super::reader::Reader;
use super::{listener_sets, views};
use crate::mesh_config::TIMEOUT;
use crate::object::{
    BackendRef, ExternalAuth, ExternalAuthProtocol, Kind, Listener, NamespacedName, ObjectRef, TargetKind,
};

/// The status of requests that can't be decided about because the authorizer is not there.
const UNDECIDED: u32 = 500;

/// Why an authorizer can't be asked: a reason of Gateway API, and one sentence.
pub(super) struct Unresolved(pub(super) &'static str, pub(super) String);

/// The authorizers of a listener. One that can't be asked denies every request; the first of these is reported.
pub(super) fn authorizers(
    reader: &Reader<'_>,
    owner: Owner<'_>,
    listener: &Listener,
) -> (Vec<l7::ExternalAuthorizer>, Option<Unresolved>) {
    let mut unresolved = None;
    let mut lower = |filter: &ExternalAuth| {
        let found = resolve(reader, owner.object().kind, owner.namespace(), &filter.backend);
        let (namespace, hostname, port, status_on_error) = match found {
            Ok((name, port)) => (name.namespace.to_string(), reader.settings.host_of_service(&name), port, 0),
            Err(fault) => {
                unresolved.get_or_insert(fault);
                (owner.namespace().to_string(), String::new(), 0, UNDECIDED)
            }
        };
        let provider = format!("{} of listener {} of {}", filter.backend.name, listener.name, owner.object());
        let authorizer = l7::ExternalAuthorizer {
            provider,
            namespace,
            hostname,
            port: port.into(),
            timeout_nanos: u64::try_from(TIMEOUT.as_nanos()).unwrap_or(u64::MAX),
            status_on_error,
            body: (filter.body > 0).then_some(l7::CheckedBody {
                max_bytes: filter.body,
                allow_partial: false,
                as_bytes: true,
            }),
            ..l7::ExternalAuthorizer::default()
        };
        match &filter.protocol {
            ExternalAuthProtocol::Grpc => {
                l7::ExternalAuthorizer { include: exactly(&filter.seen), ..authorizer }
            }
            ExternalAuthProtocol::Http { path, returned } => {
                let any = StringMatch { match_type: Some(MatchType::Presence(())) };
                let to_upstream = if returned.is_empty() { vec![any] } else { exactly(returned) };
                let check = l7::HttpCheck {
                    path_prefix: path.clone(),
                    include: exactly(&filter.seen),
                    to_upstream,
                    ..l7::HttpCheck::default()
                };
                l7::ExternalAuthorizer { http: Some(check), ..authorizer }
            }
        }
    };
    let authorizers = listener.filters.iter().flatten().map(&mut lower).collect();
    (authorizers, unresolved)
}

fn exactly(names: &[String]) -> Vec<StringMatch> {
    let exact = |name: &String| StringMatch { match_type: Some(MatchType::Exact(name.clone())) };
    names.iter().map(exact).collect()
}

/// The Service that a filter of an object of this kind in `own` means, with its port.
fn resolve(
    reader: &Reader<'_>,
    kind: Kind,
    own: &Arc<str>,
    to: &BackendRef,
) -> Result<(NamespacedName, u16), Unresolved> {
    let name = to.name_in(own);
    if to.kind != TargetKind::Service {
        return Err(Unresolved(
            "InvalidKind",
            format!("authorizers of kind {} are not supported", to.kind_name),
        ));
    }
    if !may_refer(reader, kind, own, &name) {
        let message = format!("no ReferenceGrant allows a reference to Service {name}");
        return Err(Unresolved("RefNotPermitted", message));
    }
    let missing = |message: String| Unresolved("BackendNotFound", message);
    let service = reader.service(&name).ok_or_else(|| missing(format!("Service {name} does not exist")))?;
    let port = to.port.filter(|port| service.ports.iter().any(|known| known.number == *port));
    let port = port.ok_or_else(|| missing(format!("Service {name} has no such port")))?;
    Ok((name, port))
}

fn may_refer(reader: &Reader<'_>, kind: Kind, own: &Arc<str>, service: &NamespacedName) -> bool {
    let object = ObjectRef { kind: Kind::Service, name: service.clone() };
    service.namespace == *own || reader.is_granted(kind, own, &object)
}

/// The roots of the gateways whose listeners ask a Service.
pub(super) fn roots_asking(reader: &Reader<'_>, service: &NamespacedName) -> Vec<Arc<str>> {
    let owners = reader.listeners_asking(service).filter(|owner| {
        // A reference that is not permitted shows nothing of what it names.
        may_refer(reader, owner.kind, &owner.name.namespace, service)
    });
    let gateway = |owner: &ObjectRef| match owner.kind {
        Kind::ListenerSet => {
            let owner = listener_sets::attached_by_name(reader, &owner.name)?.ok()?;
            Some(owner.gateway.meta.id.clone())
        }
        _ => {
            let gateway = reader.gateway(&owner.name)?;
            reader.settings.gateway_classes.contains(&gateway.class).then(|| gateway.meta.id.clone())
        }
    };
    owners.filter_map(gateway).map(|id| views::root(&id)).collect()
}
