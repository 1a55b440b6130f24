//! TCPRoutes, TLSRoutes and UDPRoutes: a TLSRoute is for the names that the client's TLS asks for, which its `hostnames` list.

use ambit_api::l7;
use serde::Deserialize;

use super::http::{Backend, lower_backends};
use super::route::{self, Route, RouteProtocol, RouteRule};
use crate::object::meta::Invalid;

/// The manifest of a TCPRoute.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(crate) struct TcpManifest(route::Manifest);

/// The manifest of a UDPRoute.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(crate) struct UdpManifest(route::Manifest);

/// The manifest of a TLSRoute.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(crate) struct TlsManifest(route::Manifest);

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    #[serde(default)]
    name: String,
    #[serde(default)]
    backend_refs: Vec<Backend>,
}

impl TryFrom<TcpManifest> for Route {
    type Error = Invalid;

    fn try_from(TcpManifest(manifest): TcpManifest) -> Result<Route, Invalid> {
        without_hosts(manifest, RouteProtocol::Tcp)
    }
}

impl TryFrom<UdpManifest> for Route {
    type Error = Invalid;

    fn try_from(UdpManifest(manifest): UdpManifest) -> Result<Route, Invalid> {
        without_hosts(manifest, RouteProtocol::Udp)
    }
}

/// TCPRoutes and UDPRoutes have no hosts.
fn without_hosts(manifest: route::Manifest, protocol: RouteProtocol) -> Result<Route, Invalid> {
    let route = manifest.read(protocol, Vec::new(), Rule::lower)?;
    Ok(Route { hostnames: Vec::new(), ..route })
}

impl TryFrom<TlsManifest> for Route {
    type Error = Invalid;

    fn try_from(TlsManifest(manifest): TlsManifest) -> Result<Route, Invalid> {
        manifest.read(RouteProtocol::Tls, Vec::new(), Rule::lower)
    }
}

impl Rule {
    fn lower(self) -> Result<RouteRule, String> {
        let Rule { name, backend_refs } = self;
        let own = l7::Rule { name, ..l7::Rule::default() };
        Ok(RouteRule { own, filters: Vec::new(), backends: lower_backends(backend_refs)? })
    }
}
