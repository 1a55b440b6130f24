//! From a service, waypoint or network gateway to one of its endpoints.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rand::{Rng, RngExt};

use crate::choose::{self, Choice, Load};
use crate::endpoints::{Endpoint, Endpoints, Known};
use crate::name::AddressRef;
use crate::resolve::{Dependencies, Dependency, Question};
use crate::route::{Expected, NoEndpoint, Refusal};
use crate::service::{Gateway, GatewayDestination, HealthPolicy, Service, WeightedWaypoint};
use crate::snapshot::Snapshot;
use crate::workload::Workload;

/// Chooses endpoints for one question.
pub(crate) struct Chooser<'a, 'q, L, R> {
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) question: &'q Question<'q>,
    pub(crate) load: &'q L,
    pub(crate) rng: &'q mut R,
    /// Where the names are noted that the route depends on, where resources come on demand.
    pub(crate) dependencies: Option<&'q mut Dependencies>,
}

/// A waypoint or network gateway that was chosen.
pub(crate) struct Proxy<'a> {
    pub(crate) workload: &'a Arc<Workload>,
    pub(crate) service: Option<&'a Arc<Service>>,
    /// Where it was named to be, when that was an address.
    pub(crate) named_address: Option<IpAddr>,
    pub(crate) port: u16,
}

impl Proxy<'_> {
    /// Where its HBONE listener is.
    pub(crate) fn hbone(&self, like: Option<IpAddr>) -> Option<SocketAddr> {
        Some(SocketAddr::new(self.workload.address_like(like)?, self.port))
    }

    pub(crate) fn expected(&self) -> Expected {
        expected(self.workload, self.service.map(|service| &**service))
    }
}

/// Why no proxy was chosen.
#[derive(Debug, Clone, Copy)]
pub(crate) enum NoProxy {
    Unknown,
    Unavailable(NoEndpoint),
}

/// Identities expected of `workload` when it was reached as an endpoint of `service` (HBONE contract).
pub(crate) fn expected(workload: &Workload, service: Option<&Service>) -> Expected {
    let mut expected = Expected::new();
    expected.push(workload.identity.clone());
    for name in service.into_iter().flat_map(|service| &service.subject_alt_names) {
        if !expected.contains(name) {
            expected.push(name.clone());
        }
    }
    expected
}

impl<'a, L: Load, R: Rng> Chooser<'a, '_, L, R> {
    /// Notes a name that the route depends on, if somebody wants to know.
    pub(crate) fn depend(&mut self, dependency: impl FnOnce() -> Dependency) {
        if let Some(dependencies) = &mut self.dependencies {
            dependencies.push(dependency());
        }
    }

    fn depend_on_gateway(&mut self, gateway: &Gateway) {
        let snapshot = self.snapshot;
        self.depend(|| {
            let is_known = match &gateway.destination {
                GatewayDestination::Hostname(host) => snapshot.known(host.as_ref()).is_some(),
                GatewayDestination::Address(at) => {
                    let address = AddressRef { network: &at.network, address: at.address };
                    !snapshot.vips.at(address).is_empty()
                        || snapshot.workload_at(&at.network, at.address).is_some()
                }
            };
            Dependency { demand: gateway.destination.demand(), is_known }
        });
    }

    /// An endpoint of `service` for connections to its `port`.
    pub(crate) fn endpoint(&mut self, known: &'a Known, port: u16) -> Result<Choice<'a>, NoEndpoint> {
        self.choose(known, |endpoint| endpoint.target_port(&known.service, port))
    }

    /// The proxy that `gateway` names, one in another network only if `crossing`. Behind a service its HBONE port is mapped if the service has it,
    /// and taken as it is if not.
    pub(crate) fn proxy(&mut self, gateway: &Gateway, crossing: bool) -> Result<Proxy<'a>, NoProxy> {
        self.depend_on_gateway(gateway);
        let snapshot = self.snapshot;
        let (known, named_address) = match &gateway.destination {
            GatewayDestination::Hostname(host) => {
                (Some(snapshot.known(host.as_ref()).ok_or(NoProxy::Unknown)?), None)
            }
            GatewayDestination::Address(at) => {
                // A gateway is named by its owner: visibility is about clients.
                let sharing = snapshot.vips.at(AddressRef { network: &at.network, address: at.address });
                (sharing.first(), Some(at.address))
            }
        };
        let port = gateway.hbone_mtls_port;
        let own_network = &self.question.client.network;
        if let Some(known) = known {
            let service = &known.service;
            let chosen = self
                .choose(known, |endpoint| {
                    let near = endpoint.workload.network == *own_network;
                    (near || crossing).then(|| endpoint.target_port(service, port).unwrap_or(port))
                })
                .map_err(NoProxy::Unavailable)?;
            return Ok(Proxy {
                workload: &chosen.endpoint.workload,
                service: Some(service),
                named_address,
                port: chosen.port,
            });
        }
        let GatewayDestination::Address(at) = &gateway.destination else { return Err(NoProxy::Unknown) };
        let workload = snapshot.workload_at(&at.network, at.address).ok_or(NoProxy::Unknown)?;
        if !workload.is_healthy() {
            return Err(NoProxy::Unavailable(NoEndpoint::NoneHealthy));
        }
        if self.question.exclude.contains(&workload.uid) {
            return Err(NoProxy::Unavailable(NoEndpoint::AllTried));
        }
        Ok(Proxy { workload, service: None, named_address, port })
    }

    /// The waypoints of a service in the order in which they are to be tried: one drawn by weight, then the others by weight; without weights the
    /// one waypoint.
    pub(crate) fn waypoints<'s>(&mut self, service: &'s Service) -> Vec<&'s Gateway> {
        let total: u64 = service.weighted_waypoints.iter().map(|waypoint| u64::from(waypoint.weight)).sum();
        if total == 0 {
            return service.waypoint.iter().collect();
        }
        let mut drawn = self.rng.random_range(0..total);
        let mut weighted: Vec<&WeightedWaypoint> =
            service.weighted_waypoints.iter().filter(|waypoint| waypoint.weight > 0).collect();
        let first = weighted.iter().position(|waypoint| {
            let hit = drawn < u64::from(waypoint.weight);
            drawn = drawn.saturating_sub(waypoint.weight.into());
            hit
        });
        if let Some(first) = first {
            let first = weighted.remove(first);
            weighted.sort_by_key(|waypoint| std::cmp::Reverse(waypoint.weight));
            weighted.insert(0, first);
        }
        weighted.into_iter().map(|waypoint| &waypoint.gateway).collect()
    }

    /// Whether the client is an endpoint of `gateway` itself.
    pub(crate) fn client_is(&self, gateway: &Gateway) -> bool {
        let client = self.question.client;
        match &gateway.destination {
            GatewayDestination::Hostname(host) => client.membership(host.as_ref()).is_some(),
            GatewayDestination::Address(at) => {
                let is_there = client.network == at.network && client.has_address(at.address);
                let sharing = self.snapshot.vips.at(AddressRef { network: &at.network, address: at.address });
                is_there || sharing.iter().any(|it| client.membership(it.service.host.as_ref()).is_some())
            }
        }
    }

    fn choose(
        &mut self,
        known: &'a Known,
        port: impl Fn(&Endpoint) -> Option<u16>,
    ) -> Result<Choice<'a>, NoEndpoint> {
        let (Known { service, endpoints }, question) = (known, self.question);
        let snapshot = self.snapshot;
        let usable = |endpoint: &Endpoint| {
            let workload = &endpoint.workload;
            // An entry in one namespace must not lead to a pod of another as if that were no pod.
            if !workload.is_pod && snapshot.claims_a_pods_address(workload) {
                return None;
            }
            let reachable = if workload.network == question.client.network {
                !workload.addresses.is_empty() || !workload.hostname.is_empty()
            } else {
                workload.network_gateway.is_some()
            };
            (reachable && !question.exclude.contains(&workload.uid)).then(|| port(endpoint)).flatten()
        };
        let load = self.load;
        for takes_ejected in [false, true] {
            let usable = |endpoint: &Endpoint| {
                usable(endpoint).filter(|_| takes_ejected || !load.is_ejected(&endpoint.workload))
            };
            for pool in endpoints.pools(question.client).filter(|pool| !pool.is_empty()) {
                let choice = if service.session_affinity {
                    choose::by_affinity(pool, usable, question.source)
                } else {
                    choose::least_loaded(pool, usable, load, self.rng)
                };
                if let Some(choice) = choice {
                    return Ok(choice);
                }
            }
        }
        Err(self.why_none(service, endpoints))
    }

    fn why_none(&self, service: &Service, endpoints: &Endpoints) -> NoEndpoint {
        let excluded = |endpoint: &Endpoint| self.question.exclude.contains(&endpoint.workload.uid);
        if endpoints.is_empty() {
            NoEndpoint::NoneKnown
        } else if endpoints.eligible().is_empty()
            && !endpoints.has_terminating()
            && service.load_balancing.health == HealthPolicy::OnlyHealthy
        {
            NoEndpoint::NoneHealthy
        } else if endpoints.pools(self.question.client).any(|pool| pool.iter().any(excluded)) {
            NoEndpoint::AllTried
        } else {
            NoEndpoint::NoneSuitable
        }
    }
}

/// What a missing waypoint means for the connection.
pub(crate) fn waypoint_refusal(waypoint: &Gateway, reason: NoProxy) -> Refusal {
    let waypoint = waypoint.destination.clone();
    match reason {
        NoProxy::Unknown => Refusal::WaypointUnknown { waypoint },
        NoProxy::Unavailable(cause) => Refusal::WaypointUnavailable { waypoint, cause },
    }
}

/// What a missing network gateway means for the connection.
pub(crate) fn gateway_refusal(gateway: &Gateway, reason: NoProxy) -> Refusal {
    let gateway = gateway.destination.clone();
    match reason {
        NoProxy::Unknown => Refusal::NetworkGatewayUnknown { gateway },
        NoProxy::Unavailable(cause) => Refusal::NetworkGatewayUnavailable { gateway, cause },
    }
}
