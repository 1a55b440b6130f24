//! HTTP/1.1 by hand: a server that reports what it was sent, and a client that sends any bytes, right or wrong.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ambit_local::Pod;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

/// What a server answers, given its name, the head of the request and the body as it came. It may block: each answer has a thread.
pub type Answer = Arc<dyn Fn(&str, &str, &[u8]) -> Vec<u8> + Send + Sync>;

/// A server that runs until this is dropped.
#[derive(Debug)]
pub struct Server(JoinHandle<()>);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// An answer with this status, headers and body.
pub fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\n{headers}content-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// Answers with the server's name, the request's head and its body.
pub fn mirror() -> Answer {
    Arc::new(|name, head, body| {
        answer("200 OK", "", &format!("server: {name}\n{head}{}", String::from_utf8_lossy(body)))
    })
}

/// Serves HTTP/1.1 at `address` in a pod.
///
/// # Errors
/// When the address is taken.
pub async fn serve(pod: &Pod, address: SocketAddr, name: &str, answer: Answer) -> io::Result<Server> {
    let listener = pod.listen(address).await?;
    let name = name.to_owned();
    Ok(Server(tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (name, answer) = (name.clone(), answer.clone());
            tokio::spawn(async move {
                // A proxy that gives up a connection is the test's business.
                drop(connection(stream, &name, &answer).await);
            });
        }
    })))
}

/// Serves connections by hand.
///
/// # Errors
/// When the address can't be listened on.
pub async fn accept<F: Future<Output = io::Result<()>> + Send + 'static>(
    pod: &Pod,
    address: SocketAddr,
    serve: impl Fn(TcpStream) -> F + Send + 'static,
) -> io::Result<Server> {
    let listener = pod.listen(address).await?;
    Ok(Server(tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let serving = serve(stream);
            // A proxy that gives up a connection is the test's business.
            tokio::spawn(async move { drop(serving.await) });
        }
    })))
}

/// Serves HTTP/1.1 inside TLS. The server's name is followed by lines with what the client asked for: `sni`, `alpn`, and `shown` with the
/// number of its certificates.
///
/// # Errors
/// When the address can't be listened on.
pub async fn serve_tls(
    pod: &Pod,
    address: SocketAddr,
    name: &str,
    answer: Answer,
    config: Arc<rustls::ServerConfig>,
) -> io::Result<Server> {
    let listener = pod.listen(address).await?;
    let name = name.to_owned();
    Ok(Server(tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (name, answer) = (name.clone(), answer.clone());
            let acceptor = TlsAcceptor::from(config.clone());
            tokio::spawn(async move {
                // A proxy that does not like the certificate is the test's business.
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let tls = stream.get_ref().1;
                let sni = tls.server_name().unwrap_or("-");
                let alpn = String::from_utf8_lossy(tls.alpn_protocol().unwrap_or(b"-"));
                let shown = tls.peer_certificates().map_or(0, <[_]>::len);
                let name = format!("{name}\nsni: {sni}\nalpn: {alpn}\nshown: {shown}");
                drop(connection(stream, &name, &answer).await);
            });
        }
    })))
}

async fn connection(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    name: &str,
    answer: &Answer,
) -> io::Result<()> {
    let mut read = Vec::new();
    while let Some(mut head) = head(&mut stream, &mut read).await? {
        let (body, trailers) = body(&mut stream, &mut read, &head).await?;
        // Where there are any they are reported with the fields of the head.
        head.push_str(&trailers);
        // Some answers sleep, which must stop nobody else's task.
        let (answer, name) = (answer.clone(), name.to_owned());
        let answer = tokio::task::spawn_blocking(move || answer(&name, &head, &body)).await?;
        if answer.is_empty() {
            return Ok(());
        }
        stream.write_all(&answer).await?;
    }
    Ok(())
}

/// The head of the next message, without the empty line; `None` at the end of the connection.
///
/// # Errors
/// When the connection breaks.
pub async fn head(stream: &mut (impl AsyncRead + Unpin), read: &mut Vec<u8>) -> io::Result<Option<String>> {
    loop {
        // A record of TLS: a server that speaks none closes the connection.
        if read.first() == Some(&0x16) {
            return Ok(None);
        }
        if let Some(at) = read.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            let rest = read.split_off(at + 4);
            let head = std::mem::replace(read, rest);
            return Ok(Some(String::from_utf8_lossy(&head).into_owned()));
        }
        if stream.read_buf(read).await? == 0 {
            return Ok(None);
        }
    }
}

/// The value of a header; names in lower case.
pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (known, value) = line.split_once(':')?;
        known.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// A message's body and its trailers.
///
/// # Errors
/// When the connection breaks.
pub async fn body(
    stream: &mut (impl AsyncRead + Unpin),
    read: &mut Vec<u8>,
    head: &str,
) -> io::Result<(Vec<u8>, String)> {
    if header(head, "transfer-encoding").is_some_and(|coding| coding.contains("chunked")) {
        let mut whole = Vec::new();
        loop {
            let line = line(stream, read).await?;
            let length = usize::from_str_radix(line.split(';').next().unwrap_or_default().trim(), 16);
            let length = length.map_err(|_| io::Error::new(io::ErrorKind::InvalidData, line.clone()))?;
            if length == 0 {
                let mut trailers = String::new();
                loop {
                    let line = self::line(stream, read).await?;
                    if line.is_empty() {
                        return Ok((whole, trailers));
                    }
                    trailers.push_str(&line);
                    trailers.push_str("\r\n");
                }
            }
            whole.extend(exactly(stream, read, length).await?);
            self::line(stream, read).await?;
        }
    }
    let length = header(head, "content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    Ok((exactly(stream, read, length).await?, String::new()))
}

async fn line(stream: &mut (impl AsyncRead + Unpin), read: &mut Vec<u8>) -> io::Result<String> {
    loop {
        if let Some(at) = read.windows(2).position(|bytes| bytes == b"\r\n") {
            let rest = read.split_off(at + 2);
            let mut line = std::mem::replace(read, rest);
            line.truncate(at);
            return Ok(String::from_utf8_lossy(&line).into_owned());
        }
        if stream.read_buf(read).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

async fn exactly(
    stream: &mut (impl AsyncRead + Unpin),
    read: &mut Vec<u8>,
    length: usize,
) -> io::Result<Vec<u8>> {
    while read.len() < length {
        if stream.read_buf(read).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let rest = read.split_off(length);
    Ok(std::mem::replace(read, rest))
}

/// A response as it came.
#[derive(Debug, Clone)]
pub struct Response {
    /// Its status code.
    pub status: u16,
    /// Its head.
    pub head: String,
    /// Its body.
    pub body: String,
    /// Its trailers.
    pub trailers: String,
}

impl Response {
    /// A header of it.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }

    /// A header of the request as the server got it.
    pub fn sent(&self, name: &str) -> Option<&str> {
        header(&self.body, name)
    }

    /// The name of the server that answered.
    pub fn server(&self) -> &str {
        self.sent("server").unwrap_or_default()
    }

    /// The request line as the server got it.
    pub fn request_line(&self) -> &str {
        self.body.lines().nth(1).unwrap_or_default()
    }
}

/// What bytes are sent and read on.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<IO: AsyncRead + AsyncWrite + Send + Unpin> Stream for IO {}

/// A connection to the mesh.
#[expect(missing_debug_implementations, reason = "a stream of any kind")]
pub struct Client {
    stream: Box<dyn Stream>,
    read: Vec<u8>,
}

impl Client {
    /// A connection from inside a pod.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn connect(pod: &Pod, to: SocketAddr) -> io::Result<Client> {
        Ok(Client::over(pod.connect(to).await?))
    }

    /// A client that speaks over any stream, as one of TLS.
    pub fn over(stream: impl Stream + 'static) -> Client {
        Client { stream: Box::new(stream), read: Vec::new() }
    }

    /// Sends bytes and reads one response.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn send(&mut self, request: &[u8]) -> io::Result<Response> {
        self.stream.write_all(request).await?;
        self.response().await
    }

    /// Reads one response.
    ///
    /// # Errors
    /// When there is none within 20 s.
    pub async fn response(&mut self) -> io::Result<Response> {
        let limit = Duration::from_secs(20);
        let reading = async {
            let Some(head) = head(&mut self.stream, &mut self.read).await? else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
            let (body, trailers) = match status {
                100 | 204 | 304 | 101 => (Vec::new(), String::new()),
                _ => body(&mut self.stream, &mut self.read, &head).await?,
            };
            Ok(Response { status, head, body: String::from_utf8_lossy(&body).into_owned(), trailers })
        };
        tokio::time::timeout(limit, reading).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Sends bytes and waits for nothing.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// All bytes until the other end closes the connection.
    ///
    /// # Errors
    /// When the connection breaks, or is not closed in time.
    pub async fn rest(&mut self) -> io::Result<Vec<u8>> {
        let limit = Duration::from_secs(20);
        let mut all = std::mem::take(&mut self.read);
        let reading = self.stream.read_to_end(&mut all);
        tokio::time::timeout(limit, reading).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        Ok(all)
    }

    /// So many bytes, of whatever is spoken.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn bytes(&mut self, count: usize) -> io::Result<Vec<u8>> {
        let reading = exactly(&mut self.stream, &mut self.read, count);
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, reading).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Whether the other end has closed the connection, or does within a moment.
    pub async fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        let read = tokio::time::timeout(Duration::from_secs(20), self.stream.read(&mut byte)).await;
        matches!(read, Ok(Ok(0) | Err(_)))
    }
}

/// One GET on a connection of its own.
///
/// # Errors
/// When the connection breaks, or there is no answer.
pub async fn get(pod: &Pod, to: SocketAddr, path: &str, headers: &str) -> io::Result<Response> {
    request(pod, to, "GET", path, headers, "").await
}

/// One request on a connection of its own.
///
/// # Errors
/// When the connection breaks, or there is no answer.
pub async fn request(
    pod: &Pod,
    to: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> io::Result<Response> {
    let host = if headers.to_ascii_lowercase().contains("host:") { "" } else { "host: app.example\r\n" };
    let length = if body.is_empty() { String::new() } else { format!("content-length: {}\r\n", body.len()) };
    let text = format!("{method} {path} HTTP/1.1\r\n{host}{headers}{length}\r\n{body}");
    Client::connect(pod, to).await?.send(text.as_bytes()).await
}

/// The value of the series of a scrape that begins like this.
///
/// # Panics
/// When there is none.
pub fn metric(scrape: &str, series: &str) -> u64 {
    let value = scrape.lines().find_map(|line| line.strip_prefix(series));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or_else(|| panic!("no {series} in {scrape}"))
}
