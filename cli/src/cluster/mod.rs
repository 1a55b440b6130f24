//! A real cluster, as commands reach it: its API server, and Ambit's pods through port-forwards.

mod admin;
mod pods;

use std::ffi::OsString;
use std::path::PathBuf;

use ambit_control::api_server::{CallError, call};
use anyhow::Context;
use clap::Args;
use kube::api::ListParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};

pub(crate) use admin::{get, lines, post};
pub(crate) use pods::{Component, PodName, is_ready, node_of, pods_of};

/// Ports of the admin interfaces of node proxies and waypoints.
pub(crate) const PROXY_ADMIN: u16 = ambit_api::ports::ADMIN;
/// Port of the control plane's admin interface, as the chart sets it.
pub(crate) const CONTROL_ADMIN: u16 = 8080;

/// How the cluster is reached, and where Ambit is in it.
#[derive(Clone, Debug, Args)]
pub(crate) struct Access {
    /// The kubeconfig; default is the one that kubectl uses.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig; default is its current one.
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// Namespace that Ambit is installed in.
    #[arg(long, value_name = "NAMESPACE", default_value = "ambit-system", env = "AMBIT_SYSTEM_NAMESPACE")]
    system_namespace: String,
}

/// A cluster.
#[derive(Clone)]
pub(crate) struct Cluster {
    /// The client of its API server.
    pub(crate) client: Client,
    /// Namespace of Ambit's own pods.
    pub(crate) system: String,
    /// Namespace of objects whose namespace is not named.
    pub(crate) namespace: String,
}

impl Access {
    /// The same access in Helm's words.
    pub(crate) fn helm_args(&self) -> Vec<OsString> {
        let kubeconfig = self.kubeconfig.iter().flat_map(|path| ["--kubeconfig".into(), path.into()]);
        let context = self.context.iter().flat_map(|context| ["--kube-context".into(), context.into()]);
        kubeconfig.chain(context).collect()
    }

    /// Makes the client. Nothing is sent yet.
    ///
    /// # Errors
    /// When no kubeconfig can be used.
    pub(crate) async fn connect(&self) -> anyhow::Result<Cluster> {
        let Self { kubeconfig, context, system_namespace } = self;
        let options = KubeConfigOptions { context: context.clone(), ..KubeConfigOptions::default() };
        let config = match kubeconfig {
            Some(path) => {
                let file = Kubeconfig::read_from(path);
                let file = file.with_context(|| format!("kubeconfig {}", path.display()))?;
                Config::from_custom_kubeconfig(file, &options).await?
            }
            None if context.is_some() => Config::from_kubeconfig(&options).await?,
            None => Config::infer().await.context("no kubeconfig: name one with --kubeconfig")?,
        };
        let namespace = config.default_namespace.clone();
        let client = Client::try_from(config).context("make the client of the API server")?;
        Ok(Cluster { client, system: system_namespace.clone(), namespace })
    }
}

impl Cluster {
    /// All objects of a kind that matches `labels`, in one namespace or all.
    ///
    /// # Errors
    /// What the API server says.
    pub(crate) async fn list<K>(&self, namespace: Option<&str>, labels: &str) -> Result<Vec<K>, CallError>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
        K::DynamicType: Default,
    {
        let api: Api<K> = match namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        };
        list(&api, labels).await
    }

    /// All objects of a kind that has no namespace.
    ///
    /// # Errors
    /// What the API server says.
    pub(crate) async fn list_cluster<K>(&self) -> Result<Vec<K>, CallError>
    where
        K: kube::Resource<Scope = kube::core::ClusterResourceScope>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
        K::DynamicType: Default,
    {
        list(&Api::<K>::all(self.client.clone()), "").await
    }
}

/// Objects that a page of a list has at most.
const PAGE: u32 = 500;

/// Lists page by page, each within the time of a call.
///
/// # Errors
/// What the API server says.
pub(crate) async fn list<K>(api: &Api<K>, labels: &str) -> Result<Vec<K>, CallError>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let mut objects = Vec::new();
    let mut params = ListParams::default().limit(PAGE).labels(labels);
    loop {
        let page = call(api.list(&params)).await?;
        objects.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(objects),
        }
    }
}

/// Runs a command's future to its end; Ctrl-C ends it as an error.
///
/// # Errors
/// That of the command.
pub(crate) fn block_on<T>(command: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    until_interrupted(command)?.context("interrupted")
}

/// Runs a command's future to its end, or to Ctrl-C: then there is no outcome.
///
/// # Errors
/// That of the command.
pub(crate) fn until_interrupted<T>(
    command: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<Option<T>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = Box::pin(command) => outcome.map(Some),
            interrupted = tokio::signal::ctrl_c() => Ok(interrupted.map(|()| None)?),
        }
    });
    runtime.shutdown_background();
    outcome
}
