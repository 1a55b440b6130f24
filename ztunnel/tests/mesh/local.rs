//! A proxy without a control plane: the mesh is what a file says.

use std::net::{Ipv4Addr, SocketAddr};

use serde_json::{Value, json};

use crate::mesh::{Mesh, Pod, echo, exchange};

/// Starts the only node's proxy anew without a control plane, with `certificates` and what the file says of `pods`.
async fn without_control_plane(
    mesh: &mut Mesh,
    certificates: Value,
    pods: &[(&Pod, Value)],
) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let workloads = pods.iter().map(|(pod, services)| {
        json!({
            "uid": pod.workload.uid,
            "name": pod.workload.name,
            "namespace": pod.workload.namespace,
            "serviceAccount": pod.workload.service_account,
            "trustDomain": pod.workload.trust_domain,
            "workloadIps": pod.net.ips(),
            "node": "node-0",
            "protocol": "HBONE",
            "services": services,
        })
    });
    let service = json!({
        "name": "greeter", "namespace": "default", "hostname": "greeter.default.svc.cluster.local",
        "vips": ["/10.96.0.10"], "ports": { "80": 8080 },
    });
    let file = dir.path().join("local.yaml");
    let text = json!({ "workloads": workloads.collect::<Vec<_>>(), "services": [service] });
    std::fs::write(&file, text.to_string()).unwrap();
    let mut config = mesh.nodes[0].ztunnel.config.clone();
    config["controlPlane"] = json!("");
    config["xds"] = json!({ "localFile": file });
    config["certificates"] = certificates;
    config["sameNode"] =
        json!(if config["certificates"]["authority"].is_string() { "tunnel" } else { "splice" });
    mesh.nodes[0].ztunnel.replace(config).await;
    dir
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_control_plane_the_file_is_the_mesh() {
    let mut mesh = Mesh::start(1, json!({})).await;
    let [client, server] = [mesh.pod(0, "client", "client").await, mesh.pod(0, "server", "server").await];
    let _seen = echo(server.net.listen(server.net.v4.into(), 8080).await);
    let memberships = json!({ "default/greeter.default.svc.cluster.local": { "80": 8080 } });
    let authority = json!({
        "authority": mesh.control.gate.address.to_string(),
        "authorityServerName": crate::control::SERVER_NAME,
    });
    // Without an authority there are no certificates, and on one node none are needed.
    for (certificates, issued) in [(json!({}), 0), (authority, 2)] {
        let pods = [(&client, json!({})), (&server, memberships.clone())];
        let _file = without_control_plane(&mut mesh, certificates, &pods).await;
        let mut stream =
            client.net.dial(SocketAddr::new(Ipv4Addr::new(10, 96, 0, 10).into(), 80)).await.unwrap();
        assert_eq!(exchange(&mut stream, b"by the file").await.unwrap(), b"by the file");
        let metrics = mesh.nodes[0].ztunnel.metrics().await;
        assert!(metrics.contains(&format!("ambit_certificates_issued_total {issued}\n")), "{metrics}");
        assert!(!metrics.contains("ambit_xds_connected"), "{metrics}");
    }
}
