//! The directory as one would write it without a care for speed: lists of what came, walked over for every question.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ambit_api::workload::load_balancing::{HealthPolicy, Mode, Scope};
use ambit_api::workload::{
    GatewayAddress, NetworkAddress, NetworkMode, Service, TunnelProtocol, Workload, WorkloadStatus,
    gateway_address,
};
use ambit_directory::{ClientRole, WAYPOINT_FAILURE_OPEN_EXTENSION};

/// What is there, as it came.
#[derive(Default)]
pub(crate) struct Naive {
    pub(crate) workloads: BTreeMap<String, Workload>,
    pub(crate) services: BTreeMap<String, Service>,
}

fn ip(bytes: &[u8]) -> IpAddr {
    match <[u8; 4]>::try_from(bytes) {
        Ok(v4) => v4.into(),
        Err(_) => <[u8; 16]>::try_from(bytes).unwrap().into(),
    }
}

pub(crate) fn key(service: &Service) -> String {
    format!("{}/{}", service.namespace, service.hostname)
}

fn healthy(workload: &Workload) -> bool {
    workload.status == WorkloadStatus::Healthy as i32
}

fn is_pod(workload: &Workload) -> bool {
    workload.uid.starts_with("Kubernetes//Pod/")
}

fn captures(service: &Service, port: u16) -> bool {
    service.ports.iter().any(|it| it.service_port == u32::from(port))
}

fn is_passthrough(service: &Service) -> bool {
    service.load_balancing.as_ref().is_some_and(|it| it.mode == Mode::Passthrough as i32)
}

fn scope_of(workload: &Workload, scope: i32) -> String {
    let locality = workload.locality.clone().unwrap_or_default();
    match Scope::try_from(scope).unwrap() {
        Scope::Region => locality.region,
        Scope::Zone => locality.zone,
        Scope::Node => workload.node.clone(),
        Scope::Network => workload.network.clone(),
        other => panic!("{other:?} is not generated"),
    }
}

impl Naive {
    pub(crate) fn put(&mut self, workload: Workload) {
        self.workloads.insert(workload.uid.clone(), workload);
    }

    pub(crate) fn remove(&mut self, name: &str) {
        self.workloads.remove(name);
        self.services.remove(name);
    }

    /// A pod before anything else: of several a healthy one, then the newest. Else the oldest, those of unknown age last.
    pub(crate) fn at(&self, network: &str, address: IpAddr) -> Option<&Workload> {
        let there = self.workloads.values().filter(|it| {
            let shares_its_nodes = it.network_mode == NetworkMode::HostNetwork as i32;
            !shares_its_nodes
                && it.network == network
                && it.addresses.iter().any(|bytes| ip(bytes) == address)
        });
        there.min_by_key(|it| {
            let age = match it.created {
                created if is_pod(it) => -created,
                0 => i64::MAX,
                created => created,
            };
            (!is_pod(it), is_pod(it) && !healthy(it), age, it.uid.clone())
        })
    }

    fn has_pod(&self, network: &str, address: IpAddr) -> bool {
        self.at(network, address).is_some_and(is_pod)
    }

    /// The service at `address`: with `exact` by its own address, else by the longest network around it.
    fn service_at(
        &self,
        network: &str,
        address: IpAddr,
        port: u16,
        namespace: &str,
        exact: bool,
    ) -> Option<&Service> {
        if exact && self.has_pod(network, address) {
            return None;
        }
        let full = if address.is_ipv4() { 32 } else { 128 };
        let lengths: Vec<u32> = if exact { vec![full] } else { (0..full).rev().collect() };
        lengths.into_iter().find_map(|length| {
            let has = |vip: &NetworkAddress| {
                let vip_ip = ip(&vip.address);
                vip.network == network
                    && vip_ip.is_ipv4() == address.is_ipv4()
                    && vip.length.unwrap_or(full) == length
                    && ipnet::IpNet::new(vip_ip, u8::try_from(length).unwrap()).unwrap().contains(&address)
            };
            let sharing: Vec<&Service> =
                self.services.values().filter(|it| it.addresses.iter().any(has)).collect();
            let suits = |it: &&Service| {
                (it.visibility == 0 || it.namespace == namespace)
                    && (captures(it, port) || (exact && !is_passthrough(it)))
            };
            let visible: Vec<&Service> = sharing.into_iter().filter(suits).collect();
            let own = visible.iter().find(|it| it.namespace == namespace && it.canonical);
            let own = own.or(visible.iter().find(|it| it.namespace == namespace));
            own.or(visible.iter().find(|it| it.canonical)).or(visible.first()).copied()
        })
    }

    /// The endpoints of `service` that may be chosen now, each with its port.
    fn choices(
        &self,
        service: &Service,
        client: &Workload,
        exclude: &[String],
        fallback: Option<u32>,
        wanted: u32,
        crossing: bool,
    ) -> Vec<(&Workload, u32)> {
        let policy = service.load_balancing.clone().unwrap_or_default();
        let name = key(service);
        let usable = self.workloads.values().filter_map(|workload| {
            let ports = workload.services.get(&name)?;
            let own = ports.ports.iter().find(|it| it.service_port == wanted).map(|it| it.target_port);
            let general = service.ports.iter().find(|it| it.service_port == wanted).map(|it| it.target_port);
            let target = own.filter(|it| *it != 0).or(general.filter(|it| *it != 0)).or(fallback)?;
            let fit = workload.capacity != Some(0)
                && (is_pod(workload)
                    || !workload.addresses.iter().any(|it| self.has_pod(&workload.network, ip(it))))
                && !exclude.contains(&workload.uid)
                && (workload.network == client.network || (workload.network_gateway.is_some() && crossing));
            fit.then_some((workload, target))
        });
        let rank = |workload: &Workload| {
            let shared = |scope: &&i32| scope_of(workload, **scope) == scope_of(client, **scope);
            policy.routing_preference.iter().take_while(shared).count()
        };
        let takes_all = policy.health_policy == HealthPolicy::AllowAll as i32;
        let (ready, rest): (Vec<_>, Vec<_>) =
            usable.partition(|(workload, _)| takes_all || healthy(workload));
        let least = match Mode::try_from(policy.mode).unwrap() {
            Mode::Strict => policy.routing_preference.len(),
            Mode::Failover => ready.iter().map(|(workload, _)| rank(workload)).max().unwrap_or(0),
            Mode::UnspecifiedMode | Mode::Passthrough => 0,
        };
        let is_in_scope = |(workload, _): &(&Workload, u32)| rank(workload) >= least;
        let ready: Vec<_> = ready.into_iter().filter(is_in_scope).collect();
        if !ready.is_empty() {
            return ready;
        }
        let rest = rest.into_iter().filter(|(workload, _)| workload.serving_while_terminating);
        rest.filter(is_in_scope).collect()
    }

    /// The workloads that stand behind a gateway, and the service they do it for; `None` if the gateway is not known.
    fn behind(
        &self,
        gateway: &GatewayAddress,
        client: &Workload,
        exclude: &[String],
        crossing: bool,
    ) -> Option<Vec<(&Workload, u32)>> {
        let service = match gateway.destination.as_ref().unwrap() {
            gateway_address::Destination::Hostname(name) => {
                Some(self.services.get(&format!("{}/{}", name.namespace, name.hostname))?)
            }
            gateway_address::Destination::Address(at) => {
                let has = |vip: &NetworkAddress| vip == at;
                let sharing = self.services.values().find(|it| it.addresses.iter().any(has));
                sharing.filter(|_| !self.has_pod(&at.network, ip(&at.address)))
            }
        };
        if let Some(service) = service {
            return Some(self.choices(service, client, exclude, Some(15008), 15008, crossing));
        }
        let Some(gateway_address::Destination::Address(at)) = &gateway.destination else { unreachable!() };
        let workload = self.at(&at.network, ip(&at.address))?;
        let usable = healthy(workload) && !exclude.contains(&workload.uid);
        Some(if usable { vec![(workload, 15008)] } else { vec![] })
    }

    fn client_is(&self, gateway: &GatewayAddress, client: &Workload) -> bool {
        match gateway.destination.as_ref().unwrap() {
            gateway_address::Destination::Hostname(name) => {
                client.services.contains_key(&format!("{}/{}", name.namespace, name.hostname))
            }
            gateway_address::Destination::Address(at) => {
                let serves =
                    |it: &&Service| it.addresses.contains(at) && client.services.contains_key(&key(it));
                let is_pods = self.has_pod(&at.network, ip(&at.address));
                (client.network == at.network && client.addresses.contains(&at.address))
                    || (!is_pods && self.services.values().any(|it| serves(&it)))
            }
        }
    }

    /// Every answer that is right, by kind and next hop.
    pub(crate) fn answers(
        &self,
        client: &Workload,
        to: SocketAddr,
        role: ClientRole,
        exclude: &[String],
    ) -> BTreeSet<String> {
        let named = |exact| self.service_at(&client.network, to.ip(), to.port(), &client.namespace, exact);
        let exact = named(true);
        let there = self.at(&client.network, to.ip());
        let around = || named(false);
        let service = exact.or_else(|| if there.is_some() { None } else { around() });
        match (service, there) {
            (Some(service), _) => self.to_service(service, client, to, role, exclude),
            (None, Some(workload)) => {
                let guarded = workload.waypoint.as_ref().filter(|waypoint| {
                    workload.uid != client.uid
                        && role == ClientRole::Workload
                        && !self.client_is(waypoint, client)
                });
                if let Some(waypoint) = guarded {
                    let (mut answers, may_fail) = self.through(waypoint, client, false, exclude);
                    if may_fail {
                        answers.extend(refused());
                    }
                    return answers;
                }
                if exclude.contains(&workload.uid) { refused() } else { [direct(workload, client)].into() }
            }
            (None, None) => ["unknown".to_owned()].into(),
        }
    }

    fn to_service(
        &self,
        service: &Service,
        client: &Workload,
        to: SocketAddr,
        role: ClientRole,
        exclude: &[String],
    ) -> BTreeSet<String> {
        let wanted = u32::from(to.port());
        if !service.ports.iter().any(|it| it.service_port == wanted) {
            return refused();
        }
        let applies = match role {
            ClientRole::Workload => true,
            ClientRole::Waypoint => false,
            ClientRole::Ingress => service.ingress_use_waypoint,
        };
        let waypoint = service.waypoint.as_ref().filter(|it| applies && !self.client_is(it, client));
        let (mut answers, may_fail) =
            waypoint.map_or((BTreeSet::new(), true), |it| self.through(it, client, true, exclude));
        let open = service.extensions.iter().any(|it| it.name == WAYPOINT_FAILURE_OPEN_EXTENSION);
        if waypoint.is_some() && (!may_fail || !open) {
            if may_fail {
                answers.extend(refused());
            }
            return answers;
        }
        answers.extend(self.past_waypoint(service, client, to, exclude));
        answers
    }

    fn past_waypoint(
        &self,
        service: &Service,
        client: &Workload,
        to: SocketAddr,
        exclude: &[String],
    ) -> BTreeSet<String> {
        let wanted = u32::from(to.port());
        if is_passthrough(service) {
            return match self.at(&client.network, to.ip()) {
                Some(workload) if exclude.contains(&workload.uid) => refused(),
                Some(workload) => [direct(workload, client)].into(),
                None => ["plain -".to_owned()].into(),
            };
        }
        let choices = self.choices(service, client, exclude, None, wanted, true);
        let mut answers = BTreeSet::new();
        for (workload, _) in &choices {
            if workload.network == client.network {
                answers.insert(direct(workload, client));
                continue;
            }
            match self.behind(workload.network_gateway.as_ref().unwrap(), client, exclude, true) {
                Some(gateways) if !gateways.is_empty() => {
                    answers.extend(gateways.iter().map(|(gateway, _)| format!("gateway {}", gateway.uid)));
                }
                Some(_) | None => answers.extend(refused()),
            }
        }
        if choices.is_empty() { refused() } else { answers }
    }

    /// The ways through a waypoint, and whether it may turn out that there is none.
    fn through(
        &self,
        waypoint: &GatewayAddress,
        client: &Workload,
        to_service: bool,
        exclude: &[String],
    ) -> (BTreeSet<String>, bool) {
        let behind = self.behind(waypoint, client, exclude, to_service).unwrap_or_default();
        let (mut answers, mut may_fail) = (BTreeSet::new(), false);
        let near = |it: &Workload| it.network == client.network;
        for (workload, _) in &behind {
            if near(workload) {
                answers.insert(format!("waypoint {}", workload.uid));
                continue;
            }
            if !to_service {
                may_fail = true;
                continue;
            }
            let gateway = workload.network_gateway.as_ref();
            let gateways = gateway.and_then(|it| self.behind(it, client, exclude, true)).unwrap_or_default();
            may_fail |= gateways.is_empty();
            answers.extend(gateways.iter().map(|(gateway, _)| format!("gateway {}", gateway.uid)));
        }
        (answers, may_fail || behind.is_empty())
    }
}

fn refused() -> BTreeSet<String> {
    ["refused".to_owned()].into()
}

fn direct(workload: &Workload, client: &Workload) -> String {
    let near = !workload.node.is_empty() && workload.node == client.node;
    let kind = if workload.uid == client.uid {
        "own"
    } else if workload.tunnel_protocol != TunnelProtocol::Hbone as i32 {
        "plain"
    } else if near && !workload.native_tunnel {
        "same node"
    } else {
        "tunnel"
    };
    if kind == "own" { kind.to_owned() } else { format!("{kind} {}", workload.uid) }
}
