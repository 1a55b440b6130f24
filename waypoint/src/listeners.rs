//! The listeners of a gateway: which one a connection or request is for. Pure.
//!
//! Gateway API, GEP-1867: of the listeners on a port the one with the most specific host counts, and no route of another one.

use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_api::l7;
use ambit_route::Hosts;
use rustls::ServerConfig;

use crate::certificates::server_config;
use crate::external::Authorizer;

/// A listener.
#[derive(Debug, Clone)]
pub struct Listener {
    /// The name of its resource, by which routes name it.
    pub name: Box<str>,
    /// What it takes.
    pub protocol: l7::ListenerProtocol,
    /// The host that it is for; empty: all.
    pub hostname: Box<str>,
    /// The TLS that ends here; `None` where it is passed on or not spoken.
    pub tls: Option<Arc<ServerConfig>>,
    /// Asked about each request before it is routed, in order.
    pub authorizers: Box<[Arc<Authorizer>]>,
}

/// How the listeners of a port are distinguished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// By the host of each request.
    Requests,
    /// By the name that TLS asks for.
    Encrypted,
    /// Not at all: there is one.
    Plain,
}

#[derive(Debug)]
struct Port {
    layer: Layer,
    hosts: Hosts<Option<Arc<Listener>>>,
}

/// All listeners of a gateway, by port and host.
#[derive(Debug, Default)]
pub struct Listeners {
    ports: BTreeMap<u16, Port>,
    /// Those for datagrams.
    datagrams: BTreeMap<u16, Arc<Listener>>,
}

impl Listeners {
    /// Sorts listeners. Of two for the same host of a port the first by name counts; the control plane sends neither. One whose TLS
    /// has no certificate that can be used is left out.
    pub fn new(all: &BTreeMap<String, l7::Listener>, key_pairs: &BTreeMap<String, l7::KeyPair>) -> Self {
        let mut listeners = Self::default();
        for (name, source) in all {
            let Some(port) = u16::try_from(source.port).ok().filter(|port| *port != 0) else { continue };
            if source.protocol() == l7::ListenerProtocol::UdpListener {
                let listener = Listener {
                    name: name.as_str().into(),
                    protocol: source.protocol(),
                    hostname: "".into(),
                    tls: None,
                    authorizers: Box::default(),
                };
                listeners.datagrams.entry(port).or_insert_with(|| Arc::new(listener));
                continue;
            }
            let Some(layer) = layer(source.protocol()) else { continue };
            let mut tls = None;
            if let Some(ends) = source.tls.as_ref().filter(|tls| !tls.passthrough) {
                let pairs = ends.key_pairs.iter().filter_map(|name| {
                    key_pairs.get_key_value(name).map(|(name, pair)| (name.as_str(), pair))
                });
                let is_http = source.protocol() == l7::ListenerProtocol::HttpsListener;
                tls = server_config(pairs, is_http, ends.client_validation.as_ref());
                if tls.is_none() {
                    continue;
                }
            }
            let listener = Listener {
                name: name.as_str().into(),
                protocol: source.protocol(),
                hostname: source.hostname.to_ascii_lowercase().into(),
                tls,
                authorizers: source.authorizers.iter().map(|it| Arc::new(Authorizer::new(it))).collect(),
            };
            let port = listeners.ports.entry(port).or_insert_with(|| Port { layer, hosts: Hosts::default() });
            if port.layer == layer {
                port.hosts.entry(&source.hostname).get_or_insert_with(|| Arc::new(listener));
            }
        }
        listeners
    }

    /// The ports that connections are taken on.
    pub fn ports(&self) -> impl Iterator<Item = u16> {
        self.ports.keys().copied()
    }

    /// The ports that datagrams are taken on.
    pub fn datagram_ports(&self) -> impl Iterator<Item = u16> {
        self.datagrams.keys().copied()
    }

    /// The listener that takes the datagrams of a port.
    pub fn of_datagrams(&self, port: u16) -> Option<&Arc<Listener>> {
        self.datagrams.get(&port)
    }

    /// How the listeners of a port are distinguished; `None` where there is none.
    pub fn layer(&self, port: u16) -> Option<Layer> {
        self.ports.get(&port).map(|port| port.layer)
    }

    /// The listener of a port for a host in lower case.
    pub fn find(&self, port: u16, host: &str) -> Option<&Arc<Listener>> {
        self.ports.get(&port)?.hosts.matching(host).flatten().next()
    }
}

fn layer(protocol: l7::ListenerProtocol) -> Option<Layer> {
    match protocol {
        l7::ListenerProtocol::Unknown | l7::ListenerProtocol::UdpListener => None,
        l7::ListenerProtocol::HttpListener => Some(Layer::Requests),
        l7::ListenerProtocol::HttpsListener | l7::ListenerProtocol::TlsListener => Some(Layer::Encrypted),
        l7::ListenerProtocol::TcpListener => Some(Layer::Plain),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(port: u32, hostname: &str) -> l7::Listener {
        let protocol = l7::ListenerProtocol::HttpListener.into();
        l7::Listener { port, hostname: hostname.to_owned(), protocol, ..l7::Listener::default() }
    }

    #[test]
    fn tls_without_a_certificate_is_not_served() {
        let protocol = l7::ListenerProtocol::HttpsListener.into();
        let tls = Some(l7::ListenerTls {
            key_pairs: vec!["gone".to_owned()],
            passthrough: false,
            client_validation: None,
        });
        let https = l7::Listener { port: 443, protocol, tls, ..l7::Listener::default() };
        let all = BTreeMap::from([("https".to_owned(), https)]);
        assert_eq!(Listeners::new(&all, &BTreeMap::new()).layer(443), None);
    }

    #[test]
    fn the_most_specific_host_of_a_port_counts() {
        let all = [
            ("all", listener(80, "")),
            ("wide", listener(80, "*.example.com")),
            ("narrow", listener(80, "*.Foo.example.com")),
            ("exact", listener(80, "abc.foo.example.com")),
            ("other", listener(81, "abc.foo.example.com")),
            (
                "datagrams",
                l7::Listener { protocol: l7::ListenerProtocol::UdpListener.into(), ..listener(80, "") },
            ),
            ("none", listener(70_000, "")),
        ];
        let all = all.map(|(name, listener)| (name.to_owned(), listener)).into_iter().collect();
        let listeners = Listeners::new(&all, &BTreeMap::new());
        assert_eq!(listeners.ports().collect::<Vec<_>>(), [80, 81]);
        assert_eq!(listeners.datagram_ports().collect::<Vec<_>>(), [80]);
        for (port, host, wanted) in [
            (80, "bar.com", Some("all")),
            (80, "example.com", Some("all")),
            (80, "bar.example.com", Some("wide")),
            (80, "bar.foo.example.com", Some("narrow")),
            (80, "abc.foo.example.com", Some("exact")),
            (81, "abc.foo.example.com", Some("other")),
            (81, "bar.com", None),
            (82, "bar.com", None),
        ] {
            let found = listeners.find(port, host).map(|listener| &*listener.name);
            assert_eq!(found, wanted, "{port} {host}");
        }
    }
}
