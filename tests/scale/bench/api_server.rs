//! The large cluster on a real API server with its etcd. No kubelet and no controller runs: every object is written from here.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::Path;
use std::time::Instant;

use ambit_cluster::{Cluster, Options};
use ambit_scale::objects::{self, File, PODS, SERVICES};
use anyhow::{Context, Result};
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

/// The namespace of the control plane's lease.
const SYSTEM: &str = "ambit-system";
/// Requests at the same time while the objects are written.
const TOGETHER: usize = 32;
/// Number of the test bed's cluster: that of no test.
const NUMBER: u8 = 4;
/// Name of the test bed's cluster.
const NAME: &str = "bench";
/// The CRDs that the chart installs.
const DEFINITIONS: &str = "charts/ambit/files/crds";

/// A running API server that holds every object of the large cluster.
pub(crate) struct ApiServer {
    cluster: Cluster,
    client: Client,
}

impl ApiServer {
    /// Resources of what the API server makes by itself: the service `kubernetes` and its endpoint.
    pub(crate) const OWN_RESOURCES: usize = 2;

    /// Starts etcd and the API server by the program `ambit-cluster`, and writes every object.
    pub(crate) async fn start(program: &Path) -> Result<Self> {
        let options = Options { number: NUMBER, nodes: 0, ..Options::new(NAME, program) };
        let cluster = Cluster::start(options).await?;
        let kubeconfig = Kubeconfig::read_from(cluster.kubectl().kubeconfig())?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        let this = Self { client: Client::try_from(config)?, cluster };
        let began = Instant::now();
        this.write().await?;
        eprintln!("the API server holds the large cluster, written in {} s", began.elapsed().as_secs());
        Ok(this)
    }

    /// Ends both programs.
    pub(crate) async fn stop(self) -> Result<()> {
        Ok(self.cluster.down().await?)
    }

    /// The source that the control plane reads.
    pub(crate) fn source(&self) -> String {
        format!("kubernetes:{}", self.cluster.kubectl().kubeconfig().display())
    }

    /// Makes a pod, then writes the status that makes it ready. Returns the time just before the status is sent: until then
    /// the pod has no address.
    pub(crate) async fn put_pod(&self, number: u32) -> Result<Instant> {
        let pod = self.create_pod(number).await?;
        let now = Instant::now();
        self.write_status(&pod).await?;
        Ok(now)
    }

    /// Deletes a pod without grace. Returns the time just before.
    pub(crate) async fn take_pod(&self, number: u32) -> Result<Instant> {
        let name = objects::pod_name(number);
        let api: Api<Pod> = self.namespaced(&objects::namespace_of(number % SERVICES));
        let now = Instant::now();
        api.delete(&name, &DeleteParams::default().grace_period(0))
            .await
            .with_context(|| format!("deleting {name}"))?;
        Ok(now)
    }

    async fn write(&self) -> Result<()> {
        let definitions = self.cluster.layout().repository().join(DEFINITIONS).display().to_string();
        self.cluster
            .kubectl()
            .run(&["apply", "--server-side", "--recursive", "--filename", &definitions])
            .await?;
        let all = || Api::all(self.client.clone());
        let system = Namespace { metadata: named(SYSTEM.to_owned()), ..Namespace::default() };
        create(&all(), &system).await?;
        let namespaces = objects::namespaces().map(|file| read::<Namespace>(&file));
        each(namespaces, async |namespace| create(&all(), &namespace).await).await?;
        // The API server admits no pod without its account.
        let accounts: BTreeSet<(String, String)> = (0..SERVICES)
            .map(|service| (objects::namespace_of(service), objects::account_of(service)))
            .collect();
        each(accounts.into_iter().map(Ok), async |(namespace, account)| {
            let account = ServiceAccount { metadata: named(account), ..ServiceAccount::default() };
            create(&self.namespaced(&namespace), &account).await
        })
        .await?;
        let nodes = objects::nodes().map(|file| read::<Node>(&file));
        each(nodes, async |node| create(&Api::all(self.client.clone()), &node).await).await?;
        let services = objects::services().map(|file| read::<Service>(&file));
        each(services, async |mut service| {
            // From the range of this API server, which chooses.
            if let Some(spec) = &mut service.spec {
                (spec.cluster_ip, spec.cluster_ips) = (None, None);
            }
            create(&self.namespaced(&service.namespace().unwrap_or_default()), &service).await
        })
        .await?;
        each((0..PODS).map(Ok), async |number| self.put_pod(number).await.map(drop)).await
    }

    async fn create_pod(&self, number: u32) -> Result<Pod> {
        let pod: Pod = read(&objects::pod(number))?;
        create(&self.namespaced(&pod.namespace().unwrap_or_default()), &pod).await?;
        Ok(pod)
    }

    async fn write_status(&self, pod: &Pod) -> Result<()> {
        let api: Api<Pod> = self.namespaced(&pod.namespace().unwrap_or_default());
        let status = Patch::Merge(json!({ "status": pod.status }));
        api.patch_status(&pod.name_any(), &PatchParams::default(), &status)
            .await
            .with_context(|| format!("writing the status of {}", pod.name_any()))?;
        Ok(())
    }

    fn namespaced<K>(&self, namespace: &str) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }
}

fn named(name: String) -> kube::core::ObjectMeta {
    kube::core::ObjectMeta { name: Some(name), ..Default::default() }
}

fn read<K: DeserializeOwned>(file: &File) -> Result<K> {
    serde_saphyr::from_str(&file.text).with_context(|| format!("reading {}", file.name))
}

async fn create<K>(api: &Api<K>, object: &K) -> Result<()>
where
    K: kube::Resource + Clone + Debug + Serialize + DeserializeOwned,
{
    let named = || format!("creating {}", object.meta().name.as_deref().unwrap_or_default());
    api.create(&PostParams::default(), object).await.with_context(named)?;
    Ok(())
}

/// Writes objects, [`TOGETHER`] at a time.
async fn each<T>(
    objects: impl Iterator<Item = Result<T>>,
    write: impl AsyncFn(T) -> Result<()>,
) -> Result<()> {
    stream::iter(objects)
        .map(|object| async { write(object?).await })
        .buffer_unordered(TOGETHER)
        .try_collect()
        .await
}
