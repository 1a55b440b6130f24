//! The listening sockets of pods: bound here, kept open here, passed to the proxy.
//!
//! While the agent holds them, connections that no proxy accepts wait in the kernel instead of being refused. The task
//! behind [`ListenerHolder`] owns them all; pods' tasks and the ZDS server ask it.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use ambit_api::workload::zds;
use ambit_net::listen::{Options as SocketOptions, bind_udp, listen_tcp};
use ambit_net::sockdiag::{self, Kind};
use ambit_net::{MARK_MASK, Netns, NetnsError, NetnsId, PROXY_MARK, pidfd};
use tokio::sync::{mpsc, oneshot};

use crate::redirect::Options;
use ambit_api::ports;

/// Requests that may wait for the task.
const QUEUE: usize = 1024;

/// The address of a listening socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listen {
    /// The port.
    pub port: u16,
    /// UDP instead of TCP.
    pub udp: bool,
    /// The address, which also says the family.
    pub address: IpAddr,
}

/// A listening socket of a pod.
#[derive(Debug)]
pub struct Listener {
    /// Its address.
    pub listen: Listen,
    socket: OwnedFd,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Listener {
    /// How it is announced to a proxy.
    pub fn announcement(&self) -> zds::Listener {
        let Listen { port, udp, address } = self.listen;
        zds::Listener { port: port.into(), udp, ipv6: address.is_ipv6() }
    }
}

/// The sockets that a pod with these options needs, in the order in which they are passed.
pub fn wanted(options: &Options) -> Vec<Listen> {
    let Options { dns_capture, inbound_capture, virtual_interfaces, socks5, other_protocols: _ } = options;
    let mut all = Vec::new();
    for (anywhere, loopback) in [
        (IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::LOCALHOST)),
        (IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::LOCALHOST)),
    ] {
        let tcp = |port, address| Listen { port, udp: false, address };
        // What a virtual interface brings in is redirected to that interface's address. Everything else outbound
        // comes by loopback, and nobody outside may reach this port.
        let outbound = if virtual_interfaces.is_empty() { loopback } else { anywhere };
        all.push(tcp(ports::OUTBOUND, outbound));
        if *inbound_capture {
            all.push(tcp(ports::INBOUND_PLAINTEXT, anywhere));
        }
        all.push(tcp(ports::INBOUND_HBONE, anywhere));
        if *dns_capture {
            all.push(tcp(ports::DNS, loopback));
            all.push(Listen { port: ports::DNS, udp: true, address: loopback });
        }
        if *socks5 {
            all.push(tcp(ports::SOCKS5, loopback));
        }
    }
    all
}

/// Binds the sockets that a pod needs. A family that the namespace does not have is left out.
///
/// # Errors
/// `EADDRINUSE` inside [`NetnsError::Socket`] when a process of the pod, or a proxy, holds a port.
pub async fn bind(inside: &Netns, options: &Options) -> Result<Vec<Listener>, NetnsError> {
    let mut bound = Vec::new();
    for listen in wanted(options) {
        match bind_one(inside, listen).await {
            Ok(socket) => bound.push(Listener { listen, socket }),
            Err(error) if listen.address.is_ipv6() && is_absent_family(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bound)
}

async fn bind_one(inside: &Netns, listen: Listen) -> Result<OwnedFd, NetnsError> {
    let address = SocketAddr::new(listen.address, listen.port);
    let options = SocketOptions::marked(PROXY_MARK);
    if listen.udp {
        Ok(bind_udp(inside, address, options).await?.into())
    } else {
        Ok(listen_tcp(inside, address, options).await?.into())
    }
}

fn is_absent_family(error: &NetnsError) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

/// Takes the listeners of a pod back from a proxy that was given them by a predecessor of this agent.
async fn take_back(inside: &Netns, options: &Options, proxies: &[i32]) -> Result<Vec<Listener>, NetnsError> {
    let fail = |source| NetnsError::Socket {
        attempt: "take listeners back from the proxy".into(),
        id: inside.id(),
        source,
    };
    let tcp = sockdiag::list(inside, Kind::TcpListeners).await?;
    let udp = sockdiag::list(inside, Kind::Udp).await?;
    let mut held = Vec::new();
    for pid in proxies {
        // A proxy in another process namespace, or one that is gone, has nothing to give.
        if let Ok(sockets) = pidfd::sockets(*pid) {
            held.push((*pid, sockets));
        }
    }
    let mut taken = Vec::new();
    for listen in wanted(options) {
        let address = SocketAddr::new(listen.address, listen.port);
        let open = if listen.udp { &udp } else { &tcp };
        let inode = open.iter().find(|entry| entry.local == address).map(|entry| entry.inode);
        let holder = inode.and_then(|inode| {
            held.iter().find_map(|(pid, sockets)| sockets.get(&inode).map(|number| (*pid, *number)))
        });
        match holder {
            Some((pid, number)) => {
                let socket = pidfd::duplicate(pid, number).map_err(fail)?;
                taken.push(Listener { listen, socket });
            }
            None => match bind_one(inside, listen).await {
                Ok(socket) => taken.push(Listener { listen, socket }),
                Err(error) if listen.address.is_ipv6() && is_absent_family(&error) => {}
                Err(error) => return Err(error),
            },
        }
    }
    Ok(taken)
}

/// Listeners of one pod, shared with the conversations that pass them to proxies.
pub type Listeners = Arc<Vec<Listener>>;

enum Request {
    Acquire {
        uid: String,
        inside: Netns,
        options: Options,
        proxies: Vec<i32>,
        answer: oneshot::Sender<Answer>,
    },
    Release(String),
    ReleaseAll(oneshot::Sender<()>),
}

type Answer = Result<Listeners, Arc<NetnsError>>;

/// The handle of the task that holds every pod's listeners.
#[derive(Debug, Clone)]
pub struct ListenerHolder {
    requests: mpsc::Sender<Request>,
}

impl ListenerHolder {
    /// The handle and the task; the listeners live as long as the task runs.
    pub fn new() -> (Self, impl Future<Output = ()> + Send) {
        let (requests, queue) = mpsc::channel(QUEUE);
        (Self { requests }, hold(queue))
    }

    /// The listeners of a pod: those that are held, else bound now, else taken back from one of the
    /// processes `proxies` that holds them.
    pub async fn acquire(&self, uid: &str, inside: &Netns, options: &Options, proxies: Vec<i32>) -> Answer {
        let (answer, result) = oneshot::channel();
        let request = Request::Acquire {
            uid: uid.into(),
            inside: inside.clone(),
            options: options.clone(),
            proxies,
            answer,
        };
        let gone = || {
            Arc::new(NetnsError::Socket {
                attempt: "ask the task that holds listeners".into(),
                id: inside.id(),
                source: io::ErrorKind::BrokenPipe.into(),
            })
        };
        self.requests.send(request).await.map_err(|_| gone())?;
        result.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Closes our copies of a pod's listeners.
    pub async fn release(&self, uid: &str) {
        // A task that has ended holds nothing.
        self.requests.send(Request::Release(uid.into())).await.ok();
    }

    /// Closes our copies of all listeners, and returns when they are closed.
    pub async fn release_all(&self) {
        let (done, closed) = oneshot::channel();
        if self.requests.send(Request::ReleaseAll(done)).await.is_ok() {
            closed.await.ok();
        }
    }
}

struct Held {
    inside: NetnsId,
    options: Options,
    listeners: Listeners,
}

async fn hold(mut queue: mpsc::Receiver<Request>) {
    let mut pods: HashMap<String, Held> = HashMap::new();
    while let Some(request) = queue.recv().await {
        match request {
            Request::Acquire { uid, inside, options, proxies, answer } => {
                let found = pods
                    .get(&uid)
                    .filter(|held| held.inside == inside.id() && held.options == options)
                    .map(|held| Arc::clone(&held.listeners));
                let outcome = match found {
                    Some(listeners) => Ok(listeners),
                    None => {
                        // Those of another namespace or other options are closed first.
                        pods.remove(&uid);
                        open(&inside, &options, &proxies).await
                    }
                };
                if let Ok(listeners) = &outcome {
                    let held = Held { inside: inside.id(), options, listeners: Arc::clone(listeners) };
                    pods.insert(uid, held);
                }
                // The caller may have given up; the listeners are kept for the next.
                answer.send(outcome).ok();
            }
            Request::Release(uid) => drop(pods.remove(&uid)),
            Request::ReleaseAll(done) => {
                pods.clear();
                // The caller may have gone.
                done.send(()).ok();
            }
        }
    }
}

async fn open(inside: &Netns, options: &Options, proxies: &[i32]) -> Answer {
    let error = match bind(inside, options).await {
        Ok(bound) => return Ok(Arc::new(bound)),
        Err(error) => error,
    };
    if error.raw_os_error() != Some(libc::EADDRINUSE) {
        return Err(Arc::new(error));
    }
    if let Some(taken) = taken_by_others(inside, options).await {
        return Err(Arc::new(taken));
    }
    match proxies.is_empty() {
        true => Err(Arc::new(error)),
        false => take_back(inside, options, proxies).await.map(Arc::new).map_err(Arc::new),
    }
}

/// The error to report where a socket that is not a proxy's has one of the addresses: nobody will hand it over. `None` where
/// that is not known; the kernel may not list sockets.
async fn taken_by_others(inside: &Netns, options: &Options) -> Option<NetnsError> {
    let tcp = sockdiag::list(inside, Kind::TcpListeners).await.ok()?;
    let udp = sockdiag::list(inside, Kind::Udp).await.ok()?;
    let wanted = wanted(options);
    let taken = wanted.iter().find(|listen| {
        let open = if listen.udp { &udp } else { &tcp };
        open.iter().any(|entry| is_others(entry) && is_in_the_way(entry.local, listen))
    })?;
    let Listen { port, udp, .. } = taken;
    let protocol = if *udp { "UDP" } else { "TCP" };
    let reason = format!("a process of the pod has {protocol} port {port}, which is the proxy's");
    // No EADDRINUSE: that says that a proxy may hand it over.
    let source = io::Error::new(io::ErrorKind::AddrInUse, reason);
    Some(NetnsError::Socket { attempt: "bind the proxy's listeners".into(), id: inside.id(), source })
}

/// Redirection contract: sockets of proxies bear the mark, which others can't set without privilege.
fn is_others(entry: &sockdiag::Entry) -> bool {
    entry.mark & MARK_MASK != PROXY_MARK
}

/// Whether a socket at `local` keeps another from being bound.
fn is_in_the_way(local: SocketAddr, wanted: &Listen) -> bool {
    let ip = local.ip();
    local.port() == wanted.port
        && (ip == wanted.address || ip.is_unspecified() || wanted.address.is_unspecified())
}
