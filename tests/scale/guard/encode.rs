//! Encoding resources for discovery, and pushing them to subscribers.

use std::hint::black_box;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use ambit_api::ADDRESS_TYPE_URL;
use ambit_api::discovery::DeltaDiscoveryRequest;
use ambit_api::workload::WorkloadStatus;
use ambit_directory::Update;
use ambit_scale::directory::workload;
use ambit_xds::{Change, Resource, Server, ServerConfig, Store, StoreConfig};
use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use http_body::{Body, Frame};
use prost::Message;
use tonic::body::Body as ResponseBody;
use tonic::codegen::Service;

const PATH: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// Resources of the store.
const RESOURCES: u32 = 2_000;
/// Subscribers that take them.
const SUBSCRIBERS: usize = 20;

fn changes() -> Vec<(String, ambit_api::workload::Address)> {
    let addresses = (0..RESOURCES).map(|number| match workload(number, WorkloadStatus::Healthy) {
        Update::Address { name, address } => Some((name, address)),
        Update::AddressRemoved { .. } | Update::Policy { .. } | Update::PolicyRemoved { .. } => None,
    });
    addresses.flatten().collect()
}

/// Messages become entries of a store.
pub(crate) fn resources() -> Result<()> {
    let messages = changes();
    let (store, _publisher) = Store::new(&[ADDRESS_TYPE_URL], StoreConfig::default());
    guarded_encode(&store, &messages);
    let kept = store.len(ADDRESS_TYPE_URL);
    ensure!(kept == messages.len(), "{kept} resources");
    Ok(())
}

#[inline(never)]
fn guarded_encode(store: &Store, messages: &[(String, ambit_api::workload::Address)]) {
    let resource = |(name, message): &(String, ambit_api::workload::Address)| {
        Change::Upsert(Resource::new(name.as_str(), message).alias("/10.0.0.1"))
    };
    black_box(store.apply(ADDRESS_TYPE_URL, messages.iter().map(resource).collect()));
}

/// A full store is taken by subscribers, one after the other.
pub(crate) fn push() -> Result<()> {
    let (store, _publisher) = Store::new(&[ADDRESS_TYPE_URL], StoreConfig::default());
    let upsert = |(name, message): (String, ambit_api::workload::Address)| {
        Change::Upsert(Resource::new(name, &message))
    };
    store.apply(ADDRESS_TYPE_URL, changes().into_iter().map(upsert).collect());
    let mut server = Server::new(store, ServerConfig::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let _within = runtime.enter();
    let bodies: Vec<_> =
        (0..SUBSCRIBERS).map(|_| runtime.block_on(subscribe(&mut server))).collect::<Result<_>>()?;
    let bytes = guarded_push(bodies)?;
    ensure!(bytes > SUBSCRIBERS * RESOURCES as usize * 100, "{bytes} bytes were pushed");
    Ok(())
}

async fn subscribe(server: &mut Server) -> Result<ResponseBody> {
    let ask =
        DeltaDiscoveryRequest { type_url: ADDRESS_TYPE_URL.to_owned(), ..Default::default() }.encode_to_vec();
    let mut frame = vec![0];
    frame.extend_from_slice(&u32::try_from(ask.len())?.to_be_bytes());
    frame.extend_from_slice(&ask);
    let request = http::Request::post(PATH)
        .header("content-type", "application/grpc")
        .body(Asking(Some(frame.into())))
        .context("making a request")?;
    Ok(server.call(request).await?.into_body())
}

/// Takes every answer that is ready; their bytes.
#[inline(never)]
fn guarded_push(bodies: Vec<ResponseBody>) -> Result<usize> {
    let mut context = Context::from_waker(Waker::noop());
    let mut bytes = 0;
    for mut body in bodies {
        while let Poll::Ready(frame) = Pin::new(&mut body).poll_frame(&mut context) {
            let Some(Ok(frame)) = frame else { bail!("the stream ended") };
            bytes += frame.into_data().map_or(0, |data| data.len());
        }
    }
    Ok(bytes)
}

/// A request that is made, of a stream that stays open.
struct Asking(Option<Bytes>);

impl Body for Asking {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.0.take().map_or(Poll::Pending, |frame| Poll::Ready(Some(Ok(Frame::data(frame)))))
    }
}
