//! Waits for the client, and copies that break off.

use super::*;

#[test]
fn waits_for_the_client_add_up() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let mut awaited = Awaited::default();
    awaited.start(at(1));
    // Another poll of the same wait.
    awaited.start(at(2));
    assert_eq!(awaited.total(at(3)), Duration::from_secs(2));
    awaited.stop(at(4));
    assert_eq!(awaited.total(at(9)), Duration::from_secs(3));
    awaited.start(at(10));
    assert_eq!(awaited.total(at(11)), Duration::from_secs(4));
}

#[test]
fn a_copy_that_is_given_up_is_broken() {
    let broken = Arc::new(AtomicBool::new(false));
    let (feed, frames) = mpsc::channel(1);
    let mut copy = Copy { frames: feed, broken: broken.clone(), whole: false };
    let copied = Copied { frames, broken };
    let state = copied.state();
    assert!(copy.feed(&Bytes::from_static(b"a")));
    assert!(!state.is_broken());
    drop(copy);
    assert!(state.is_broken());
}

/// The body of a request whose client has sent `head` and is silent from then on, as long as the rest is kept.
async fn silent(head: &'static str) -> (Source, impl Sized) {
    use hyper_util::rt::TokioIo;
    use tokio::io::AsyncWriteExt;

    let (mut client, server) = tokio::io::duplex(1024);
    client.write_all(head.as_bytes()).await.unwrap();
    let (bodies, mut body) = mpsc::channel(1);
    let service = hyper::service::service_fn(move |request: http::Request<Incoming>| {
        let bodies = bodies.clone();
        async move {
            bodies.send(request.into_body()).await.unwrap();
            std::future::pending::<io::Result<http::Response<RequestBody>>>().await
        }
    });
    let serving = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(server), service);
    let serving = tokio::spawn(serving);
    let source = Source::new(body.recv().await.unwrap(), 1024, Duration::from_secs(60));
    (source, (client, serving))
}

#[tokio::test]
async fn each_try_counts_its_own_wait_for_the_client() {
    let (source, _client) = silent("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nab").await;
    let mut first = RequestBody::Replay(source.replay().unwrap());
    let mut frame = std::future::poll_fn(|cx| Pin::new(&mut first).poll_frame(cx)).await;
    assert_eq!(frame.take().unwrap().unwrap().into_data().unwrap(), "ab");
    let before = source.awaited();
    let silent = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut first).poll_frame(cx).is_pending()));
    assert!(silent.await);
    while source.awaited() < before + Duration::from_millis(5) {
        tokio::task::yield_now().await;
    }
    // The next one has not asked for anything yet.
    let second = source.replay();
    assert_eq!((source.awaited(), second.is_some()), (Duration::ZERO, true));
}

/// A client must not write in its trailers what it may not write in its header.
#[tokio::test]
async fn withheld_trailers_are_not_passed_on() {
    let head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-user: root\r\nx-sum: 1\r\n\r\n";
    for is_read_ahead in [false, true] {
        let (source, _client) = silent(head).await;
        source.withhold(|name| name == "x-user");
        if is_read_ahead {
            assert_eq!(source.read_ahead(10).await.unwrap(), (Bytes::from_static(b"a"), true));
        }
        let mut body = RequestBody::Replay(source.replay().unwrap());
        let mut trailers = None;
        while let Some(frame) = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            trailers = frame.unwrap().into_trailers().ok();
        }
        let trailers = trailers.unwrap();
        assert_eq!((trailers.get("x-user"), trailers.len()), (None, 1));
        assert_eq!(trailers["x-sum"], "1");
    }
}
