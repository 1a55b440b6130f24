//! The directory from a file, where there is no control plane: workloads and services in the form of Istio's local
//! configuration. A file with anything else, such as policies, is refused: ignoring them would open what they protect.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ambit_api::workload::address::Type;
use ambit_api::workload::{
    Address, NetworkAddress, Port, PortList, Service, TunnelProtocol, Workload, WorkloadStatus,
};
use ambit_directory::{Directory, Update as Change};
use bytes::Bytes;
use serde::Deserialize;

/// Why a local file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// It can't be read.
    #[error("can't read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not of this form.
    #[error("{path}: {reason}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's message.
        reason: String,
    },
    /// A workload or service can't be.
    #[error("{path}: {name}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct LocalFile {
    workloads: Vec<LocalWorkload>,
    services: Vec<LocalService>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LocalWorkload {
    uid: String,
    name: String,
    namespace: String,
    #[serde(default)]
    service_account: String,
    #[serde(default)]
    trust_domain: String,
    workload_ips: Vec<IpAddr>,
    #[serde(default)]
    protocol: LocalProtocol,
    #[serde(default)]
    network: String,
    #[serde(default)]
    node: String,
    #[serde(default)]
    cluster_id: String,
    #[serde(default)]
    workload_name: String,
    #[serde(default)]
    canonical_name: String,
    #[serde(default)]
    canonical_revision: String,
    /// Ports of services and of this workload, by `<namespace>/<hostname>`.
    #[serde(default)]
    services: BTreeMap<String, BTreeMap<u16, u16>>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum LocalProtocol {
    #[default]
    Tcp,
    Hbone,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LocalService {
    name: String,
    namespace: String,
    hostname: String,
    /// `<network>/<address>`.
    #[serde(default)]
    vips: Vec<String>,
    #[serde(default)]
    ports: BTreeMap<u16, u16>,
}

/// Applies what `file` says; without a file nothing is known.
///
/// # Errors
/// [`LocalError`].
pub fn apply(file: Option<&Path>, mut directory: Directory) -> Result<Directory, LocalError> {
    let Some(path) = file else { return Ok(directory) };
    let text =
        std::fs::read_to_string(path).map_err(|source| LocalError::Read { path: path.to_owned(), source })?;
    let syntax = |reason| LocalError::Syntax { path: path.to_owned(), reason };
    let file: LocalFile = serde_saphyr::from_str(&text).map_err(|error| syntax(error.to_string()))?;
    let rejected = directory.apply(file.changes().map_err(syntax)?);
    match rejected.into_iter().next() {
        Some(ambit_directory::Rejected { name, error }) => {
            Err(LocalError::Invalid { path: path.to_owned(), name, reason: error.to_string() })
        }
        None => Ok(directory),
    }
}

impl LocalFile {
    fn changes(self) -> Result<Vec<Change>, String> {
        let services = self.services.into_iter().map(LocalService::address);
        let workloads = self.workloads.into_iter().map(|workload| Ok(workload.address()));
        let change = |address: Result<(String, Type), String>| {
            address.map(|(name, kind)| Change::Address { name, address: Address { r#type: Some(kind) } })
        };
        services.chain(workloads).map(change).collect()
    }
}

impl LocalService {
    fn address(self) -> Result<(String, Type), String> {
        let Self { name, namespace, hostname, vips, ports } = self;
        let vip = |text: &String| {
            let (network, ip) = text.split_once('/').unwrap_or(("", text));
            let ip: IpAddr = ip.parse().map_err(|_| format!("{hostname}: {text} is not network/address"))?;
            Ok(NetworkAddress { network: network.to_owned(), address: bytes(ip), length: None })
        };
        let addresses = vips.iter().map(vip).collect::<Result<_, String>>()?;
        let (key, ports) = (format!("{namespace}/{hostname}"), port_list(&ports));
        Ok((
            key,
            Type::Service(Service { name, namespace, hostname, addresses, ports, ..Service::default() }),
        ))
    }
}

impl LocalWorkload {
    fn address(self) -> (String, Type) {
        let services = self.services.into_iter();
        let workload = Workload {
            uid: self.uid.clone(),
            name: self.name,
            namespace: self.namespace,
            service_account: self.service_account,
            trust_domain: self.trust_domain,
            addresses: self.workload_ips.into_iter().map(bytes).collect(),
            network: self.network,
            node: self.node,
            cluster_id: self.cluster_id,
            workload_name: self.workload_name,
            canonical_name: self.canonical_name,
            canonical_revision: self.canonical_revision,
            tunnel_protocol: match self.protocol {
                LocalProtocol::Tcp => TunnelProtocol::None.into(),
                LocalProtocol::Hbone => TunnelProtocol::Hbone.into(),
            },
            status: WorkloadStatus::Healthy.into(),
            services: services
                .map(|(name, ports)| (name, PortList { ports: port_list(&ports), ..PortList::default() }))
                .collect(),
            ..Workload::default()
        };
        (self.uid, Type::Workload(workload))
    }
}

fn port_list(ports: &BTreeMap<u16, u16>) -> Vec<Port> {
    let port = |(service, target): (&u16, &u16)| Port {
        service_port: (*service).into(),
        target_port: (*target).into(),
        app_protocol: 0,
    };
    ports.iter().map(port).collect()
}

fn bytes(ip: IpAddr) -> Bytes {
    match ip {
        IpAddr::V4(ip) => Bytes::copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => Bytes::copy_from_slice(&ip.octets()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(text: &str) -> Result<Directory, LocalError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        apply(Some(file.path()), Directory::new().0)
    }

    #[test]
    fn what_is_not_read_is_refused() {
        for (text, said) in [
            ("policies: [{name: deny}]", "policies"),
            ("services: [{name: a, namespace: b, hostname: c, vips: [nowhere]}]", "nowhere"),
            ("workloads: [{name: a}]", "uid"),
        ] {
            let error = applied(text).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        applied("").unwrap();
    }
}
