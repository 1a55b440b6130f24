//! Packets with descriptors between two ends of a real socket.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use ambit_net::seqpacket::{MAX_DESCRIPTORS, SeqPacket, SeqPacketListener};

/// A path of this test's own.
fn path() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("ambit-seqpacket-{}-{n}", std::process::id()))
}

async fn pair() -> (SeqPacketListener, SeqPacket, SeqPacket) {
    let listener = SeqPacketListener::bind(path()).unwrap();
    let dialled = SeqPacket::connect(listener.path().unwrap()).unwrap();
    let accepted = listener.accept().await.unwrap();
    (listener, dialled, accepted)
}

#[tokio::test]
async fn packets_keep_bounds_and_order_of_descriptors() {
    let (_listener, one, other) = pair().await;
    let mut files = Vec::new();
    for text in ["first", "second"] {
        let path = path();
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.rewind().unwrap();
        files.push(file);
    }
    let descriptors: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    one.send(b"with", &descriptors).await.unwrap();
    one.send(b"without", &[]).await.unwrap();
    let mut buffer = [0; 64];
    let received = other.recv(&mut buffer).await.unwrap();
    assert_eq!(&buffer[..received.len], b"with");
    let texts: Vec<String> = received
        .descriptors
        .into_iter()
        .map(|fd| {
            let mut text = String::new();
            File::from(fd).read_to_string(&mut text).unwrap();
            text
        })
        .collect();
    assert_eq!(texts, ["first", "second"]);
    let received = other.recv(&mut buffer).await.unwrap();
    assert_eq!((&buffer[..received.len], received.descriptors.len()), (&b"without"[..], 0));
    drop(one);
    assert_eq!(other.recv(&mut buffer).await.unwrap().len, 0);
}

#[tokio::test]
async fn received_descriptors_are_not_inherited_by_programs() {
    let (_listener, one, other) = pair().await;
    let file = File::open("/dev/null").unwrap();
    one.send(b"x", &[file.as_fd()]).await.unwrap();
    let received = other.recv(&mut [0; 8]).await.unwrap();
    let flags = nix::fcntl::fcntl(&received.descriptors[0], nix::fcntl::FcntlArg::F_GETFD).unwrap();
    assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
}

#[tokio::test]
async fn a_packet_beyond_the_buffer_is_an_error() {
    let (_listener, one, other) = pair().await;
    one.send(&[7; 100], &[]).await.unwrap();
    one.send(b"next", &[]).await.unwrap();
    let mut buffer = [0; 64];
    assert_eq!(other.recv(&mut buffer).await.unwrap_err().kind(), ErrorKind::InvalidData);
    let received = other.recv(&mut buffer).await.unwrap();
    assert_eq!(&buffer[..received.len], b"next");
}

#[tokio::test]
async fn too_many_descriptors_and_empty_packets_are_not_sent() {
    let (_listener, one, _other) = pair().await;
    let file = File::open("/dev/null").unwrap();
    let many = vec![file.as_fd(); MAX_DESCRIPTORS + 1];
    assert_eq!(one.send(b"x", &many).await.unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(one.send(b"", &[]).await.unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[tokio::test]
async fn only_a_dead_predecessors_socket_file_is_replaced() {
    let path = path();
    let listener = SeqPacketListener::bind(&path).unwrap();
    let error = SeqPacketListener::bind(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    drop(listener);
    assert!(!path.exists());
    // A killed process leaves a socket file without a listener.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = SeqPacketListener::bind(&path).unwrap();
    SeqPacket::connect(listener.path().unwrap()).unwrap();
}

#[tokio::test]
async fn the_peers_process_is_known() {
    let (_listener, one, other) = pair().await;
    let own = i32::try_from(std::process::id()).unwrap();
    assert_eq!((one.peer_pid().unwrap(), other.peer_pid().unwrap()), (own, own));
}
