//! Delta discovery, both ends, over gRPC messages as they come from the network.

mod client;
mod server;

pub(crate) use client::client;
pub(crate) use server::server;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http_body::Frame;

/// A gRPC message that is not compressed.
fn framed(message: &[u8]) -> Bytes {
    let length = u32::try_from(message.len()).expect("a short message").to_be_bytes();
    [&[0][..], &length, message].concat().into()
}

/// The messages of complete frames.
fn unframed(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    while let Some((&[0, a, b, c, d], rest)) = bytes.split_first_chunk::<5>() {
        let Some((message, after)) = rest.split_at_checked(u32::from_be_bytes([a, b, c, d]) as usize) else {
            break;
        };
        messages.push(message.to_vec());
        bytes = after;
    }
    messages
}

/// A body that is fed from outside.
#[derive(Clone, Default)]
struct Fed(Arc<Mutex<Feed>>);

#[derive(Default)]
struct Feed {
    waiting: VecDeque<Bytes>,
    ended: bool,
    waker: Option<Waker>,
}

impl Fed {
    fn push(&self, frame: Bytes) {
        let mut feed = self.0.lock().expect("no panic before");
        feed.waiting.push_back(frame);
        feed.waker.take().into_iter().for_each(Waker::wake);
    }

    fn end(&self) {
        let mut feed = self.0.lock().expect("no panic before");
        feed.ended = true;
        feed.waker.take().into_iter().for_each(Waker::wake);
    }
}

impl http_body::Body for Fed {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let mut feed = self.0.lock().expect("no panic before");
        match feed.waiting.pop_front() {
            Some(frame) => Poll::Ready(Some(Ok(Frame::data(frame)))),
            None if feed.ended => Poll::Ready(None),
            None => {
                feed.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// The runtime that timers need; nothing waits for them. Without tokio's budget: what is not ready is not there yet.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    }
    RUNTIME.with(|runtime| runtime.block_on(tokio::task::unconstrained(future)))
}
