//! AuthorizationPolicies with `targetRefs` as resources: for which waypoints they are, and for what of these.

use std::collections::BTreeSet;
use std::sync::Arc;

use ambit_api::{l7, security};
use prost::Message;

use super::gateways::object_name;
use super::l4::authorization::everything;
use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::{Finding, views};
use crate::object::{
    Action, AuthorizationPolicy, Kind, NamespacedName, PolicyBody, PolicyTarget, PolicyTargetKind,
};

/// The resource of a policy that is bound to something of a waypoint.
pub(in crate::index) fn of_policy(
    reader: &Reader<'_>,
    policy: &AuthorizationPolicy,
) -> Vec<(ResourceType, Resource)> {
    let (PolicyBody::Rules { action, .. } | PolicyBody::Unreadable { action, .. }) = &policy.body;
    let mut bound = Bound::default();
    let faults: Vec<String> =
        policy.targets.iter().filter_map(|target| bound.add(reader, &policy.id, target).err()).collect();
    if let Some(fault) = faults.first() {
        report(reader, false, "TargetNotFound", format!("{fault}: it has no effect there"));
    }
    if bound.roots.is_empty() {
        return Vec::new();
    }
    let (authorization, audit) = match action {
        Action::Audit => (
            Some(authorization(policy, security::Action::Deny, Vec::new())),
            audited(reader, policy, faults.is_empty()),
        ),
        Action::Allow | Action::Deny | Action::Custom => (enforced(reader, policy, faults.is_empty()), None),
    };
    let message = l7::Policy {
        object: Some(object_name(Kind::AuthorizationPolicy, &policy.id)),
        targets: bound.targets,
        gateways: bound.gateways,
        authorization,
        authentication: None,
        external: authorizer(reader, policy).ok().cloned().map(Box::new),
        audit,
        traffic: None,
    };
    let resource = Resource {
        name: policy.id.to_string().into(),
        aliases: Vec::new(),
        parents: bound.roots.into_iter().collect(),
        body: message.encode_to_vec().into(),
        unhealthy: false,
    };
    vec![(ResourceType::Policy, resource)]
}

/// The waypoints that a policy is for.
pub(super) fn roots_of(reader: &Reader<'_>, policy: &AuthorizationPolicy) -> BTreeSet<Arc<str>> {
    let mut bound = Bound::default();
    for target in &policy.targets {
        // What is wrong with it is a finding of the policy's own.
        let _ = bound.add(reader, &policy.id, target);
    }
    bound.roots
}

/// What waypoints enforce of a policy; `None` where they deny everything instead.
fn enforced(
    reader: &Reader<'_>,
    policy: &AuthorizationPolicy,
    attached: bool,
) -> Option<security::Authorization> {
    let (PolicyBody::Rules { action, .. } | PolicyBody::Unreadable { action, .. }) = &policy.body;
    let say = |met, reason, message: String| {
        // Where a target is missing, that was said instead.
        if attached {
            report(reader, met, reason, message);
        }
    };
    let action = match action {
        Action::Allow => security::Action::Allow,
        Action::Deny => security::Action::Deny,
        Action::Custom => match authorizer(reader, policy) {
            // What is not known counts as met, and is asked about.
            Ok(authorizer) => {
                if !is_offered(reader, &authorizer.hostname) {
                    let message = format!("there is no service {}: nobody can be asked", authorizer.hostname);
                    say(false, "ProviderNotFound", message);
                }
                security::Action::Deny
            }
            Err(reason) => {
                let reason = match &policy.body {
                    PolicyBody::Unreadable { reason, .. } => reason.clone(),
                    PolicyBody::Rules { .. } => reason,
                };
                if policy.dry_run {
                    say(false, "ProviderNotFound", format!("{reason}: nothing is logged"));
                    return Some(authorization(policy, security::Action::Deny, Vec::new()));
                }
                say(false, "Denies", format!("{reason}: everything is denied instead"));
                return None;
            }
        },
        // It is reported, not enforced.
        Action::Audit => return None,
    };
    let rules = match (&policy.body, action) {
        (PolicyBody::Rules { rules, .. }, action) => {
            let (rules, unknown) = super::authorization::rules(reader, &policy.id.namespace, action, rules);
            match unknown.first() {
                None => say(true, "Accepted", accepted(policy)),
                Some(key) => say(false, "UnsupportedValue", unsupported(key, action)),
            }
            rules
        }
        (PolicyBody::Unreadable { reason, .. }, security::Action::Allow) => {
            say(false, "Unreadable", format!("{reason}: nothing is allowed by it"));
            Vec::new()
        }
        (PolicyBody::Unreadable { reason, .. }, security::Action::Deny) => {
            say(false, "Unreadable", format!("{reason}: everything is denied instead"));
            vec![everything()]
        }
    };
    Some(authorization(policy, action, rules))
}

/// What waypoints report by a policy with the action AUDIT.
fn audited(
    reader: &Reader<'_>,
    policy: &AuthorizationPolicy,
    attached: bool,
) -> Option<security::Authorization> {
    let (met, reason, message, rules) = match &policy.body {
        PolicyBody::Unreadable { reason, .. } => {
            (false, "Unreadable", format!("{reason}: nothing is reported by it"), Vec::new())
        }
        PolicyBody::Rules { rules, .. } => {
            let (rules, unknown) =
                super::authorization::rules(reader, &policy.id.namespace, security::Action::Deny, rules);
            match unknown.first() {
                None => {
                    (true, "Accepted", "reported by waypoints: logged and counted only".to_owned(), rules)
                }
                Some(key) => {
                    let message =
                        format!("waypoints do not know {key}: it counts as met, so more is reported");
                    (false, "UnsupportedValue", message, rules)
                }
            }
        }
    };
    if attached {
        report(reader, met, reason, message);
    }
    let audit = authorization(policy, security::Action::Deny, rules);
    Some(security::Authorization { dry_run: false, ..audit })
}

/// Whether some Service or ServiceEntry has this host.
fn is_offered(reader: &Reader<'_>, host: &str) -> bool {
    let service = reader.settings.own_service(host).and_then(|id| reader.service(&id));
    service.is_some() || reader.entries_of_host(&Arc::from(host)).next().is_some()
}

/// Whom a policy asks.
///
/// # Errors
/// Why nobody can be asked.
fn authorizer<'r>(
    reader: &'r Reader<'_>,
    policy: &AuthorizationPolicy,
) -> Result<&'r l7::ExternalAuthorizer, String> {
    let provider = policy.asks().ok_or("spec.provider names nobody to ask")?;
    let known = reader.settings.authorizers.get(provider);
    known.ok_or_else(|| format!("there is no extension provider {provider} in the mesh's settings"))
}

fn authorization(
    policy: &AuthorizationPolicy,
    action: security::Action,
    rules: Vec<security::Rule>,
) -> security::Authorization {
    security::Authorization {
        name: policy.id.name.to_string(),
        namespace: policy.id.namespace.to_string(),
        scope: security::Scope::WorkloadSelector.into(),
        action: action.into(),
        rules,
        dry_run: policy.dry_run,
        extensions: Vec::new(),
    }
}

fn accepted(policy: &AuthorizationPolicy) -> String {
    match policy.dry_run {
        true => "evaluated by waypoints, logged and counted only (dry-run)".to_owned(),
        false => "enforced by waypoints".to_owned(),
    }
}

fn unsupported(key: &str, action: security::Action) -> String {
    match action {
        security::Action::Allow => format!("waypoints do not know {key}: rules with it never match"),
        security::Action::Deny => format!("waypoints do not know {key}: it counts as met, so more is denied"),
    }
}

/// What the targets of a policy come to.
#[derive(Default)]
pub(super) struct Bound {
    pub(super) targets: Vec<l7::Target>,
    pub(super) gateways: Vec<String>,
    /// The waypoints that it is for.
    pub(super) roots: BTreeSet<Arc<str>>,
}

impl Bound {
    /// Adds a target, or says why there is none.
    pub(super) fn add(
        &mut self,
        reader: &Reader<'_>,
        policy: &NamespacedName,
        target: &PolicyTarget,
    ) -> Result<(), String> {
        let PolicyTarget { kind, kind_name, name } = target;
        if *kind != PolicyTargetKind::GatewayClass && name.namespace != policy.namespace {
            return Err(format!("{kind_name} {name} is in another namespace"));
        }
        let missing = || format!("{kind_name} {name} does not exist");
        match kind {
            PolicyTargetKind::Gateway => {
                let gateway = reader.gateway(name).ok_or_else(missing)?;
                self.add_gateway(reader, &gateway.class, name)
            }
            PolicyTargetKind::GatewayClass if policy.namespace != reader.settings.root_namespace => {
                Err("policies of a GatewayClass are in the root namespace".to_owned())
            }
            PolicyTargetKind::GatewayClass => {
                for gateway in reader.gateways_of_class(&name.name) {
                    self.add_gateway(reader, &name.name, &gateway.meta.id)?;
                }
                Ok(())
            }
            PolicyTargetKind::Service => {
                let service = reader.service(name).ok_or_else(missing)?;
                let roots = views::of_binding(reader, &name.namespace, &service.waypoint);
                self.add_hosts(target, [reader.settings.host_of_service(name)], roots)
            }
            PolicyTargetKind::ServiceEntry => {
                let entry = reader.service_entry(name).ok_or_else(missing)?;
                let roots = views::of_binding(reader, &name.namespace, &entry.waypoint);
                self.add_hosts(target, entry.hosts.iter().map(ToString::to_string), roots)
            }
            PolicyTargetKind::Other => Err(format!("policies can't be bound to a {kind_name}")),
        }
    }

    fn add_gateway(
        &mut self,
        reader: &Reader<'_>,
        class: &Arc<str>,
        name: &NamespacedName,
    ) -> Result<(), String> {
        if !reader.settings.runs(class) {
            return Err(format!("Gateway {name} of class {class} is another controller's"));
        }
        self.gateways.push(name.to_string());
        self.roots.insert(views::root(name));
        Ok(())
    }

    fn add_hosts(
        &mut self,
        target: &PolicyTarget,
        hosts: impl IntoIterator<Item = String>,
        roots: BTreeSet<Arc<str>>,
    ) -> Result<(), String> {
        if roots.is_empty() {
            return Err(format!("{} {} is bound to no waypoint", target.kind_name, target.name));
        }
        let namespace = target.name.namespace.to_string();
        self.targets.extend(hosts.into_iter().map(|hostname| l7::Target {
            namespace: namespace.clone(),
            hostname,
            ..l7::Target::default()
        }));
        self.roots.extend(roots);
        Ok(())
    }
}

pub(super) fn report(reader: &Reader<'_>, met: bool, reason: &'static str, message: String) {
    reader.find(Finding::new("WaypointAccepted", met, reason, message));
}
