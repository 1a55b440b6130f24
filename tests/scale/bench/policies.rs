//! What a decision costs among many policies.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use ambit_api::security::Scope;
use ambit_policy::{Peer, Policy, PolicyList, PolicyName, PolicySet, Request};
use ambit_scale::policies::{POLICIES, allowed, policy};
use anyhow::Result;

use crate::report::{Row, Section};

/// Decisions of each kind.
const DECISIONS: u32 = 100_000;
/// Changes of each kind.
const CHANGES: u32 = 1_000;

const INTRODUCTION: &str = "10,000 policies of 10 rules each, rules of every shape, all of which apply to the workload: those of its namespace, or \
those that it lists by name. A change is made while a reader keeps the set before it.";

/// Takes every figure of the section.
pub(crate) fn measure() -> Result<Section> {
    let mut section = Section::new("Policies", INTRODUCTION);
    for (which, scope) in
        [("of the namespace", Scope::Namespace), ("listed by name", Scope::WorkloadSelector)]
    {
        let mut set = PolicySet::default();
        for number in 0..POLICIES {
            set.insert(Policy::compile(&policy(number, scope))?);
        }
        let listed: PolicyList = match scope {
            Scope::WorkloadSelector => {
                (0..POLICIES).map(|number| PolicyName::new("app", &format!("p{number}"))).collect()
            }
            Scope::Global | Scope::Namespace => PolicyList::default(),
        };
        let (port, principal) = allowed();
        for (whom, principal) in [
            ("whom the last one allows", principal.as_str()),
            ("whom none allows", "cluster.local/ns/x/sa/y"),
        ] {
            let took = decide(&set, &listed, port, principal);
            let row = Row::new(format!("a decision, policies {which}, for a client {whom}"));
            section.push(row.time(took).at_most(Duration::from_micros(20)));
        }
        let mut times = Vec::new();
        for number in 0..CHANGES {
            let mut changed = policy(number, scope);
            changed.dry_run = true;
            let kept = set.clone();
            let start = Instant::now();
            set.insert(Policy::compile(&changed)?);
            times.push(start.elapsed());
            drop(black_box(kept));
        }
        section.push(Row::of_times(format!("a change, policies {which}"), times));
    }
    Ok(section)
}

/// The mean time of a decision.
fn decide(set: &PolicySet, listed: &PolicyList, port: u16, principal: &str) -> Duration {
    let mut parts = principal.split('/').skip(2).step_by(2);
    let peer = Peer {
        principal,
        namespace: parts.next().unwrap_or_default(),
        service_account: parts.next().unwrap_or_default(),
    };
    let request = Request {
        peer: Some(peer),
        source_ip: IpAddr::from(Ipv4Addr::new(10, 1, 2, 3)),
        destination_ip: IpAddr::from(Ipv4Addr::new(10, 1, 2, 4)),
        destination_port: port,
    };
    let start = Instant::now();
    for _ in 0..DECISIONS {
        black_box(black_box(set).evaluate("app", listed, black_box(&request)));
    }
    start.elapsed() / DECISIONS
}
