//! Decisions of policies.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};

use ambit_api::security::Scope;
use ambit_policy::{Peer, Policy, PolicyList, PolicyName, PolicySet, Request};
use ambit_scale::policies::policy;
use anyhow::Result;

/// Policies that apply.
const POLICIES: u32 = 500;
/// Counted decisions.
const CALLS: u32 = 1_000;

pub(crate) fn by_namespace() -> Result<()> {
    decide(Scope::Namespace, PolicyList::default())
}

pub(crate) fn by_name() -> Result<()> {
    let listed = (0..POLICIES).map(|number| PolicyName::new("app", &format!("p{number}"))).collect();
    decide(Scope::WorkloadSelector, listed)
}

#[allow(clippy::needless_pass_by_value, reason = "each caller makes the list for this call")]
fn decide(scope: Scope, listed: PolicyList) -> Result<()> {
    let mut set = PolicySet::default();
    for number in 0..POLICIES {
        set.insert(Policy::compile(&policy(number, scope))?);
    }
    let peer = Peer { principal: "cluster.local/ns/x/sa/y", namespace: "x", service_account: "y" };
    let request = Request {
        peer: Some(peer),
        source_ip: IpAddr::from(Ipv4Addr::new(10, 1, 2, 3)),
        destination_ip: IpAddr::from(Ipv4Addr::new(10, 1, 2, 4)),
        destination_port: 8080,
    };
    guarded_decide(&set, &listed, &request);
    Ok(())
}

#[inline(never)]
fn guarded_decide(set: &PolicySet, listed: &PolicyList, request: &Request<'_>) {
    for _ in 0..CALLS {
        black_box(set.evaluate("app", black_box(listed), black_box(request)));
    }
}
