//! What look-ups and changes cost in a large directory, and what it holds in memory.

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use ambit_api::workload::WorkloadStatus;
use ambit_directory::{
    Authority, ClientRole, Directory, Question, Reader, Update, Workload, WorkloadUid, resolve,
};
use ambit_scale::directory::{
    NODES, SERVICES, WORKLOADS, everything, pod_address, policy, service, uid, vip, workload,
};
use ambit_scale::machine;
use anyhow::{Context, Result};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use crate::report::{Row, Section};

/// Passes over every destination.
const PASSES: u32 = 3;
/// Changes of each kind.
const CHANGES: u32 = 20_000;

/// Takes every figure of the section.
pub(crate) fn measure() -> Result<Section> {
    let mut section = Section::new("Directory", INTRODUCTION);
    let before = machine::resident(std::process::id())?;
    let (mut directory, reader) = Directory::new();
    let start = Instant::now();
    directory.apply(everything());
    section.push(Row::new("everything applied at once").time(start.elapsed()));
    let held = machine::resident(std::process::id())?.saturating_sub(before);
    section.push(Row::new("memory").bytes(held as f64));
    let per_workload = held as f64 / f64::from(WORKLOADS);
    section.push(Row::new("memory a workload, its part of everything").bytes(per_workload));
    look_ups(&reader, &mut section)?;
    all_changes(&mut directory, &reader, &mut section);
    Ok(section)
}

const INTRODUCTION: &str = "100,000 workloads, 10,000 services, 500 policies. A look-up is all of `resolve`: snapshot to route, endpoint \
chosen. \"In random order\": every service or workload once in an order drawn at random, from clients drawn at random among the 100 of one node, \
so that next to nothing is in the processor's caches; \"again and again\": one question. A change is applied and published while a reader keeps \
the snapshot before it.";

fn look_ups(reader: &Reader, section: &mut Section) -> Result<()> {
    let goal = Duration::from_micros(1);
    let every_vip = || (0..SERVICES).map(|number| (vip(number), 80)).collect();
    let plain = (0..SERVICES).filter(|number| number % 2 == 1 && number % 100 != 0);
    let plain = plain.map(|number| (vip(number), 80)).collect();
    let large = (0..SERVICES / 100).map(|number| (vip(number), 80)).collect();
    let pods = (0..WORKLOADS).map(|number| (pod_address(number), 8080)).collect();
    let nowhere = (0..WORKLOADS).map(|number| (Ipv4Addr::from(0x0101_0000 + number), 443)).collect();
    let rows: [(&str, Vec<(Ipv4Addr, u16)>); 7] = [
        ("by VIP, all services in random order", every_vip()),
        ("by VIP, services without preference in random order", plain),
        ("by VIP, services of 110 endpoints in random order", large),
        ("by workload address, all workloads in random order", pods),
        ("to an address that nobody has, in random order", nowhere),
        ("by VIP, again and again", vec![(vip(7), 80)]),
        ("by VIP, near endpoints preferred, again and again", vec![(vip(8), 80)]),
    ];
    for (what, destinations) in rows {
        let took = look_up(reader, destinations)?;
        section.push(Row::new(what).time(took).at_most(goal));
    }
    Ok(())
}

/// The mean time of a look-up.
fn look_up(reader: &Reader, mut destinations: Vec<(Ipv4Addr, u16)>) -> Result<Duration> {
    let mut rng = SmallRng::seed_from_u64(1);
    let snapshot = reader.snapshot();
    let clients: Option<Vec<&Workload>> = (0..WORKLOADS / NODES)
        .map(|number| snapshot.workload(&uid(number * NODES + 1)).map(|workload| &**workload))
        .collect();
    let clients = clients.context("a client is not in the directory")?;
    let rounds = (200_000 / destinations.len() as u32).max(PASSES);
    let mut spent = Duration::ZERO;
    for _ in 0..rounds {
        destinations.shuffle(&mut rng);
        let start = Instant::now();
        for (ip, port) in &destinations {
            let client = clients[rng.random_range(0..clients.len())];
            let question = Question {
                client,
                role: ClientRole::Workload,
                source: client.addresses.first().copied().unwrap_or(Ipv4Addr::LOCALHOST.into()),
                destination: Authority::Address(SocketAddr::from((*ip, *port))),
                exclude: &[],
            };
            black_box(resolve(&snapshot, black_box(&question), &|_: &WorkloadUid| 0, &mut rng));
        }
        spent += start.elapsed();
    }
    Ok(spent / rounds / destinations.len() as u32)
}

fn all_changes(directory: &mut Directory, reader: &Reader, section: &mut Section) {
    let step = |round: u32| round.wrapping_mul(7919);
    let healthy = |number| workload(number, WorkloadStatus::Healthy);
    let mut changes = |what, change: &dyn Fn(u32) -> Update| {
        section.push(change_row(directory, reader, what, change));
    };
    changes("a workload terminates", &|round| workload(step(round) % WORKLOADS, WorkloadStatus::Unhealthy));
    changes("a workload goes", &|round| Update::AddressRemoved { name: uid(step(round) % WORKLOADS) });
    changes("a workload comes", &|round| healthy(step(round) % WORKLOADS));
    changes("a service changes", &|round| {
        // First the other way round, then back: every one differs from what is there.
        let number = step(round) % SERVICES;
        service(number, number.is_multiple_of(2) ^ (round / SERVICES).is_multiple_of(2))
    });
    changes("a policy changes", &|round| policy(round % 500, round / 500 % 2 == 1));
}

fn change_row(directory: &mut Directory, reader: &Reader, what: &str, change: &dyn Fn(u32) -> Update) -> Row {
    let mut times = Vec::with_capacity(CHANGES as usize);
    for round in 0..CHANGES {
        let (update, kept) = (change(round), reader.snapshot());
        let start = Instant::now();
        directory.apply([update]);
        times.push(start.elapsed());
        drop(kept);
    }
    Row::of_times(what, times).at_most(Duration::from_micros(100))
}
