//! Deploys waypoints and gateways: for each Gateway of a class that is ours a ServiceAccount, a Deployment, a Service and, where the
//! template has them, a PodDisruptionBudget and a HorizontalPodAutoscaler, all of the Gateway's name; and its status.
//!
//! What the objects must be is planned by pure functions from the Gateway, the template of the installation and the
//! Gateway's own parameters. Objects of the same name that were not made for the Gateway are never touched. Kubernetes
//! deletes the objects with the Gateway that owns them.

mod listener_sets;
mod overlay;
mod plan;
mod status;
mod template;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, Preconditions};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client, ResourceExt};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use super::WriteMetrics;
use super::classes::{self, Owned};
use super::queue::{StatusQueue, Work};
use super::retries::{Failed, Retries};
use super::status::{list_all, now};
use super::write_backoff::WriteBackoff;
use crate::api_server::{CallError, FIELD_MANAGER, call};
use crate::kind::Kind;
use crate::object::{NamespacedName, ObjectRef};
use crate::observe::Findings;
use crate::source::kubernetes::served_version;
use plan::{Part, Role, WantedAddresses, WaypointGateway};
use status::DeploymentState;
pub use template::{Template, TemplateError};

/// Field manager of a number of pods that is an autoscaler's to change.
const REPLICAS_MANAGER: &str = "ambit-control-replicas";
/// Gateways looked at at the same time.
const CONCURRENT: usize = 4;
/// Gateways taken from the queue together.
const TOGETHER: usize = 16;
/// How often every Gateway is looked at: parameters are not watched, nor the kinds that the mesh does not read.
const INTERVAL: Duration = Duration::from_secs(60);

/// Deploys waypoints.
pub(crate) struct WaypointWriter {
    client: Client,
    template: Template,
    /// Classes whose Gateways are deployed.
    classes: Vec<Arc<str>>,
    /// Those of them whose Gateways are for clients outside the mesh.
    gateway_classes: Vec<Arc<str>>,
    /// What the index says of listeners.
    findings: Findings,
    queue: Arc<StatusQueue>,
    metrics: Arc<WriteMetrics>,
    /// Guards when which object may be written again; held for one question.
    backoff: Mutex<WriteBackoff<String>>,
}

/// Why a Gateway could not be looked at to the end.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Call(#[from] CallError),
    /// The class of the Gateway is not there yet.
    #[error("GatewayClass {0} does not exist")]
    NoClass(String),
    /// An object is in the way that was not made for the Gateway.
    #[error("{kind} {name} was not made for the Gateway and is not changed")]
    Foreign { kind: String, name: NamespacedName },
}

impl Fault {
    /// Whether trying again may come to something else.
    fn is_passing(&self) -> bool {
        match self {
            Fault::Call(error) => error.is_unavailable() || error.is_conflict(),
            // That of a Gateway of the same name that was deleted a moment ago goes soon.
            Fault::Foreign { .. } | Fault::NoClass(_) => true,
        }
    }
}

impl WaypointWriter {
    pub(crate) fn new(
        client: Client,
        template: Template,
        classes: Vec<Arc<str>>,
        gateway_classes: Vec<Arc<str>>,
        findings: Findings,
        queue: Arc<StatusQueue>,
        metrics: Arc<WriteMetrics>,
    ) -> Self {
        let backoff = Mutex::new(WriteBackoff::new(metrics.backoffs.clone()));
        let classes = classes.into_iter().chain(gateway_classes.iter().cloned()).collect();
        Self { client, template, classes, gateway_classes, findings, queue, metrics, backoff }
    }

    /// Writes while `leads` is true; ends with its sender.
    pub(crate) async fn run(self, leads: watch::Receiver<bool>) {
        self.queue.while_leading(leads, || self.run_as_leader()).await;
    }

    async fn run_as_leader(&self) {
        let mut retries = Retries::default();
        let mut due = tokio::time::interval(INTERVAL);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = due.tick() => self.reconcile_everything(&mut retries).await,
                work = self.queue.take(TOGETHER) => match work {
                    Work::Everything => self.reconcile_everything(&mut retries).await,
                    Work::Objects(objects) => {
                        let (sets, gateways): (Vec<_>, Vec<_>) =
                            objects.into_iter().partition(|object| object.kind == Kind::ListenerSet);
                        let gateways = gateways.into_iter().map(|gateway| gateway.name).collect();
                        self.reconcile_gateways(gateways, &mut retries).await;
                        self.reconcile_sets(sets, &mut retries).await;
                    }
                },
                () = retries.due() => {
                    let Failed { kinds, objects } = retries.take();
                    if !kinds.is_empty() {
                        self.reconcile_everything(&mut retries).await;
                    }
                    self.queue.push(objects);
                }
            }
        }
    }

    async fn reconcile_everything(&self, retries: &mut Retries) {
        let gateways = async {
            let Some(resource) = self.gateways().await? else { return Ok(Vec::new()) };
            list_all(Api::<DynamicObject>::all_with(self.client.clone(), &resource)).await
        };
        match gateways.await {
            Ok(gateways) => {
                let ours = gateways.into_iter().filter(|gateway| {
                    let class = gateway.data["spec"]["gatewayClassName"].as_str().unwrap_or_default();
                    // Of others only those that this control plane has written to.
                    let is_left = || {
                        gateway
                            .managed_fields()
                            .iter()
                            .any(|entry| entry.manager.as_deref() == Some(FIELD_MANAGER))
                    };
                    self.is_ours(class) || is_left()
                });
                let names = ours.filter_map(|gateway| {
                    Some(NamespacedName::new(gateway.metadata.namespace?, gateway.metadata.name?))
                });
                self.reconcile_gateways(names.collect(), retries).await;
            }
            Err(error) => {
                self.metrics.failed.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, "Gateways not listed for their deployments; trying again");
                retries.add_kind(Kind::Gateway);
            }
        }
    }

    async fn reconcile_gateways(&self, gateways: Vec<NamespacedName>, retries: &mut Retries) {
        let look = |name: NamespacedName| async move { (self.reconcile(&name).await, name) };
        let outcomes: Vec<_> = stream::iter(gateways).map(look).buffer_unordered(CONCURRENT).collect().await;
        for (outcome, name) in outcomes {
            let Err(error) = outcome else { continue };
            self.metrics.failed.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(gateway = %name, %error, "waypoint not deployed");
            if error.is_passing() {
                retries.add_objects(vec![ObjectRef { kind: Kind::Gateway, name }]);
            }
        }
    }

    /// Looks at one Gateway: makes what it lacks, then writes how it stands.
    async fn reconcile(&self, name: &NamespacedName) -> Result<(), Fault> {
        let Some(resource) = self.gateways().await? else { return Ok(()) };
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &name.namespace, &resource);
        let Some(gateway) = call(api.get_opt(&name.name)).await? else { return Ok(()) };
        if gateway.metadata.deletion_timestamp.is_some() {
            return Ok(());
        }
        let gateway = serde_json::to_value(gateway).unwrap_or_default();
        // The API server has checked it: what can't be read is no Gateway that it has a definition for.
        let Ok(waypoint) = serde_json::from_value::<WaypointGateway>(gateway.clone()) else { return Ok(()) };
        let is_gateway = self.gateway_classes.iter().any(|ours| **ours == *waypoint.class());
        let object = ObjectRef { kind: Kind::Gateway, name: name.clone() };
        let findings = self.findings.lock().get(&object).cloned().unwrap_or_default();
        let sets = findings.iter().find_map(|finding| finding.listener_sets.clone()).unwrap_or_default();
        let waypoint = waypoint
            .with_role(if is_gateway { Role::Gateway } else { Role::Waypoint })
            .with_added_ports(sets.ports);
        let class = waypoint.class();
        if !self.is_ours(class) {
            return self.leave(name, &waypoint, &gateway).await;
        }
        match classes::owner(&self.client, class).await? {
            Owned::ByUs => {}
            // Such as Istio, whose waypoints can be used beside ours.
            Owned::ByOthers => return self.leave(name, &waypoint, &gateway).await,
            Owned::Absent => return Err(Fault::NoClass(class.to_owned())),
        }
        let (state, fault) = match self.deploy(name, &waypoint).await {
            Ok(state) => (state, None),
            Err(Fault::Call(error)) if error.is_unavailable() || error.is_conflict() => {
                return Err(error.into());
            }
            Err(fault) => (DeploymentState::Refused(fault.to_string()), Some(fault)),
        };
        if let Some(status) = status::plan(&gateway, waypoint.role(), &state, &findings, &now()) {
            self.write_status(&api, name, &gateway, status).await?;
        }
        // Whether their listeners serve depends on the Gateway.
        self.queue.push(sets.all.into_iter().map(|name| ObjectRef { kind: Kind::ListenerSet, name }));
        fault.map_or(Ok(()), Err)
    }

    fn is_ours(&self, class: &str) -> bool {
        self.classes.iter().any(|ours| &**ours == class)
    }

    async fn write_status(
        &self,
        api: &Api<DynamicObject>,
        name: &NamespacedName,
        gateway: &Value,
        status: Value,
    ) -> Result<(), CallError> {
        let version = &gateway["metadata"]["resourceVersion"];
        let patch = json!({ "metadata": { "resourceVersion": version }, "status": status });
        let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        call(api.patch_status(&name.name, &parameters, &Patch::Merge(patch))).await?;
        self.metrics.written.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Removes what was made for a Gateway whose class is another controller's now, then what its status says of it. Without
    /// anything of ours in the status there is nothing to remove.
    async fn leave(
        &self,
        name: &NamespacedName,
        waypoint: &WaypointGateway,
        gateway: &Value,
    ) -> Result<(), Fault> {
        let Some(status) = status::without_ours(gateway, &now()) else { return Ok(()) };
        for part in Part::ALL {
            let resource = part.resource();
            let api: Api<DynamicObject> =
                Api::namespaced_with(self.client.clone(), &name.namespace, &resource);
            let Some(object) = call(api.get_opt(&name.name)).await? else { continue };
            let uid = object.metadata.uid.clone();
            if waypoint.is_left(&serde_json::to_value(object).unwrap_or_default(), &self.classes) {
                delete(&api, &name.name, uid).await?;
                tracing::info!(gateway = %name, kind = resource.kind, "removed: the class of the Gateway is another's");
            }
        }
        if let Some(resource) = self.gateways().await? {
            let api = Api::namespaced_with(self.client.clone(), &name.namespace, &resource);
            self.write_status(&api, name, gateway, status).await?;
        }
        Ok(())
    }

    /// Makes the parts of a waypoint what they must be.
    async fn deploy(
        &self,
        name: &NamespacedName,
        waypoint: &WaypointGateway,
    ) -> Result<DeploymentState, Fault> {
        let parameters = match self.parameters(name, waypoint).await? {
            Ok(parameters) => parameters,
            Err(reason) => return Ok(DeploymentState::Invalid(reason)),
        };
        let asked = match waypoint.role() {
            Role::Waypoint => Ok(WantedAddresses::default()),
            Role::Gateway => waypoint.wanted_addresses(),
        };
        let asked = match asked {
            Ok(asked) => asked,
            Err(reason) => return Ok(DeploymentState::Unaddressable(reason)),
        };
        let parts = match plan::manifests(waypoint, &self.template, parameters.as_ref()) {
            Ok(parts) => parts,
            Err(reason) => return Ok(DeploymentState::Invalid(reason)),
        };
        let (mut addresses, mut serves) = (Vec::new(), false);
        for (part, manifest) in parts {
            let object = self.put(name, waypoint, part, manifest).await?;
            match part {
                Part::Service => addresses = status::addresses(&object, asked.in_cluster),
                Part::Deployment => {
                    serves = object["status"]["availableReplicas"].as_u64().is_some_and(|pods| pods > 0);
                }
                Part::ServiceAccount | Part::PodDisruptionBudget | Part::HorizontalPodAutoscaler => {}
            }
        }
        let mut wanted = asked.default.iter().chain(&asked.cluster_ips);
        let withheld = wanted.find(|wanted| addresses.iter().all(|known| known.value != **wanted));
        let withheld = withheld.map(ToString::to_string);
        Ok(DeploymentState::Deployed { addresses, withheld, serves })
    }

    /// The parameters that a Gateway names; the inner error says what is wrong with them.
    async fn parameters(
        &self,
        name: &NamespacedName,
        waypoint: &WaypointGateway,
    ) -> Result<Result<Option<Template>, String>, Fault> {
        let config_map = match waypoint.config_map() {
            Ok(Some(config_map)) => config_map,
            Ok(None) => return Ok(Ok(None)),
            Err(reason) => return Ok(Err(reason)),
        };
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &name.namespace);
        let Some(object) = call(api.get_opt(config_map)).await? else {
            return Ok(Err(format!("ConfigMap {config_map} does not exist")));
        };
        let object = serde_json::to_value(object).unwrap_or_default();
        let parameters = Template::of_config_map(&object);
        Ok(parameters.map(Some).map_err(|reason| format!("ConfigMap {config_map}: {reason}")))
    }

    /// Writes a part if it is not as it must be, and returns what it is.
    async fn put(
        &self,
        name: &NamespacedName,
        waypoint: &WaypointGateway,
        part: Part,
        manifest: Option<Value>,
    ) -> Result<Value, Fault> {
        let resource = part.resource();
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &name.namespace, &resource);
        let present = call(api.get_opt(&name.name)).await?;
        let uid = present.as_ref().and_then(|object| object.metadata.uid.clone());
        let present = present.map(|object| serde_json::to_value(object).unwrap_or_default());
        let is_owned = present.as_ref().is_some_and(|object| waypoint.owns(object));
        match (present, manifest) {
            (Some(_), Some(_)) if !is_owned => {
                Err(Fault::Foreign { kind: resource.kind, name: name.clone() })
            }
            (Some(object), Some(manifest)) if plan::has_all_of(&object, &manifest) => Ok(object),
            (present, Some(mut manifest)) => {
                let object = format!("{} {name}", resource.kind);
                // It is looked at again with every Gateway.
                if !self.backoff.lock().admits(&object, Instant::now()) {
                    return Ok(present.unwrap_or_default());
                }
                if let Some(uid) = uid {
                    // Another object of this name that came meanwhile is not overwritten.
                    manifest["metadata"]["uid"] = uid.into();
                }
                let kept = present.as_ref().and_then(|present| plan::kept_replicas(present, &manifest));
                if let Some(kept) = kept {
                    // Not by force: whoever changed the number meanwhile owns it, which is as good.
                    let handed = PatchParams::apply(REPLICAS_MANAGER);
                    match call(api.patch(&name.name, &handed, &Patch::Apply(kept))).await {
                        Err(error) if !error.is_conflict() => return Err(error.into()),
                        Ok(_) | Err(_) => {}
                    }
                }
                let parameters = PatchParams::apply(FIELD_MANAGER).force();
                let written = call(api.patch(&name.name, &parameters, &Patch::Apply(manifest))).await?;
                self.metrics.written.fetch_add(1, Ordering::Relaxed);
                self.backoff.lock().wrote(&object, Instant::now());
                tracing::info!(gateway = %name, kind = resource.kind, "written for a waypoint");
                Ok(serde_json::to_value(written).unwrap_or_default())
            }
            (Some(_), None) if is_owned => {
                delete(&api, &name.name, uid).await?;
                Ok(Value::Null)
            }
            (_, None) => Ok(Value::Null),
        }
    }

    /// Gateways as the server has them; `None` where the kind is not installed.
    async fn gateways(&self) -> Result<Option<ApiResource>, CallError> {
        self.resource(Kind::Gateway).await
    }

    /// A kind as the server has it; `None` where it is not installed.
    async fn resource(&self, kind: Kind) -> Result<Option<ApiResource>, CallError> {
        let info = kind.info();
        let version = served_version(&self.client, &info).await?;
        Ok(version.map(|version| {
            let gvk = GroupVersionKind::gvk(info.group, version, info.name);
            ApiResource::from_gvk_with_plural(&gvk, info.plural)
        }))
    }
}

/// Deletes an object, unless another of its name came meanwhile.
async fn delete(api: &Api<DynamicObject>, name: &str, uid: Option<String>) -> Result<(), CallError> {
    let preconditions = Some(Preconditions { uid, ..Preconditions::default() });
    let parameters = DeleteParams { preconditions, ..DeleteParams::default() };
    match call(api.delete(name, &parameters)).await {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => Err(error),
    }
}
