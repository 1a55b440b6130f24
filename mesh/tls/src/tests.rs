//! The record layer against rustls' own stream at the other end.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use proptest::prelude::*;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ContentType, RootCertStore, ServerConfig, SupportedCipherSuite};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::record::{
    HEADER, KEY_LASTS, MAX_PLAIN, MAX_RECORD, MAX_SEALED, Opener, RecordError, Sealer, complete,
};
use crate::stream::TlsStream;

/// Bytes that a test's connection holds, in each direction.
const WIRE: usize = 64 * 1024;
const SUITES: [SupportedCipherSuite; 2] =
    [cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384];

struct Configs {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

fn configs(suite: SupportedCipherSuite) -> Configs {
    let key = rcgen::KeyPair::generate().unwrap();
    let names = vec!["0.0.0.0".to_owned()];
    let certificate = rcgen::CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
    let certificate: CertificateDer<'static> = certificate.der().clone();
    let provider = Arc::new(CryptoProvider { cipher_suites: vec![suite], ..aws_lc_rs::default_provider() });
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.enable_secret_extraction = true;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    server.enable_secret_extraction = true;
    Configs { client: Arc::new(client), server: Arc::new(server) }
}

fn name() -> ServerName<'static> {
    ServerName::try_from("0.0.0.0").unwrap()
}

type Ours = TlsStream<DuplexStream>;

async fn accept<IO>(mut io: IO, config: Arc<ServerConfig>) -> io::Result<TlsStream<IO>>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let first = crate::FirstBytes::read(&mut io).await?;
    Ok(crate::accept(io, first, config, |_| ()).await?.0)
}

/// We dial rustls.
async fn dialled(configs: &Configs, wire: usize) -> (Ours, server::TlsStream<DuplexStream>) {
    let (near, far) = duplex(wire);
    let acceptor = TlsAcceptor::from(Arc::clone(&configs.server));
    let connecting = crate::connect(near, Arc::clone(&configs.client), name(), |_| ());
    let (ours, theirs) = within(async { tokio::join!(connecting, acceptor.accept(far)) }).await;
    (ours.unwrap().0, theirs.unwrap())
}

/// rustls dials us.
async fn accepted(configs: &Configs, wire: usize) -> (Ours, client::TlsStream<DuplexStream>) {
    let (near, far) = duplex(wire);
    let connector = TlsConnector::from(Arc::clone(&configs.client));
    let accepting = accept(near, Arc::clone(&configs.server));
    let (ours, theirs) = within(async { tokio::join!(accepting, connector.connect(name(), far)) }).await;
    (ours.unwrap(), theirs.unwrap())
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n * 31 + n / 251) as u8).collect()
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), work).await.expect("in time")
}

/// Sends `length` bytes each way at once, says so, and sees the other end.
async fn exchange<A, B>(one: A, other: B, length: usize)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    async fn all(io: impl AsyncRead + AsyncWrite, length: usize) {
        let (mut from, mut to) = tokio::io::split(io);
        let sent = pattern(length);
        let write = async {
            to.write_all(&sent).await.unwrap();
            to.shutdown().await.unwrap();
        };
        let mut got = Vec::new();
        let read = async { from.read_to_end(&mut got).await.unwrap() };
        tokio::join!(write, read);
        assert!(got == sent, "{} of {length} bytes, or others", got.len());
    }
    within(async { tokio::join!(all(one, length), all(other, length)) }).await;
}

#[tokio::test]
async fn rustls_understands_us_and_we_understand_rustls() {
    for suite in SUITES {
        let configs = configs(suite);
        for length in [0, 1, 73, MAX_PLAIN - 1, MAX_PLAIN, MAX_PLAIN + 1, 300 * 1024, 12 << 20] {
            let (ours, theirs) = dialled(&configs, WIRE).await;
            exchange(ours, theirs, length).await;
            let (ours, theirs) = accepted(&configs, WIRE).await;
            exchange(ours, theirs, length).await;
        }
    }
}

/// A wire that takes and gives a few bytes at a time.
struct Trickle(DuplexStream, usize);

impl AsyncRead for Trickle {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut some = vec![0; self.1.min(buf.remaining())];
        let mut few = ReadBuf::new(&mut some);
        ready!(Pin::new(&mut self.0).poll_read(cx, &mut few))?;
        buf.put_slice(few.filled());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Trickle {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let few = self.1.min(buf.len());
        Pin::new(&mut self.0).poll_write(cx, &buf[..few])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[tokio::test]
async fn records_arrive_whole_however_the_wire_cuts_them() {
    let configs = configs(SUITES[0]);
    for few in [1, 7, 1000] {
        let (near, far) = duplex(WIRE);
        let connector = TlsConnector::from(Arc::clone(&configs.client));
        let accepting = accept(Trickle(near, few), Arc::clone(&configs.server));
        let (ours, theirs) = within(async { tokio::join!(accepting, connector.connect(name(), far)) }).await;
        exchange(ours.unwrap(), theirs.unwrap(), 40_000).await;
    }
}

#[tokio::test]
async fn pieces_of_all_sizes_are_sent_in_their_order() {
    let configs = configs(SUITES[0]);
    let (mut ours, mut theirs) = dialled(&configs, 1 << 20).await;
    let data = pattern(200_000);
    let cuts = [9, 16_375, 0, 1, 16_384, 30_000, 9, 100_000];
    let mut pieces = Vec::new();
    let mut rest = &data[..];
    for cut in cuts {
        let (piece, after) = rest.split_at(cut);
        pieces.push(io::IoSlice::new(piece));
        rest = after;
    }
    let total: usize = cuts.iter().sum();
    let sent = within(ours.write_vectored(&pieces)).await.unwrap();
    assert_eq!(sent, total, "one call takes a large piece with its framing");
    ours.flush().await.unwrap();
    let mut got = vec![0; total];
    within(theirs.read_exact(&mut got)).await.unwrap();
    assert!(got == data[..total]);
}

#[tokio::test]
async fn a_reader_with_little_room_gets_all_in_pieces() {
    let configs = configs(SUITES[0]);
    let (mut ours, mut theirs) = dialled(&configs, WIRE).await;
    let data = pattern(40_000);
    theirs.write_all(&data).await.unwrap();
    theirs.shutdown().await.unwrap();
    let mut got = Vec::new();
    loop {
        let mut some = vec![0; 1 + got.len() % 6000];
        match within(ours.read(&mut some)).await.unwrap() {
            0 => break,
            n => got.extend_from_slice(&some[..n]),
        }
    }
    assert!(got == data);
}

#[tokio::test]
async fn keys_are_updated_when_the_peer_does_and_when_ours_is_worn() {
    let configs = configs(SUITES[1]);
    let (mut ours, mut theirs) = dialled(&configs, WIRE).await;
    for round in 0..3 {
        ours.key_lasts = if round == 1 { 0 } else { KEY_LASTS };
        // rustls updates its key and asks for ours.
        theirs.get_mut().1.refresh_traffic_keys().unwrap();
        theirs.write_all(b"question").await.unwrap();
        let mut got = [0; 8];
        within(ours.read_exact(&mut got)).await.unwrap();
        assert_eq!(&got, b"question");
        ours.write_all(b"answered").await.unwrap();
        ours.flush().await.unwrap();
        within(theirs.read_exact(&mut got)).await.unwrap();
        assert_eq!(&got, b"answered");
    }
    exchange(ours, theirs, 100_000).await;
}

#[tokio::test]
async fn our_end_is_sent_and_the_peers_end_is_no_cut() {
    let configs = configs(SUITES[0]);
    let (mut ours, mut theirs) = accepted(&configs, WIRE).await;
    theirs.write_all(b"last").await.unwrap();
    theirs.shutdown().await.unwrap();
    let mut got = Vec::new();
    within(ours.read_to_end(&mut got)).await.unwrap();
    assert_eq!(got, b"last");
    ours.write_all(b"still").await.unwrap();
    ours.shutdown().await.unwrap();
    got.clear();
    within(theirs.read_to_end(&mut got)).await.unwrap();
    assert_eq!(got, b"still");

    let (mut ours, theirs) = accepted(&configs, WIRE).await;
    drop(theirs.into_inner().0);
    let cut = within(ours.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
}

/// Feeds `bytes` to us as if the peer had sent them after `before`; what we say, and what the peer hears then.
async fn fed(before: &[u8], bytes: &[u8]) -> (Vec<u8>, String, String) {
    let configs = configs(SUITES[0]);
    let (mut ours, mut theirs) = accepted(&configs, WIRE).await;
    theirs.write_all(before).await.unwrap();
    theirs.get_mut().0.write_all(bytes).await.unwrap();
    let mut got = Vec::new();
    let ended = within(ours.read_to_end(&mut got)).await.unwrap_err();
    let again = within(ours.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(ended.to_string(), again.to_string(), "what failed stays failed");
    assert!(within(ours.write(b"x")).await.is_err());
    let heard = within(theirs.read(&mut [0; 8])).await.unwrap_err();
    (got, ended.to_string(), heard.to_string())
}

#[tokio::test]
async fn forged_records_end_the_connection_with_an_alert() {
    let forged = [&[23, 3, 3, 0, 40][..], &[7; 40]].concat();
    let cases: [(&[u8], RecordError, &str); 5] = [
        (&forged, RecordError::Unauthentic, "BadRecordMac"),
        (
            &[23, 3, 3, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            RecordError::Unauthentic,
            "BadRecordMac",
        ),
        (&[23, 3, 3, 0, 0], RecordError::Unauthentic, "BadRecordMac"),
        (&[23, 3, 3, 0x41, 1], RecordError::Oversized(MAX_RECORD + 1), "RecordOverflow"),
        (&[20, 3, 3, 0, 1, 1], RecordError::Unexpected(20), "UnexpectedMessage"),
    ];
    for (bytes, error, alert) in cases {
        let (got, said, heard) = fed(b"good", bytes).await;
        assert_eq!(got, b"good", "what came before is delivered");
        assert_eq!(said, error.to_string());
        assert!(heard.contains(alert), "{heard}");
    }
}

#[tokio::test]
async fn what_is_no_tls_is_refused_with_an_alert() {
    let configs = configs(SUITES[0]);
    for words in [&b"GET / HTTP/1.1\r\nhost: server\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
        let (near, mut far) = duplex(WIRE);
        far.write_all(words).await.unwrap();
        let refused = within(accept(near, Arc::clone(&configs.server))).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
        let mut answer = Vec::new();
        within(far.read_to_end(&mut answer)).await.unwrap();
        assert_eq!((answer.len(), answer[0]), (7, 21), "an alert: {answer:?}");
    }
}

/// Two ends of a connection without any I/O.
fn keys() -> (Sealer, Opener) {
    use rustls::crypto::cipher::{AeadKey, Iv};
    let secrets = || {
        let key = AeadKey::from([7; 32]);
        (0, rustls::ConnectionTrafficSecrets::Aes256Gcm { key, iv: Iv::copy(&[9; 12]) })
    };
    (Sealer::new(secrets()).unwrap(), Opener::new(secrets()).unwrap())
}

/// Records sealed by a peer who holds the keys, and what becomes of them.
async fn sent_by_a_peer(records: impl FnOnce(&mut Sealer) -> Vec<u8>) -> Result<Vec<u8>, String> {
    let configs = configs(SUITES[0]);
    let (ours, theirs) = duplex(1 << 20);
    let mut session =
        rustls::client::UnbufferedClientConnection::new(Arc::clone(&configs.client), name()).unwrap();
    let mut theirs = theirs;
    let (ours, _) = tokio::join!(
        accept(ours, Arc::clone(&configs.server)),
        crate::handshake::run(&mut theirs, &mut session, Vec::new())
    );
    let (secrets, _) = session.dangerous_into_kernel_connection().unwrap();
    let mut sealer = Sealer::new(secrets.tx).unwrap();
    theirs.write_all(&records(&mut sealer)).await.unwrap();
    let mut got = Vec::new();
    let mut ours = ours.unwrap();
    let ended = within(ours.read_to_end(&mut got)).await;
    ended.map(|_| got).map_err(|error| error.to_string())
}

fn record(sealer: &mut Sealer, kind: ContentType, content: &[u8]) -> Vec<u8> {
    let mut out = vec![0; MAX_SEALED];
    let length = sealer.seal(kind, content, &mut out).unwrap();
    out.truncate(length);
    out
}

#[tokio::test]
async fn a_peer_with_the_keys_may_not_send_everything() {
    let close = |sealer: &mut Sealer| record(sealer, ContentType::Alert, &[1, 0]);
    let data = |sealer: &mut Sealer, n| record(sealer, ContentType::ApplicationData, &pattern(n));
    let empty = |n| {
        move |sealer: &mut Sealer| {
            let mut all = vec![data(sealer, 5)];
            all.extend((0..n).map(|_| data(sealer, 0)));
            all.push(data(sealer, 5));
            all.push(close(sealer));
            all.concat()
        }
    };
    assert_eq!(sent_by_a_peer(empty(32)).await.unwrap().len(), 10);
    assert_eq!(sent_by_a_peer(empty(33)).await.unwrap_err(), RecordError::Overhead.to_string());

    let handshake =
        |content: &'static [u8]| move |sealer: &mut Sealer| record(sealer, ContentType::Handshake, content);
    let not_allowed: [&[u8]; 7] = [
        // A ticket from a client, Finished, a key update that says neither, one with more behind it.
        &[4, 0, 0, 0],
        &[20, 0, 0, 1, 0],
        &[24, 0, 0, 1, 2],
        &[24, 0, 0, 1, 0, 24, 0, 0, 1, 0],
        // One of another length, one that goes on elsewhere, nothing.
        &[24, 0, 0, 2, 0, 0],
        &[24, 0, 0, 1],
        &[24, 0],
    ];
    for content in not_allowed {
        assert_eq!(sent_by_a_peer(handshake(content)).await.unwrap_err(), RecordError::Handshake.to_string());
    }
    // RFC 8446 §5.1: no record of a kind that carries nothing else may be without content.
    let alert =
        |content: &'static [u8]| move |sealer: &mut Sealer| record(sealer, ContentType::Alert, content);
    assert_eq!(sent_by_a_peer(alert(&[])).await.unwrap_err(), RecordError::Unexpected(21).to_string());
    assert!(sent_by_a_peer(alert(&[2, 80])).await.unwrap_err().contains("InternalError"));
    let heartbeat = |sealer: &mut Sealer| record(sealer, ContentType::Heartbeat, b"bleed");
    assert_eq!(sent_by_a_peer(heartbeat).await.unwrap_err(), RecordError::Unexpected(24).to_string());
}

proptest! {
    #[test]
    fn what_is_sealed_is_opened_once_in_order_and_unaltered(
        contents in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..400), 1..6),
        in_place: bool,
        flip in any::<prop::sample::Index>(),
    ) {
        let (mut sealer, mut opener) = keys();
        for content in &contents {
            let mut sealed = record(&mut sealer, ContentType::ApplicationData, content);
            prop_assert_eq!(complete(&sealed), Ok(Some(sealed.len())));
            prop_assert_eq!(complete(&sealed[..sealed.len() - 1]), Ok(None));
            let mut out = vec![0; Opener::room(sealed.len())];
            let opened = if in_place {
                let opened = opener.open_in_place(&mut sealed).unwrap();
                out = sealed[HEADER..].to_vec();
                opened
            } else {
                opener.open_into(&sealed, &mut out).unwrap()
            };
            prop_assert_eq!(opened.kind, ContentType::ApplicationData);
            prop_assert_eq!(&out[..opened.length], &content[..]);
        }
        let mut altered = record(&mut sealer, ContentType::ApplicationData, b"altered");
        let at = flip.index(altered.len());
        altered[at] ^= 1;
        let mut out = vec![0; 1 << 16];
        prop_assert!(opener.open_into(&altered, &mut out).is_err());
    }

    #[test]
    fn padding_is_taken_off(content: Vec<u8>, padding in 0..300usize) {
        let (mut sealer, mut opener) = keys();
        // A record of "application data" whose content is data, its type, and zeros, sealed with a type of zero.
        let inner = [&content[..], &[23], &vec![0; padding]].concat();
        let sealed = record(&mut sealer, ContentType::from(0), &inner);
        let mut out = vec![0; Opener::room(sealed.len())];
        let opened = opener.open_into(&sealed, &mut out).unwrap();
        prop_assert_eq!(opened.kind, ContentType::ApplicationData);
        prop_assert_eq!(&out[..opened.length], &content[..]);
    }

    #[test]
    fn any_bytes_are_refused_without_harm(bytes: Vec<u8>) {
        let (_, mut opener) = keys();
        if let Ok(Some(length)) = complete(&bytes) {
            let mut out = vec![0; 1 << 16];
            prop_assert!(opener.open_into(&bytes[..length], &mut out).is_err());
        }
        prop_assert!(opener.open_in_place(&mut bytes.clone()).is_err());
    }
}
