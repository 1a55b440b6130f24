//! Writes statuses: conditions of what was found out about objects, parents of routes, and addresses of ServiceEntries.
//!
//! The holder of the lease looks at every object once when it takes it, then at those that change. It reads an object
//! before it writes, writes only what differs, and names the version that it read, so foreign entries are never lost.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, stream};
use k8s_openapi::jiff::{Timestamp, Unit};
use kube::api::{DynamicObject, ListParams, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::WriteMetrics;
use super::allocation::Allocator;
use super::ancestors;
use super::conditions;
use super::ingress;
use super::queue::{StatusQueue, Work};
use super::retries::{Failed, Retries};
use super::routes;
use super::write_backoff::WriteBackoff;
use crate::api_server::{CallError, FIELD_MANAGER, call};
use crate::kind::Kind;
use crate::object::{NamespacedName, ObjectRef, Route};
use crate::observe::Findings;
use crate::source::kubernetes::served_version;

/// The kinds whose status is written here.
pub(crate) const KINDS: [Kind; 16] = [
    Kind::Service,
    Kind::Ingress,
    Kind::AuthorizationPolicy,
    Kind::ServiceEntry,
    Kind::WorkloadEntry,
    Kind::HttpRoute,
    Kind::GrpcRoute,
    Kind::TcpRoute,
    Kind::TlsRoute,
    Kind::UdpRoute,
    Kind::VirtualService,
    Kind::DestinationRule,
    Kind::RequestAuthentication,
    Kind::BackendTlsPolicy,
    Kind::TrafficPolicy,
    Kind::Telemetry,
];
/// Objects looked at at the same time.
const CONCURRENT: usize = 8;
/// Objects taken from the queue together.
const TOGETHER: usize = 64;
/// Objects of one page of a list.
const PAGE: u32 = 500;

/// Writes statuses.
pub(crate) struct StatusWriter {
    client: Client,
    findings: Findings,
    queue: Arc<StatusQueue>,
    metrics: Arc<WriteMetrics>,
    /// Whether there may be gateways: Ingresses are nobody's business otherwise.
    has_gateways: bool,
    /// Guards the allocations for one plan; never held across an await.
    allocator: Mutex<Allocator>,
    /// Guards the times of writes alone; never held across an await.
    backoff: Mutex<WriteBackoff<ObjectRef>>,
    versions: Mutex<HashMap<Kind, &'static str>>,
}

impl StatusWriter {
    pub(crate) fn new(
        client: Client,
        findings: Findings,
        queue: Arc<StatusQueue>,
        metrics: Arc<WriteMetrics>,
        has_gateways: bool,
    ) -> Self {
        let backoff = Mutex::new(WriteBackoff::new(metrics.backoffs.clone()));
        Self {
            has_gateways,
            client,
            findings,
            queue,
            metrics,
            allocator: Mutex::default(),
            backoff,
            versions: Mutex::default(),
        }
    }

    /// Writes while `leads` is true; ends with its sender. Starts after everything that is there was taken.
    pub(crate) async fn run(self, leads: watch::Receiver<bool>) {
        self.queue.while_leading(leads, || self.run_as_leader()).await;
    }

    async fn run_as_leader(&self) {
        *self.allocator.lock() = Allocator::default();
        let mut retries = Retries::default();
        self.reconcile_kinds(KINDS, &mut retries).await;
        loop {
            tokio::select! {
                work = self.queue.take(TOGETHER) => match work {
                    Work::Everything => self.reconcile_kinds(KINDS, &mut retries).await,
                    Work::Objects(objects) => self.reconcile_objects(objects, &mut retries).await,
                },
                () = self.held_is_due() => {
                    let due = self.backoff.lock().take_due(Instant::now());
                    self.queue.push(due);
                }
                () = retries.due() => {
                    let Failed { kinds, objects } = retries.take();
                    self.reconcile_kinds(kinds, &mut retries).await;
                    // A few at a time, between those that change.
                    self.queue.push(objects);
                }
            }
        }
    }

    /// Waits until a write that the backoff holds is due. Writes are held only by the task that waits here.
    async fn held_is_due(&self) {
        let next = self.backoff.lock().next();
        match next {
            Some(at) => tokio::time::sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    async fn reconcile_kinds(&self, kinds: impl IntoIterator<Item = Kind>, retries: &mut Retries) {
        for kind in kinds.into_iter().filter(|kind| self.has_gateways || *kind != Kind::Ingress) {
            match self.reconcile_kind(kind).await {
                Ok(failed) => retries.add_objects(failed),
                Err(error) => {
                    self.metrics.failed.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(%kind, %error, "objects not listed for their status; trying again");
                    retries.add_kind(kind);
                }
            }
        }
    }

    async fn reconcile_objects(&self, objects: impl IntoIterator<Item = ObjectRef>, retries: &mut Retries) {
        let look = |object: ObjectRef| async move { (self.reconcile(&object).await, object) }.boxed();
        let failed = self.at_once(objects.into_iter().map(look).collect()).await;
        retries.add_objects(failed);
    }

    /// Runs calls side by side, to the end of all, and returns the objects that must be tried again.
    async fn at_once(&self, calls: Vec<BoxFuture<'_, (Result<(), CallError>, ObjectRef)>>) -> Vec<ObjectRef> {
        let outcomes: Vec<_> = stream::iter(calls).buffer_unordered(CONCURRENT).collect().await;
        let mut failed = Vec::new();
        for (outcome, object) in outcomes {
            let Err(error) = outcome else { continue };
            self.metrics.failed.fetch_add(1, Ordering::Relaxed);
            if error.is_unavailable() {
                tracing::warn!(%object, %error, "status not written; trying again");
                failed.push(object);
            } else {
                // Trying again would come to the same.
                tracing::warn!(%object, %error, "status refused");
            }
        }
        failed
    }

    /// Looks at every object of a kind; the oldest first, so that of two that claim an address it keeps it.
    /// Returns those that must be tried again.
    async fn reconcile_kind(&self, kind: Kind) -> Result<Vec<ObjectRef>, CallError> {
        let Some(resource) = self.resource(kind).await? else { return Ok(Vec::new()) };
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let mut objects = match list_all(api).await {
            Ok(objects) => objects,
            Err(error) if error.is_not_found() => {
                // Its definition was removed, or another version is served now.
                self.versions.lock().remove(&kind);
                return Ok(Vec::new());
            }
            Err(error) => return Err(error),
        };
        objects.sort_by_key(|object| object.metadata.creation_timestamp.clone());
        let planned: Vec<_> = objects.into_iter().filter_map(|object| self.plan(kind, object)).collect();
        let resource = &resource;
        let write = |(object, patch): (ObjectRef, Value)| {
            async move { (self.write(object.clone(), patch, resource).await, object) }.boxed()
        };
        Ok(self.at_once(planned.into_iter().map(write).collect()).await)
    }

    /// Looks at one object.
    async fn reconcile(&self, object: &ObjectRef) -> Result<(), CallError> {
        let Some(resource) = self.resource(object.kind).await? else { return Ok(()) };
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &object.name.namespace, &resource);
        let Some(present) = call(api.get_opt(&object.name.name)).await? else {
            self.allocator.lock().release(&object.name);
            return Ok(());
        };
        match self.plan(object.kind, present) {
            Some((object, patch)) => self.write(object, patch, &resource).await,
            None => Ok(()),
        }
    }

    /// The patch that an object's status needs, if any.
    fn plan(&self, kind: Kind, object: DynamicObject) -> Option<(ObjectRef, Value)> {
        let (namespace, name) = (object.metadata.namespace.as_deref()?, object.metadata.name.as_deref()?);
        let reference = ObjectRef { kind, name: NamespacedName::new(namespace, name) };
        let version = object.metadata.resource_version.clone();
        let value = serde_json::to_value(object).ok()?;
        let findings = self.findings.lock().get(&reference).cloned().unwrap_or_default();
        let mut status = Map::new();
        if Route::KINDS.contains(&kind) {
            if let Some(parents) = routes::plan(&value, &reference.name.namespace, &findings, &now()) {
                status.insert("parents".to_owned(), parents.into());
            }
        } else if kind == Kind::Ingress {
            if let Some(load_balancer) = ingress::plan(&value, &findings) {
                status.insert("loadBalancer".to_owned(), load_balancer);
            }
        } else if matches!(kind, Kind::BackendTlsPolicy | Kind::TrafficPolicy) {
            if let Some(ancestors) = ancestors::plan(&value, &findings, &now()) {
                status.insert("ancestors".to_owned(), ancestors.into());
            }
        } else if let Some(conditions) = conditions::plan(&value, &findings, &now()) {
            status.insert("conditions".to_owned(), conditions.into());
        }
        if kind == Kind::ServiceEntry
            && let Some(addresses) = self.allocator.lock().plan(&reference.name, &value)
        {
            status.insert("addresses".to_owned(), addresses.into());
        }
        let patch = json!({ "metadata": { "resourceVersion": version }, "status": status });
        (!status.is_empty()).then_some((reference, patch))
    }

    async fn write(&self, object: ObjectRef, patch: Value, resource: &ApiResource) -> Result<(), CallError> {
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &object.name.namespace, resource);
        let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        if !self.backoff.lock().admits(&object, Instant::now()) {
            return Ok(());
        }
        match call(api.patch_status(&object.name.name, &parameters, &Patch::Merge(patch))).await {
            Ok(_) => {
                self.metrics.written.fetch_add(1, Ordering::Relaxed);
                self.backoff.lock().wrote(&object, Instant::now());
                Ok(())
            }
            // Somebody else wrote meanwhile: it is looked at again.
            Err(error) if error.is_conflict() => {
                self.queue.push([object]);
                Ok(())
            }
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The kind as the server has it; `None` where it is not installed.
    async fn resource(&self, kind: Kind) -> Result<Option<ApiResource>, CallError> {
        let info = kind.info();
        let known = self.versions.lock().get(&kind).copied();
        let version = match known {
            Some(version) => version,
            None => {
                let Some(version) = served_version(&self.client, &info).await? else { return Ok(None) };
                self.versions.lock().insert(kind, version);
                version
            }
        };
        let gvk = GroupVersionKind::gvk(info.group, version, info.name);
        Ok(Some(ApiResource::from_gvk_with_plural(&gvk, info.plural)))
    }
}

/// All objects of a kind, page by page.
pub(super) async fn list_all(api: Api<DynamicObject>) -> Result<Vec<DynamicObject>, CallError> {
    let mut objects = Vec::new();
    let mut parameters = ListParams::default().limit(PAGE);
    loop {
        let page = call(api.list(&parameters)).await?;
        objects.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters = parameters.continue_token(&token),
            None => return Ok(objects),
        }
    }
}

/// The time as conditions have it.
pub(super) fn now() -> String {
    Timestamp::now().round(Unit::Second).unwrap_or_default().to_string()
}
