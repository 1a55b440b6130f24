//! The CA's roots as a ClusterTrustBundle, which pods can mount, where the API server serves the kind.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ambit_ca::Authority;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;

use super::WriteMetrics;
use crate::api_server::{CallError, FIELD_MANAGER, call};
use crate::kind::{KindInfo, Needed, Scope};
use crate::source::kubernetes::served_version;

/// The signer whose certificates lead to the roots.
pub(super) const SIGNER: &str = "ambit.dev/workload";
/// Name of the bundle; the API demands that it begins with the signer's.
pub(super) const NAME: &str = "ambit.dev:workload:roots";
/// How often it is compared when the roots do not change, and when it could not be written.
const INTERVAL: Duration = Duration::from_secs(30);

pub(super) const KIND: KindInfo = KindInfo {
    name: "ClusterTrustBundle",
    plural: "clustertrustbundles",
    group: "certificates.k8s.io",
    versions: &["v1", "v1beta1"],
    scope: Scope::Cluster,
    needed: Needed::Everything,
};

/// Writes the bundle.
pub(crate) struct TrustBundleWriter {
    pub(crate) client: Client,
    pub(crate) authority: Authority,
    pub(crate) metrics: Arc<WriteMetrics>,
}

impl TrustBundleWriter {
    /// Writes while `leads` is true; ends with its sender.
    pub(crate) async fn run(self, mut leads: watch::Receiver<bool>) {
        let (mut roots_changed, mut last_error) = (self.authority.subscribe(), None);
        while leads.wait_for(|leads| *leads).await.is_ok() {
            let error = self.reconcile().await.err().map(|error| error.to_string());
            if let Some(error) = &error {
                self.metrics.failed.fetch_add(1, Ordering::Relaxed);
                if last_error.as_ref() != Some(error) {
                    tracing::warn!(bundle = NAME, error, "ClusterTrustBundle not written; it is tried again");
                }
            }
            last_error = error;
            // The authority lives as long as the program.
            tokio::time::timeout(INTERVAL, roots_changed.changed()).await.ok();
        }
    }

    /// Writes the bundle if it is served and is not as it must be.
    async fn reconcile(&self) -> Result<(), CallError> {
        let Some(version) = served_version(&self.client, &KIND).await? else { return Ok(()) };
        let gvk = GroupVersionKind::gvk(KIND.group, version, KIND.name);
        let resource = ApiResource::from_gvk_with_plural(&gvk, KIND.plural);
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let roots = self.authority.roots_pem();
        let present = call(api.get_opt(NAME)).await?;
        if present.is_some_and(|bundle| bundle.data["spec"]["trustBundle"] == *roots) {
            return Ok(());
        }
        let manifest = json!({
            "apiVersion": resource.api_version, "kind": KIND.name,
            "metadata": { "name": NAME },
            "spec": { "signerName": SIGNER, "trustBundle": &*roots },
        });
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        call(api.patch(NAME, &parameters, &Patch::Apply(manifest))).await?;
        self.metrics.written.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
