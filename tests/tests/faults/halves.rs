//! Connections of which one half has ended long before the other goes on.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use ambit_local::Pod;
use ambit_tests::wait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::bed::Bed;

/// Where the server waits for its client's half to end, and where it ends its own first.
const CLIENT_FIRST: u16 = 8090;
const SERVER_FIRST: u16 = 8091;
/// Until the other half goes on: longer than the kernel remembers such a connection by itself, which is a minute
/// (`nf_conntrack_tcp_timeout_close_wait`), and than the proxy's first probe takes, which is another.
const SILENCE: Duration = Duration::from_secs(75);
const LIMIT: Duration = Duration::from_secs(150);
/// What nobody may read on the wire.
const QUESTION: &[u8] = b"what is asked";
const ANSWER: &[u8] = b"what is answered";

/// Serves one connection to each of the two ports, and passes on what it was asked.
async fn serve(pod: &Pod) -> mpsc::UnboundedReceiver<Vec<u8>> {
    let (heard, questions) = mpsc::unbounded_channel();
    for port in [CLIENT_FIRST, SERVER_FIRST] {
        let listener = pod.listen(SocketAddr::new(pod.ip().into(), port)).await.unwrap();
        let heard = heard.clone();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await?;
            if port == SERVER_FIRST {
                stream.write_all(ANSWER).await?;
                stream.shutdown().await?;
            }
            let mut question = Vec::new();
            stream.read_to_end(&mut question).await?;
            heard.send(question).ok();
            if port == CLIENT_FIRST {
                tokio::time::sleep(SILENCE).await;
                stream.write_all(ANSWER).await?;
            }
            io::Result::Ok(())
        });
    }
    questions
}

async fn dial(client: &Pod, server: &Pod, port: u16) -> io::Result<TcpStream> {
    client.connect_within(SocketAddr::new(server.ip().into(), port), wait::SOON).await
}

/// Ends the client's half with the question and reads what is answered later.
async fn ask_at_once(client: &Pod, server: &Pod) -> io::Result<Vec<u8>> {
    let mut stream = dial(client, server, CLIENT_FIRST).await?;
    let mut answer = Vec::new();
    stream.write_all(QUESTION).await?;
    stream.shutdown().await?;
    stream.read_to_end(&mut answer).await?;
    Ok(answer)
}

/// Reads what the server says before it ends its half, and asks later.
async fn ask_later(client: &Pod, server: &Pod) -> io::Result<Vec<u8>> {
    let mut stream = dial(client, server, SERVER_FIRST).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    tokio::time::sleep(SILENCE).await;
    stream.write_all(QUESTION).await?;
    stream.shutdown().await?;
    Ok(answer)
}

#[ignore = "takes 75 s, which is the kernel's own timer; `make soak` runs it"]
#[tokio::test(flavor = "multi_thread")]
async fn a_half_closed_tunnel_lasts_longer_than_a_minute() {
    let bed = Bed::start(true, &[0, 1]).await;
    let capture = bed.cluster.capture().await.unwrap();
    let mut heard = Vec::new();
    for server in &bed.servers {
        heard.push(serve(server).await);
    }
    let (near, far) = (&bed.servers[0], &bed.servers[1]);
    let client = &bed.client;
    let asked = tokio::time::timeout(LIMIT, async {
        tokio::join!(
            ask_at_once(client, near),
            ask_at_once(client, far),
            ask_later(client, near),
            ask_later(client, far)
        )
    });
    let (near_at_once, far_at_once, near_later, far_later) = asked.await.expect("answers in time");
    for answer in [near_at_once, far_at_once, near_later, far_later] {
        assert_eq!(answer.unwrap(), ANSWER);
    }
    for questions in &mut heard {
        for _ in [CLIENT_FIRST, SERVER_FIRST] {
            let question = tokio::time::timeout(wait::SOON, questions.recv()).await.expect("a question");
            assert_eq!(question.unwrap(), QUESTION);
        }
    }
    let captured = capture.stop().await.unwrap();
    assert_eq!(captured.dropped, 0, "the capture is complete");
    for text in [QUESTION, ANSWER] {
        assert_eq!(captured.find(text), [], "on the wire: {}", String::from_utf8_lossy(text));
    }
    bed.shutdown().await;
}
