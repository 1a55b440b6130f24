//! Looking up one pod and its namespace at the API server, for a sandbox that is about to start.
//!
//! A watch may be behind, and a new pod of the mesh must not start without its redirection, so the CNI plugin's calls
//! are decided from what the API server says now.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{Api, Client};
use tokio::time::{Instant, timeout};

use super::index::{Metadata, PodObject, Source, Verdict};
use crate::cni::message::PodRef;

/// How long the API server may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Why nothing can be said about a pod.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The API server did not answer, or refused.
    #[error("the API server: {0}")]
    Api(#[from] Box<kube::Error>),
    /// It took too long.
    #[error("the API server did not answer within {LIMIT:?}")]
    Late,
    /// It knows no such pod.
    #[error("the API server knows no pod {0}/{1}")]
    NoPod(String, String),
    /// The name belongs to another pod by now.
    #[error("pod {name} has uid {present}, not {asked}")]
    OtherPod {
        /// The pod.
        name: String,
        /// The uid that it has.
        present: String,
        /// The uid of the sandbox's pod.
        asked: String,
    },
    /// The object lacks what every pod has.
    #[error("pod {name}: {reason}")]
    NotReadable {
        /// The pod.
        name: String,
        /// What it lacks.
        reason: &'static str,
    },
}

/// Where the CNI plugin's server learns whether a pod is to be enrolled.
pub trait PodSource: Send + Sync + 'static {
    /// What holds for the pod now, not what was known of it once.
    fn verdict(&self, pod: &PodRef) -> impl Future<Output = Result<Verdict, SourceError>> + Send;

    /// The pod is about to be enrolled although it may not have been listed yet.
    fn announce(&self, uid: &str);
}

/// The API server as the source of single pods.
#[derive(Clone)]
pub struct Lookup {
    client: Client,
    source: Source,
}

impl std::fmt::Debug for Lookup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lookup").field("source", &self.source).finish_non_exhaustive()
    }
}

impl Lookup {
    /// Decides by the settings and RuntimeClasses of `source`.
    pub fn new(client: Client, source: Source) -> Self {
        Self { client, source }
    }

    async fn read(&self, asked: &PodRef) -> Result<(PodObject, Metadata), SourceError> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &asked.namespace);
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let (pod, namespace) =
            tokio::try_join!(pods.get_opt(&asked.name), namespaces.get_metadata(&asked.namespace))
                .map_err(Box::new)?;
        let no_pod = || SourceError::NoPod(asked.namespace.clone(), asked.name.clone());
        let pod = PodObject::try_from(&pod.ok_or_else(no_pod)?)
            .map_err(|reason| SourceError::NotReadable { name: asked.name.clone(), reason })?;
        let known_by = [Some(&pod.uid), pod.runtime_uid.as_ref()];
        if !asked.uid.is_empty() && !known_by.contains(&Some(&asked.uid)) {
            return Err(SourceError::OtherPod {
                name: asked.name.clone(),
                present: pod.uid,
                asked: asked.uid.clone(),
            });
        }
        Ok((pod, namespace.metadata.into()))
    }
}

impl PodSource for Lookup {
    async fn verdict(&self, asked: &PodRef) -> Result<Verdict, SourceError> {
        let (pod, namespace) = timeout(LIMIT, self.read(asked)).await.map_err(|_| SourceError::Late)??;
        Ok(self.source.with(|index| {
            let verdict = index.verdict(&pod, &namespace);
            // The watch may be behind: it must not undo what is answered here.
            index.look_up_namespace(&asked.namespace, namespace, Instant::now());
            verdict
        }))
    }

    fn announce(&self, uid: &str) {
        self.source.with(|index| index.announce(uid, Instant::now()));
    }
}
