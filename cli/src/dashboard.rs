//! `ambit dashboard`: a port of this machine's loopback that leads to a page in the cluster.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Args;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::cluster::{
    Access, CONTROL_ADMIN, Cluster, Component, PROXY_ADMIN, PodName, is_ready, pods_of, until_interrupted,
};
use crate::output::print;
use crate::proxies;

/// Connections at the same time; a browser opens six.
const CONNECTIONS: usize = 64;

/// A dashboard that other charts install: its name in labels, its port and the path to open.
const PAGES: [(&str, u16, &str); 4] =
    [("kiali", 20001, "/kiali"), ("grafana", 3000, "/"), ("prometheus", 9090, "/"), ("jaeger", 16686, "/")];

/// Options of `ambit dashboard`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// kiali, grafana, prometheus or jaeger; control for the control plane; or a node or pod for the admin interface of its
    /// proxy.
    #[arg(default_value = "kiali", value_name = "NAME|NODE|POD")]
    name: String,
    /// Namespace of the pod.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Port of this machine; 0 takes any free one.
    #[arg(short, long, default_value_t = 0)]
    port: u16,
    #[command(flatten)]
    access: Access,
}

/// Forwards until Ctrl-C.
///
/// # Errors
/// When there is no such page or the port is taken.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    until_interrupted(async {
        let cluster = options.access.connect().await?;
        let (pod, port, path) = find(&cluster, options).await?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, options.port));
        let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
        print(&format!("open http://{}{path}\n", listener.local_addr()?));
        serve(&listener, &cluster, &pod, port).await
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn find(cluster: &Cluster, options: &Options) -> anyhow::Result<(PodName, u16, &'static str)> {
    let name = options.name.as_str();
    if let Some((name, port, path)) = PAGES.into_iter().find(|(page, ..)| *page == name) {
        for label in ["app.kubernetes.io/name", "app"] {
            let pods: Vec<Pod> = cluster.list(None, &format!("{label}={name}")).await?;
            if let Some(pod) = pods.iter().find(|pod| is_ready(pod)) {
                return Ok((PodName::of(pod), port, path));
            }
        }
        bail!(
            "no pod with the label app.kubernetes.io/name={name} or app={name} is ready: is {name} installed?"
        );
    }
    if name.parse() == Ok(Component::Control) {
        let pods = pods_of(cluster, Component::Control).await?;
        let pod = pods.iter().find(|pod| is_ready(pod)).context("no pod of the control plane is ready")?;
        return Ok((PodName::of(pod), CONTROL_ADMIN, "/config_dump"));
    }
    let namespace = options.namespace.as_deref().unwrap_or(&cluster.namespace);
    let target = proxies::find(cluster, Some(name), namespace).await?;
    let proxy = target.proxies.into_iter().next().context("there is no proxy")?;
    Ok((proxy.pod, PROXY_ADMIN, "/config_dump"))
}

async fn serve(listener: &TcpListener, cluster: &Cluster, pod: &PodName, port: u16) -> anyhow::Result<()> {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let place = Arc::clone(&places).acquire_owned().await?;
        let (client, _) = listener.accept().await?;
        let (cluster, pod) = (cluster.clone(), pod.clone());
        tokio::spawn(async move {
            if let Err(error) = forward(client, &cluster, &pod, port).await {
                eprintln!("ambit: {error:#}");
            }
            drop(place);
        });
    }
}

async fn forward(mut client: TcpStream, cluster: &Cluster, pod: &PodName, port: u16) -> anyhow::Result<()> {
    let api: Api<Pod> = Api::namespaced(cluster.client.clone(), &pod.namespace);
    let mut forward =
        api.portforward(&pod.name, &[port]).await.with_context(|| format!("forward to {pod}"))?;
    let mut server = forward.take_stream(port).context("forward the port")?;
    // A browser that resets its connection is no error.
    tokio::io::copy_bidirectional(&mut client, &mut server).await.ok();
    drop(server);
    forward.abort();
    Ok(())
}
