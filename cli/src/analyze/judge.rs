//! Objects in, reports out. Pure: the control plane's index judges what it reads, the table of foreign kinds the rest.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use ambit_api::l7;
use ambit_control::index::{Finding as Condition, Index, ResourceType, Settings, default_gateway};
use ambit_control::intake;
use ambit_control::object::{Change, Kind, Object, ObjectRef};
use ambit_control::source::files::inspect::{Content, Fields};
use prost::Message;
use serde::Serialize;
use serde_json::{Value, json};

use super::shadows::{self, Shadowed};
use super::{foreign, remedies};
use crate::finding::{Finding, Level};
use crate::output::Palette;

/// Where an object is written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Place {
    /// The file; `-` is standard input.
    pub(crate) file: String,
    /// The line, from 1.
    pub(crate) line: u64,
}

/// An object, or what can't be one.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    /// Where it is written; nothing for one of a cluster.
    pub(crate) place: Option<Place>,
    /// What it is.
    pub(crate) content: Content,
    /// Where its fields are written; nothing for one of a cluster.
    pub(crate) fields: Option<Fields>,
    /// It is only there for others to refer to: nothing is said of it.
    pub(crate) is_context: bool,
}

impl Item {
    /// An object of a cluster.
    pub(super) fn of_cluster(content: Content) -> Item {
        Item { place: None, content, fields: None, is_context: false }
    }
}

/// What is to be said of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Report {
    /// Where it is written; nothing for one of a cluster.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub(crate) place: Option<Place>,
    /// The object, as `Kind namespace/name`.
    pub(crate) object: String,
    /// Its namespace.
    pub(crate) namespace: String,
    /// How much it matters.
    pub(crate) level: Level,
    /// The reason, one word; empty where no condition says it.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) reason: &'static str,
    /// What is wrong.
    pub(crate) message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) remedy: String,
}

/// Judges objects. `is_complete`: they are all that there is, so that a missing one is missing, and their statuses count.
pub(crate) fn judge(items: Vec<Item>, settings: Settings, is_complete: bool) -> Vec<Report> {
    let mut places: BTreeMap<ObjectRef, (Written, bool)> = BTreeMap::new();
    let (mut changes, mut reports) = (Vec::new(), Vec::new());
    for Item { place, content, fields, is_context } in items {
        let object = match content {
            Content::Object(object) => Some(object),
            Content::Foreign(value) => {
                if !is_context {
                    reports.extend(of_foreign(&value, place.clone()));
                }
                None
            }
            Content::Fault { object, field, message, stand_in } => {
                if !is_context {
                    reports.push(of_fault(object.as_ref(), field.as_deref(), &message, place.clone()));
                }
                stand_in.map(|object| *object)
            }
        };
        let Some(object) = object else { continue };
        if let Some((Written { place: Some(first), .. }, false)) = places.get(&object.reference())
            && let Some(place) = &place
        {
            reports.push(twice(&object, first, place));
            // Of several files with the same object the first counts, as for the control plane.
            continue;
        }
        places.insert(object.reference(), (Written { place, fields }, is_context));
        changes.push(Change::Apply(object));
    }
    if !is_complete {
        changes.extend(ingress_gateways(&changes, &settings));
    }
    let mut index = Index::new(settings);
    index.apply(changes);
    for (object, findings) in index.findings() {
        let Some((written, false)) = places.get(object) else { continue };
        // What can't be read was reported with its line.
        let is_unreadable = |finding: &Condition| {
            finding.reason == "Unreadable"
                || object.kind == Kind::TrafficPolicy && finding.reason == "Invalid"
        };
        let is_new = |finding: &Condition| !is_unreadable(finding) && (is_complete || !is_status(finding));
        let counts = |finding: &&Condition| !finding.met && is_new(finding);
        reports.extend(
            findings.iter().filter(counts).map(|finding| of_condition(object, finding, written.of(finding))),
        );
    }
    reports.extend(shadows(&index, &places));
    reports.sort();
    reports
}

/// What is to be said of rules that get no request.
fn shadows(index: &Index, places: &BTreeMap<ObjectRef, (Written, bool)>) -> Vec<Report> {
    let of_routes = index.resources().into_iter().filter(|((kind, _), _)| *kind == ResourceType::Route);
    // What the control plane has encoded can be decoded.
    let routes: Vec<l7::Route> =
        of_routes.filter_map(|(_, resource)| l7::Route::decode(resource.body.as_ref()).ok()).collect();
    let report = |Shadowed { rule, by }: Shadowed| {
        let (object, (written, is_context)) =
            places.iter().find(|(object, _)| object.to_string() == rule.route)?;
        let place = (!is_context).then(|| written.place.clone())?;
        let of_other = if by.route == rule.route { String::new() } else { format!(" of {}", by.route) };
        Some(Report {
            place,
            object: rule.route.clone(),
            namespace: object.name.namespace.to_string(),
            level: Level::Warning,
            reason: "Shadowed",
            message: format!(
                "rule {} gets no request: rule {}{of_other} matches all that it matches, and comes first",
                rule.number, by.number
            ),
            remedy:
                "change the matches of one of them, or delete it; `ambit why` shows the order for a request"
                    .to_owned(),
        })
    };
    shadows::shadowed(&routes).into_iter().filter_map(report).collect()
}

/// The Gateways that the control plane makes for Ingresses, which files never hold.
fn ingress_gateways(changes: &[Change], settings: &Settings) -> Vec<Change> {
    let class = |change: &Change| match change {
        Change::Apply(Object::Ingress(ingress)) => ingress.class.clone(),
        Change::Apply(Object::IngressClass(class)) if class.is_ours => Some(class.name.clone()),
        _ => None,
    };
    let classes: BTreeSet<_> = changes.iter().filter_map(class).collect();
    let gateway = |class: &str| {
        let name = default_gateway(&settings.ingress_namespace, class);
        let manifest = json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": { "name": name.name, "namespace": name.namespace },
            "spec": {
                "gatewayClassName": settings.gateway_classes.first(),
                "listeners": [{ "name": "http", "port": 80, "protocol": "HTTP" }],
            },
        });
        let is_there = changes
            .iter()
            .any(|change| change.reference() == ObjectRef { kind: Kind::Gateway, name: name.clone() });
        intake::read(Kind::Gateway, &manifest).ok().filter(|_| !is_there).map(Change::Apply)
    };
    classes.iter().filter_map(|class| gateway(class)).collect()
}

/// Where an object is written.
struct Written {
    place: Option<Place>,
    fields: Option<Fields>,
}

impl Written {
    /// Where that is written which a finding is of: a field, where its message begins with one, else the object.
    fn of(&self, finding: &Condition) -> Option<Place> {
        let place = self.place.clone()?;
        let is_of_field = finding.condition == FIELDS_HONOURED && !finding.message.starts_with("annotation ");
        let named = finding.message.split([' ', ':']).next().filter(|_| is_of_field);
        let field = named.map(|name| match name.starts_with("spec.") {
            true => name.to_owned(),
            false => format!("spec.{name}"),
        });
        let line = field.and_then(|field| self.fields.as_ref()?.line(&field));
        Some(Place { line: line.unwrap_or(place.line), ..place })
    }
}

/// The condition whose findings begin with the path of a field.
const FIELDS_HONOURED: &str = "ambit.dev/FieldsHonoured";

/// Whether a finding is of what a controller has not written, which files never hold.
fn is_status(finding: &Condition) -> bool {
    finding.reason == "WaypointNotReady" && finding.message.ends_with("has no address yet")
}

fn of_condition(object: &ObjectRef, finding: &Condition, place: Option<Place>) -> Report {
    Report {
        place,
        object: object.to_string(),
        namespace: object.name.namespace.to_string(),
        level: Level::Warning,
        reason: finding.reason,
        message: finding.message.clone(),
        remedy: remedies::remedy(finding),
    }
}

fn of_fault(object: Option<&ObjectRef>, field: Option<&str>, message: &str, place: Option<Place>) -> Report {
    let field = field.map(|field| format!("{field}: ")).unwrap_or_default();
    Report {
        place,
        object: object.map(ToString::to_string).unwrap_or_else(|| "document".to_owned()),
        namespace: object.map(|object| object.name.namespace.to_string()).unwrap_or_default(),
        level: Level::Error,
        reason: "",
        message: format!("{field}{message}"),
        remedy: "a policy that can't be read fails closed; any other object is absent until it is mended"
            .to_owned(),
    }
}

fn of_foreign(value: &Value, place: Option<Place>) -> Option<Report> {
    let text = |key: &str| value["metadata"][key].as_str().unwrap_or_default();
    let namespace = match text("namespace") {
        "" => "default",
        namespace => namespace,
    };
    let object = format!("{} {namespace}/{}", value["kind"].as_str().unwrap_or_default(), text("name"));
    let Finding { level, problem, remedy, .. } = foreign::judge(value, &object)?;
    Some(Report {
        place,
        object,
        namespace: namespace.to_owned(),
        level,
        reason: "",
        message: problem,
        remedy,
    })
}

fn twice(object: &Object, first: &Place, place: &Place) -> Report {
    let reference = object.reference();
    Report {
        place: Some(place.clone()),
        object: reference.to_string(),
        namespace: reference.name.namespace.to_string(),
        level: Level::Warning,
        reason: "",
        message: format!("it is in {}:{} too", first.file, first.line),
        remedy: "keep one: kubectl apply takes the last, a directory of the control plane the first"
            .to_owned(),
    }
}

/// Reports for people: one line each as compilers print them, and what to do below.
pub(crate) fn render(reports: &[Report], paint: Palette) -> String {
    let mut text = String::new();
    for Report { place, object, level, reason, message, remedy, .. } in reports {
        let place =
            place.as_ref().map(|place| format!("{}:{}: ", place.file, place.line)).unwrap_or_default();
        let level = match level {
            Level::Error => paint.red("error"),
            Level::Warning => paint.yellow("warning"),
            Level::Note => paint.dim("note"),
        };
        let reason = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
        let _ = writeln!(text, "{place}{}: {level}: {message}{reason}", paint.bold(object));
        if !remedy.is_empty() {
            let _ = writeln!(text, "    remedy: {remedy}");
        }
    }
    if reports.is_empty() {
        let _ = writeln!(text, "{}", paint.green("✓ every object has the effect that it says"));
    }
    text
}

#[cfg(test)]
mod tests {
    use ambit_control::source::files::inspect;

    use super::*;

    const MANIFESTS: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient, istio.io/use-waypoint: waypoint}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {istio.io/use-waypoint: absent}}
spec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec: {gatewayClassName: ambit-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec: {clusterIP: 10.0.0.2, ports: [{port: 80}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-delete, namespace: shop}
spec: {action: DENY, rules: [{to: [{operation: {methods: [DELETE]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: typo, namespace: shop}
spec:
  action: FORBID
---
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: tweak, namespace: shop}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web-only, namespace: shop}
spec: {podSelector: {}, ingress: [{ports: [{port: 8080}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec: {clusterIP: 10.0.0.3, ports: [{port: 80}]}
";

    fn items(text: &str) -> Vec<Item> {
        let item = |document: inspect::Document| Item {
            place: Some(Place { file: "shop.yaml".into(), line: document.line }),
            content: document.content,
            fields: Some(document.fields),
            is_context: false,
        };
        inspect::documents(text).into_iter().map(item).collect()
    }

    #[test]
    fn objects_without_their_effect_are_named_with_file_and_line() {
        let reports = judge(items(MANIFESTS), Settings::default(), false);
        insta::assert_snapshot!(render(&reports, Palette::new(false)));
    }

    #[test]
    fn a_waypoint_without_an_address_counts_only_where_statuses_do() {
        let of = |is_complete| judge(items(MANIFESTS), Settings::default(), is_complete);
        let not_ready =
            |reports: &[Report]| reports.iter().filter(|r| r.reason == "WaypointNotReady").count();
        assert_eq!(not_ready(&of(false)), 0);
        assert!(not_ready(&of(true)) > 0);
    }

    /// Its Gateway is made by the control plane; what is wrong with it is said all the same.
    #[test]
    fn an_ingress_is_judged_without_its_gateway() {
        let ingress = |name: &str, service: &str| {
            format!(
                "apiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {{name: {name}, namespace: shop}}\n\
                 spec: {{ingressClassName: ambit, defaultBackend: {{service: {{name: {service}, port: {{number: 80}}}}}}}}\n---\n"
            )
        };
        let text = format!("{}{}{MANIFESTS}", ingress("right", "api"), ingress("wrong", "absent"));
        let reports = judge(items(&text), Settings::default(), false);
        let of_ingresses = reports.iter().filter(|report| report.object.starts_with("Ingress"));
        let found: Vec<_> = of_ingresses.map(|report| (&*report.object, &*report.message)).collect();
        let shadowed = "rule 1 gets no request: rule 1 of Ingress shop/right matches all that it matches, and comes first";
        let wrong = "Ingress shop/wrong";
        assert_eq!(found, [(wrong, "Service shop/absent does not exist"), (wrong, shadowed)]);
    }

    #[test]
    fn nothing_is_said_of_what_is_only_context() {
        let mut items = items(MANIFESTS);
        items.iter_mut().for_each(|item| item.is_context = true);
        assert_eq!(judge(items, Settings::default(), true), []);
        assert!(render(&[], Palette::new(false)).contains("every object"));
    }
}
