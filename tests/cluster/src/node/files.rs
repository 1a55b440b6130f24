//! Configuration files of a node's programs.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::Config;
use crate::error::{Error, Result};

/// Writes every file.
pub(super) fn write(config: &Config) -> Result<()> {
    let directory = &config.directory;
    write_file(&directory.join("containerd.toml"), CONTAINERD)?;
    write_file(&directory.join("kubelet.yaml"), &kubelet(config).to_string())?;
    write_file(&directory.join("proxy.yaml"), &proxy(config).to_string())?;
    // The node itself resolves no names, and its pods ask the cluster's DNS.
    write_file(&directory.join("resolv.conf"), "nameserver 127.0.0.1\n")?;
    let network = Path::new("/etc/cni/net.d/10-pods.conflist");
    // Kept from boot to boot: others chain their plugins into it.
    if !network.exists() {
        write_file(network, &pod_network(config).to_string())?;
    }
    copy_plugins()
}

const CONTAINERD: &str = r#"version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "local/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
"#;

/// The plugins of the `containernetworking-plugins` package, where CNI looks for them.
fn copy_plugins() -> Result<()> {
    let (source, target) = (Path::new("/usr/lib/cni"), Path::new("/opt/cni/bin"));
    let attempt = || format!("copy {} to {}", source.display(), target.display());
    fs::create_dir_all(target).map_err(Error::system(attempt()))?;
    for entry in fs::read_dir(source).map_err(Error::system(attempt()))? {
        let entry = entry.map_err(Error::system(attempt()))?;
        fs::copy(entry.path(), target.join(entry.file_name())).map_err(Error::system(attempt()))?;
    }
    Ok(())
}

fn kubelet(config: &Config) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "failCgroupV1": false,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}", config.cgroup),
        "enforceNodeAllocatable": [],
        "failSwapOn": false,
        "localStorageCapacityIsolation": false,
        // The file systems of a node are the machine's, whose fill is none of its business.
        "evictionHard": {
            "memory.available": "50Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%",
            "imagefs.available": "0%",
        },
        "imageGCHighThresholdPercent": 100,
        "maxPods": 250,
        "clusterDNS": [config.dns],
        "clusterDomain": "cluster.local",
        "resolvConf": config.directory.join("resolv.conf"),
        "tlsCertFile": config.certificate,
        "tlsPrivateKeyFile": config.key,
        "authentication": {
            "x509": {"clientCAFile": config.ca}, "webhook": {"enabled": true}, "anonymous": {"enabled": false},
        },
        "authorization": {"mode": "Webhook"},
    })
}

fn proxy(config: &Config) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clusterCIDR": config.cluster_cidr,
        "hostnameOverride": config.name,
        "clientConnection": {"kubeconfig": config.directory.join("proxy.kubeconfig")},
        // The table of connections is the machine's.
        "conntrack": {"maxPerCore": 0},
    })
}

fn pod_network(config: &Config) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {
                "type": "ptp",
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": config.pods}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

fn write_file(path: &Path, text: &str) -> Result<()> {
    let attempt = format!("write {}", path.display());
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(Error::system(attempt.clone()))?;
    }
    fs::write(path, text).map_err(Error::system(attempt))
}
