//! Where certificates come from: the control plane, an authority of its own, or nowhere.

use std::sync::Arc;
use std::time::Duration;

use ambit_identity::{
    ControlPlane, ControlPlaneConfig, ControlPlaneError, GrpcIssuer, IssueError, Issuer, SpiffeId,
};
use async_trait::async_trait;

use crate::config::Config;

/// The control plane, unless there is none.
pub(super) fn control_plane(config: &Config) -> Result<Option<ControlPlane>, ControlPlaneError> {
    if config.proxy.control_plane.is_empty() {
        return Ok(None);
    }
    ControlPlane::new(config.proxy.control_plane_config()).map(Some)
}

/// Who issues certificates.
pub(super) fn issuer(
    config: &Config,
    control_plane: Option<ControlPlane>,
) -> Result<Arc<dyn Issuer>, ControlPlaneError> {
    let own = &config.certificates;
    let server = match (&own.authority, control_plane) {
        (Some(address), _) => {
            let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
            let of_discovery = config.proxy.control_plane_config();
            ControlPlane::new(ControlPlaneConfig {
                address: address.clone(),
                root_file: own.authority_root.clone().unwrap_or(of_discovery.root_file),
                server_name: own.authority_server_name.clone().unwrap_or_else(|| host.to_owned()),
                ..of_discovery
            })?
        }
        (None, Some(control_plane)) => control_plane,
        (None, None) => return Ok(Arc::new(NoAuthority)),
    };
    Ok(Arc::new(GrpcIssuer::impersonating(server)))
}

/// Issues nothing: pods are served in plaintext and between each other on this node.
struct NoAuthority;

#[async_trait]
impl Issuer for NoAuthority {
    async fn issue(&self, identity: &SpiffeId, _: &str, _: Duration) -> Result<Vec<String>, IssueError> {
        Err(IssueError::Unavailable {
            address: "(none)".to_owned(),
            identity: identity.clone(),
            reason: "neither a control plane nor a certificate authority is configured".to_owned(),
        })
    }
}
