//! Ingresses: the Gateways that serve classes without parameters are made, and statuses say where Ingresses are reached.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::WriteMetrics;
use crate::api_server::{CallError, FIELD_MANAGER, call};
use crate::index::{Finding, default_gateway};
use crate::kind::Kind;
use crate::object::{AddressValue, NamespacedName, ObjectRef};
use crate::observe::Findings;
use crate::source::kubernetes::served_version;

/// How often findings are looked at for Gateways that are missing.
const INTERVAL: Duration = Duration::from_secs(2);
/// Annotations of an IngressClass that its Gateway gets.
const INHERITED: [&str; 3] =
    ["networking.istio.io/service-type", "ambit.dev/trusted-proxies", "proxy.istio.io/config"];

/// Makes the Gateways that serve IngressClasses without parameters.
pub(crate) struct IngressWriter {
    pub(crate) client: Client,
    /// The class of the Gateways.
    pub(crate) gateway_class: Arc<str>,
    /// Their namespace.
    pub(crate) namespace: Arc<str>,
    pub(crate) findings: Findings,
    pub(crate) metrics: Arc<WriteMetrics>,
}

impl IngressWriter {
    /// Writes while `leads` is true; ends with its sender.
    pub(crate) async fn run(self, mut leads: watch::Receiver<bool>) {
        while leads.wait_for(|leads| *leads).await.is_ok() {
            for gateway in missing(&self.findings, &self.namespace) {
                if let Err(error) = self.make(&gateway).await {
                    self.metrics.failed.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(%gateway, %error, "Gateway for Ingresses not made; trying again");
                }
            }
            // A sender that is gone ends the loop.
            tokio::time::timeout(INTERVAL, leads.wait_for(|leads| !*leads)).await.ok();
        }
    }

    /// Makes a Gateway, unless there is one of its name.
    async fn make(&self, gateway: &NamespacedName) -> Result<(), CallError> {
        let Some(version) = served_version(&self.client, &Kind::Gateway.info()).await? else {
            return Ok(());
        };
        let resource = resource(Kind::Gateway, version);
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &gateway.namespace, &resource);
        if call(api.get_opt(&gateway.name)).await?.is_some() {
            return Ok(());
        }
        let classes: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource_of_classes());
        let class = gateway.name.strip_suffix("-ingress").unwrap_or_default();
        let class = call(classes.get_opt(class)).await?;
        let manifest = manifest(gateway, &self.gateway_class, &resource.api_version, class.as_ref());
        let parameters = PatchParams::apply(FIELD_MANAGER);
        call(api.patch(&gateway.name, &parameters, &Patch::Apply(manifest))).await?;
        self.metrics.written.fetch_add(1, Ordering::Relaxed);
        tracing::info!(%gateway, "made for Ingresses");
        Ok(())
    }
}

fn resource(kind: Kind, version: &str) -> ApiResource {
    let info = kind.info();
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(info.group, version, info.name), info.plural)
}

fn resource_of_classes() -> ApiResource {
    resource(Kind::IngressClass, "v1")
}

/// The Gateways that Ingresses miss and that are made here: those of classes without parameters.
fn missing(findings: &Findings, namespace: &Arc<str>) -> BTreeSet<NamespacedName> {
    let first = ObjectRef { kind: Kind::Ingress, name: NamespacedName::new("", "") };
    let findings = findings.lock();
    let of_ingresses = findings.range(first..).take_while(|(object, _)| object.kind == Kind::Ingress);
    let missed = of_ingresses.flat_map(|(_, findings)| findings).filter(|it| it.reason == "GatewayMissing");
    let gateways = missed.filter_map(|finding| finding.parent.as_ref()).map(|parent| parent.name.clone());
    let is_own = |gateway: &NamespacedName| {
        let class = gateway.name.strip_suffix("-ingress");
        class.is_some_and(|class| default_gateway(namespace, class) == *gateway)
    };
    gateways.filter(is_own).collect()
}

/// The Gateway that serves an IngressClass. It goes with the class.
fn manifest(
    gateway: &NamespacedName,
    gateway_class: &str,
    api_version: &str,
    class: Option<&DynamicObject>,
) -> Value {
    let annotations = class.and_then(|class| class.metadata.annotations.clone()).unwrap_or_default();
    let inherited: serde_json::Map<String, Value> = annotations
        .into_iter()
        .filter(|(key, _)| INHERITED.contains(&key.as_str()))
        .map(|(key, value)| (key, value.into()))
        .collect();
    let owner = class.and_then(|class| {
        let (name, uid) = (class.metadata.name.as_ref()?, class.metadata.uid.as_ref()?);
        Some(json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "IngressClass", "name": name, "uid": uid,
        }))
    });
    json!({
        "apiVersion": api_version, "kind": "Gateway",
        "metadata": {
            "name": gateway.name, "namespace": gateway.namespace, "annotations": inherited,
            "ownerReferences": owner.into_iter().collect::<Vec<_>>(),
        },
        "spec": {
            "gatewayClassName": gateway_class,
            "listeners": [{ "name": "http", "port": 80, "protocol": "HTTP" }],
        },
    })
}

/// `status.loadBalancer` of an Ingress that a Gateway of the mesh serves, if it must differ from what it is.
pub(super) fn plan(ingress: &Value, findings: &[Finding]) -> Option<Value> {
    let accepted = findings.iter().find(|finding| finding.condition == "Accepted")?;
    let entry = |address: &AddressValue| match address {
        AddressValue::Ip(ip) => json!({ "ip": ip.to_string() }),
        AddressValue::Hostname(host) => json!({ "hostname": host }),
    };
    let wanted: Vec<Value> = accepted.addresses.iter().map(entry).collect();
    let present = ingress["status"]["loadBalancer"]["ingress"].as_array().map(Vec::as_slice);
    let is_present = |wanted: &[Value]| {
        let present = present.unwrap_or_default();
        // The API server may add what is known of ports.
        let is_same =
            |one: &Value, other: &Value| one["ip"] == other["ip"] && one["hostname"] == other["hostname"];
        present.len() == wanted.len() && present.iter().zip(wanted).all(|(one, other)| is_same(one, other))
    };
    (!is_present(&wanted)).then(|| json!({ "ingress": wanted }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(reason: &'static str, gateway: &str, addresses: Vec<AddressValue>) -> Finding {
        let parent = ObjectRef { kind: Kind::Gateway, name: NamespacedName::new("ambit-system", gateway) };
        Finding {
            condition: "Accepted",
            met: reason == "Accepted",
            reason,
            message: String::new(),
            parent: Some(parent),
            parent_ref: None,
            listener: None,
            listener_sets: None,
            addresses,
            controller: crate::index::CONTROLLER,
        }
    }

    #[test]
    fn only_missing_gateways_of_classes_without_parameters_are_made() {
        let findings = Findings::default();
        let ingress = |name: &str| ObjectRef { kind: Kind::Ingress, name: NamespacedName::new("shop", name) };
        for (name, reason, gateway) in [
            ("a", "GatewayMissing", "ambit-ingress"),
            ("b", "GatewayMissing", "ambit-ingress"),
            ("c", "GatewayMissing", "web"),
            ("d", "Accepted", "other-ingress"),
        ] {
            findings.lock().insert(ingress(name), vec![found(reason, gateway, Vec::new())]);
        }
        let made = missing(&findings, &"ambit-system".into());
        assert_eq!(made.iter().map(ToString::to_string).collect::<Vec<_>>(), ["ambit-system/ambit-ingress"]);
        assert!(missing(&findings, &"elsewhere".into()).is_empty());
    }

    #[test]
    fn a_gateway_goes_with_its_class_and_has_its_type_of_service() {
        let class = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "IngressClass",
            "metadata": { "name": "ambit", "uid": "u", "annotations": {
                "networking.istio.io/service-type": "ClusterIP", "meta.helm.sh/release-name": "ambit",
            } },
        });
        let class: DynamicObject = serde_json::from_value(class).unwrap();
        let name = NamespacedName::new("ambit-system", "ambit-ingress");
        let gateway = manifest(&name, "ambit", "gateway.networking.k8s.io/v1", Some(&class));
        let metadata = &gateway["metadata"];
        assert_eq!(metadata["annotations"], json!({ "networking.istio.io/service-type": "ClusterIP" }));
        assert_eq!(metadata["ownerReferences"][0]["uid"], "u");
        assert_eq!(gateway["spec"]["listeners"][0]["port"], 80);
    }

    #[test]
    fn a_status_says_where_the_gateway_is() {
        let ingress = json!({ "status": { "loadBalancer": {} } });
        assert_eq!(plan(&ingress, &[]), None, "another controller's");
        let addresses =
            || vec![AddressValue::Ip([192, 0, 2, 1].into()), AddressValue::Hostname("lb.example".into())];
        let accepted = [found("Accepted", "ambit-ingress", addresses())];
        let wanted = plan(&ingress, &accepted).unwrap();
        assert_eq!(wanted, json!({ "ingress": [{ "ip": "192.0.2.1" }, { "hostname": "lb.example" }] }));
        let written = json!({ "status": { "loadBalancer": wanted } });
        assert_eq!(plan(&written, &accepted), None);
        let gone = plan(&written, &[found("GatewayMissing", "ambit-ingress", Vec::new())]);
        assert_eq!(gone, Some(json!({ "ingress": [] })));
    }
}
