//! A pod of the cluster: its namespaces, addresses and running containers, and what tests do inside it.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ambit_node::redirect::Options;
use k8s_openapi::api::core::v1::Pod as Object;
use parking_lot::{Mutex, RwLock};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::watch;

use crate::addresses::Addresses;
use crate::error::{Error, Result};
use crate::kubelet::lifecycle;
use crate::kubelet::status::{PodView, Redirection};
use crate::process::{Command, Process};
use crate::sandbox::Sandbox;

/// The label that says whether a namespace or pod is in the mesh.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// The annotation by which the node agent's state is published.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";

/// The reason for which a pod was made, which decides when it is deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A replica of a Deployment, with its template's hash.
    Deployment {
        /// The Deployment's namespace.
        namespace: String,
        /// The Deployment's name.
        name: String,
        /// Hash of the template.
        hash: String,
    },
    /// A Pod object of the manifests.
    Manifest,
    /// A call of [`Cluster::pod`](crate::Cluster::pod), or a program of the mesh itself.
    Call,
}

/// Handle to a pod. Cheap to clone; the namespaces live until the pod is deleted and the last clone dropped.
#[derive(Debug, Clone)]
pub struct Pod {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) service_account: String,
    pub(crate) node: usize,
    pub(crate) node_name: String,
    pub(crate) host_network: bool,
    pub(crate) addresses: Addresses,
    pub(crate) node_addresses: Addresses,
    pub(crate) trust_domain: String,
    pub(crate) origin: Origin,
    /// The object as it is published, without status; labels and annotations change.
    pub(crate) object: RwLock<Object>,
    pub(crate) sandbox: Sandbox,
    pub(crate) view: Arc<watch::Sender<PodView>>,
    pub(crate) processes: Arc<Mutex<Vec<Option<Process>>>>,
    pub(crate) stop: watch::Sender<Option<Duration>>,
    /// The options with which labels and annotations put it into the mesh, if they do.
    pub(crate) wanted_in_mesh: watch::Sender<Option<Options>>,
}

impl Pod {
    /// Name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.inner.namespace
    }

    /// Kubernetes uid.
    #[must_use]
    pub fn uid(&self) -> &str {
        &self.inner.uid
    }

    /// Service account.
    #[must_use]
    pub fn service_account(&self) -> &str {
        &self.inner.service_account
    }

    /// The identity it has in the mesh.
    #[must_use]
    pub fn spiffe_id(&self) -> String {
        let Inner { trust_domain, namespace, service_account, .. } = &*self.inner;
        format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
    }

    /// Index of its node, from 0.
    #[must_use]
    pub fn node(&self) -> usize {
        self.inner.node
    }

    /// Name of its node.
    #[must_use]
    pub fn node_name(&self) -> &str {
        &self.inner.node_name
    }

    /// IPv4 address.
    #[must_use]
    pub fn ip(&self) -> Ipv4Addr {
        self.inner.addresses.v4
    }

    /// IPv6 address, in a dual-stack cluster.
    #[must_use]
    pub fn ipv6(&self) -> Option<Ipv6Addr> {
        self.inner.addresses.v6
    }

    /// All addresses, primary first.
    #[must_use]
    pub fn ips(&self) -> Vec<IpAddr> {
        self.inner.addresses.all()
    }

    /// Its labels.
    #[must_use]
    pub fn labels(&self) -> BTreeMap<String, String> {
        self.inner.object.read().metadata.labels.clone().unwrap_or_default()
    }

    /// Its annotations, without those that are its status.
    #[must_use]
    pub fn annotations(&self) -> BTreeMap<String, String> {
        self.inner.object.read().metadata.annotations.clone().unwrap_or_default()
    }

    /// Whether labels say that it is to be in the mesh.
    #[must_use]
    pub fn is_wanted_in_mesh(&self) -> bool {
        self.inner.wanted_in_mesh.borrow().is_some()
    }

    /// What its kubelet sees now.
    #[must_use]
    pub fn view(&self) -> PodView {
        self.inner.view.borrow().clone()
    }

    /// Whether it takes traffic.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.inner.view.borrow().is_ready()
    }

    /// Whether it is captured and served.
    #[must_use]
    pub fn is_enrolled(&self) -> bool {
        self.inner.view.borrow().redirection == Some(Redirection::Enabled)
    }

    /// Its network namespace, as a descriptor of the caller's own.
    ///
    /// # Errors
    /// When this process has no descriptor left.
    pub fn netns(&self) -> Result<OwnedFd> {
        self.inner
            .sandbox
            .network()
            .as_fd()
            .try_clone_to_owned()
            .map_err(Error::system(format!("duplicate the namespace of pod {self}")))
    }

    /// Runs a closure, which may block, on a thread of its own inside the pod's network and mount namespace:
    /// name resolution there reads the pod's own `/etc/resolv.conf`.
    ///
    /// # Errors
    /// When the thread can't be started, or the closure panicked.
    pub async fn run<T, F>(&self, job: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        self.inner.sandbox.run(job).await
    }

    /// Connects from inside the pod.
    ///
    /// # Errors
    /// The connection's own error, as it was.
    pub async fn connect(&self, target: SocketAddr) -> io::Result<TcpStream> {
        let make = move || if target.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        self.inner.sandbox.on(make).await.map_err(io::Error::other)??.connect(target).await
    }

    /// Connects from inside the pod, giving up after `limit`.
    ///
    /// # Errors
    /// The connection's own error, or `TimedOut`.
    pub async fn connect_within(&self, target: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
        tokio::time::timeout(limit, self.connect(target)).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, format!("connect to {target} from pod {self}"))
        })?
    }

    /// Listens inside the pod; port 0 takes a free one.
    ///
    /// # Errors
    /// When the address can't be bound.
    pub async fn listen(&self, address: SocketAddr) -> io::Result<TcpListener> {
        let make = move || {
            let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            socket.listen(1024)
        };
        self.inner.sandbox.on(make).await.map_err(io::Error::other)?
    }

    /// Binds a UDP socket inside the pod.
    ///
    /// # Errors
    /// When the address can't be bound.
    pub async fn udp(&self, address: SocketAddr) -> io::Result<UdpSocket> {
        let make = move || {
            let socket = std::net::UdpSocket::bind(address)?;
            socket.set_nonblocking(true)?;
            UdpSocket::from_std(socket)
        };
        self.inner.sandbox.on(make).await.map_err(io::Error::other)?
    }

    /// Resolves a name as a program in the pod would, with search domains and `/etc/hosts`.
    ///
    /// # Errors
    /// The resolver's own error.
    pub async fn resolve(&self, name: &str) -> io::Result<Vec<IpAddr>> {
        use std::net::ToSocketAddrs;
        let name = name.to_owned();
        let resolved =
            self.run(move || (name.as_str(), 0).to_socket_addrs()).await.map_err(io::Error::other)?;
        let mut addresses: Vec<IpAddr> = resolved?.map(|address| address.ip()).collect();
        addresses.dedup();
        Ok(addresses)
    }

    /// Starts a program inside the pod. It ends with the pod, or when the last handle to it is dropped.
    ///
    /// # Errors
    /// When it can't be executed.
    pub async fn spawn(&self, command: Command) -> Result<Process> {
        Process::start(format!("a program in pod {self}"), &self.inner.sandbox, command).await
    }

    /// The name of the Deployment that it belongs to.
    #[must_use]
    pub fn deployment(&self) -> Option<&str> {
        match &self.inner.origin {
            Origin::Deployment { name, .. } => Some(name),
            Origin::Manifest | Origin::Call => None,
        }
    }

    /// The process of a container, by its position in the specification; init containers count after the others.
    #[must_use]
    pub fn process(&self, container: usize) -> Option<Process> {
        self.inner.processes.lock().get(container).cloned().flatten()
    }

    /// The names of its containers, then of its init containers: the order of [`Pod::process`].
    #[must_use]
    pub fn container_names(&self) -> Vec<String> {
        let view = self.inner.view.borrow();
        view.containers.iter().chain(&view.init_containers).map(|container| container.name.clone()).collect()
    }

    /// The last output of all containers, container after container.
    #[must_use]
    pub fn logs(&self) -> Vec<String> {
        let processes: Vec<Process> = self.inner.processes.lock().iter().flatten().cloned().collect();
        processes.iter().flat_map(Process::logs).collect()
    }

    /// Waits until what the kubelet sees satisfies `wanted`.
    ///
    /// # Errors
    /// [`Error::Deadline`] with what it saw last.
    pub async fn wait_for(
        &self,
        what: &str,
        limit: Duration,
        wanted: impl FnMut(&PodView) -> bool,
    ) -> Result<()> {
        let mut view = self.inner.view.subscribe();
        let seen = tokio::time::timeout(limit, view.wait_for(wanted)).await;
        match seen {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Error::Ended(format!("pod {self}"))),
            Err(_) => {
                let now = self.view();
                let detail = format!("it is {} with redirection {:?}", now.summary(), now.redirection);
                Err(Error::Deadline {
                    what: format!("pod {self}: {what}"),
                    after: limit,
                    detail: Some(detail),
                })
            }
        }
    }

    /// Asks the pod to stop. Its end is in the view.
    pub(crate) fn begin_stop(&self) {
        let grace = lifecycle::grace(&self.inner.object.read());
        self.inner.view.send_if_modified(|view| {
            let first = view.terminating.is_none();
            view.terminating.get_or_insert_with(SystemTime::now);
            first
        });
        self.inner.stop.send_if_modified(|stop| {
            let first = stop.is_none();
            stop.get_or_insert(grace);
            first
        });
    }

    /// The object with its status, as an API server would show it.
    pub(crate) fn published(&self) -> Object {
        let view = self.view();
        let mut object = self.inner.object.read().clone();
        let annotations = object.metadata.annotations.get_or_insert_default();
        match view.redirection {
            Some(Redirection::Enabled) => annotations.insert(REDIRECTION.to_owned(), "enabled".to_owned()),
            Some(Redirection::Pending) => annotations.insert(REDIRECTION.to_owned(), "pending".to_owned()),
            None => annotations.remove(REDIRECTION),
        };
        object.metadata.deletion_timestamp = view.terminating.map(crate::kubelet::status::time);
        object.status = Some(view.to_status(self.inner.addresses, self.inner.node_addresses));
        object
    }
}

impl std::fmt::Display for Pod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.inner.namespace, self.inner.name)
    }
}

/// What kind of pod [`Cluster::pod`](crate::Cluster::pod) makes: one without containers, ready at once.
#[derive(Debug, Clone)]
pub struct PodOptions {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) node: Option<usize>,
    pub(crate) service_account: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) ports: Vec<(String, u16)>,
    pub(crate) address: Option<Ipv4Addr>,
    pub(crate) host_network: bool,
}

impl PodOptions {
    /// A pod with the service account `default`, on the node with the fewest pods.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            node: None,
            service_account: "default".to_owned(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            ports: Vec::new(),
            address: None,
            host_network: false,
        }
    }

    /// On this node, by index from 0.
    #[must_use]
    pub fn node(mut self, index: usize) -> Self {
        self.node = Some(index);
        self
    }

    /// With this service account.
    #[must_use]
    pub fn service_account(mut self, name: impl Into<String>) -> Self {
        self.service_account = name.into();
        self
    }

    /// With this label.
    #[must_use]
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// With this annotation.
    #[must_use]
    pub fn annotation(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.annotations.insert(key.into(), value.into());
        self
    }

    /// With this named container port.
    #[must_use]
    pub fn port(mut self, name: impl Into<String>, port: u16) -> Self {
        self.ports.push((name.into(), port));
        self
    }

    /// With this IPv4 address of the node's range, such as that of a pod deleted before.
    #[must_use]
    pub fn address(mut self, address: Ipv4Addr) -> Self {
        self.address = Some(address);
        self
    }

    /// In the node's own network namespace, like a pod with `hostNetwork`.
    #[must_use]
    pub fn host_network(mut self) -> Self {
        self.host_network = true;
        self
    }
}
