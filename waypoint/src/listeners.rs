//! The listeners of a gateway: which one a connection or request is for. Pure.
//!
//! Gateway API, GEP-1867: of the listeners on a port the one with the most specific host counts, and no route of another one.

use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_api::l7;
use ambit_route::Hosts;

/// A listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// The name of its resource, by which routes name it.
    pub name: Box<str>,
    /// What it takes.
    pub protocol: l7::ListenerProtocol,
    /// The host that it is for; empty: all.
    pub hostname: Box<str>,
}

/// All listeners of a gateway, by port and host.
#[derive(Debug, Default)]
pub struct Listeners {
    ports: BTreeMap<u16, Hosts<Option<Arc<Listener>>>>,
}

impl Listeners {
    /// Sorts listeners. Of two for the same host of a port the first by name counts; the control plane serves neither.
    pub fn new(all: &BTreeMap<String, l7::Listener>) -> Self {
        let mut listeners = Self::default();
        for (name, source) in all {
            let Some(port) = u16::try_from(source.port).ok().filter(|port| *port != 0) else { continue };
            let listener = Listener {
                name: name.as_str().into(),
                protocol: source.protocol(),
                hostname: source.hostname.to_ascii_lowercase().into(),
            };
            let place = listeners.ports.entry(port).or_default().entry(&source.hostname);
            place.get_or_insert_with(|| Arc::new(listener));
        }
        listeners
    }

    /// The ports that connections are taken on.
    pub fn ports(&self) -> impl Iterator<Item = u16> {
        self.ports.keys().copied()
    }

    /// The listener of a port for a host in lower case.
    pub fn find(&self, port: u16, host: &str) -> Option<&Arc<Listener>> {
        self.ports.get(&port)?.matching(host).flatten().next()
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
    fn the_most_specific_host_of_a_port_counts() {
        let all = [
            ("all", listener(80, "")),
            ("wide", listener(80, "*.example.com")),
            ("narrow", listener(80, "*.Foo.example.com")),
            ("exact", listener(80, "abc.foo.example.com")),
            ("other", listener(81, "abc.foo.example.com")),
            ("none", listener(70_000, "")),
        ];
        let all = all.map(|(name, listener)| (name.to_owned(), listener)).into_iter().collect();
        let listeners = Listeners::new(&all);
        assert_eq!(listeners.ports().collect::<Vec<_>>(), [80, 81]);
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
