//! In which version the API server serves a kind, if at all.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIResourceList;
use kube::Client;

use crate::api_server::{Backoff, CallError, call};
use crate::kind::{Kind, KindInfo};

/// How often a kind that is not served is looked for.
pub(super) const LOOK: Duration = Duration::from_secs(2);
/// How often in a row a kind must be missing before it counts as not installed.
const CONFIRMATIONS: u32 = 3;
/// The same for a kind of which there are objects. Policies are among them, so a server that forgets a definition for a moment must not
/// make them go.
const CONFIRMATIONS_OF_LOSS: u32 = 10;

/// What looking for a kind came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// In this version.
    In(&'static str),
    /// Not at all: its definition is not installed.
    Absent,
}

/// Why the API server's answer to where a kind is served does not count.
#[derive(Debug, thiserror::Error)]
enum DiscoveryError {
    /// There is no answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// It says that it does not serve a kind that every API server serves.
    #[error("it says that it does not serve a kind of Kubernetes itself")]
    BuiltInAbsent,
}

/// Looks until the answer is certain. A kind of Kubernetes itself is never absent: its objects stay as they were. A server that is
/// starting serves kinds of extensions late, so a missing kind counts only when a server that says that it is ready has not
/// had it several times, and more often where there are objects of it.
pub(super) async fn find(client: &Client, kind: Kind, has_objects: bool) -> Served {
    let (confirmations, pause) = match has_objects {
        true => (CONFIRMATIONS_OF_LOSS, LOOK),
        false => (CONFIRMATIONS, LOOK / CONFIRMATIONS),
    };
    let (mut backoff, mut missing, mut last_error) = (Backoff::default(), 0, None);
    loop {
        match certain(look(client, &kind.info()).await, &kind.info()) {
            Ok(Served::In(version)) => return Served::In(version),
            Ok(Served::Absent) => {
                missing += 1;
                if missing >= confirmations {
                    return Served::Absent;
                }
                tokio::time::sleep(pause).await;
            }
            Err(error) => {
                missing = 0;
                let error = error.to_string();
                if last_error.as_ref() != Some(&error) {
                    tracing::warn!(%kind, error, "the API server does not say whether it serves the kind");
                    last_error = Some(error);
                }
                tokio::time::sleep(backoff.pause()).await;
            }
        }
    }
}

fn certain(answer: Result<Served, CallError>, info: &KindInfo) -> Result<Served, DiscoveryError> {
    match answer? {
        Served::Absent if info.is_built_in() => Err(DiscoveryError::BuiltInAbsent),
        served => Ok(served),
    }
}

/// Asks once.
pub(super) async fn look(client: &Client, info: &KindInfo) -> Result<Served, CallError> {
    for version in info.versions {
        match call(resources(client, info.group, version)).await {
            Ok(list) if list.resources.iter().any(|resource| resource.name == info.plural) => {
                return Ok(Served::In(version));
            }
            Ok(_) => {}
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    is_ready(client).await.map(|()| Served::Absent)
}

async fn resources(client: &Client, group: &str, version: &str) -> kube::Result<APIResourceList> {
    match group {
        "" => client.list_core_api_resources(version).await,
        group => client.list_api_group_resources(&format!("{group}/{version}")).await,
    }
}

/// Whether the server has everything that it is going to serve. One that does not let us ask counts as ready.
async fn is_ready(client: &Client) -> Result<(), CallError> {
    let request = http::Request::get("/readyz").body(Vec::new()).map_err(kube::Error::HttpError)?;
    match call(client.request_text(request)).await {
        Ok(_) => Ok(()),
        // A server without the path is not an API server, but perhaps a proxy before one that is away.
        Err(error) if matches!(error.code(), Some(401 | 403)) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_of_kubernetes_itself_is_never_absent() {
        let look = |kind: Kind| certain(Ok(Served::Absent), &kind.info());
        assert!(matches!(look(Kind::Pod), Err(DiscoveryError::BuiltInAbsent)));
        assert!(matches!(look(Kind::ReplicaSet), Err(DiscoveryError::BuiltInAbsent)));
        assert!(matches!(look(Kind::ServiceEntry), Ok(Served::Absent)));
    }
}
