//! The machinery of a running cluster: nodes, links, the mesh's programs, captures, tokens and files.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::addresses::Addresses;
use crate::capture::{Capture, DEFAULT_LIMIT};
use crate::cluster::findings;
use crate::cluster::mesh::{self, MeshOptions};
use crate::cluster::{Cluster, Program, Ztunnel};
use crate::error::{Error, Result};
use crate::token::{AUDIENCE, Subject};

/// Maximum number of the control plane's problems that are shown.
const MOST_PROBLEMS: usize = 5;

impl Cluster {
    /// How many nodes there are.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.shared.nodes.len()
    }

    /// The names of the nodes, by index.
    #[must_use]
    pub fn node_names(&self) -> Vec<String> {
        self.shared.nodes.iter().map(|node| node.name.clone()).collect()
    }

    /// A node's address on the fabric.
    ///
    /// # Errors
    /// [`Error::Unknown`] when there is no such node.
    pub fn node_addresses(&self, index: usize) -> Result<Addresses> {
        Ok(self.shared.node(index)?.attached.addresses)
    }

    /// Runs a closure, which may block, in a node's own network namespace.
    ///
    /// # Errors
    /// When there is no such node, or the closure panicked.
    pub async fn on_node<T, F>(&self, index: usize, job: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        self.shared.node(index)?.attached.sandbox.run(job).await
    }

    /// A service's VIPs, once the controller has given it some.
    #[must_use]
    pub fn service_ips(&self, namespace: &str, name: &str) -> Vec<IpAddr> {
        let file = self.shared.directory.join("objects").join(format!("Service_{namespace}_{name}.json"));
        let text = std::fs::read(file).unwrap_or_default();
        let service: Option<k8s_openapi::api::core::v1::Service> = serde_json::from_slice(&text).ok();
        let ips = service.and_then(|service| service.spec).and_then(|spec| spec.cluster_ips);
        ips.unwrap_or_default().iter().filter_map(|ip| ip.parse().ok()).collect()
    }

    /// Gives a name outside the cluster's domain addresses in the cluster DNS.
    pub async fn set_dns_record(&self, name: &str, addresses: Vec<IpAddr>) -> Result<()> {
        self.shared.records.lock().insert(name.trim_end_matches('.').to_ascii_lowercase(), addresses);
        self.shared.settle().await
    }

    /// The newest node proxy of a node.
    ///
    /// # Errors
    /// [`Error::Unknown`] in a cluster without a mesh.
    pub fn ztunnel(&self, index: usize) -> Result<Ztunnel> {
        let node = self.shared.node(index)?;
        let newest = node.ztunnels.lock().last().cloned();
        newest.ok_or_else(|| Error::Unknown(format!("ztunnel of {}", node.name)))
    }

    /// Starts one more node proxy on a node, beside those that run, as an upgrade does. Waits until it is ready.
    ///
    /// # Errors
    /// When it can't be started or does not become ready.
    pub async fn start_another_ztunnel(&self, index: usize) -> Result<Ztunnel> {
        let (options, _) = self.mesh()?;
        let ztunnel = options.start_ztunnel(&self.shared, index).await?;
        self.extra.lock().push(ztunnel.clone());
        ztunnel.wait_ready().await?;
        Ok(ztunnel)
    }

    /// Removes an ended node proxy with its pod from its node.
    ///
    /// # Errors
    /// When its pod does not go.
    pub async fn remove_ztunnel(&self, ztunnel: &Ztunnel) -> Result<()> {
        let node = self.shared.node(ztunnel.pod().node())?;
        node.ztunnels.lock().retain(|other| other.pod().uid() != ztunnel.pod().uid());
        self.extra.lock().retain(|other| other.pod().uid() != ztunnel.pod().uid());
        self.delete_pod(ztunnel.pod()).await
    }

    /// The control plane.
    ///
    /// # Errors
    /// [`Error::Unknown`] in a cluster without a mesh.
    pub fn control(&self) -> Result<&Program> {
        self.mesh().map(|(_, control)| control)
    }

    fn mesh(&self) -> Result<&(MeshOptions, Program)> {
        self.mesh.as_ref().ok_or_else(|| Error::Unknown("mesh in this cluster".to_owned()))
    }

    /// Ends a node's agent as a crash would: sockets close, rules and pods stay.
    ///
    /// # Errors
    /// [`Error::Unknown`] in a cluster without a mesh.
    pub async fn stop_agent(&self, index: usize) -> Result<()> {
        self.agent(index)?.stop().await;
        Ok(())
    }

    /// Starts a node's agent again, from its registry.
    ///
    /// # Errors
    /// When it can't be started.
    pub async fn start_agent(&self, index: usize) -> Result<()> {
        let pods = self.shared.pods().into_iter().filter(|pod| pod.node() == index);
        let wanted = pods.filter_map(|pod| {
            let options = pod.inner.wanted_in_mesh.borrow().clone()?;
            Some((pod, options))
        });
        self.agent(index)?.start(&self.shared, &wanted.collect::<Vec<_>>()).await
    }

    fn agent(&self, index: usize) -> Result<&crate::agent::NodeAgent> {
        let node = self.shared.node(index)?;
        node.agent.as_ref().ok_or_else(|| Error::Unknown(format!("node agent of {}", node.name)))
    }

    /// Captures what every node and the control plane send over the fabric, up to 256 MiB.
    ///
    /// # Errors
    /// When the kernel refuses a packet socket.
    pub async fn capture(&self) -> Result<Capture> {
        self.capture_up_to(DEFAULT_LIMIT).await
    }

    /// The same with a limit of one's own, bytes, shared evenly by the links.
    ///
    /// # Errors
    /// When the kernel refuses a packet socket.
    pub async fn capture_up_to(&self, limit: usize) -> Result<Capture> {
        let nodes = self.shared.nodes.iter().map(|node| &node.attached);
        let links: Vec<u32> =
            nodes.chain([&self.shared.control_node]).map(|attached| attached.uplink.near).collect();
        Capture::start(self.shared.fabric.sandbox(), &links, limit).await
    }

    /// Disconnects a node from the fabric (`up` false) or connects it again.
    ///
    /// # Errors
    /// When there is no such node.
    pub async fn set_link(&self, index: usize, up: bool) -> Result<()> {
        self.shared.fabric.set_link(&self.shared.node(index)?.attached, up).await
    }

    /// Signs a service account token with the audience of the CA.
    ///
    /// # Errors
    /// When signing fails.
    pub fn token(&self, subject: &Subject, lifetime: Duration) -> Result<String> {
        self.shared.signer.sign(subject, AUDIENCE, lifetime)
    }

    /// The work directory: `ca/`, `objects/`, `root-cert.pem`, a directory a ztunnel.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.shared.directory
    }

    /// The PEM file with the roots of the mesh.
    #[must_use]
    pub fn root_cert(&self) -> PathBuf {
        mesh::root_file(&self.shared)
    }

    /// Where the CA keeps its key and certificates.
    #[must_use]
    pub fn ca_dir(&self) -> PathBuf {
        self.shared.directory.join("ca")
    }

    /// The socket between a node's agent and its proxies.
    #[must_use]
    pub fn zds_socket(&self, index: usize) -> PathBuf {
        mesh::zds_socket(&self.shared, index)
    }

    /// Programs of the mesh that ended by themselves or were restarted, with their last line of output.
    #[must_use]
    pub fn program_troubles(&self) -> Vec<String> {
        let ztunnels: Vec<Ztunnel> =
            self.shared.nodes.iter().flat_map(|node| node.ztunnels.lock().clone()).collect();
        let control = self.mesh.iter().filter_map(|(_, control)| control.trouble());
        control.chain(ztunnels.iter().filter_map(|ztunnel| ztunnel.trouble())).collect()
    }

    /// The current errors in the log of the control plane. Empty in a cluster without a mesh.
    pub async fn control_problems(&self) -> Vec<String> {
        let Ok(control) = self.control() else { return Vec::new() };
        let Ok(metrics) = control.metrics().await else { return Vec::new() };
        let count = metrics.samples.iter().filter(|sample| sample.name.ends_with("source_problems"));
        if count.map(|sample| sample.value).sum::<f64>() == 0.0 {
            return Vec::new();
        }
        let mut problems: Vec<String> = control
            .logs()
            .iter()
            .filter(|line| line.contains(" ERROR "))
            .filter_map(|line| {
                line.split_once("::source::files: ")?.1.split(" file=").next().map(str::to_owned)
            })
            .collect();
        problems.dedup();
        // Older ones may be solved by now.
        problems.drain(..problems.len().saturating_sub(MOST_PROBLEMS));
        problems
    }

    /// Findings of the control plane about objects: each condition that does not hold, with the file of its object. Empty in a
    /// cluster without a mesh.
    pub async fn findings(&self) -> Vec<String> {
        let Ok(control) = self.control() else { return Vec::new() };
        let Ok(dump) = control.config_dump().await else { return Vec::new() };
        let objects = self.shared.objects.lock().all();
        findings::unmet(&dump["findings"], &objects)
    }

    /// Logs of the mesh's programs, for a failing test.
    #[must_use]
    pub fn mesh_logs(&self) -> BTreeMap<String, Vec<String>> {
        let mut logs = BTreeMap::new();
        if let Some((_, control)) = &self.mesh {
            logs.insert("ambit-control".to_owned(), control.logs());
        }
        for node in &self.shared.nodes {
            for ztunnel in node.ztunnels.lock().iter() {
                logs.insert(format!("{} of {}", ztunnel.pod().name(), node.name), ztunnel.logs());
            }
        }
        logs
    }
}
