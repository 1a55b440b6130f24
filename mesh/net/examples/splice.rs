//! What a relay between two plain TCP connections costs: bulk and round trips, `splice` beside the
//! copying relay. Prints CPU time of the relay's thread alone. Everything is on loopback.
#![allow(clippy::expect_used, reason = "a measurement that cannot be made ends")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use ambit_net::relay::{Counters, relay_tcp};
use ambit_net::splice::splice;

#[derive(Clone, Copy)]
enum Way {
    Splice,
    Copy,
}

fn main() {
    for round in 0..2 {
        for (name, way) in [("splice", Way::Splice), ("copy", Way::Copy)] {
            let bytes = 4_u64 << 30;
            let (wall, cpu) = measured(way, move |to| bulk(to, bytes), drain);
            let gb = bytes as f64 / 1e9;
            println!(
                "{round} {name:>6} bulk: {:6.1} Gb/s, {:.3} CPU-s/GB",
                gb * 8.0 / wall.as_secs_f64(),
                cpu.as_secs_f64() / gb
            );
            let trips = 50_000;
            let (wall, cpu) = measured(way, move |to| ping(to, trips), echo);
            println!(
                "{round} {name:>6} 64 bytes: {:6.1} µs a round trip, {:.1} µs CPU",
                wall.as_secs_f64() * 1e6 / f64::from(trips),
                cpu.as_secs_f64() * 1e6 / f64::from(trips)
            );
        }
    }
}

/// Wall-clock time of the client, CPU time of the relay.
fn measured(
    way: Way,
    client: impl FnOnce(SocketAddr) + Send + 'static,
    server: fn(TcpStream),
) -> (Duration, Duration) {
    let back = TcpListener::bind("127.0.0.1:0").expect("bind");
    let upstream = back.local_addr().expect("address");
    let serving = std::thread::spawn(move || server(back.accept().expect("accept").0));
    let front = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = front.local_addr().expect("address");
    let relaying = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(relay_one(way, front, upstream));
        cpu_time()
    });
    let start = Instant::now();
    client(address);
    let wall = start.elapsed();
    serving.join().expect("server");
    (wall, relaying.join().expect("relay"))
}

async fn relay_one(way: Way, front: TcpListener, upstream: SocketAddr) {
    let (downstream, _) = front.accept().expect("accept");
    downstream.set_nonblocking(true).expect("non-blocking");
    downstream.set_nodelay(true).expect("no delay");
    let mut downstream = tokio::net::TcpStream::from_std(downstream).expect("register");
    let mut upstream = tokio::net::TcpStream::connect(upstream).await.expect("connect");
    upstream.set_nodelay(true).expect("no delay");
    let counters = Counters::new();
    let ended = match way {
        Way::Splice => splice(&mut downstream, &mut upstream, &counters).await,
        Way::Copy => relay_tcp(&mut downstream, &mut upstream, &counters, None).await,
    };
    ended.expect("relay");
}

fn cpu_time() -> Duration {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).expect("clock");
    time.into()
}

fn bulk(to: SocketAddr, bytes: u64) {
    let mut stream = TcpStream::connect(to).expect("connect");
    let piece = vec![7; 256 << 10];
    for _ in 0..bytes / piece.len() as u64 {
        stream.write_all(&piece).expect("write");
    }
    stream.shutdown(std::net::Shutdown::Write).expect("end");
    assert_eq!(stream.read(&mut [0; 1]).expect("the other end"), 0);
}

fn drain(mut stream: TcpStream) {
    let mut buffer = vec![0; 256 << 10];
    while stream.read(&mut buffer).expect("read") > 0 {}
}

fn ping(to: SocketAddr, trips: u32) {
    let mut stream = TcpStream::connect(to).expect("connect");
    stream.set_nodelay(true).expect("no delay");
    let mut message = [7; 64];
    for _ in 0..trips {
        stream.write_all(&message).expect("write");
        stream.read_exact(&mut message).expect("read");
    }
}

fn echo(mut stream: TcpStream) {
    stream.set_nodelay(true).expect("no delay");
    let mut message = [0; 64];
    while stream.read_exact(&mut message).is_ok() {
        stream.write_all(&message).expect("write");
    }
}
