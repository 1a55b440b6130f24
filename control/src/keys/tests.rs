//! Keys are fetched from real servers.

use std::net::SocketAddr;

use bytes::Bytes;
use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;

const SET: &str =
    r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

/// Answers by path; the empty answer is none at all.
type Answers = Arc<Mutex<BTreeMap<&'static str, String>>>;

/// The set as it is passed on.
fn set() -> Bytes {
    ambit_token::keys::canonical(SET.as_bytes()).unwrap().into()
}

fn answer(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

async fn respond(mut stream: impl AsyncRead + AsyncWrite + Unpin, answers: &Answers) {
    let mut head = Vec::new();
    while !head.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
        if stream.read_buf(&mut head).await.unwrap_or(0) == 0 {
            return;
        }
    }
    let head = String::from_utf8(head).unwrap();
    let path = head.split(' ').nth(1).unwrap();
    let answer = answers.lock().get(path).cloned().unwrap_or_else(|| answer("404 Not Found", ""));
    if answer.is_empty() {
        std::future::pending::<()>().await;
    }
    stream.write_all(answer.as_bytes()).await.unwrap_or_default();
    stream.shutdown().await.unwrap_or_default();
}

async fn serve(answers: &Answers, tls: Option<TlsAcceptor>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answers = answers.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (answers, tls) = (answers.clone(), tls.clone());
            tokio::spawn(async move {
                match tls {
                    None => respond(stream, &answers).await,
                    Some(tls) => {
                        if let Ok(stream) = tls.accept(stream).await {
                            respond(stream, &answers).await;
                        }
                    }
                }
            });
        }
    });
    address
}

fn answers(all: impl IntoIterator<Item = (&'static str, String)>) -> Answers {
    Arc::new(Mutex::new(all.into_iter().collect()))
}

async fn fetched(fetcher: &Fetcher, address: KeyAddress) -> Result<Option<Bytes>, String> {
    fetcher.fetch(&address, Duration::from_secs(2)).await.map_err(|error| error.to_string())
}

#[tokio::test]
async fn only_a_key_set_is_taken_for_one() {
    let answers = answers([
        ("/good", answer("200 OK", SET)),
        ("/moved", "HTTP/1.1 302 Found\r\nlocation: /good\r\ncontent-length: 0\r\n\r\n".to_owned()),
        ("/large", answer("200 OK", &" ".repeat(300 << 10))),
        ("/page", answer("200 OK", "<html>")),
        ("/secret", answer("200 OK", r#"{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}"#)),
        ("/empty", answer("200 OK", r#"{"keys":[]}"#)),
        ("/silent", String::new()),
    ]);
    let server = serve(&answers, None).await;
    let fetcher = Fetcher::new(None, Addresses::all()).unwrap();
    for (path, wanted) in [
        ("/good", Ok(Some(set()))),
        ("/secret", Ok(None)),
        ("/empty", Ok(None)),
        ("/moved", Err("the answer is 302 Found")),
        ("/none", Err("the answer is 404 Not Found")),
        ("/large", Err("the answer broke off or is larger than 262144 bytes")),
        ("/page", Err("the answer is no JSON Web Key Set, or too large a one")),
        ("/silent", Err("no answer within 2s")),
    ] {
        let address = KeyAddress::Uri(format!("http://{server}{path}").into());
        assert_eq!(fetched(&fetcher, address).await, wanted.map_err(str::to_owned), "{path}");
    }
}

/// Nor is what only this host reaches asked for keys, by whatever name or hop.
#[tokio::test]
async fn keys_are_not_fetched_from_this_host() {
    let answers = answers([("/keys", answer("200 OK", SET))]);
    let server = serve(&answers, None).await;
    let fetcher = Fetcher::new(None, Addresses::without(&[])).unwrap();
    let port = server.port();
    for host in ["127.0.0.1", "localhost", "127.1", "0.0.0.0", "[::ffff:127.0.0.1]", "[::1]"] {
        let address = KeyAddress::Uri(format!("http://{host}:{port}/keys").into());
        assert!(fetched(&fetcher, address).await.is_err(), "{host}");
    }
}

#[tokio::test]
async fn an_issuers_configuration_leads_to_its_keys() {
    let answers = answers([("/keys", answer("200 OK", SET))]);
    let server = serve(&answers, None).await;
    let configuration = |uri: String| answer("200 OK", &format!(r#"{{"issuer":"x","jwks_uri":"{uri}"}}"#));
    let fetcher = Fetcher::new(None, Addresses::all()).unwrap();
    let issuer = KeyAddress::Issuer(format!("http://{server}/tenant").into());
    let place = "/tenant/.well-known/openid-configuration";
    answers.lock().insert(place, configuration(format!("http://{server}/keys")));
    assert_eq!(fetched(&fetcher, issuer.clone()).await, Ok(Some(set())));
    answers.lock().insert(place, configuration("file:///etc/passwd".to_owned()));
    assert!(fetched(&fetcher, issuer).await.is_err());
}

#[tokio::test]
async fn servers_are_trusted_by_the_roots_of_the_file() {
    let certified = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key)
        .unwrap();
    let answers = answers([("/keys", answer("200 OK", SET))]);
    let server = serve(&answers, Some(TlsAcceptor::from(Arc::new(config)))).await;
    let address = KeyAddress::Uri(format!("https://localhost:{}/keys", server.port()).into());
    let directory = tempfile::tempdir().unwrap();
    let roots = directory.path().join("roots.pem");
    std::fs::write(&roots, certified.cert.pem()).unwrap();
    assert!(fetched(&Fetcher::new(None, Addresses::all()).unwrap(), address.clone()).await.is_err());
    assert!(fetched(&Fetcher::new(Some(&roots), Addresses::all()).unwrap(), address).await.is_ok());
    assert!(matches!(Fetcher::new(Some(directory.path()), Addresses::all()), Err(RootsError::Read { .. })));
}

/// The last good keys stay while the server has none, and are replaced by new ones.
#[tokio::test]
async fn keys_are_kept_while_their_server_fails() {
    let answers = answers([("/keys", answer("200 OK", SET))]);
    let server = serve(&answers, None).await;
    let address = KeyAddress::Uri(format!("http://{server}/keys").into());
    let metrics = Arc::new(KeyMetrics::default());
    let fetcher = Fetcher::new(None, Addresses::all()).unwrap();
    let keys = Keys::with(fetcher, Duration::from_millis(20), metrics.clone());
    let namespaces = [Arc::from("shop")].into();
    let of_shop = WantedKeys { timeout: Duration::from_secs(2), namespaces, generation: 0 };
    let (want, wanted) = watch::channel(Wanted::from([(address.clone(), of_shop)]));
    let (changed, mut changes) = mpsc::channel(1);
    let running = tokio::spawn(keys.run(wanted, changed));
    let mut next =
        async || tokio::time::timeout(Duration::from_secs(10), changes.recv()).await.unwrap().unwrap();
    let good = FetchedKeys { keys: Some(set()), problem: None };
    assert_eq!(next().await, (address.clone(), good.clone()));
    answers.lock().insert("/keys", answer("500 Broken", ""));
    let problem = Some("they can't be fetched".into());
    assert_eq!(next().await, (address.clone(), FetchedKeys { problem, ..good.clone() }));
    answers.lock().insert("/keys", answer("200 OK", SET));
    assert_eq!(next().await, (address, good));
    assert!(metrics.fetched.load(Ordering::Relaxed) >= 2 && metrics.failed.load(Ordering::Relaxed) >= 1);
    drop(want);
    running.await.unwrap();
}
