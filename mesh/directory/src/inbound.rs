//! What a proxy needs to know of a connection that comes in: whether it is meant for this workload, and who is at either end.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ambit_api::Authority;
use ambit_identity::SpiffeId;

use crate::endpoints::Known;
use crate::name::AddressRef;
use crate::service::{Gateway, GatewayDestination, Service};
use crate::snapshot::Snapshot;
use crate::workload::Workload;

/// Where a tunnelled connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InboundTarget {
    /// What the client wants: the address that policies see and a PROXY header names.
    pub destination: SocketAddr,
    /// Where to connect, in the workload's namespace.
    pub dial: SocketAddr,
    /// Whether the connection begins with a PROXY v2 header.
    pub proxy_header: bool,
}

/// Why a CONNECT is not for this workload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InboundRefusal {
    /// The address is not one of the workload.
    #[error("{authority} is not an address of workload {workload}")]
    NotHere {
        /// What was asked for.
        authority: Authority,
        /// Who was asked.
        workload: String,
    },
    /// The host is no service that the workload is an endpoint of, or has no such port.
    #[error("workload {workload} serves no {authority}")]
    NotServed {
        /// What was asked for.
        authority: Authority,
        /// Who was asked.
        workload: String,
    },
}

impl Snapshot {
    /// Where a CONNECT for `authority` ends that came in at the address `local` of `workload`.
    ///
    /// HBONE contract, "Inbound check": the authority's IP must be the local address unless this pod is the target's waypoint or has an
    /// application tunnel.
    ///
    /// # Errors
    /// [`InboundRefusal`] if the authority is meant for somebody else.
    pub fn inbound_target(
        &self,
        workload: &Workload,
        local: IpAddr,
        authority: &Authority,
    ) -> Result<InboundTarget, InboundRefusal> {
        let local = local.to_canonical();
        let destination = match authority {
            Authority::Address(address) => {
                let ip = address.ip().to_canonical();
                let meant =
                    ip == local || workload.application_tunnel.is_some() || self.is_waypoint_of(workload, ip);
                if !meant {
                    return Err(InboundRefusal::NotHere {
                        authority: authority.clone(),
                        workload: workload.uid.to_string(),
                    });
                }
                SocketAddr::new(ip, address.port())
            }
            Authority::Host { host, port } => {
                let target = self.served_port(workload, host, *port);
                let port = target.ok_or_else(|| InboundRefusal::NotServed {
                    authority: authority.clone(),
                    workload: workload.uid.to_string(),
                })?;
                SocketAddr::new(local, port)
            }
        };
        let tunnel = workload.application_tunnel;
        let port = tunnel.map(|tunnel| tunnel.port).filter(|port| *port != 0);
        Ok(InboundTarget {
            destination,
            dial: SocketAddr::new(local, port.unwrap_or(destination.port())),
            proxy_header: tunnel.is_some_and(|tunnel| tunnel.proxy),
        })
    }

    /// Whether traffic to `address` must pass `workload` as its waypoint.
    pub fn is_waypoint_of(&self, workload: &Workload, address: IpAddr) -> bool {
        let address = AddressRef { network: &workload.network, address: address.to_canonical() };
        let is_mine = |gateway: &Gateway| match &gateway.destination {
            GatewayDestination::Hostname(host) => workload.membership(host.as_ref()).is_some(),
            GatewayDestination::Address(at) => {
                let sharing = self.vips.at(AddressRef { network: &at.network, address: at.address });
                (workload.network == at.network && workload.has_address(at.address))
                    || sharing.iter().any(|it| workload.membership(it.service.host.as_ref()).is_some())
            }
        };
        let passes = |known: &Arc<Known>| {
            let service = &known.service;
            service
                .waypoint
                .iter()
                .chain(service.weighted_waypoints.iter().map(|it| &it.gateway))
                .any(is_mine)
        };
        let around = || self.vips.around(address.network, address.address).flatten();
        self.vips.at(address).iter().chain(around()).any(passes)
            || self
                .workload_at(address.network, address.address)
                .and_then(|target| target.waypoint.as_ref())
                .is_some_and(is_mine)
    }

    /// Who connects from `address` of `network` with the identity that `peer` proved: the workload there if its identity is the same. Between
    /// networks addresses say nothing, and a proxy on the way shows its own; then a sole holder of the identity is it.
    pub fn inbound_source(
        &self,
        network: &str,
        address: IpAddr,
        peer: Option<&SpiffeId>,
    ) -> Option<&Arc<Workload>> {
        let there = self.workload_at(network, address);
        let Some(peer) = peer else { return there };
        there.filter(|workload| workload.identity == *peer).or_else(|| {
            let mut holders = self.workloads_of(peer);
            let first = holders.next()?;
            holders.next().is_none().then_some(first)
        })
    }

    /// The service that a connection to `port` of `workload` came for: the one of `host` if the client named one, else the only one of the
    /// workload's with that target port, else none.
    pub fn inbound_service(
        &self,
        workload: &Workload,
        port: u16,
        host: Option<&str>,
    ) -> Option<&Arc<Service>> {
        let mut candidates = workload.services.iter().filter_map(|membership| {
            let service = self.service(membership.host.as_ref())?;
            let named = host.is_none_or(|host| *service.host.hostname == *host);
            let serves = service.ports.iter().any(|mapping| {
                let own = membership.ports.get(mapping.service_port).map(|own| own.target_port);
                own.filter(|own| *own != 0).unwrap_or(mapping.target_port) == port
            });
            (named && serves).then_some(service)
        });
        let first = candidates.next()?;
        candidates.next().is_none().then_some(first)
    }

    /// The workload's port for `port` of the service `hostname`, if it is an endpoint of it.
    fn served_port(&self, workload: &Workload, hostname: &str, port: u16) -> Option<u16> {
        let membership =
            workload.services.iter().find(|membership| *membership.host.hostname == *hostname)?;
        let own = membership.ports.get(port).map(|mapping| mapping.target_port).filter(|port| *port != 0);
        own.or_else(|| {
            let service = self.service(membership.host.as_ref())?;
            service.ports.get(port).map(|mapping| mapping.target_port).filter(|port| *port != 0)
        })
    }
}
