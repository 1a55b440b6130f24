//! A control plane's answers, at a node proxy.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ambit_api::core::Node;
use ambit_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use ambit_api::security::Authorization;
use ambit_api::workload::Address;
use ambit_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use ambit_directory::{Directory, InvalidResource, Update as Change};
use ambit_xds::{BoxError, Client, ClientConfig, Rejected, Update};
use http_body_util::BodyExt;
use prost::Message;
use tower::service_fn;

use super::{Fed, block_on, framed, unframed};
use crate::directory::{decides_naively, is_consistent, leads_somewhere};
use crate::pieces::cut;

/// Where the request's body is put, to be read when the stream has ended.
type Sent = Arc<Mutex<Option<tonic::body::Body>>>;

/// A byte that says how addresses are subscribed and whether the parts are messages or the raw body; then the parts.
/// What was applied is consistent, and what was answered is the protocol: each nonce once, in order, a nack for what
/// was rejected.
pub(crate) fn client(data: &[u8]) {
    let Some((flags, data)) = data.split_first() else { return };
    let body = Fed::default();
    let mut nonces = Vec::new();
    for part in cut(data) {
        if flags & 2 != 0 {
            body.push(part.to_vec().into());
        } else {
            body.push(framed(part));
            nonces.extend(DeltaDiscoveryResponse::decode(part).map(|response| response.nonce));
        }
    }
    body.end();
    let (directory, reader) = Directory::new();
    let sent = Sent::default();
    run(directory, body, flags & 1 != 0, &sent);
    let snapshot = reader.snapshot();
    is_consistent(&snapshot);
    leads_somewhere(&snapshot, &[]);
    decides_naively(&snapshot);
    let Some(requests) = sent.lock().expect("no panic before").take() else { return };
    let requests = block_on(requests.collect()).expect("a body").to_bytes();
    let requests: Vec<DeltaDiscoveryRequest> = unframed(&requests)
        .iter()
        .map(|message| DeltaDiscoveryRequest::decode(message.as_slice()).expect("a request"))
        .collect();
    follow_the_protocol(&requests, &nonces, flags & 2 == 0);
}

fn follow_the_protocol(requests: &[DeltaDiscoveryRequest], nonces: &[String], known: bool) {
    let (opening, acks) = requests.split_at(requests.len().min(2));
    let types: Vec<&str> = opening.iter().map(|request| request.type_url.as_str()).collect();
    assert!([AUTHORIZATION_TYPE_URL, ADDRESS_TYPE_URL].starts_with(&types), "{types:?}");
    assert!(
        opening.iter().all(|request| request.response_nonce.is_empty() && request.error_detail.is_none())
    );
    let mut left = nonces.iter();
    for ack in acks {
        assert!(ack.error_detail.as_ref().is_none_or(|error| error.code != 0 && !error.message.is_empty()));
        let is_next = !known || left.any(|nonce| *nonce == ack.response_nonce);
        assert!(is_next, "{:?} was never sent, or before", ack.response_nonce);
    }
}

/// One stream from its beginning to its end.
fn run(directory: Directory, body: Fed, on_demand: bool, sent: &Sent) {
    // Once the stream has ended, nothing happens for longer than any input takes.
    let pause = Duration::from_secs(3600);
    let config = ClientConfig { min_delay: pause, max_delay: pause, ..ClientConfig::new(Node::default()) };
    let policy = |update: Update<Authorization>| match update {
        Update::Upsert { name, resource } => Change::Policy { name, policy: resource },
        Update::Remove { name } => Change::PolicyRemoved { name },
    };
    let address = |update: Update<Address>| match update {
        Update::Upsert { name, resource } => Change::Address { name, address: resource },
        Update::Remove { name } => Change::AddressRemoved { name },
    };
    let builder = Client::builder(config, applier(directory)).wildcard(AUTHORIZATION_TYPE_URL, policy);
    let builder = match on_demand {
        true => builder.on_demand(ADDRESS_TYPE_URL, address),
        false => builder.wildcard(ADDRESS_TYPE_URL, address),
    };
    let sent = Arc::clone(sent);
    let connector = move || {
        let (body, sent) = (body.clone(), Arc::clone(&sent));
        std::future::ready(Ok::<_, BoxError>(service_fn(move |request: http::Request<tonic::body::Body>| {
            *sent.lock().expect("no panic before") = Some(request.into_body());
            let response = http::Response::builder().header("content-type", "application/grpc");
            std::future::ready(Ok::<_, BoxError>(response.body(body.clone()).expect("a response")))
        })))
    };
    let (client, driver) = builder.build(connector);
    block_on(async {
        let mut driver = std::pin::pin!(driver.run());
        std::future::poll_fn(|cx| {
            // Everything is there already: it goes on until the stream has ended.
            let done = driver.as_mut().poll(cx).is_ready();
            match done || client.metrics().disconnections.load(Ordering::Relaxed) > 0 {
                true => std::task::Poll::Ready(()),
                false => std::task::Poll::Pending,
            }
        })
        .await;
    });
}

/// As the node proxy has it.
fn applier(
    mut directory: Directory,
) -> impl FnMut(&mut dyn Iterator<Item = Change>) -> Vec<Rejected> + Send + 'static {
    move |batch| {
        let report = |it: ambit_directory::Rejected| {
            let is_policy = matches!(it.error, InvalidResource::Policy(_));
            let type_url = if is_policy { AUTHORIZATION_TYPE_URL } else { ADDRESS_TYPE_URL };
            Rejected { type_url: type_url.to_owned(), reason: it.error.to_string(), name: it.name }
        };
        directory.apply(batch).into_iter().map(report).collect()
    }
}
