//! Reused addresses: bytes for the old pod never reach the new one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ambit_local::{Pod, PodOptions};
use ambit_tests::apps::{self, App};
use ambit_tests::wait;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::bed::{Bed, ECHO, NAMESPACE, ping};

/// How the pod that gets the address differs, and where both are.
struct Case {
    node: usize,
    /// Name and service account of the new pod; those of the old one are `old` and `web`.
    name: &'static str,
    service_account: &'static str,
    /// Whether sockets of the old application outlive their pod.
    lingers: bool,
}

async fn no_old_stream_reaches_the_new_pod(case: Case) {
    let bed = Bed::start(true, &[]).await;
    let old = PodOptions::new(NAMESPACE, "old").node(case.node).service_account("web");
    let old = bed.cluster.pod(old).await.unwrap();
    let address = SocketAddr::new(old.ip().into(), ECHO);
    let mut running = Some(apps::run(&old, address, App::Echo).await.unwrap());
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(bed.echo(address).await);
    }
    if !case.lingers {
        running.take();
    }
    bed.cluster.delete_pod(&old).await.unwrap();
    drop(old);
    let new = PodOptions::new(NAMESPACE, case.name).node(case.node).service_account(case.service_account);
    let new = match address.ip() {
        std::net::IpAddr::V4(ip) => bed.cluster.pod(new.address(ip)).await.unwrap(),
        std::net::IpAddr::V6(_) => unreachable!("the bed has IPv4 only"),
    };
    let heard = record(&new, address).await;
    for stream in &mut streams {
        // Whether it can be written depends on what its end has reached by now.
        stream.write_all(b"for the old pod").await.ok();
    }
    // A connection made now is for the new pod, as soon as its proxy knows the owner of the address.
    wait::for_ok("the new pod answers", wait::SOON, || async {
        let mut stream = bed.client.connect_within(address, wait::SOON).await?;
        ping(&mut stream, "for the new pod").await
    })
    .await;
    for stream in &mut streams {
        stream.write_all(b"for the old pod").await.ok();
    }
    for mut stream in streams {
        // With its application the stream has ended; with the socket of a dead pod it may only be silent.
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(2), stream.read_to_end(&mut answer)).await;
        assert!(case.lingers || read.is_ok(), "the old stream has ended");
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(case.lingers || answer.is_empty(), "the old stream was answered: {answer}");
    }
    drop(running);
    let heard = heard.lock().clone();
    assert!(!heard.is_empty() && heard.iter().all(|text| text == "for the new pod"), "{heard:?}");
    bed.shutdown().await;
}

/// Runs an echo that notes what every connection sent.
async fn record(pod: &Pod, address: SocketAddr) -> Arc<Mutex<Vec<String>>> {
    let heard: Arc<Mutex<Vec<String>>> = Arc::default();
    let (listener, noted) = (pod.listen(address).await.unwrap(), heard.clone());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let noted = noted.clone();
            tokio::spawn(async move {
                let mut buffer = vec![0; 1024];
                while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                    noted.lock().push(String::from_utf8_lossy(&buffer[..length]).into_owned());
                    if stream.write_all(&buffer[..length]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    heard
}

#[tokio::test(flavor = "multi_thread")]
async fn no_old_stream_reaches_a_new_pod_with_the_address() {
    let case = Case { node: 1, name: "new", service_account: "other", lingers: false };
    no_old_stream_reaches_the_new_pod(case).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_old_stream_reaches_a_new_pod_of_the_clients_node() {
    let case = Case { node: 0, name: "new", service_account: "other", lingers: false };
    no_old_stream_reaches_the_new_pod(case).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_old_stream_reaches_a_new_pod_of_the_same_identity() {
    let case = Case { node: 1, name: "old", service_account: "web", lingers: false };
    no_old_stream_reaches_the_new_pod(case).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_old_stream_reaches_the_new_pod_while_sockets_linger() {
    let case = Case { node: 1, name: "old", service_account: "web", lingers: true };
    no_old_stream_reaches_the_new_pod(case).await;
}
