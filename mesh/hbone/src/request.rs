//! A CONNECT and its headers as types, for sending and receiving.

use http::header::{FORWARDED, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request};

use crate::{Authority, AuthorityError, Baggage, Forwarded, TraceParent};

const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const FORWARDED_NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");

/// A request for a tunnel: its destination, and the client for which it is opened (HBONE contract).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectRequest {
    /// The original destination.
    pub authority: Authority,
    /// The client workload.
    pub baggage: Option<Baggage>,
    /// The application's client and the service it dialled.
    pub forwarded: Option<Forwarded>,
    /// The trace.
    pub traceparent: Option<TraceParent>,
    /// The network that the request came from; on the inner request of double HBONE.
    pub forwarded_network: Option<String>,
}

/// Why a request cannot open a tunnel. The peer is to blame; the answer is 400.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RequestError {
    /// Another method than CONNECT.
    #[error("method {0} is not CONNECT")]
    Method(Method),
    /// Extended CONNECT or a request in another form (HBONE contract: no `:scheme`, no `:path`).
    #[error("a CONNECT with scheme, path or protocol")]
    Form,
    /// No authority, or not a destination.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

impl ConnectRequest {
    /// A request with a destination only.
    pub fn new(authority: impl Into<Authority>) -> ConnectRequest {
        ConnectRequest {
            authority: authority.into(),
            baggage: None,
            forwarded: None,
            traceparent: None,
            forwarded_network: None,
        }
    }

    /// The HTTP/2 request to send. `None` if the authority cannot be part of a URI, which
    /// [`Authority`] rules out.
    pub fn to_http(&self) -> Option<Request<()>> {
        let uri = http::uri::Authority::try_from(self.authority.to_string()).ok()?;
        let uri = http::Uri::builder().authority(uri).build().ok()?;
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = uri;
        *request.version_mut() = http::Version::HTTP_2;
        let values = [
            (BAGGAGE, self.baggage.as_ref().and_then(Baggage::header)),
            (FORWARDED, self.forwarded.as_ref().and_then(Forwarded::header)),
            (TRACEPARENT, self.traceparent.as_ref().and_then(TraceParent::header)),
            (
                FORWARDED_NETWORK,
                self.forwarded_network.as_ref().and_then(|network| HeaderValue::from_str(network).ok()),
            ),
        ];
        for (name, value) in values {
            if let Some(value) = value {
                request.headers_mut().insert(name, value);
            }
        }
        Some(request)
    }

    /// Reads a request that arrived. Headers that cannot be read count as absent.
    ///
    /// # Errors
    /// [`RequestError`] if it asks for no tunnel.
    pub fn from_http(request: &http::request::Parts) -> Result<ConnectRequest, RequestError> {
        if request.method != Method::CONNECT {
            return Err(RequestError::Method(request.method.clone()));
        }
        let plain = request.uri.scheme().is_none()
            && matches!(request.uri.path(), "" | "/")
            && request.extensions.get::<h2::ext::Protocol>().is_none();
        if !plain {
            return Err(RequestError::Form);
        }
        let authority = request.uri.authority().map_or("", |authority| authority.as_str());
        let text = |name: &HeaderName| request.headers.get(name).and_then(|value| value.to_str().ok());
        Ok(ConnectRequest {
            authority: authority.parse()?,
            baggage: baggage(&request.headers),
            forwarded: text(&FORWARDED).and_then(Forwarded::parse),
            traceparent: text(&TRACEPARENT).and_then(TraceParent::parse),
            forwarded_network: text(&FORWARDED_NETWORK).filter(|text| !text.is_empty()).map(Into::into),
        })
    }
}

/// The baggage of a request or of its answer.
pub(crate) fn baggage(headers: &HeaderMap) -> Option<Baggage> {
    let header = headers.get(&BAGGAGE)?.to_str().ok()?;
    Some(Baggage::parse(header)).filter(|baggage| *baggage != Baggage::default())
}

/// Adds the answering side's baggage to an answer.
pub(crate) fn set_baggage(headers: &mut HeaderMap, value: Option<&Baggage>) {
    if let Some(value) = value.and_then(Baggage::header) {
        headers.insert(BAGGAGE, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(request: Request<()>) -> Result<ConnectRequest, RequestError> {
        ConnectRequest::from_http(&request.into_parts().0)
    }

    #[test]
    fn a_request_survives_being_sent() {
        let request = ConnectRequest {
            authority: "[fd00::1]:80".parse().unwrap(),
            baggage: Some(Baggage { service: "a".into(), ..Baggage::default() }),
            forwarded: Some(Forwarded { client: "10.0.0.1:4".parse().unwrap(), host: Some("b.c".into()) }),
            traceparent: TraceParent::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
            forwarded_network: Some("east".into()),
        };
        let read = read(request.to_http().unwrap()).unwrap();
        assert_eq!(read, request);
    }

    #[test]
    fn only_plain_connect_to_a_destination_is_accepted() {
        let build = |method, uri: &str| Request::builder().method(method).uri(uri).body(()).unwrap();
        assert!(matches!(read(build("GET", "http://a:1/")), Err(RequestError::Method(_))));
        assert!(matches!(read(build("CONNECT", "http://a:1/x")), Err(RequestError::Form)));
        assert!(matches!(read(build("CONNECT", "a.b")), Err(RequestError::Authority(_))));
        let mut extended = build("CONNECT", "a.b:80");
        extended.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
        assert!(matches!(read(extended), Err(RequestError::Form)));
    }
}
