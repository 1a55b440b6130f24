//! Look-ups and changes in a directory.

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};

use ambit_api::workload::WorkloadStatus;
use ambit_directory::{Authority, ClientRole, Directory, Question, Reader, Snapshot, WorkloadUid, resolve};
use ambit_scale::directory::{pod_address, policy, service, uid, vip, workload};
use anyhow::{Context, Result};
use rand::SeedableRng;
use rand::rngs::SmallRng;

/// Services in the directory, each with as many endpoints as `workload` gives it: enough that indexes have their usual depth.
const SERVICES: u32 = 2_000;
/// Workloads in the directory.
const WORKLOADS: u32 = 10_000;
/// Counted calls.
const CALLS: u32 = 1_000;

fn directory() -> (Directory, Reader) {
    let (mut directory, reader) = Directory::new();
    let services = (0..SERVICES).map(|number| service(number, number.is_multiple_of(2)));
    let workloads = (0..WORKLOADS)
        .map(|number| workload(number % SERVICES * 5 + number / SERVICES, WorkloadStatus::Healthy));
    directory.apply(services.chain(workloads).chain((0..500).map(|number| policy(number, true))));
    (directory, reader)
}

fn look_up(destination: impl Fn(u32) -> (Ipv4Addr, u16)) -> Result<()> {
    let (_directory, reader) = directory();
    let snapshot = reader.snapshot();
    let client = snapshot.workload(&uid(1)).context("the client is not there")?;
    let questions: Vec<Question<'_>> = (0..CALLS)
        .map(|number| Question {
            client,
            role: ClientRole::Workload,
            source: Ipv4Addr::LOCALHOST.into(),
            destination: Authority::Address(SocketAddr::from(destination(number))),
            exclude: &[],
        })
        .collect();
    guarded_resolve(&snapshot, &questions);
    Ok(())
}

#[inline(never)]
fn guarded_resolve(snapshot: &Snapshot, questions: &[Question<'_>]) {
    let mut rng = SmallRng::seed_from_u64(1);
    for question in questions {
        black_box(resolve(snapshot, question, &|_: &WorkloadUid| 0, &mut rng));
    }
}

pub(crate) fn by_vip() -> Result<()> {
    look_up(|number| (vip(number * 7 % (SERVICES / 2) * 2 + 1), 80))
}

pub(crate) fn by_vip_near() -> Result<()> {
    look_up(|number| (vip(number * 7 % (SERVICES / 2) * 2), 80))
}

pub(crate) fn by_address() -> Result<()> {
    look_up(|number| (pod_address(number * 7 % WORKLOADS), 8080))
}

/// A workload becomes unhealthy and healthy again, each published while a reader keeps the snapshot before.
pub(crate) fn apply_change() -> Result<()> {
    let (mut directory, reader) = directory();
    for number in 0..CALLS {
        let kept = reader.snapshot();
        let status = if number % 2 == 0 { WorkloadStatus::Unhealthy } else { WorkloadStatus::Healthy };
        let update = workload(number / 2 * 7 % WORKLOADS, status);
        guarded_apply(&mut directory, update);
        drop(kept);
    }
    Ok(())
}

#[inline(never)]
fn guarded_apply(directory: &mut Directory, update: ambit_directory::Update) {
    black_box(directory.apply([update]));
}
