//! What look-ups and changes cost in a directory of 100,000 workloads and 10,000 services: `scale [ROUNDS]`, under callgrind or by the clock.
//!
//! Prints the time of the first bulk update, of one route by VIP, by workload address and to nowhere, of one change of each kind with its publication
//! while a reader keeps the snapshot before it, and the memory held.

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use ambit_api::security::{Action, Authorization, Rule, Scope};
use ambit_api::workload::{
    self as wire, Address, NetworkAddress, Port, PortList, Service, TunnelProtocol, Workload, WorkloadStatus,
    address,
};
use ambit_directory::{Authority, ClientRole, Directory, Question, Reader, Update, WorkloadUid, resolve};
use rand::SeedableRng;
use rand::rngs::SmallRng;

const WORKLOADS: u32 = 100_000;
const SERVICES: u32 = 10_000;
const NODES: u32 = 1_000;

fn uid(number: u32) -> String {
    format!("Kubernetes//v1/Pod/ns-{}/app-{number}", number % SERVICES % 500)
}

fn host(service: u32) -> String {
    format!("svc-{service}.ns-{}.svc.cluster.local", service % 500)
}

fn pod_address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0000 + number)
}

fn vip(service: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a80_0000 + service)
}

fn workload(number: u32, status: WorkloadStatus) -> Update {
    // One service in a hundred has ten times the endpoints of the others.
    let service = number % SERVICES;
    let service = if number / SERVICES == 9 { service / 100 } else { service };
    let namespace = format!("ns-{}", number % SERVICES % 500);
    let ports = PortList { ports: vec![Port { service_port: 80, target_port: 8080, ..Port::default() }] };
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

fn service(number: u32, failover: bool) -> Update {
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

fn policy(number: u32, dry_run: bool) -> Update {
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

/// Resident memory of this process in MiB.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib / 1024)
}

fn routes(reader: &Reader, rounds: u32, what: &str, destination: impl Fn(u32) -> (Ipv4Addr, u16)) {
    let mut rng = SmallRng::seed_from_u64(1);
    let snapshot = reader.snapshot();
    let Some(client) = snapshot.workload(&uid(1)) else { return };
    let mut spent = Duration::ZERO;
    for round in 0..rounds {
        let question = Question {
            client,
            role: ClientRole::Workload,
            source: client.addresses.first().copied().unwrap_or(Ipv4Addr::LOCALHOST.into()),
            destination: Authority::Address(destination(round).into()),
            exclude: &[],
        };
        let start = Instant::now();
        black_box(resolve(&snapshot, black_box(&question), &|_: &WorkloadUid| 0, &mut rng));
        spent += start.elapsed();
    }
    println!("  {what}: {:?}", spent / rounds.max(1));
}

fn changes(
    directory: &mut Directory,
    reader: &Reader,
    rounds: u32,
    what: &str,
    change: impl Fn(u32) -> Update,
) {
    let (mut spent, mut longest) = (Duration::ZERO, Duration::ZERO);
    for round in 0..rounds {
        let (update, kept) = (change(round), reader.snapshot());
        let start = Instant::now();
        directory.apply([update]);
        let took = start.elapsed();
        drop(kept);
        spent += took;
        longest = longest.max(took);
    }
    println!("  {what}: {:?}, at most {longest:?}", spent / rounds.max(1));
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let rounds: u32 = std::env::args().nth(1).map_or(Ok(10_000), |rounds| rounds.parse())?;
    let (mut directory, reader) = Directory::new();
    let healthy = |number| workload(number, WorkloadStatus::Healthy);
    let first =
        (0..SERVICES).map(|number| service(number, number % 2 == 0)).chain((0..WORKLOADS).map(healthy));
    let start = Instant::now();
    directory.apply(first.chain((0..500).map(|number| policy(number, true))));
    println!("{WORKLOADS} workloads, {SERVICES} services: applied in {:?}", start.elapsed());
    println!("resident: {} MiB", resident().unwrap_or_default());
    println!("a route");
    let step = |round: u32| round.wrapping_mul(7919);
    routes(&reader, rounds, "by VIP", |round| (vip(step(round) % SERVICES / 2 * 2 + 1), 80));
    routes(&reader, rounds, "by VIP, preferring the zone", |round| (vip(step(round) % SERVICES / 2 * 2), 80));
    routes(&reader, rounds, "by the VIP of a service of 110 endpoints", |round| (vip(step(round) % 100), 80));
    routes(&reader, rounds, "by VIP, the same again", |_| (vip(7), 80));
    routes(&reader, rounds, "by workload address", |round| (pod_address(step(round) % WORKLOADS), 8080));
    routes(&reader, rounds, "to nowhere known", |round| (Ipv4Addr::from(0x0101_0000 + round), 443));
    println!("a change, published, while a reader keeps the snapshot before");
    let count = rounds.min(20_000);
    changes(&mut directory, &reader, count, "a workload terminates", |round| {
        workload(step(round) % WORKLOADS, WorkloadStatus::Unhealthy)
    });
    changes(&mut directory, &reader, count, "a workload goes", |round| Update::AddressRemoved {
        name: uid(step(round) % WORKLOADS),
    });
    changes(&mut directory, &reader, count, "a workload comes", |round| healthy(step(round) % WORKLOADS));
    changes(&mut directory, &reader, count, "a service changes", |round| {
        service(step(round) % SERVICES, round % 2 == 0)
    });
    changes(&mut directory, &reader, count, "a policy changes", |round| {
        policy(round % 500, round / 500 % 2 == 1)
    });
    println!("resident: {} MiB", resident().unwrap_or_default());
    Ok(())
}
