//! Accepting when descriptors run out. It is a separate test program because the limit applies to the whole process.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::net::TcpListener;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ambit_net::accept::Acceptor;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

static SHORTAGES: AtomicU32 = AtomicU32::new(0);

#[tokio::test]
async fn connections_wait_while_descriptors_are_short() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut acceptor = Acceptor::new(listener).unwrap().on_shortage(|error| {
        assert_eq!(error.raw_os_error(), Some(libc::EMFILE));
        SHORTAGES.fetch_add(1, Ordering::Relaxed);
    });
    let client = std::net::TcpStream::connect(acceptor.local_addr()).unwrap();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
    let mut taken = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        taken.push(file);
    }
    let waiting = tokio::time::timeout(Duration::from_millis(200), acceptor.accept()).await;
    assert!(waiting.is_err(), "nothing can be accepted");
    let seen = SHORTAGES.load(Ordering::Relaxed);
    // 5, 10, 20, 40, 80 … ms: neither one attempt nor a busy loop.
    assert!((2..=8).contains(&seen), "{seen} attempts in 200 ms");
    drop(taken);
    let accepted = tokio::time::timeout(Duration::from_secs(5), acceptor.accept()).await;
    let (_stream, peer) = accepted.expect("accepted within 5 s").unwrap();
    assert_eq!(peer, client.local_addr().unwrap());
}
