//! A gateway in front of one server, reached in the clear and inside TLS; what reaches the server is written down.

use std::net::SocketAddr;
use std::sync::Arc;

use ambit_tests::frames::Frames;
use ambit_tests::http::{self, Answer, Client, Stream};
use ambit_tests::wait::{self, SOON};
use parking_lot::Mutex;

use crate::bed::Gateways;
use crate::tls::{Certificate, dial, get_as};

/// How a client reaches the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Over {
    /// In the clear.
    Plain,
    /// Inside TLS that ends at the gateway.
    Tls,
}

/// Both ways.
pub(crate) const BOTH: [Over; 2] = [Over::Plain, Over::Tls];

/// A gateway in front of one server, whose requests are written down.
pub(crate) struct Edge<'a> {
    bed: &'a Gateways,
    plain: SocketAddr,
    pub(crate) tls: SocketAddr,
    host: String,
    certificate: Certificate,
    /// Request lines that the server got.
    got: Arc<Mutex<Vec<String>>>,
}

impl<'a> Edge<'a> {
    pub(crate) async fn start(bed: &'a Gateways, name: &str) -> Self {
        Self::serving(bed, name, http::mirror()).await
    }

    pub(crate) async fn serving(bed: &'a Gateways, name: &str, answer: Answer) -> Self {
        let host = format!("{name}.example");
        let certificate = Certificate::new(&[&host]);
        let got: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = got.clone();
        let answer: Answer = Arc::new(move |name, head, body| {
            seen.lock().push(head.lines().next().unwrap_or_default().to_owned());
            answer(name, head, body)
        });
        bed.service_with(name, answer).await;
        bed.apply(&certificate.secret("edge", name)).await;
        let listeners = format!(
            "[{{name: http, port: 80, protocol: HTTP}}, \
             {{name: https, port: 443, protocol: HTTPS, tls: {{certificateRefs: [{{name: {name}}}]}}}}]"
        );
        let gateway = format!("{name}-gw");
        let at = bed.gateway(&gateway, &listeners).await;
        bed.route(name, &format!("[{{name: {gateway}}}]"), "[]").await;
        let (plain, tls) = (SocketAddr::new(at, 80), SocketAddr::new(at, 443));
        let edge = Self { bed, plain, tls, host, certificate, got };
        edge.serves().await;
        edge
    }

    /// Waits until both listeners serve; what the server got before is forgotten.
    pub(crate) async fn serves(&self) {
        let name = (self.host.as_str(), self.host.as_str());
        self.bed.eventually(self.plain, &self.host, |answer| answer.status == 200).await;
        wait::until("requests inside TLS are served", SOON, || async {
            let answer = get_as(self.bed, self.tls, name, &[&self.certificate], None).await;
            answer.is_ok_and(|answer| answer.status == 200)
        })
        .await;
        self.got.lock().clear();
    }

    /// Request lines that reached the server since the last look.
    pub(crate) fn got(&self) -> Vec<String> {
        std::mem::take(&mut *self.got.lock())
    }

    pub(crate) async fn stream(&self, over: Over, alpn: &[&[u8]]) -> Box<dyn Stream> {
        match over {
            Over::Plain => Box::new(self.bed.outside.connect(self.plain).await.unwrap()),
            Over::Tls => {
                let trusted = [&self.certificate];
                Box::new(dial(self.bed, self.tls, &self.host, &trusted, alpn).await.unwrap())
            }
        }
    }

    pub(crate) async fn client(&self, over: Over) -> Client {
        Client::over(self.stream(over, &[b"http/1.1"]).await)
    }

    pub(crate) async fn frames(&self, over: Over) -> Frames {
        Frames::start(self.stream(over, &[b"h2"]).await).await.unwrap()
    }

    /// Sends each request on a connection of its own, over both transports: it is answered with this status, the connection is closed,
    /// and nothing reaches the server.
    pub(crate) async fn refuses(&self, requests: &[(&str, u16)]) {
        let mut wrong = Vec::new();
        for over in BOTH {
            for (request, wanted) in requests {
                let mut client = self.client(over).await;
                let answer = client.send(request.as_bytes()).await;
                let status = answer.as_ref().map_or(0, |answer| answer.status);
                let is_closed = client.is_closed().await;
                let got = self.got();
                if status != *wanted || !is_closed || !got.is_empty() {
                    wrong.push((over, *request, answer, is_closed, got));
                }
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
        self.serves().await;
    }
}
