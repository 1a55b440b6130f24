//! A small HTTP/1 server for admin, metrics and readiness: routes by path, bounded connections, timeouts.
//! Not for traffic of the mesh.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ::http::header::{ALLOW, CONTENT_TYPE};
use ::http::{HeaderValue, Method, Request, Response, StatusCode};
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::{Readiness, Registry};

/// Connections at the same time, per server; more wait in the kernel's queue. An address may use at most as many as are left
/// free; further connections from it are closed.
const MAX_CONNECTIONS: usize = 64;
/// Limit on the head of a request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);
/// Limit on a whole connection; profiles are the longest.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(600);
/// Limit on a connection with a reply that has no end.
const STREAM_TIMEOUT: Duration = Duration::from_secs(3600);
/// Pause after a failed accept, as when descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An answer.
pub type Reply = Response<UnsyncBoxBody<Bytes, Infallible>>;
type Handling = Pin<Box<dyn Future<Output = Reply> + Send>>;
type Handler = Arc<dyn Fn(Query) -> Handling + Send + Sync>;

/// The parameters of a request's URL, decoded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Query(BTreeMap<String, String>);

impl Query {
    /// Reads `a=b&c=d`; a name that comes twice has its last value.
    pub fn parse(text: &str) -> Self {
        Self(form_urlencoded::parse(text.as_bytes()).into_owned().collect())
    }

    /// A parameter's value.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// All parameters, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

/// A plain-text reply.
pub fn text(status: StatusCode, body: impl Into<String>) -> Reply {
    reply(status, "text/plain; charset=utf-8", body.into().into())
}

/// A reply with any body.
pub fn reply(status: StatusCode, content_type: &'static str, body: Bytes) -> Reply {
    let mut response = Response::new(Full::new(body).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Marks a reply whose body has no end of its own.
#[derive(Clone, Copy)]
struct Endless;

/// A reply whose body goes on until the client leaves, or for an hour. A handler bounds how many there are at once.
pub fn stream(
    content_type: &'static str,
    body: impl Body<Data = Bytes, Error = Infallible> + Send + 'static,
) -> Reply {
    let mut response = Response::new(body.boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.extensions_mut().insert(Endless);
    response
}

/// Handlers by path and method.
#[derive(Clone, Default)]
pub struct Router {
    routes: BTreeMap<String, Vec<(Method, Handler)>>,
}

impl Router {
    /// No routes.
    pub fn new() -> Self {
        Self::default()
    }

    /// `GET` of a path.
    #[must_use]
    pub fn get<F, Replying>(self, path: &str, handler: F) -> Self
    where
        F: Fn(Query) -> Replying + Send + Sync + 'static,
        Replying: Future<Output = Reply> + Send + 'static,
    {
        self.route(Method::GET, path, handler)
    }

    /// `POST` to a path. Bodies are not read; parameters come with the URL.
    #[must_use]
    pub fn post<F, Replying>(self, path: &str, handler: F) -> Self
    where
        F: Fn(Query) -> Replying + Send + Sync + 'static,
        Replying: Future<Output = Reply> + Send + 'static,
    {
        self.route(Method::POST, path, handler)
    }

    fn route<F, Replying>(mut self, method: Method, path: &str, handler: F) -> Self
    where
        F: Fn(Query) -> Replying + Send + Sync + 'static,
        Replying: Future<Output = Reply> + Send + 'static,
    {
        let handler: Handler = Arc::new(move |query| Box::pin(handler(query)));
        self.routes.entry(path.to_owned()).or_default().push((method, handler));
        self
    }

    async fn answer(&self, method: &Method, path: &str, query: &str) -> Reply {
        let Some(handlers) = self.routes.get(path) else {
            let known: Vec<_> = self
                .routes
                .iter()
                .flat_map(|(path, handlers)| {
                    handlers.iter().map(move |(method, _)| format!("{method} {path}\n"))
                })
                .collect();
            return text(StatusCode::NOT_FOUND, format!("no {path} here; there is:\n{}", known.concat()));
        };
        let wanted = if *method == Method::HEAD { &Method::GET } else { method };
        if let Some((_, handler)) = handlers.iter().find(|(method, _)| method == wanted) {
            return handler(Query::parse(query)).await;
        }
        let allowed = handlers.iter().map(|(method, _)| method.as_str()).collect::<Vec<_>>().join(", ");
        let mut refused = text(StatusCode::METHOD_NOT_ALLOWED, format!("{path} takes {allowed}\n"));
        if let Ok(value) = HeaderValue::from_str(&allowed) {
            refused.headers_mut().insert(ALLOW, value);
        }
        refused
    }
}

/// `/metrics` and `/stats/prometheus`.
pub fn metrics_router(registry: &Registry) -> Router {
    let render = |registry: Registry| {
        move |_| {
            let registry = registry.clone();
            async move { reply(StatusCode::OK, Registry::CONTENT_TYPE, registry.encode().into()) }
        }
    };
    Router::new().get("/metrics", render(registry.clone())).get("/stats/prometheus", render(registry.clone()))
}

/// `/healthz/ready`: 200, or 503 naming what is awaited.
pub fn readiness_router(readiness: &Readiness) -> Router {
    let readiness = readiness.clone();
    Router::new().get("/healthz/ready", move |_| {
        let awaited = readiness.awaited();
        async move {
            if awaited.is_empty() {
                text(StatusCode::OK, "ready\n")
            } else {
                text(
                    StatusCode::SERVICE_UNAVAILABLE,
                    format!("not ready, waiting for: {}\n", awaited.join(", ")),
                )
            }
        }
    })
}

/// Serves until dropped; connections end with it.
pub async fn serve(listener: TcpListener, router: Router) {
    let router = Arc::new(router);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut clients = Clients::default();
    let mut connections = JoinSet::new();
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        while let Some(ended) = connections.try_join_next() {
            if let Err(error) = ended {
                warn!(%error, "an admin connection panicked");
            }
        }
        match listener.accept().await {
            Ok((stream, peer)) => {
                // Including the place that this connection would take.
                let free = places.available_permits() + 1;
                let Some(share) = clients.enter(peer.ip().to_canonical(), free) else {
                    debug!(%peer, "an address has too many admin connections");
                    continue;
                };
                let router = Arc::clone(&router);
                connections.spawn(async move {
                    converse(stream, router).await;
                    drop((place, share));
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept an admin connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Connections by address of the client.
#[derive(Debug, Default)]
struct Clients(HashMap<IpAddr, Arc<()>>);

impl Clients {
    /// Counts one more connection of `address` until the returned value is dropped. Returns `None` if the address would have
    /// more than `free`, the number of unused places.
    fn enter(&mut self, address: IpAddr, free: usize) -> Option<Arc<()>> {
        if self.0.len() > 2 * MAX_CONNECTIONS {
            self.0.retain(|_, open| Arc::strong_count(open) > 1);
        }
        let open = self.0.entry(address).or_default();
        // The table holds one reference itself.
        (Arc::strong_count(open) <= free).then(|| Arc::clone(open))
    }
}

async fn converse(stream: TcpStream, router: Arc<Router>) {
    let streams = Arc::new(AtomicBool::new(false));
    let has_stream = streams.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let (router, has_stream) = (Arc::clone(&router), Arc::clone(&has_stream));
        async move {
            let uri = request.uri();
            let reply = router.answer(request.method(), uri.path(), uri.query().unwrap_or_default()).await;
            has_stream.store(reply.extensions().get::<Endless>().is_some(), Ordering::Relaxed);
            Ok::<_, Infallible>(reply)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), service);
    let limit = async {
        tokio::time::sleep(CONNECTION_TIMEOUT).await;
        if streams.load(Ordering::Relaxed) {
            tokio::time::sleep(STREAM_TIMEOUT - CONNECTION_TIMEOUT).await;
        }
    };
    tokio::select! {
        ended = connection => if let Err(error) = ended {
            debug!(%error, "an admin connection failed");
        },
        () = limit => debug!("an admin connection took too long"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_leaves_connections_to_others() {
        let mut clients = Clients::default();
        let mut open = Vec::new();
        let mut fill = |last: u8| {
            let before = open.len();
            while let Some(place) = clients.enter([10, 0, 0, last].into(), MAX_CONNECTIONS - open.len()) {
                open.push(place);
            }
            open.len() - before
        };
        assert_eq!([fill(1), fill(2), fill(1)], [32, 16, 0]);
    }

    #[test]
    fn parameters_are_decoded() {
        let query = Query::parse("level=info%2Cztunnel%3Ddebug&seconds=5&odd=%zz&plus=a+b&flag");
        assert_eq!(query.get("level"), Some("info,ztunnel=debug"));
        assert_eq!(query.get("seconds"), Some("5"));
        assert_eq!(query.get("odd"), Some("%zz"), "what is no escape stays");
        assert_eq!(query.get("plus"), Some("a b"));
        assert_eq!(query.get("flag"), Some(""));
        assert_eq!(query.get("none"), None);
    }
}
