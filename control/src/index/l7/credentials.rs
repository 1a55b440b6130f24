//! Secrets that DestinationRules name for TLS to endpoints (`credentialName`).
//!
//! As in Istio a Secret is one of the namespace of the waypoint that uses it. So that nobody has a waypoint of another namespace use its
//! keys for them, the rule must be of that namespace too, of the root namespace, or allowed by a ReferenceGrant. Where a Secret can't be
//! used, requests are answered with 500: nothing goes out in the clear.

use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_api::l7;
use ambit_api::l7::backend_tls::Roots;

use super::reader::Reader;
use super::{Finding, backend_tls, views};
use crate::object::{DestinationRule, Kind, NamespacedName, ObjectRef, Secret};

/// Whether all that a rule refers to is there, and may be used.
const RESOLVED: &str = "ambit.dev/ResolvedRefs";

/// Why a Secret can't be used: a reason, and one sentence.
struct Fault(&'static str, String);

/// Whether a policy names a Secret.
pub(super) fn are_named(policy: &l7::BackendPolicy) -> bool {
    let of_subsets = policy.subsets.iter().flat_map(|subset| &subset.settings);
    let mut all = policy.settings.iter().chain(of_subsets);
    all.any(|settings| settings.tls.as_ref().is_some_and(|tls| !tls.credential_name.is_empty()))
}

/// The policy for the waypoints of each namespace, with what is in the Secrets there.
pub(super) fn by_namespace<'a>(
    reader: &'a Reader<'_>,
    rule: &'a DestinationRule,
    policy: &'a l7::BackendPolicy,
    parents: Vec<Arc<str>>,
) -> impl Iterator<Item = (Arc<str>, Vec<Arc<str>>, l7::BackendPolicy)> + 'a {
    let mut waypoints: BTreeMap<Arc<str>, Vec<Arc<str>>> = BTreeMap::new();
    for root in parents {
        let gateway = views::gateway_of(&root);
        let namespace = gateway.map(|gateway| gateway.name.namespace).unwrap_or_default();
        waypoints.entry(namespace).or_default().push(root);
    }
    waypoints.into_iter().map(move |(namespace, roots)| {
        let filled = filled(reader, rule, policy.clone(), &namespace);
        (namespace, roots, filled)
    })
}

fn filled(
    reader: &Reader<'_>,
    rule: &DestinationRule,
    mut policy: l7::BackendPolicy,
    namespace: &Arc<str>,
) -> l7::BackendPolicy {
    let of_subsets = policy.subsets.iter_mut().flat_map(|subset| &mut subset.settings);
    for settings in policy.settings.iter_mut().chain(of_subsets) {
        let Some(tls) = settings.tls.as_mut().filter(|tls| !tls.credential_name.is_empty()) else { continue };
        let name = NamespacedName::new(namespace.clone(), tls.credential_name.as_str());
        let found = secret(reader, rule, &name).and_then(|secret| fill(tls, secret));
        if let Err(Fault(reason, message)) = found {
            let message = format!("credentialName: {message}");
            reader.find(Finding::new(RESOLVED, false, reason, message.clone()));
            settings.tls = None;
            if settings.invalid.is_empty() {
                settings.invalid = message;
            }
        }
    }
    policy
}

fn secret<'r>(
    reader: &Reader<'r>,
    rule: &DestinationRule,
    name: &NamespacedName,
) -> Result<&'r Secret, Fault> {
    let own = &rule.meta.id.namespace;
    let object = ObjectRef { kind: Kind::Secret, name: name.clone() };
    let is_own = *own == name.namespace || *own == reader.settings.root_namespace;
    // Whether it exists is said only to who may refer to it.
    if !is_own && !reader.is_granted(Kind::DestinationRule, own, &object) {
        let message = format!("no ReferenceGrant allows a DestinationRule of {own} to refer to {object}");
        return Err(Fault("RefNotPermitted", message));
    }
    let missing = || format!("there is no Secret {name} of type kubernetes.io/tls");
    reader.secret(name).ok_or_else(|| Fault("InvalidCertificateRef", missing()))
}

/// Writes what is in the Secret into the settings.
fn fill(tls: &mut l7::BackendTls, secret: &Secret) -> Result<(), Fault> {
    let invalid = |reason: &str| Fault("InvalidCertificateRef", format!("Secret {} {reason}", secret.id));
    if !matches!(tls.roots, Some(Roots::DangerousAny(true))) {
        let roots = secret.roots.as_deref().ok_or_else(|| invalid("has no ca.crt"))?;
        backend_tls::check_roots(roots).map_err(|problem| invalid(&format!("can't be used: {problem}")))?;
        tls.roots = Some(Roots::Pem(roots.as_bytes().to_vec().into()));
    }
    if let Some(revoked) = secret.revoked.as_ref().filter(|_| tls.revoked_file.is_empty()) {
        tls.revoked = revoked.as_bytes().to_vec().into();
    }
    if let Some(certificate) = &mut tls.certificate {
        let pair = secret.key_pair.as_ref().map_err(|reason| invalid(reason))?;
        certificate.chain = pair.certificates.to_vec().into();
        certificate.key = pair.private_key.to_vec().into();
    }
    Ok(())
}
