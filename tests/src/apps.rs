//! Applications that tests run inside pods: echo, server-first, HTTP, and one that says whom it saw.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use ambit_local::Pod;

/// What a server does with a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum App {
    /// Sends back what it gets, until the client is done.
    Echo,
    /// Greets first, `220 NAME\r\n`, then echoes.
    ServerFirst(String),
    /// Answers HTTP/1.1 requests without a body; the answer's body is its name.
    Http(String),
    /// Sends the client's address as it sees it, then closes.
    WhoAmI,
}

/// A server that runs until this is dropped.
#[derive(Debug)]
pub struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) task: JoinHandle<()>,
}

impl Running {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Runs `app` at `address` inside `pod`.
///
/// # Errors
/// When the address can't be bound.
pub async fn run(pod: &Pod, address: SocketAddr, app: App) -> io::Result<Running> {
    let listener = pod.listen(address).await?;
    let address = listener.local_addr()?;
    let task = tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((stream, peer)) = listener.accept().await {
            let app = app.clone();
            connections.spawn(async move {
                // A client that resets its connection is the test's business, not the server's.
                drop(serve(stream, peer, &app).await);
            });
            while connections.try_join_next().is_some() {}
        }
    });
    Ok(Running { address, task })
}

async fn serve(mut stream: TcpStream, peer: SocketAddr, app: &App) -> io::Result<()> {
    stream.set_nodelay(true)?;
    match app {
        App::Echo => echo(stream).await,
        App::ServerFirst(name) => {
            stream.write_all(format!("220 {name}\r\n").as_bytes()).await?;
            echo(stream).await
        }
        App::Http(name) => http(stream, name).await,
        App::WhoAmI => {
            stream.write_all(peer.to_string().as_bytes()).await?;
            stream.shutdown().await
        }
    }
}

async fn echo(mut stream: TcpStream) -> io::Result<()> {
    let (mut reader, mut writer) = stream.split();
    tokio::io::copy(&mut reader, &mut writer).await?;
    writer.shutdown().await
}

async fn http(mut stream: TcpStream, name: &str) -> io::Result<()> {
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{name}", name.len());
    loop {
        if !read_head(&mut stream).await? {
            return Ok(());
        }
        stream.write_all(answer.as_bytes()).await?;
    }
}

/// Reads up to the empty line; false at a clean end.
async fn read_head(stream: &mut TcpStream) -> io::Result<bool> {
    let mut last = [0u8; 4];
    let mut any = false;
    loop {
        let mut byte = [0u8; 1];
        if stream.read(&mut byte).await? == 0 {
            return if any { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(false) };
        }
        any = true;
        last.rotate_left(1);
        last[3] = byte[0];
        if &last == b"\r\n\r\n" {
            return Ok(true);
        }
    }
}

/// One HTTP request on an open connection; the body of the answer.
///
/// # Errors
/// When the connection ends, or the answer is not 200 with a length.
pub async fn get(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<String> {
    get_answer(stream).await.map(|answer| answer.body)
}

/// An answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its body.
    pub body: String,
    /// Whether it says that it is the connection's last (RFC 9112 §9.6).
    pub closes: bool,
}

/// The same, with what the answer says of the connection.
///
/// # Errors
/// As for [`get`].
pub async fn get_answer(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<Answer> {
    stream.write_all(b"GET / HTTP/1.1\r\nhost: app\r\n\r\n").await?;
    stream.flush().await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let byte = stream.read_u8().await?;
        head.push(byte);
        if head.len() > 8192 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer's head is too long"));
        }
    }
    let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok())
        .filter(|_| head.starts_with("http/1.1 200"))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, head.clone()))?;
    let mut body = vec![0u8; length];
    stream.read_exact(&mut body).await?;
    let body = String::from_utf8_lossy(&body).into_owned();
    Ok(Answer { body, closes: head.contains("\r\nconnection: close\r\n") })
}

/// Sends `message`, ends the sending half, and gives everything that came back.
///
/// # Errors
/// When the connection is reset.
pub async fn exchange(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    message: &[u8],
) -> io::Result<Vec<u8>> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    // Both at once: an echo of more than all buffers hold would stop a client that only writes.
    let writing = async {
        writer.write_all(message).await?;
        writer.shutdown().await
    };
    let mut answer = Vec::new();
    tokio::try_join!(writing, reader.read_to_end(&mut answer))?;
    Ok(answer)
}
