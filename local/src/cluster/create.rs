//! Creation and removal of a pod: its namespaces, link, files and task.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ambit_node::redirect::Options;
use k8s_openapi::api::core::v1::{Container, ContainerPort, Pod as Object, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::addresses::{Addresses, DNS_V4};
use crate::cluster::shared::{Node, Shared};
use crate::dns::CLUSTER_DOMAIN;
use crate::error::{Error, Result};
use crate::kubelet::configuration::Configuration;
use crate::kubelet::container::{ConfigurationReader, PodContext};
use crate::kubelet::lifecycle;
use crate::kubelet::probe::Prober;
use crate::kubelet::status::{self, Redirection};
use crate::kubelet::volumes;
use crate::pod::{Inner, Origin, Pod, PodOptions};
use crate::sandbox::{Overlays, PrivateRoot, Sandbox};

/// Delay before the node agent is asked again after it failed.
const AGENT_RETRY: Duration = Duration::from_millis(250);

/// A pod that is to be made.
#[derive(Debug)]
pub(crate) struct NewPod {
    /// The object as it was asked for: metadata with name and namespace, and a specification.
    pub(crate) object: Object,
    /// The reason for which it is made.
    pub(crate) origin: Origin,
    /// The node.
    pub(crate) node: usize,
    /// The IPv4 address, if a certain one is required.
    pub(crate) address: Option<Ipv4Addr>,
    /// Whether its containers run; otherwise it is ready at once.
    pub(crate) run: bool,
    /// The options with which it is in the mesh from the start, if it is.
    pub(crate) mesh: Option<Options>,
}

impl NewPod {
    /// What a call for an empty pod asks for.
    pub(crate) fn of(options: &PodOptions, node: usize) -> Self {
        let ports = options.ports.iter().map(|(name, port)| ContainerPort {
            name: Some(name.clone()),
            container_port: i32::from(*port),
            ..ContainerPort::default()
        });
        let container =
            Container { name: "main".to_owned(), ports: Some(ports.collect()), ..Container::default() };
        let object = Object {
            metadata: ObjectMeta {
                name: Some(options.name.clone()),
                namespace: Some(options.namespace.clone()),
                labels: Some(options.labels.clone()),
                annotations: Some(options.annotations.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(PodSpec {
                service_account_name: Some(options.service_account.clone()),
                host_network: options.host_network.then_some(true),
                containers: vec![container],
                ..PodSpec::default()
            }),
            status: None,
        };
        Self { object, origin: Origin::Call, node, address: options.address, run: false, mesh: None }
    }
}

/// Makes a pod and starts its task. When this returns, the pod has its addresses and is listed; its containers
/// may still be starting.
///
/// # Errors
/// When a pod of that name exists, no address is left, or the kernel refuses.
pub(crate) async fn create(shared: &Arc<Shared>, new: NewPod) -> Result<Pod> {
    let NewPod { mut object, origin, node: index, address, run, mesh } = new;
    let node = shared.node(index)?;
    let name = object.metadata.name.clone().unwrap_or_default();
    let namespace = object.metadata.namespace.clone().unwrap_or_default();
    if shared.pod(&namespace, &name).is_some() {
        return Err(Error::manifest(format!("{namespace}/{name}"), "a pod of that name exists"));
    }
    let uid = fresh_uid();
    let spec = object.spec.get_or_insert_default();
    let service_account = spec.service_account_name.get_or_insert_with(|| "default".to_owned()).clone();
    let host_network = spec.host_network == Some(true);
    spec.node_name = Some(node.name.clone());
    object.metadata.uid = Some(uid.clone());
    object.metadata.creation_timestamp = Some(status::time(SystemTime::now()));
    let addresses = take_address(node, host_network, address)?;
    let sandbox = match sandbox(shared, node, &object, &uid, addresses).await {
        Ok(sandbox) => sandbox,
        Err(error) => {
            if !host_network {
                node.range.lock().give_back(addresses);
            }
            return Err(error);
        }
    };
    let mut view = lifecycle::first_view(&object);
    if !run {
        view.containers.clear();
        view.init_containers.clear();
        view.initialized = true;
    }
    let containers = view.containers.len() + view.init_containers.len();
    // Environments may refer to the pod's addresses.
    object.status = Some(view.to_status(addresses, node.attached.addresses));
    let started = Arc::new(object.clone());
    object.status = None;
    let inner = Inner {
        namespace: namespace.clone(),
        name: name.clone(),
        uid,
        service_account,
        node: index,
        node_name: node.name.clone(),
        host_network,
        addresses,
        node_addresses: node.attached.addresses,
        trust_domain: shared.trust_domain.clone(),
        origin,
        object: object.into(),
        sandbox,
        view: Arc::new(watch::Sender::new(view)),
        processes: Arc::new(Mutex::new(vec![None; containers])),
        stop: watch::Sender::new(None),
        wanted_in_mesh: watch::Sender::new(mesh),
    };
    let pod = Pod { inner: Arc::new(inner) };
    shared.pods.write().insert((namespace, name), pod.clone());
    tokio::spawn(live(Arc::clone(shared), pod.clone(), run.then_some(started)));
    Ok(pod)
}

fn take_address(node: &Node, host_network: bool, wanted: Option<Ipv4Addr>) -> Result<Addresses> {
    match (host_network, wanted) {
        (true, _) => Ok(node.attached.addresses),
        (false, None) => node.range.lock().take(),
        (false, Some(wanted)) => node.range.lock().take_exactly(wanted),
    }
}

async fn sandbox(
    shared: &Shared,
    node: &Node,
    object: &Object,
    uid: &str,
    addresses: Addresses,
) -> Result<Sandbox> {
    let spec = object.spec.as_ref();
    if spec.is_some_and(|spec| spec.host_network == Some(true)) {
        return Ok(node.attached.sandbox.clone());
    }
    let namespace = object.metadata.namespace.as_deref().unwrap_or_default();
    let name = object.metadata.name.as_deref().unwrap_or_default();
    let hostname = spec.and_then(|spec| spec.hostname.as_deref()).unwrap_or(name);
    let directory = shared.directory.join("pods").join(uid);
    let mut overlays = write_files(&directory, namespace, hostname, addresses)?;
    let configuration = Configuration::of(namespace, &shared.objects.lock().all());
    let volumes = volumes::plan(object, &configuration)
        .map_err(|message| Error::manifest(format!("{namespace}/{name}"), message))?;
    if !volumes.is_empty() {
        let binds = volumes.write(&directory.join("volumes"))?;
        overlays.root = Some(PrivateRoot { directory: directory.join("root"), binds });
    }
    let sandbox = Sandbox::new(name, Some(overlays)).await?;
    let port = format!("veth{}", uid.chars().take(8).collect::<String>());
    let gateway = shared.plan.gateway(node.index);
    node.attached.link_pod(&sandbox, &port, addresses, gateway).await?;
    Ok(sandbox)
}

/// A pod's own `/etc/resolv.conf` and `/etc/hosts`, as a kubelet writes them.
fn write_files(
    directory: &std::path::Path,
    namespace: &str,
    hostname: &str,
    addresses: Addresses,
) -> Result<Overlays> {
    let resolv = format!(
        "search {namespace}.svc.{CLUSTER_DOMAIN} svc.{CLUSTER_DOMAIN} {CLUSTER_DOMAIN}\nnameserver {DNS_V4}\noptions ndots:5\n"
    );
    let mut hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    for address in addresses.all() {
        hosts.push_str(&format!("{address}\t{hostname}\n"));
    }
    let write = |name: &str, content: String| -> Result<PathBuf> {
        let file = directory.join(name);
        std::fs::write(&file, content).map_err(Error::system(format!("write {}", file.display())))?;
        Ok(file)
    };
    std::fs::create_dir_all(directory)
        .map_err(Error::system(format!("make directory {}", directory.display())))?;
    let files = vec![
        (write("resolv.conf", resolv)?, PathBuf::from("/etc/resolv.conf")),
        (write("hosts", hosts)?, PathBuf::from("/etc/hosts")),
    ];
    Ok(Overlays { files, root: None })
}

/// A random uid in the form of RFC 9562, version 4.
pub(crate) fn fresh_uid() -> String {
    let bits = rand::random::<u128>() & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62);
    let hex = format!("{bits:032x}");
    let part = |range: std::ops::Range<usize>| hex.get(range).unwrap_or_default().to_owned();
    [part(0..8), part(8..12), part(12..16), part(16..20), part(20..32)].join("-")
}

/// The pod's task: enrols it as its labels say, runs its containers, and cleans up after it.
async fn live(shared: Arc<Shared>, pod: Pod, run: Option<Arc<Object>>) {
    let mut view = pod.inner.view.subscribe();
    let containers = async {
        // The pod is in the mesh before its first program runs, so that no traffic bypasses the mesh.
        if !until_first_enrolled(&shared, &pod).await {
            return;
        }
        let work = async {
            if let Some(object) = run {
                let around = context(&shared, &pod);
                lifecycle::run(object, Arc::clone(&shared.programs), around).await;
            }
            stopped(&pod).await;
        };
        tokio::select! {
            () = work => {}
            () = follow_membership(&shared, &pod) => {}
        }
    };
    let publishing = async {
        while view.changed().await.is_ok() {
            shared.wake();
        }
    };
    tokio::select! {
        () = containers => {}
        () = publishing => {}
    }
    leave(&shared, &pod).await;
}

fn context(shared: &Arc<Shared>, pod: &Pod) -> PodContext {
    let (of, namespace) = (Arc::clone(shared), pod.namespace().to_owned());
    let own = &pod.inner.sandbox;
    let node = shared.nodes.get(pod.node()).map_or(own, |node| &node.attached.sandbox);
    PodContext {
        pod: pod.to_string().into(),
        prober: Prober { node: node.clone(), pod: own.clone(), address: pod.ip().into() },
        view: Arc::clone(&pod.inner.view),
        configuration: ConfigurationReader(Arc::new(move || {
            Configuration::of(&namespace, &of.objects.lock().all())
        })),
        processes: Arc::clone(&pod.inner.processes),
        stop: pod.inner.stop.subscribe(),
    }
}

async fn stopped(pod: &Pod) {
    // An error means that the pod is gone, which also counts as a stop.
    pod.inner.stop.subscribe().wait_for(Option::is_some).await.ok();
}

/// Asks the agent until the pod is in the mesh and served, if it is to be. False when it was stopped before.
///
/// As in a cluster, where the plugin's ADD fails until the node proxy serves the pod: peers would send in the
/// clear to a pod that is ready before it is served.
async fn until_first_enrolled(shared: &Shared, pod: &Pod) -> bool {
    loop {
        let wanted = pod.inner.wanted_in_mesh.borrow().clone();
        let in_mesh =
            wanted.is_some() && shared.nodes.get(pod.node()).is_some_and(|node| node.agent.is_some());
        match reconcile_membership(shared, pod, wanted).await {
            Ok(()) if !in_mesh => return true,
            Ok(()) => {
                let mut view = pod.inner.view.subscribe();
                let served = view.wait_for(|view| view.redirection == Some(Redirection::Enabled));
                let mut wanted = pod.inner.wanted_in_mesh.subscribe();
                tokio::select! {
                    // An error means that the pod is gone, which also counts as a stop.
                    served = served => return served.is_ok(),
                    _ = wanted.wait_for(Option::is_none) => continue,
                    () = stopped(pod) => return false,
                }
            }
            Err(error) => tracing::warn!(%pod, %error, "the pod can't enter the mesh yet"),
        }
        tokio::select! {
            () = tokio::time::sleep(AGENT_RETRY) => {}
            () = stopped(pod) => return false,
        }
    }
}

/// Enrols and unenrols a running pod as its labels say. Never returns.
async fn follow_membership(shared: &Shared, pod: &Pod) {
    // A change during the first enrolment is seen at the first turn.
    let mut wanted = pod.inner.wanted_in_mesh.subscribe();
    wanted.mark_changed();
    loop {
        if wanted.changed().await.is_err() {
            return std::future::pending().await;
        }
        loop {
            let now = wanted.borrow_and_update().clone();
            match reconcile_membership(shared, pod, now).await {
                Ok(()) => break,
                Err(error) => {
                    tracing::warn!(%pod, %error, "the pod's place in the mesh can't be changed yet");
                }
            }
            tokio::time::sleep(AGENT_RETRY).await;
        }
    }
}

async fn reconcile_membership(shared: &Shared, pod: &Pod, wanted: Option<Options>) -> Result<()> {
    let Some(agent) = shared.nodes.get(pod.node()).and_then(|node| node.agent.as_ref()) else {
        return Ok(());
    };
    match wanted {
        Some(options) => agent.enrol(pod, options).await,
        None => agent.unenrol(pod).await,
    }
}

/// Releases the pod at the agent, and frees its address and name, after its containers have ended.
async fn leave(shared: &Shared, pod: &Pod) {
    let node = shared.nodes.get(pod.node());
    if let Some(agent) = node.and_then(|node| node.agent.as_ref())
        && let Err(error) = agent.remove_pod(pod.uid()).await
    {
        tracing::warn!(%pod, %error, "the node agent did not let go of the pod");
    }
    let key = (pod.namespace().to_owned(), pod.name().to_owned());
    shared.pods.write().remove(&key);
    pod.inner.processes.lock().clear();
    if let Some(node) = node.filter(|_| !pod.inner.host_network) {
        node.range.lock().give_back(pod.inner.addresses);
    }
    let directory = shared.directory.join("pods").join(pod.uid());
    if let Err(error) = std::fs::remove_dir_all(&directory)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(directory = %directory.display(), %error, "a pod's files are left");
    }
    pod.inner.view.send_modify(|view| view.gone = true);
    shared.wake();
}

/// Chooses a node for a pod that names none: the one with the fewest pods of the same kind, then the fewest.
pub(crate) fn schedule(pods: &[Pod], nodes: usize, labels: &BTreeMap<String, String>) -> usize {
    let like = |pod: &&Pod| pod.labels() == *labels;
    let load = |node: usize| {
        let here: Vec<&Pod> = pods.iter().filter(|pod| pod.node() == node).collect();
        (here.iter().filter(|pod| like(pod)).count(), here.len())
    };
    (0..nodes).min_by_key(|node| load(*node)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_has_the_form_of_a_random_uuid() {
        let uid = fresh_uid();
        let parts: Vec<_> = uid.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12]);
        assert_eq!(uid.as_bytes()[14], b'4');
        assert!(b"89ab".contains(&uid.as_bytes()[19]));
        assert_ne!(uid, fresh_uid());
    }
}
