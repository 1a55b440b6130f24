//! Statuses of ListenerSets: what the index says of their listeners, and whether their Gateway serves.

use std::sync::atomic::Ordering;

use futures_util::{StreamExt, stream};
use kube::Api;
use kube::api::{DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};

use super::{CONCURRENT, WaypointWriter, status};
use crate::api_server::{CallError, FIELD_MANAGER, call};
use crate::kind::Kind;
use crate::object::{NamespacedName, ObjectRef, ParentRef};
use crate::write::retries::Retries;
use crate::write::status::now;

impl WaypointWriter {
    pub(super) async fn reconcile_sets(&self, sets: Vec<ObjectRef>, retries: &mut Retries) {
        let look = |set: ObjectRef| async move { (self.reconcile_set(&set).await, set) };
        let outcomes: Vec<_> = stream::iter(sets).map(look).buffer_unordered(CONCURRENT).collect().await;
        for (outcome, set) in outcomes {
            let Err(error) = outcome else { continue };
            self.metrics.failed.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(object = %set, %error, "status not written");
            if error.is_unavailable() || error.is_conflict() {
                retries.add_objects(vec![set]);
            }
        }
    }

    /// Writes the status of one ListenerSet, if it differs.
    async fn reconcile_set(&self, set: &ObjectRef) -> Result<(), CallError> {
        let findings = self.findings.lock().get(set).cloned().unwrap_or_default();
        // That of a Gateway of another controller is not ours.
        if findings.is_empty() {
            return Ok(());
        }
        let Some(resource) = self.resource(Kind::ListenerSet).await? else { return Ok(()) };
        let NamespacedName { namespace, name } = &set.name;
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &resource);
        let Some(object) = call(api.get_opt(name)).await? else { return Ok(()) };
        let object = serde_json::to_value(object).unwrap_or_default();
        let parent = ParentRef::of_value(&object["spec"]["parentRef"], namespace);
        let Some(parent) = parent.map(|parent| parent.name) else { return Ok(()) };
        let Some(resource) = self.gateways().await? else { return Ok(()) };
        let gateways: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &parent.namespace, &resource);
        let gateway = call(gateways.get_opt(&parent.name)).await?;
        let gateway =
            gateway.map_or(Value::Null, |gateway| serde_json::to_value(gateway).unwrap_or_default());
        let programmed = status::is_programmed(&gateway);
        let Some(status) = status::of_set(&object, &findings, &programmed, &now()) else { return Ok(()) };
        let version = &object["metadata"]["resourceVersion"];
        let patch = json!({ "metadata": { "resourceVersion": version }, "status": status });
        let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        call(api.patch_status(name, &parameters, &Patch::Merge(patch))).await?;
        self.metrics.written.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
