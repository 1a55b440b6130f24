//! Every object of a cluster that the mesh reads, or that belongs to a mesh.

use std::collections::BTreeSet;

use ambit_control::api_server::call;
use ambit_control::index::{L7DenyAtL4, Settings};
use ambit_control::intake;
use ambit_control::kind::{Kind, Needed};
use ambit_control::mesh_config;
use ambit_control::source::files::inspect::Content;
use ambit_control::source::kubernetes::served_version;
use anyhow::Context;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use serde_json::Value;

use super::foreign;
use super::judge::Item;
use crate::cluster::{Cluster, Component, list};
use crate::enrolment;

/// Reads the objects.
///
/// # Errors
/// When the API server can't be asked for a kind.
pub(crate) async fn read(cluster: &Cluster) -> anyhow::Result<Vec<Item>> {
    let mut items = Vec::new();
    for kind in Kind::ALL {
        let info = kind.info();
        let Some(version) = served_version(&cluster.client, &info).await? else { continue };
        let gvk = GroupVersionKind::gvk(info.group, version, info.name);
        let resource = ApiResource::from_gvk_with_plural(&gvk, info.plural);
        let objects = objects(cluster, &resource, info.needed).await.with_context(|| format!("list {kind}"));
        let objects = match objects {
            // Nothing is reported on certificates to a user who may not read Secrets.
            Err(_) if kind == Kind::Secret => Vec::new(),
            objects => objects?,
        };
        items.extend(objects.into_iter().map(|value| Item::of_cluster(content(kind, &value))));
    }
    let excluded = enrolment::settings(&cluster.system).excluded_namespaces;
    for resource in foreign_resources(cluster).await? {
        // A kind that may not be listed is one whose objects are not judged.
        let objects = objects(cluster, &resource, Needed::Everything).await.unwrap_or_default();
        let judged = objects.into_iter().filter(|value| !never_enrolled(value, &excluded));
        items.extend(judged.map(|value| Item::of_cluster(Content::Foreign(value))));
    }
    Ok(items)
}

/// Whether an object is a NetworkPolicy of pods that are never in the mesh, to which no tunnel leads.
fn never_enrolled(object: &Value, excluded: &BTreeSet<String>) -> bool {
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
    object["kind"] == "NetworkPolicy" && excluded.contains(namespace)
}

fn content(kind: Kind, value: &Value) -> Content {
    match intake::read(kind, value) {
        Ok(object) => Content::Object(object),
        Err(fault) => Content::Fault {
            object: fault.object,
            field: fault.field,
            message: fault.message,
            stand_in: fault.stand_in,
        },
    }
}

async fn objects(cluster: &Cluster, resource: &ApiResource, needed: Needed) -> anyhow::Result<Vec<Value>> {
    let api: Api<DynamicObject> = Api::all_with(cluster.client.clone(), resource);
    let found = list(&api, "").await?;
    let value = |object: DynamicObject| {
        let mut value = serde_json::to_value(object)?;
        value["apiVersion"] = resource.api_version.clone().into();
        value["kind"] = resource.kind.clone().into();
        if needed == Needed::Metadata
            && let Some(object) = value.as_object_mut()
        {
            // As the watch has it: what is not needed can't be wrong.
            object.retain(|key, _| matches!(key.as_str(), "apiVersion" | "kind" | "metadata" | "spec"));
        }
        anyhow::Ok(value)
    };
    found.into_iter().map(value).collect()
}

/// The kinds of meshes that are served and not read, and NetworkPolicy.
async fn foreign_resources(cluster: &Cluster) -> anyhow::Result<Vec<ApiResource>> {
    let mut resources = Vec::new();
    let groups = call(cluster.client.list_api_groups()).await?;
    for group in groups.groups.iter().filter(|group| foreign::is_group(&group.name)) {
        let Some(preferred) = &group.preferred_version else { continue };
        let found = call(cluster.client.list_api_group_resources(&preferred.group_version)).await?;
        let kinds = found.resources.into_iter().filter(|resource| {
            let is_part = resource.name.contains('/');
            let is_read =
                Kind::ALL.iter().any(|kind| kind.group() == group.name && kind.as_str() == resource.kind);
            !is_part && !is_read && foreign::is_judged(&group.name, &resource.kind)
        });
        resources.extend(kinds.map(|resource| {
            let gvk = GroupVersionKind::gvk(&group.name, &preferred.version, &resource.kind);
            ApiResource::from_gvk_with_plural(&gvk, &resource.name)
        }));
    }
    Ok(resources)
}

/// The settings of the control plane that is installed; the defaults where none is.
///
/// # Errors
/// When the API server can't be asked.
pub(crate) async fn settings(cluster: &Cluster) -> anyhow::Result<Settings> {
    let api: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), &cluster.system);
    let config = call(api.get_opt(Component::Control.workload())).await?;
    let mut data = config.and_then(|config| config.data).unwrap_or_default();
    let text = data.remove("config.yaml");
    let config: Value = text.and_then(|text| serde_saphyr::from_str(&text).ok()).unwrap_or_default();
    let mesh = data.get("mesh.yaml").and_then(|text| mesh_config::parse(text).ok()).unwrap_or_default();
    let default = Settings {
        root_namespace: cluster.system.as_str().into(),
        ingress_namespace: cluster.system.as_str().into(),
        authorizers: mesh.authorizers,
        gateway_topology: mesh.gateway_topology,
        telemetry: mesh.telemetry,
        ..Settings::default()
    };
    Ok(of_config(&config, default))
}

fn of_config(config: &Value, default: Settings) -> Settings {
    let text = |key: &str, default| config[key].as_str().map_or(default, Into::into);
    Settings {
        cluster_id: text("clusterId", default.cluster_id),
        network: text("network", default.network),
        trust_domain: text("trustDomain", default.trust_domain),
        cluster_domain: text("clusterDomain", default.cluster_domain),
        root_namespace: text("rootNamespace", default.root_namespace),
        waypoint_classes: default.waypoint_classes,
        gateway_classes: default.gateway_classes,
        ingress_namespace: default.ingress_namespace,
        authorizers: default.authorizers,
        gateway_topology: default.gateway_topology,
        telemetry: default.telemetry,
        l7_deny_at_l4: if config["l7DenyAtL4"] == "deny" { L7DenyAtL4::Deny } else { default.l7_deny_at_l4 },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn network_policies_of_pods_outside_the_mesh_are_passed_over() {
        let excluded = enrolment::settings("ambit-system").excluded_namespaces;
        let policy = |namespace: &str| json!({ "kind": "NetworkPolicy", "metadata": { "name": "a", "namespace": namespace } });
        for (namespace, passed_over) in [("ambit-system", true), ("kube-system", true), ("shop", false)] {
            assert_eq!(never_enrolled(&policy(namespace), &excluded), passed_over, "{namespace}");
        }
        let filter =
            json!({ "kind": "EnvoyFilter", "metadata": { "name": "a", "namespace": "kube-system" } });
        assert!(!never_enrolled(&filter, &excluded));
    }

    #[test]
    fn settings_are_those_of_the_control_plane() {
        let config =
            json!({ "rootNamespace": "istio-system", "trustDomain": "td.example", "l7DenyAtL4": "deny" });
        let settings = of_config(&config, Settings::default());
        assert_eq!((&*settings.root_namespace, &*settings.trust_domain), ("istio-system", "td.example"));
        assert_eq!(settings.l7_deny_at_l4, L7DenyAtL4::Deny);
        assert_eq!(of_config(&Value::Null, Settings::default()), Settings::default());
    }
}
