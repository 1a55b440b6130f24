//! Reads an `/etc/resolv.conf`.

use std::net::{IpAddr, SocketAddr};

/// What an `/etc/resolv.conf` says.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct ResolvConf {
    /// The resolvers, in order.
    pub nameservers: Vec<SocketAddr>,
    /// The domains that are tried, in order.
    pub search: Vec<String>,
}

impl ResolvConf {
    /// The proxy's own. One that can't be read is as an empty one.
    pub fn of_system() -> Self {
        const PATH: &str = "/etc/resolv.conf";
        match std::fs::read_to_string(PATH) {
            Ok(text) => Self::parse(&text),
            Err(error) => {
                tracing::warn!(%error, path = PATH, "no resolvers are known");
                Self::default()
            }
        }
    }

    /// Reads a file's text; lines that are not understood are skipped.
    pub fn parse(text: &str) -> Self {
        const DNS_PORT: u16 = 53;
        let mut conf = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let address = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                    let server = address.map(|address| SocketAddr::new(address, DNS_PORT));
                    if let Some(server) = server.filter(|server| !conf.nameservers.contains(server)) {
                        conf.nameservers.push(server);
                    }
                }
                // resolv.conf(5): the last such line counts.
                Some("search" | "domain") => {
                    conf.search = words.map(|word| word.trim_matches('.').to_ascii_lowercase()).collect();
                }
                _ => {}
            }
        }
        conf
    }

    /// The resolvers that a pod's namespace can reach: those on loopback are the host's own.
    pub fn reachable_from_pods(&self) -> Vec<SocketAddr> {
        self.nameservers.iter().filter(|server| !server.ip().is_loopback()).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameservers_and_search_are_read_and_the_rest_is_skipped() {
        let text = "# comment\nsearch a.b\nnameserver 10.96.0.10\nnameserver 127.0.0.53\n\
                    nameserver  fd00::10 \nnameserver junk\nnameserver 10.96.0.10\noptions ndots:5\n\
                    search Shop.svc.cluster.local node.example.\n";
        let conf = ResolvConf::parse(text);
        assert_eq!(
            conf.reachable_from_pods(),
            ["10.96.0.10:53".parse().unwrap(), "[fd00::10]:53".parse().unwrap()]
        );
        assert_eq!(conf.nameservers.len(), 3);
        assert_eq!(conf.search, ["shop.svc.cluster.local", "node.example"]);
    }
}
