//! Proxies that know only what their pods dialled: what happens while the control plane has not answered.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde_json::json;

use crate::mesh::{Mesh, Pod, echo, eventually, ping};

async fn count(mesh: &Mesh, name: &str) -> u64 {
    let metrics = mesh.nodes[0].ztunnel.metrics().await;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).unwrap();
    line.parse().unwrap()
}

/// What comes back when `pod` says something to `target`.
async fn said(pod: &Pod, target: SocketAddr) -> std::io::Result<Vec<u8>> {
    let mut stream = pod.net.dial(target).await.map_err(std::io::Error::other)?;
    ping(&mut stream, b"in the clear").await
}

/// A silent control plane says nothing of whether an address is one of the mesh.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_definite_no_of_the_control_plane_lets_bytes_pass() {
    let settings = json!({ "xds": { "onDemand": true }, "limits": { "directoryWait": "500ms" } });
    let mesh = Mesh::start(1, settings).await;
    let client = mesh.pod(0, "client", "client").await;
    let (asked, unasked) = (mesh.fabric.pod().await, mesh.fabric.pod().await);
    let target = |ip: Ipv4Addr| SocketAddr::new(IpAddr::V4(ip), 7000);
    let _asked = echo(asked.listen(asked.v4.into(), 7000).await);
    let mut reached = echo(unasked.listen(unasked.v4.into(), 7000).await);
    assert_eq!(
        said(&client, target(asked.v4)).await.unwrap(),
        b"in the clear",
        "nobody of the mesh is there"
    );

    mesh.control.gate.set_open(false);
    assert!(said(&client, target(unasked.v4)).await.is_err(), "passed although nobody said that it may");
    assert!(reached.try_recv().is_err(), "the server saw a connection");
    assert_eq!(said(&client, target(asked.v4)).await.unwrap(), b"in the clear", "what was answered is known");
    let line = mesh.nodes[0].ztunnel.logged("the refusal", |line| {
        line["error"].as_str().is_some_and(|error| error.contains("did not answer"))
    });
    assert_eq!(line.await["direction"], "outbound");
    assert!(count(&mesh, "ambit_demands_unanswered_total").await >= 1);

    mesh.control.gate.set_open(true);
    eventually("the answer came", async || said(&client, target(unasked.v4)).await.is_ok()).await;
}

/// One pod dials more names than it may wait for, then more than it may use; another is served all the while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_scans_addresses_does_not_hurt_another() {
    let settings = json!({ "xds": { "onDemand": true }, "limits": { "directoryWait": "15s" } });
    let mesh = Mesh::start(1, settings).await;
    let scanner = mesh.pod(0, "scanner", "scanner").await;
    let other = mesh.pod(0, "other", "other").await;
    let server = mesh.fabric.pod().await;
    let _reached = echo(server.listen(server.v4.into(), 7000).await);
    let scan = async |numbers: std::ops::Range<u16>| {
        for number in numbers {
            let [high, low] = number.to_be_bytes();
            // The connection is captured, so it opens at once, whatever becomes of it.
            drop(scanner.net.dial((Ipv4Addr::new(10, 88, high, low), 7000).into()).await);
        }
    };
    mesh.control.gate.set_open(false);
    scan(0..200).await;
    eventually("the scanner is refused", async || count(&mesh, "ambit_demands_refused_total").await >= 100)
        .await;
    mesh.control.gate.set_open(true);
    assert_eq!(said(&other, (server.v4, 7000).into()).await.unwrap(), b"in the clear");
    // Only so many demands of a pod wait at once, so its share of names fills no faster than they are answered.
    let scanned = std::cell::Cell::new(200);
    eventually("names are given up", async || {
        let start = scanned.replace(scanned.get() + 50);
        scan(start..start + 50).await;
        count(&mesh, "ambit_demands_given_up_total").await > 0
    })
    .await;
    assert!(count(&mesh, "ambit_demanded_names").await <= 513, "more than the shares of two pods");
    assert_eq!(said(&other, (server.v4, 7000).into()).await.unwrap(), b"in the clear");
}
