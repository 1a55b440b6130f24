//! Objects of the cluster as a whole that the control plane makes and no release owns: GatewayClasses, the XMesh and the
//! ClusterTrustBundle of the roots. `ambit uninstall` removes them.

use kube::api::{DeleteParams, DynamicObject};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client, ResourceExt};

use super::classes::{self, CLASS, MESH};
use super::status::list_all;
use super::trust_bundle;
use crate::api_server::{CallError, call};
use crate::kind::KindInfo;
use crate::source::kubernetes::served_version;

/// Removes them, and returns them as `Kind name`. Classes of other controllers stay.
///
/// # Errors
/// When one can't be listed or deleted.
pub async fn remove(client: &Client) -> Result<Vec<String>, CallError> {
    let mut removed = Vec::new();
    for kind in [&CLASS, &MESH, &trust_bundle::KIND] {
        let Some(api) = api(client, kind).await? else { continue };
        for object in list_all(api.clone()).await? {
            let name = object.name_any();
            if name == trust_bundle::NAME || classes::is_ours(&object.data) {
                match call(api.delete(&name, &DeleteParams::default())).await {
                    Err(error) if !error.is_not_found() => return Err(error),
                    _ => removed.push(format!("{} {name}", kind.name)),
                }
            }
        }
    }
    Ok(removed)
}

/// `None` where the API server does not serve the kind.
async fn api(client: &Client, kind: &KindInfo) -> Result<Option<Api<DynamicObject>>, CallError> {
    let Some(version) = served_version(client, kind).await? else { return Ok(None) };
    let gvk = GroupVersionKind::gvk(kind.group, version, kind.name);
    Ok(Some(Api::all_with(client.clone(), &ApiResource::from_gvk_with_plural(&gvk, kind.plural))))
}
