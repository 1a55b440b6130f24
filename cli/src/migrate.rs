//! `ambit migrate check`: what would behave differently if Ambit took over from Istio's ambient mode.
//!
//! What `ambit analyze` says of objects comes first; the rest are differences of the mesh's own settings, each a rule of
//! [`differences`], a function of what was read.

use std::process::ExitCode;

use ambit_control::api_server::call;
use ambit_control::object::{NamespacedName, Object};
use ambit_control::source::files::inspect::Content;
use anyhow::Context;
use clap::{Args, Subcommand};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::{Api, ResourceExt};
use serde::Serialize;
use serde_json::Value;

use crate::analyze::{self, Item, Report, cluster_settings, judge, read_cluster};
use crate::cluster::{Access, Cluster, block_on};
use crate::enrolment::{self, Namespaces};
use crate::finding::{Finding, Level, Section, gravest, render};
use crate::output::{Format, Palette, Wait, emit};

/// Commands for clusters that run Istio's ambient mode.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Names each object and setting that would behave differently with Ambit.
    Check(Options),
}

/// Options of `ambit migrate check`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Namespace that Istio is installed in.
    #[arg(long, value_name = "NAMESPACE", default_value = "istio-system")]
    istio_namespace: String,
    /// Form of the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    access: Access,
}

/// What Istio's settings and the cluster's namespaces are.
struct Facts {
    /// Namespace that Istio is installed in.
    istio: String,
    /// Istio's `meshConfig`; null where it is not installed.
    mesh: Value,
    namespaces: Namespaces,
    /// Policies of the namespace that Istio is installed in.
    root_policies: Vec<String>,
    /// Gateways with their classes.
    gateways: Vec<(NamespacedName, String)>,
    /// Settings of Ambit, as installed or by default.
    root_namespace: String,
    trust_domain: String,
}

/// The result.
#[derive(Debug, Serialize)]
struct Differences {
    /// Settings and objects that Ambit takes differently.
    settings: Vec<Section>,
    /// Objects that have no or another effect.
    objects: Vec<Report>,
}

/// Runs a command for clusters that run Istio.
///
/// # Errors
/// When the cluster can't be reached.
pub(crate) fn run(command: &Command) -> anyhow::Result<ExitCode> {
    let Command::Check(options) = command;
    let found = block_on(async {
        let cluster = options.access.connect().await?;
        let _wait = Wait::start("reading the cluster");
        check(&cluster, options).await
    })?;
    emit(options.output, &found, |paint| show(&found, paint))?;
    let is_error = gravest(&found.settings) == Some(Level::Error)
        || found.objects.iter().any(|report| report.level == Level::Error);
    Ok(if is_error { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn show(found: &Differences, paint: Palette) -> String {
    format!(
        "{}\n{}\n{}",
        render(&found.settings, paint),
        paint.bold("Objects that have no effect, or another than they say:"),
        analyze::render(&found.objects, paint)
    )
}

async fn check(cluster: &Cluster, options: &Options) -> anyhow::Result<Differences> {
    let settings = cluster_settings(cluster).await?;
    let items = read_cluster(cluster).await?;
    let configs: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), &options.istio_namespace);
    let config = call(configs.get_opt("istio")).await?;
    let mesh = config.and_then(|config| config.data).and_then(|mut data| data.remove("mesh"));
    let mesh = mesh.map(|text| serde_saphyr::from_str(&text)).transpose().context("meshConfig of Istio")?;
    let facts = Facts {
        istio: options.istio_namespace.clone(),
        mesh: mesh.unwrap_or_default(),
        namespaces: enrolment::by_name(cluster.list_cluster::<Namespace>().await?),
        root_policies: root_policies(&items, &options.istio_namespace),
        gateways: gateways(&items),
        root_namespace: settings.root_namespace.to_string(),
        trust_domain: settings.trust_domain.to_string(),
    };
    Ok(Differences { settings: differences(&facts), objects: judge(items, settings, true) })
}

fn root_policies(items: &[Item], istio: &str) -> Vec<String> {
    let of = |item: &Item| match &item.content {
        Content::Object(object @ (Object::AuthorizationPolicy(_) | Object::PeerAuthentication(_))) => {
            Some(object.reference())
        }
        _ => None,
    };
    let references = items.iter().filter_map(of).filter(|reference| &*reference.name.namespace == istio);
    references.map(|reference| reference.to_string()).collect()
}

fn gateways(items: &[Item]) -> Vec<(NamespacedName, String)> {
    let of = |item: &Item| match &item.content {
        Content::Object(Object::Gateway(gateway)) => {
            Some((gateway.meta.id.clone(), gateway.class.to_string()))
        }
        _ => None,
    };
    items.iter().filter_map(of).collect()
}

/// The rules, in the order in which they are shown.
fn differences(facts: &Facts) -> Vec<Section> {
    let section = |title: &str, findings| Section { title: title.to_owned(), findings };
    vec![
        section("the trust domain stays", trust_domain(facts)),
        section("policies for the whole mesh stay", root(facts)),
        section("settings of meshConfig stay", mesh_config(facts)),
        section("Gateways have a controller", classes(facts)),
        section("no pod has a sidecar", sidecars(facts)),
    ]
}

fn trust_domain(facts: &Facts) -> Vec<Finding> {
    let own = facts.mesh["trustDomain"].as_str().unwrap_or("cluster.local");
    if facts.mesh.is_null() || own == facts.trust_domain {
        return Vec::new();
    }
    let problem = format!("Istio's is {own}, Ambit's {}", facts.trust_domain);
    let finding = Finding::error("trust domain", problem)
        .shows("peers of both meshes refuse each other, and policies with principals match nobody")
        .remedy(format!(
            "install with --set trustDomain={own}, and with the same certificate authority (Secret cacerts)"
        ));
    vec![finding]
}

fn root(facts: &Facts) -> Vec<Finding> {
    let Facts { mesh, istio, root_policies, root_namespace, .. } = facts;
    let of_istio = mesh["rootNamespace"].as_str().unwrap_or(istio);
    if root_policies.is_empty() || root_namespace == of_istio {
        return Vec::new();
    }
    let finding = Finding::error(root_policies.join(", "), format!("they are for pods of {of_istio} only"))
        .shows("what they deny in the whole mesh with Istio is allowed with Ambit")
        .remedy(format!("install with --set rootNamespace={of_istio}"));
    vec![finding]
}

fn mesh_config(facts: &Facts) -> Vec<Finding> {
    let mesh = &facts.mesh;
    let mut findings = Vec::new();
    if mesh["outboundTrafficPolicy"]["mode"] == "REGISTRY_ONLY" {
        findings.push(
            Finding::error("outboundTrafficPolicy", "Ambit has no REGISTRY_ONLY")
                .shows("pods reach addresses that no Service or ServiceEntry names")
                .remedy("limit the egress of pods with NetworkPolicies"),
        );
    }
    let providers = mesh["extensionProviders"].as_array().into_iter().flatten();
    findings.extend(providers.filter_map(|provider| {
        let name = provider["name"].as_str()?;
        let kind = provider.as_object()?.keys().find(|key| *key != "name")?;
        let subject = format!("extensionProviders {name}");
        Some(match kind.as_str() {
            "envoyExtAuthzGrpc" | "envoyExtAuthzHttp" => Finding::warning(
                subject,
                format!("{kind} is used by AuthorizationPolicies with the action CUSTOM"),
            )
            .remedy("put it into the chart's value meshConfig (docs/external-authorization.md)"),
            "opentelemetry" | "envoyOtelAls" | "envoyFileAccessLog" => {
                Finding::warning(subject, format!("{kind} is used by Telemetry objects"))
                    .remedy("put it into the chart's value meshConfig (docs/tracing.md)")
            }
            _ => Finding::note(subject, format!("{kind} has no effect"))
                .remedy("see docs/observability.md for logs and metrics, and docs/tracing.md for traces"),
        })
    }));
    if !mesh["defaultProviders"].is_null() {
        findings.push(
            Finding::warning("defaultProviders", "they count where no Telemetry says otherwise")
                .remedy("put them into the chart's value meshConfig (docs/tracing.md)"),
        );
    }
    for key in ["accessLogFile", "accessLogFormat", "proxyListenPort"] {
        if !mesh[key].is_null() {
            findings.push(Finding::note(key, "it has no effect: proxies have settings of their own"));
        }
    }
    findings
}

fn classes(facts: &Facts) -> Vec<Finding> {
    let finding = |(name, class): &(NamespacedName, String)| {
        let subject = format!("Gateway {name}");
        match class.as_str() {
            "istio-waypoint" => Some(
                Finding::warning(subject, "Istio's controller deploys the pods of its class, istio-waypoint")
                    .shows("the waypoint stays Istio's as long as istiod runs, and is nobody's after that")
                    .remedy("make a waypoint of class ambit-waypoint (ambit waypoint apply), then move the label istio.io/use-waypoint"),
            ),
            "istio" | "istio-remote" | "istio-east-west" => Some(
                Finding::warning(subject, format!("its class {class} is Istio's"))
                    .shows("without istiod nobody deploys or configures it")
                    .remedy("keep istiod for it, or move ingress to another controller of Gateway API"),
            ),
            _ => None,
        }
    };
    facts.gateways.iter().filter_map(finding).collect()
}

fn sidecars(facts: &Facts) -> Vec<Finding> {
    let injected = |namespace: &&Namespace| {
        let labels = namespace.labels();
        labels.get("istio-injection").is_some_and(|value| value == "enabled")
            || labels.contains_key("istio.io/rev") && labels.get("istio.io/dataplane-mode").is_none()
    };
    let finding = |namespace: &Namespace| {
        Finding::warning(format!("namespace {}", namespace.name_any()), "its pods get Istio's sidecar")
            .shows("pods with a sidecar are never enrolled, and node proxies send to them in the clear")
            .remedy("take the label off, label it istio.io/dataplane-mode=ambient, restart its pods")
    };
    facts.namespaces.values().filter(injected).map(finding).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn facts() -> Facts {
        Facts {
            istio: "istio-system".into(),
            mesh: json!({ "trustDomain": "cluster.local", "rootNamespace": "istio-system" }),
            namespaces: Namespaces::new(),
            root_policies: Vec::new(),
            gateways: Vec::new(),
            root_namespace: "ambit-system".into(),
            trust_domain: "cluster.local".into(),
        }
    }

    #[test]
    fn a_mesh_that_behaves_alike_has_no_differences() {
        assert!(differences(&facts()).iter().all(|section| section.findings.is_empty()));
    }

    #[test]
    fn each_difference_is_named_with_what_to_do() {
        let namespace = json!({ "metadata": { "name": "old", "labels": { "istio-injection": "enabled" } } });
        let name = |name: &str| NamespacedName::new("shop", name);
        let facts = Facts {
            mesh: json!({
                "trustDomain": "td.example", "outboundTrafficPolicy": { "mode": "REGISTRY_ONLY" },
                "extensionProviders": [
                    { "name": "opa", "envoyExtAuthzGrpc": {} }, { "name": "tracing", "zipkin": {} }, { "name": "otel", "opentelemetry": {} },
                ],
                "accessLogFile": "/dev/stdout",
            }),
            namespaces: enrolment::by_name(vec![serde_json::from_value(namespace).unwrap_or_default()]),
            root_policies: vec!["AuthorizationPolicy istio-system/deny-all".into()],
            gateways: vec![
                (name("waypoint"), "istio-waypoint".into()),
                (name("ingress"), "istio".into()),
                (name("ours"), "ambit-waypoint".into()),
            ],
            ..facts()
        };
        insta::assert_snapshot!(render(&differences(&facts), Palette::new(false)));
    }
}
