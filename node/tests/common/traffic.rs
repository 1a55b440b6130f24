//! Connections of a pod, and the proxy's end of those that are captured.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use ambit_net::listen::{Options as SocketOptions, listen_tcp};
use ambit_net::{Netns, SocketStock, connect};
use ambit_node::listeners::{Listener, bind};
use ambit_node::redirect::{self, Fault, Options, Stage, plan};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::Host;

pub(crate) const SOON: Duration = Duration::from_secs(5);

/// The pod's listeners, as a proxy would have them.
pub(crate) struct Proxy {
    pub(crate) listeners: Vec<Listener>,
}

impl Proxy {
    pub(crate) async fn in_pod(pod: &Host) -> Self {
        Self { listeners: bind(&pod.netns, &Options::default()).await.unwrap() }
    }

    pub(crate) fn find(&self, port: u16, udp: bool, like: IpAddr) -> std::os::fd::OwnedFd {
        let found = self.listeners.iter().find(|l| {
            l.listen.port == port && l.listen.udp == udp && l.listen.address.is_ipv4() == like.is_ipv4()
        });
        found.unwrap().as_fd().try_clone_to_owned().unwrap()
    }

    pub(crate) fn tcp(&self, port: u16, like: IpAddr) -> TcpListener {
        TcpListener::from_std(self.find(port, false, like).into()).unwrap()
    }

    pub(crate) fn udp(&self, port: u16, like: IpAddr) -> UdpSocket {
        UdpSocket::from_std(self.find(port, true, like).into()).unwrap()
    }
}

pub(crate) async fn dial(from: &Netns, to: SocketAddr) -> TcpStream {
    connect(&SocketStock::new(from.clone(), None), to, SOON).await.unwrap()
}

pub(crate) async fn listen(inside: &Netns, at: SocketAddr) -> TcpListener {
    let listener = listen_tcp(inside, at, SocketOptions::default()).await.unwrap();
    TcpListener::from_std(listener).unwrap()
}

pub(crate) async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    tokio::time::timeout(SOON, listener.accept()).await.expect("a connection within 5 s").unwrap()
}

/// A byte each way.
pub(crate) async fn talk(one: &mut TcpStream, other: &mut TcpStream) {
    for byte in 0..2 {
        one.write_all(&[byte]).await.unwrap();
        let got = tokio::time::timeout(SOON, other.read_u8()).await.expect("a byte within 5 s");
        assert_eq!(got.unwrap(), byte);
        other.write_all(&[byte]).await.unwrap();
        let got = tokio::time::timeout(SOON, one.read_u8()).await.expect("a byte within 5 s");
        assert_eq!(got.unwrap(), byte);
    }
}

pub(crate) async fn apply(pod: &Host, stage: Stage) -> Vec<Fault> {
    redirect::apply(&pod.netns, &plan(&Options::default(), stage)).await.unwrap()
}

pub(crate) async fn set(pod: &Host, setting: &str, value: impl ToString) {
    let (path, value) = (format!("/proc/sys/{setting}"), value.to_string());
    pod.netns.run(move || std::fs::write(path, value)).await.unwrap().unwrap();
}
