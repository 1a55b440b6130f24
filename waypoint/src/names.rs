//! Addresses of endpoints that only DNS can locate: those that a ServiceEntry names by host, and those that clients ask for where a
//! ServiceEntry resolves dynamically.
//!
//! Answers are cached and lookups in progress bounded. An address is checked after it was resolved and dialled as it was checked,
//! so a name that changes its mind leads nowhere else.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ambit_directory::{Snapshot, TunnelProtocol, Vip, Workload};
use ambit_runtime::hostnames::{Addresses, Hostnames};
use ipnet::IpNet;
use tokio::sync::Semaphore;

use crate::balance::{Endpoint, is_elsewhere};
use crate::failure::Failure;
use crate::proxy::Worker;

/// Lookups in progress of the whole process; more fail at once.
const MOST: usize = 512;

/// Resolves host names.
#[derive(Debug)]
pub struct Names {
    hostnames: Hostnames,
    permits: Arc<Semaphore>,
    /// Networks that hosts which clients ask for may be in beside public ones.
    allowed: Box<[IpNet]>,
    /// Counts.
    pub counts: Counts,
}

/// Counts of lookups.
#[derive(Debug, Default)]
pub struct Counts {
    /// Those that found an address.
    pub found: AtomicU64,
    /// Those that found none.
    pub failed: AtomicU64,
    /// Those that found only addresses that must not be dialled.
    pub refused: AtomicU64,
    /// Those that were not begun because too many were in progress.
    pub overflow: AtomicU64,
}

/// A host that stands for an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Its full name, in lower case.
    pub name: Arc<str>,
    /// Whether a client asked for it, and nobody vouches for where it leads.
    pub is_asked: bool,
}

impl Host {
    /// Of an endpoint that an object names.
    pub fn vouched(name: &Arc<str>) -> Self {
        Self { name: name.clone(), is_asked: false }
    }

    /// That a client asked for.
    pub fn asked(name: &Arc<str>) -> Self {
        Self { name: name.clone(), is_asked: true }
    }
}

impl Names {
    /// Over this resolver; `allowed` are networks that hosts which clients ask for may be in.
    pub fn new(hostnames: Hostnames, allowed: &[IpNet]) -> Self {
        let permits = Arc::new(Semaphore::new(MOST));
        Self { hostnames, permits, allowed: allowed.into(), counts: Counts::default() }
    }

    async fn lookup(&self, worker: &Worker, host: &Host, like: IpAddr) -> Result<Addresses, Failure> {
        let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() else {
            self.counts.overflow.fetch_add(1, Ordering::Relaxed);
            return Err(Failure::Unavailable("too many host names are being looked up".to_owned()));
        };
        let limit = worker.proxy.settings.limits.connect_timeout.get();
        // A full name: no search path makes another of it.
        let name = format!("{}.", host.name.trim_end_matches('.'));
        self.hostnames.lookup(&name, "", like, limit, permit).await.map_err(|error| {
            self.counts.failed.fetch_add(1, Ordering::Relaxed);
            Failure::Connect(error.to_string())
        })
    }

    fn may_dial(&self, address: IpAddr, host: &Host, snapshot: &Snapshot, own: &Workload) -> bool {
        if !is_elsewhere(address, own) || !has_family(own, address) || is_of_mesh(snapshot, own, address) {
            return false;
        }
        let is_allowed = || self.allowed.iter().any(|network| network.contains(&address));
        !host.is_asked || is_public(address) || is_allowed()
    }
}

/// The endpoint with an address to dial; one of several at random. One that has an address stays as it is.
///
/// # Errors
/// [`Failure::Connect`], [`Failure::NoEndpoint`], [`Failure::Unavailable`].
pub async fn locate(worker: &Worker, endpoint: Arc<Endpoint>) -> Result<Arc<Endpoint>, Failure> {
    let Some(host) = &endpoint.host else { return Ok(endpoint) };
    let names = &worker.proxy.names;
    let like = crate::balance::own_address(&worker.proxy)?;
    let found = Box::pin(names.lookup(worker, host, like)).await?;
    let published = worker.proxy.published.load();
    let own = crate::balance::own_workload(&worker.proxy, &published.directory)?;
    let usable: Addresses =
        found.into_iter().filter(|ip| names.may_dial(*ip, host, &published.directory, own)).collect();
    let Some(address) = rand::seq::IndexedRandom::choose(usable.as_slice(), &mut rand::rng()) else {
        names.counts.refused.fetch_add(1, Ordering::Relaxed);
        return Err(Failure::NoEndpoint(format!("{} has no address that may be dialled", host.name)));
    };
    names.counts.found.fetch_add(1, Ordering::Relaxed);
    let address = SocketAddr::new(*address, endpoint.address.port());
    Ok(Arc::new(Endpoint { address, ..Endpoint::clone(&endpoint) }))
}

/// Whether the waypoint can dial addresses of this family.
fn has_family(own: &Workload, address: IpAddr) -> bool {
    own.addresses.iter().any(|own| own.is_ipv4() == address.is_ipv4())
}

/// Whether a pod, a workload of the mesh or a service is there: these are reached by their own names, where their policies hold.
fn is_of_mesh(snapshot: &Snapshot, own: &Workload, address: IpAddr) -> bool {
    let workload = snapshot.workload_at(&own.network, address);
    let is_its_own = |vip: &Vip| matches!(vip, Vip::Address(vip) if vip.address == address.to_canonical());
    let service = snapshot.service_at(&own.network, address, &own.namespace);
    workload.is_some_and(|workload| workload.is_pod || workload.tunnel == TunnelProtocol::Hbone)
        || service.is_some_and(|service| service.vips.iter().any(is_its_own))
}

/// Whether an address is one of the public internet (IANA's registries of special-purpose addresses). Nodes, pods and services of
/// most clusters have others.
fn is_public(address: IpAddr) -> bool {
    const SPECIAL_V4: [([u8; 4], u8); 11] = [
        ([10, 0, 0, 0], 8),
        ([100, 64, 0, 0], 10),
        ([172, 16, 0, 0], 12),
        ([192, 0, 0, 0], 24),
        ([192, 0, 2, 0], 24),
        ([192, 88, 99, 0], 24),
        ([192, 168, 0, 0], 16),
        ([198, 18, 0, 0], 15),
        ([198, 51, 100, 0], 24),
        ([203, 0, 113, 0], 24),
        ([240, 0, 0, 0], 4),
    ];
    match address.to_canonical() {
        IpAddr::V4(ip) => {
            let is_in = |(network, length): &([u8; 4], u8)| {
                let mask = u32::MAX << (32 - u32::from(*length));
                ip.to_bits() & mask == u32::from_be_bytes(*network)
            };
            !ambit_api::is_local(ip.into()) && !SPECIAL_V4.iter().any(is_in)
        }
        // RFC 4291 §2.4: what was given out is in 2000::/3. Of that, protocols, 6to4 and documentation have their own.
        IpAddr::V6(ip) => match ip.segments() {
            [0x2001, second, ..] => second > 0x01ff && second != 0x0db8,
            [0x2002, ..] => false,
            [0x3fff, second, ..] => second > 0x0fff,
            [first, ..] => first & 0xe000 == 0x2000,
        },
    }
}

/// Whether the host of a service stands for another one: the same, or a wildcard above it.
pub fn covers(service: &str, asked: &str) -> bool {
    match service.strip_prefix('*') {
        None => service == asked,
        Some(suffix) => {
            let label = asked.strip_suffix(suffix).unwrap_or_default();
            suffix.starts_with('.') && !label.is_empty() && !label.starts_with('.')
        }
    }
}

/// A host as a client wrote it, without port and final dot, in lower case; `None` for an address, which no name covers.
pub fn asked_host(authority: &str) -> Option<Arc<str>> {
    let authority: http::uri::Authority = authority.parse().ok()?;
    let host = authority.host().trim_end_matches('.').to_ascii_lowercase();
    let is_name = !host.is_empty() && !host.starts_with('[') && host.parse::<IpAddr>().is_err();
    is_name.then(|| host.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_cover_what_is_below_them() {
        for (service, asked, covered) in [
            ("*.example.com", "api.example.com", true),
            ("*.example.com", "a.b.example.com", true),
            ("*.example.com", "example.com", false),
            ("*.example.com", ".example.com", false),
            ("*.example.com", "apiexample.com", false),
            ("*.example.com", "api.example.com.evil.org", false),
            ("api.example.com", "api.example.com", true),
            ("api.example.com", "x.api.example.com", false),
            ("*", "api.example.com", false),
            ("*example.com", "badexample.com", false),
        ] {
            assert_eq!(covers(service, asked), covered, "{service} {asked}");
        }
    }

    #[test]
    fn hosts_are_names() {
        for (authority, host) in [
            ("Api.Example.com", Some("api.example.com")),
            ("api.example.com.:8443", Some("api.example.com")),
            ("192.0.2.1", None),
            ("192.0.2.1:80", None),
            ("[2001:db8::1]:80", None),
            ("", None),
        ] {
            assert_eq!(asked_host(authority).as_deref(), host, "{authority}");
        }
    }

    #[test]
    fn only_public_addresses_are_public() {
        for address in
            ["1.1.1.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "2606:4700::1111", "2001:4860::8888"]
        {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
        for address in [
            "10.0.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.168.1.1",
            "198.19.0.1",
            "224.0.0.1",
            "240.240.0.1",
            "255.255.255.255",
            "0.0.0.0",
            "::",
            "::1",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
            "fd00::1",
            "fe80::1",
            "ff02::1",
            "2001:2::1",
            "2001:db8::1",
            "2002:a00:1::1",
        ] {
            assert!(!is_public(address.parse().unwrap()), "{address}");
        }
    }
}
