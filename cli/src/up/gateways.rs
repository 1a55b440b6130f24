//! Ports of this machine that lead to the Gateways of a directory. Each listener gets the port that it has, where that is free.

use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::Path;

use serde_json::Value;

use crate::up::expectations::{self, ServiceName};

/// Class of Gateways for clients outside the mesh.
const CLASS: &str = "ambit";
/// Listeners that get a port; more are not reached from this machine.
const MOST: usize = 32;
/// Largest file that is looked at, bytes.
const LARGEST: u64 = 1 << 20;

/// A listener that is to be reached from this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listener {
    /// Its Gateway, whose Service has the same name.
    pub(crate) gateway: ServiceName,
    /// Its port.
    pub(crate) port: u16,
    /// What is spoken there: `http`, `https`, `tls`, `tcp` or `udp`.
    pub(crate) scheme: &'static str,
}

/// The listeners of a directory's Gateways, each port of a Gateway once. Files that can't be read are the cluster's to report. The
/// first listener of a Gateway that is opened as a page is left out.
pub(crate) fn listeners(directory: &Path) -> Vec<Listener> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let is_small = |path: &Path| std::fs::metadata(path).is_ok_and(|data| data.len() <= LARGEST);
    let mut files: Vec<_> = entries.map(|entry| entry.path()).filter(|path| is_small(path)).collect();
    files.sort();
    let texts = files.iter().filter_map(|file| std::fs::read_to_string(file).ok());
    let mut all: Vec<Listener> = Vec::new();
    for listener in texts.flat_map(|text| of_text(&text)) {
        // Several Ingresses have one Gateway.
        if !all.contains(&listener) && all.len() < MOST {
            all.push(listener);
        }
    }
    all
}

fn of_text(text: &str) -> Vec<Listener> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).unwrap_or_default();
    documents.iter().flat_map(of_object).collect()
}

/// Those of an Ingress, at the Gateway that serves the class of the chart.
fn of_ingress(object: &Value) -> Vec<Listener> {
    let annotation = object["metadata"]["annotations"]["kubernetes.io/ingress.class"].as_str();
    if annotation.or(object["spec"]["ingressClassName"].as_str()) != Some(CLASS) {
        return Vec::new();
    }
    let gateway = ServiceName { namespace: "ambit-system".to_owned(), name: format!("{CLASS}-ingress") };
    let has_tls = object["spec"]["tls"].as_array().is_some_and(|tls| !tls.is_empty());
    let listener = |port, scheme| Listener { gateway: gateway.clone(), port, scheme };
    let https = has_tls.then(|| listener(443, "https"));
    std::iter::once(listener(80, "http")).chain(https).collect()
}

fn of_object(object: &Value) -> Vec<Listener> {
    if object["kind"] == "Ingress" {
        return of_ingress(object);
    }
    if object["kind"] != "Gateway" || object["spec"]["gatewayClassName"] != CLASS {
        return Vec::new();
    }
    let text = |field: &str| object["metadata"][field].as_str();
    let Some(name) = text("name") else { return Vec::new() };
    let namespace = text("namespace").unwrap_or("default");
    let gateway = ServiceName { namespace: namespace.to_owned(), name: name.to_owned() };
    let mut found: Vec<Listener> = Vec::new();
    for listener in object["spec"]["listeners"].as_array().into_iter().flatten() {
        let port = listener["port"].as_u64().and_then(|port| u16::try_from(port).ok());
        let scheme = match listener["protocol"].as_str() {
            Some("HTTP") => "http",
            Some("HTTPS") => "https",
            Some("TLS") => "tls",
            Some("TCP") => "tcp",
            Some("UDP") => "udp",
            _ => continue,
        };
        let is_known =
            |known: &Listener, port: u16| known.port == port && (known.scheme == "udp") == (scheme == "udp");
        if let Some(port) = port.filter(|port| found.iter().all(|known| !is_known(known, *port))) {
            found.push(Listener { gateway: gateway.clone(), port, scheme });
        }
    }
    if expectations::opens(object)
        && let Some(page) = found.iter().position(|listener| listener.scheme != "udp")
    {
        found.remove(page);
    }
    found
}

/// A port of the loopback for a listener: its own, or any free one.
///
/// # Errors
/// When there is none at all.
pub(crate) fn bind(listener: &Listener) -> io::Result<OwnedFd> {
    let (own, any) = ((Ipv4Addr::LOCALHOST, listener.port), (Ipv4Addr::LOCALHOST, 0));
    Ok(match listener.scheme {
        "udp" => UdpSocket::bind(own).or_else(|_| UdpSocket::bind(any))?.into(),
        _ => TcpListener::bind(own).or_else(|_| TcpListener::bind(any))?.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<(u16, &'static str)> {
        of_text(text).into_iter().map(|listener| (listener.port, listener.scheme)).collect()
    }

    #[test]
    fn each_port_of_a_gateway_is_reached_once() {
        let gateway = |class: &str, annotations: &str| {
            format!(
                "kind: Gateway\nmetadata: {{name: a, annotations: {annotations}}}\nspec: {{gatewayClassName: {class}, listeners: [\
                 {{port: 80, protocol: HTTP}}, {{port: 80, protocol: HTTP, hostname: b.example}}, {{port: 443, protocol: HTTPS}}, \
                 {{port: 53, protocol: UDP}}, {{port: 5432, protocol: TCP}}]}}\n"
            )
        };
        assert_eq!(
            found(&gateway("ambit", "{}")),
            [(80, "http"), (443, "https"), (53, "udp"), (5432, "tcp")]
        );
        assert_eq!(found(&gateway("ambit-waypoint", "{}")), []);
        let opened = gateway("ambit", "{ambit.dev/open: '9080/'}");
        assert_eq!(found(&opened), [(443, "https"), (53, "udp"), (5432, "tcp")]);
        assert_eq!(found("kind: [\n"), []);
        let ingress = |class: &str, tls: &str| {
            format!("kind: Ingress\nmetadata: {{name: a}}\nspec: {{ingressClassName: {class}, tls: {tls}}}\n")
        };
        assert_eq!(found(&ingress("ambit", "[{secretName: a}]")), [(80, "http"), (443, "https")]);
        assert_eq!(found(&ingress("ambit", "[]")), [(80, "http")]);
        assert_eq!(found(&ingress("nginx", "[]")), []);
    }

    #[test]
    fn a_port_that_is_taken_is_replaced() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = taken.local_addr().expect("an address").port();
        let gateway = ServiceName { namespace: "n".to_owned(), name: "a".to_owned() };
        let other = bind(&Listener { gateway: gateway.clone(), port, scheme: "http" }).expect("another port");
        let other = TcpListener::from(other);
        assert_ne!(other.local_addr().expect("an address").port(), port);
        let taken = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = taken.local_addr().expect("an address").port();
        let other = bind(&Listener { gateway, port, scheme: "udp" }).expect("another port");
        assert_ne!(UdpSocket::from(other).local_addr().expect("an address").port(), port);
    }
}
