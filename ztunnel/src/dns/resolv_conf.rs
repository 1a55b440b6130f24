//! Reads the resolvers of an `/etc/resolv.conf`. Pure.

use std::net::{IpAddr, SocketAddr};

/// The resolvers that a pod's namespace can reach: those on loopback are the host's own and left out.
pub fn nameservers(text: &str) -> Vec<SocketAddr> {
    const DNS_PORT: u16 = 53;
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let address = words.next().and_then(|word| word.parse::<IpAddr>().ok());
        if let Some(address) = address.filter(|address| !address.is_loopback()) {
            let server = SocketAddr::new(address, DNS_PORT);
            if !found.contains(&server) {
                found.push(server);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameservers_are_read_and_the_rest_is_passed_over() {
        let text = "# comment\nsearch a.b\nnameserver 10.96.0.10\nnameserver 127.0.0.53\n\
                    nameserver  fd00::10 \nnameserver junk\nnameserver 10.96.0.10\noptions ndots:5\n";
        assert_eq!(nameservers(text), ["10.96.0.10:53".parse().unwrap(), "[fd00::10]:53".parse().unwrap()]);
    }
}
