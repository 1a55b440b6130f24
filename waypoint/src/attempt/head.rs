//! A request's head as its endpoint gets it: the version of HTTP, the authority, and the names of a change of protocol.

use ambit_directory::AppProtocol;
use http::header::HOST;
use http::request::Parts;
use http::uri::{Authority, Scheme};
use http::{HeaderMap, HeaderValue, Method, Request, Uri, Version};

use crate::backend_policies::PoolPolicy;
use crate::balance::Target;
use crate::sanitise::Sane;
use crate::upgrade;

/// A request as it is sent on, before the version is known that its endpoint speaks.
#[derive(Debug, Clone, Copy)]
pub struct Form<'a> {
    /// Its head.
    pub parts: &'a Parts,
    /// What was found out about it.
    pub sane: &'a Sane,
    /// Another host, if a filter says so.
    pub host: Option<&'a Authority>,
    /// Whether the client speaks to a gateway, not to the endpoint that it has in mind: its protocol says nothing of that.
    pub at_gateway: bool,
}

impl Form<'_> {
    /// Whether endpoints are spoken to in HTTP/2: as a policy says, else as declared, else as the client does. What wants to change the
    /// protocol can do so in HTTP/1 only. Inside TLS and at gateways, what is not declared is HTTP/1.1, which every server speaks,
    /// except gRPC.
    pub fn speaks_http2(&self, target: &Target, pool: Option<&PoolPolicy>) -> bool {
        if self.sane.upgrade.is_some() {
            return false;
        }
        match target.protocol {
            _ if pool.is_some_and(|pool| pool.use_client_protocol) => {
                self.sane.grpc || self.sane.version == Version::HTTP_2
            }
            _ if pool.is_some_and(|pool| pool.upgrade_to_http2) => true,
            AppProtocol::Http2 | AppProtocol::Grpc => true,
            AppProtocol::Http11 => self.sane.grpc,
            _ if target.tls || self.at_gateway => self.sane.grpc,
            AppProtocol::Unknown | AppProtocol::Tcp | AppProtocol::Tls => {
                self.sane.version == Version::HTTP_2
            }
        }
    }
}

/// The request's head in the form that the endpoint's version wants.
pub fn head(form: &Form<'_>, http2: bool, tls: bool) -> Request<()> {
    let Form { parts, sane, host, at_gateway: _ } = form;
    let parts = (parts.method.clone(), parts.uri.clone(), parts.headers.clone());
    assemble(parts, sane, *host, http2, tls)
}

/// The same, of parts that nobody needs any more.
pub(super) fn assemble(
    (method, uri, headers): (Method, Uri, HeaderMap),
    sane: &Sane,
    host: Option<&Authority>,
    http2: bool,
    tls: bool,
) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = method;
    *request.headers_mut() = headers;
    if http2 {
        let mut parts = uri.clone().into_parts();
        // RFC 9113 §8.3.1; the tunnel encrypts, so the scheme is that of what is in it.
        parts.scheme = Some(if tls { Scheme::HTTPS } else { Scheme::HTTP });
        parts.authority = match host {
            Some(host) => Some(host.clone()),
            None => Authority::try_from(&*sane.authority).ok(),
        };
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or(uri);
    } else {
        *request.uri_mut() = uri;
        // Sanitising has made sure that the authority is one.
        if let Ok(host) = HeaderValue::from_str(host.map_or(&*sane.authority, Authority::as_str)) {
            request.headers_mut().insert(HOST, host);
        }
        if let Some(protocol) = &sane.upgrade {
            upgrade::announce(request.headers_mut(), protocol.clone());
        }
    }
    request
}
