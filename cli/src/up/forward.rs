//! A port of this machine that leads into a pod, as `kubectl port-forward` does: the connection ends at the
//! loopback of a ready pod behind the service, so no policy of the mesh concerns it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ambit_local::Cluster;
use anyhow::Context;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use crate::up::expectations::{Expectations, ServiceName};

/// Connections that are forwarded at once; others wait.
const CONNECTIONS: usize = 256;

/// The open port. Dropping it closes it.
#[derive(Debug)]
pub(crate) struct Forward {
    address: SocketAddr,
    /// A socket of the user's own network namespace, with which the port is tried.
    probe: Mutex<Option<OwnedFd>>,
    accepting: AbortHandle,
}

impl Forward {
    /// Forwards what the listener accepts to the service or Gateway that the manifests open, else to the first service.
    ///
    /// # Errors
    /// When there is no service at all.
    pub(crate) fn page(
        listener: TcpListener,
        probe: Option<OwnedFd>,
        cluster: &Arc<Cluster>,
        expectations: &Expectations,
    ) -> anyhow::Result<Self> {
        let service = match &expectations.open {
            Some((service, _, _)) => service.clone(),
            None => first_service(cluster).context("there is no service that could be opened")?,
        };
        Self::start(listener, probe, cluster, service, None)
    }

    /// Forwards what the listener accepts to a port of a service, by default its first.
    ///
    /// # Errors
    /// When the listener can't be used.
    pub(crate) fn start(
        listener: TcpListener,
        probe: Option<OwnedFd>,
        cluster: &Arc<Cluster>,
        service: ServiceName,
        port: Option<u16>,
    ) -> anyhow::Result<Self> {
        listener.set_nonblocking(true).context("use the open port")?;
        let listener = tokio::net::TcpListener::from_std(listener).context("use the open port")?;
        let address = listener.local_addr().context("use the open port")?;
        // A task that outlives the cluster's handle must not keep the cluster.
        let cluster = Arc::downgrade(cluster);
        let accepting = tokio::spawn(async move {
            let permits = Arc::new(Semaphore::new(CONNECTIONS));
            while let Ok(permit) = Arc::clone(&permits).acquire_owned().await {
                let Ok((client, _)) = listener.accept().await else {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                let Some(cluster) = cluster.upgrade() else { return };
                let service = service.clone();
                tokio::spawn(async move {
                    if let Err(error) = carry(client, cluster, &service, port).await {
                        tracing::warn!("{error:#}");
                    }
                    drop(permit);
                });
            }
        });
        Ok(Self { address, probe: Mutex::new(probe), accepting: accepting.abort_handle() })
    }

    /// A port at which something else is forwarded, until it is dropped.
    pub(crate) fn of(address: SocketAddr, forwarding: AbortHandle) -> Self {
        Self { address, probe: Mutex::new(None), accepting: forwarding }
    }

    /// Connects to the port as a person's browser would, from the user's own network namespace. Works once.
    ///
    /// # Errors
    /// When the connection is refused, or this was tried before.
    pub(crate) async fn try_out(&self) -> anyhow::Result<TcpStream> {
        let probe = self.probe.lock().unwrap_or_else(PoisonError::into_inner).take();
        let probe = std::net::TcpStream::from(probe.context("the port was tried before")?);
        probe.set_nonblocking(true)?;
        let connecting = TcpSocket::from_std_stream(probe).connect(self.address);
        connecting.await.with_context(|| format!("connect to {}", self.address))
    }

    /// Where it can be opened.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn carry(
    mut client: TcpStream,
    cluster: Arc<Cluster>,
    service: &ServiceName,
    port: Option<u16>,
) -> anyhow::Result<()> {
    let ServiceName { namespace, name } = service;
    let backends = cluster.backends(namespace, name, port);
    drop(cluster);
    let (pod, port) = backends.first().with_context(|| format!("no pod of {namespace}/{name} is ready"))?;
    let target = SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
    let mut server = pod.connect_within(target, Duration::from_secs(3)).await?;
    copy_bidirectional(&mut client, &mut server).await.with_context(|| format!("forward to {pod}"))?;
    Ok(())
}

fn first_service(cluster: &Cluster) -> Option<ServiceName> {
    let services = cluster.objects("Service");
    let metadata = &services.first()?["metadata"];
    let text = |field: &str| metadata[field].as_str().map(str::to_owned);
    Some(ServiceName { namespace: text("namespace")?, name: text("name")? })
}
