//! A pod as a place to open sockets in.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ambit_net::Netns;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

/// How long a connection may take to open.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// A network namespace in which a test plays an application: sockets are made there, and used from here.
#[derive(Clone, Debug)]
pub struct Place {
    netns: Netns,
}

impl Place {
    /// The place inside `netns`.
    pub fn new(netns: Netns) -> Self {
        Self { netns }
    }

    /// The namespace itself.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Listens for TCP connections.
    ///
    /// # Errors
    /// When the namespace can't be entered or the address is taken.
    pub async fn listen(&self, address: SocketAddr) -> io::Result<TcpListener> {
        let listener = self.socket(address, Type::STREAM, move |socket| {
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())?;
            socket.listen(4096)
        });
        TcpListener::from_std(listener.await?.into())
    }

    /// Binds a UDP socket.
    ///
    /// # Errors
    /// When the namespace can't be entered or the address is taken.
    pub async fn udp(&self, address: SocketAddr) -> io::Result<UdpSocket> {
        let socket = self.socket(address, Type::DGRAM, move |socket| socket.bind(&address.into()));
        UdpSocket::from_std(socket.await?.into())
    }

    /// Opens a TCP connection within [`CONNECT_LIMIT`].
    ///
    /// # Errors
    /// When it is refused, or not there in time.
    pub async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.connect_from(None, to).await
    }

    /// Opens a TCP connection from a chosen address of this place.
    ///
    /// # Errors
    /// As [`connect`](Self::connect), and when the address is not of this place.
    pub async fn connect_from(&self, from: Option<IpAddr>, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.socket(to, Type::STREAM, move |socket| match from {
            Some(from) => socket.bind(&SocketAddr::new(from, 0).into()),
            None => Ok(()),
        });
        let socket = tokio::net::TcpSocket::from_std_stream(socket.await?.into());
        let stream = tokio::time::timeout(CONNECT_LIMIT, socket.connect(to))
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("connecting to {to}")))??;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    async fn socket<F>(&self, address: SocketAddr, kind: Type, prepare: F) -> io::Result<Socket>
    where
        F: FnOnce(&Socket) -> io::Result<()> + Send + 'static,
    {
        let make = move || {
            let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
            let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
            socket.set_nonblocking(true)?;
            prepare(&socket)?;
            Ok(socket)
        };
        self.netns.run(make).await.map_err(io::Error::other)?
    }
}
