//! An application that does not read, together with one that reads all that it gets.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ambit_local::Pod;
use ambit_tests::usage::resident;
use ambit_tests::wait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::bed::Bed;

const PORT: u16 = 8090;
/// Bytes of the bulk transfer.
const BULK: usize = 64 << 20;
/// A transfer that takes longer does not move at all.
const HELD_UP: Duration = Duration::from_secs(30);
/// Bytes that wait for a reader at most: the stream's window (4 MiB), what the sender's proxy holds (0.5 MiB), and
/// the socket buffers of two applications and three connections, which the kernel grows to 6 MiB at most (tcp_rmem).
const WAITING: usize = 24 << 20;
/// What that may cost a proxy, bytes: the same without the sockets, and what the bulk stream beside it needs.
const MEMORY: u64 = 24 << 20;
/// Bulk transfers beside them, until one is as fast as it should be.
const TRIES: usize = 8;
/// Streams that nobody reads.
const SLOW: usize = 3;

/// Reads nothing of a connection that begins with `s` before `release` says so; then, and of others at once,
/// everything. Sends back how much it was.
async fn reader(pod: &Pod, release: watch::Receiver<bool>) -> JoinHandle<()> {
    let listener = pod.listen(SocketAddr::new(pod.ip().into(), PORT)).await.unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut release = release.clone();
            tokio::spawn(async move {
                let first = stream.read_u8().await?;
                if first == b's' {
                    release.wait_for(|released| *released).await.ok();
                }
                let (mut total, mut buffer) = (1_u64, vec![0; 256 << 10]);
                loop {
                    match stream.read(&mut buffer).await? {
                        0 => break,
                        more => total += more as u64,
                    }
                }
                stream.write_u64(total).await
            });
        }
    })
}

async fn open(bed: &Bed) -> TcpStream {
    let target = SocketAddr::new(bed.servers[0].ip().into(), PORT);
    bed.client.connect_within(target, wait::SOON).await.unwrap()
}

/// Duration of a bulk transfer, from the first byte to the reader's confirmation.
async fn bulk(bed: &Bed) -> Duration {
    let mut stream = open(bed).await;
    let began = Instant::now();
    let transfer = async {
        stream.write_all(&vec![b'b'; BULK]).await.unwrap();
        stream.shutdown().await.unwrap();
        stream.read_u64().await.unwrap()
    };
    let received = tokio::time::timeout(HELD_UP, transfer).await.expect("a bulk stream is held up");
    assert_eq!(received, BULK as u64);
    began.elapsed()
}

/// Writes until nothing more is taken; how much it was.
async fn stuff(stream: &mut TcpStream) -> usize {
    let chunk = vec![b's'; 64 << 10];
    let mut total = 0;
    // Nothing for a second: the writer is held back.
    while let Ok(written) = tokio::time::timeout(Duration::from_secs(1), stream.write(&chunk)).await {
        total += written.unwrap();
        assert!(total <= WAITING, "{total} bytes are taken for a reader that does not read");
    }
    total
}

#[tokio::test(flavor = "multi_thread")]
async fn stalled_readers_neither_slow_bulk_nor_grow_memory() {
    let bed = Bed::start(true, &[1]).await;
    let (release, released) = watch::channel(false);
    let reading = reader(&bed.servers[0], released).await;
    let alone = bulk(&bed).await.min(bulk(&bed).await);
    let proxies = [0, 1].map(|node| bed.cluster.ztunnel(node).unwrap());
    let before = proxies.each_ref().map(resident);
    let (mut slow, mut sent) = (Vec::new(), Vec::new());
    for _ in 0..SLOW {
        let mut stream = open(&bed).await;
        sent.push(stuff(&mut stream).await);
        slow.push(stream);
    }
    // The best of some: other work on this machine slows single ones, a window that is used up slows all.
    let bound = alone * 2 + Duration::from_millis(200);
    let mut beside = Duration::MAX;
    for _ in 0..TRIES {
        beside = beside.min(bulk(&bed).await);
        if beside < bound {
            break;
        }
    }
    for (before, proxy) in before.into_iter().zip(&proxies) {
        let grown = resident(proxy).saturating_sub(before);
        assert!(grown < MEMORY * SLOW as u64, "{grown} bytes for {SLOW} streams that nobody reads");
    }
    assert!(beside < bound, "{beside:?} beside, {alone:?} alone");
    release.send_replace(true);
    for (mut stream, sent) in slow.into_iter().zip(sent) {
        stream.shutdown().await.unwrap();
        let received = tokio::time::timeout(wait::SOON, stream.read_u64()).await;
        assert_eq!(received.expect("read to the end").unwrap(), sent as u64);
    }
    reading.abort();
    bed.shutdown().await;
}
