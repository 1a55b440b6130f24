//! A directory of 100,000 workloads and 10,000 services, as the control plane would send it.

use std::net::Ipv4Addr;

use ambit_api::security::{Action, Authorization, Rule, Scope};
use ambit_api::workload::{
    self as wire, Address, NetworkAddress, Port, PortList, Service, TunnelProtocol, Workload, WorkloadStatus,
    address,
};
use ambit_directory::Update;

/// Workloads: ten a service, but for every hundredth service, which has 110 or so, at the cost of the others.
pub const WORKLOADS: u32 = 100_000;
/// Services; those of even number prefer endpoints near the client.
pub const SERVICES: u32 = 10_000;
/// Nodes that the workloads are on.
pub const NODES: u32 = 1_000;

/// The uid of a workload.
pub fn uid(number: u32) -> String {
    format!("Kubernetes//Pod/ns-{}/app-{number}", number % SERVICES % 500)
}

fn host(service: u32) -> String {
    format!("svc-{service}.ns-{}.svc.cluster.local", service % 500)
}

/// The address of a workload.
pub fn pod_address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0000 + number)
}

/// The virtual address of a service.
pub fn vip(service: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a80_0000 + service)
}

/// A workload, there with this health.
pub fn workload(number: u32, status: WorkloadStatus) -> Update {
    // One service in a hundred has ten times the endpoints of the others.
    let service = number % SERVICES;
    let service = if number / SERVICES == 9 { service / 100 } else { service };
    let namespace = format!("ns-{}", number % SERVICES % 500);
    let ports = PortList {
        ports: vec![Port { service_port: 80, target_port: 8080, ..Port::default() }],
        ..PortList::default()
    };
    let workload = Workload {
        uid: uid(number),
        name: format!("app-{number}"),
        addresses: vec![pod_address(number).octets().to_vec().into()],
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        service_account: format!("sa-{}", service % 20),
        node: format!("node-{}", number % NODES),
        canonical_name: format!("app-{service}"),
        canonical_revision: "latest".into(),
        workload_name: format!("app-{service}"),
        cluster_id: "Kubernetes".into(),
        authorization_policies: vec![format!("{namespace}/strict")],
        services: [(format!("ns-{}/{}", service % 500, host(service)), ports)].into(),
        locality: Some(wire::Locality {
            region: "r".into(),
            zone: format!("z{}", number % 3),
            subzone: String::new(),
        }),
        status: status.into(),
        namespace,
        ..Workload::default()
    };
    Update::Address {
        name: uid(number),
        address: Address { r#type: Some(address::Type::Workload(workload)) },
    }
}

/// A service, which prefers endpoints near the client or not.
pub fn service(number: u32, failover: bool) -> Update {
    use wire::load_balancing::{Mode, Scope};
    let balancing = wire::LoadBalancing {
        routing_preference: [Scope::Network, Scope::Region, Scope::Zone].map(Into::into).to_vec(),
        mode: Mode::Failover.into(),
        ..wire::LoadBalancing::default()
    };
    let service = Service {
        name: format!("svc-{number}"),
        namespace: format!("ns-{}", number % 500),
        hostname: host(number),
        addresses: vec![NetworkAddress {
            network: String::new(),
            address: vip(number).octets().to_vec().into(),
            length: None,
        }],
        ports: vec![Port { service_port: 80, target_port: 8080, ..Port::default() }],
        load_balancing: failover.then_some(balancing),
        ..Service::default()
    };
    let name = format!("ns-{}/{}", number % 500, host(number));
    Update::Address { name, address: Address { r#type: Some(address::Type::Service(service)) } }
}

/// The policy that the workloads of a namespace list.
pub fn policy(number: u32, dry_run: bool) -> Update {
    let namespace = format!("ns-{}", number % 500);
    let name = format!("{namespace}/strict");
    let policy = Authorization {
        name: "strict".into(),
        scope: Scope::WorkloadSelector.into(),
        action: Action::Deny.into(),
        rules: vec![Rule::default()],
        namespace,
        dry_run,
        ..Authorization::default()
    };
    Update::Policy { name, policy }
}

/// Everything at first: services, workloads and the policies that they list.
pub fn everything() -> impl Iterator<Item = Update> {
    let services = (0..SERVICES).map(|number| service(number, number.is_multiple_of(2)));
    let workloads = (0..WORKLOADS).map(|number| workload(number, WorkloadStatus::Healthy));
    services.chain(workloads).chain((0..500).map(|number| policy(number, true)))
}
