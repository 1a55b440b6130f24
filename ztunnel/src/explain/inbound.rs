//! Whether a pod of this node would let a connection in.

use std::net::{IpAddr, SocketAddr};

use ambit_directory::{Snapshot, Workload};
use ambit_explain::{Considered, Explanation, Next};
use ambit_identity::SpiffeId;
use ambit_policy::{Action, Content, Peer, Policy, Request};
use ambit_telemetry::http::Query;

use super::{ExplainError, named, parameter, parse, pod, workload};
use crate::pods::Role;
use crate::proxy::Proxy;

/// A connection to a pod.
struct Connection<'a> {
    workload: &'a Workload,
    peer: Option<&'a SpiffeId>,
    source: IpAddr,
    destination: SocketAddr,
}

/// Explains `?pod=NAMESPACE/NAME&port=PORT`, with `from=SPIFFE_ID` and `source=ADDRESS`.
///
/// # Errors
/// [`ExplainError`].
pub(super) fn explain(proxy: &Proxy, query: &Query) -> Result<Explanation, ExplainError> {
    let pod = pod(proxy, query)?;
    let port: u16 = parse("port", parameter(query, "port")?)?;
    let peer: Option<SpiffeId> = query.get("from").map(|from| parse("from", from)).transpose()?;
    let source: Option<IpAddr> = query.get("source").map(|source| parse("source", source)).transpose()?;
    let explanation = Explanation::begin();
    let own = match workload(proxy, &pod) {
        Ok(own) => own,
        Err(reason) => return Ok(explanation.refuses("authorize", reason, Vec::new())),
    };
    let listeners = proxy.settings.listeners;
    if Role::ALL.iter().any(|role| listeners.wants(*role) && role.port() == port) {
        let text = format!("port {port} of a pod is the proxy's own");
        return Ok(explanation.refuses("authorize", text, Vec::new()));
    }
    let Some(address) = own.address_like(source) else {
        return Ok(explanation.refuses("authorize", "the pod has no address", Vec::new()));
    };
    let snapshot = proxy.directory.load();
    let connection = Connection {
        workload: &own,
        peer: peer.as_ref(),
        source: source.unwrap_or(IpAddr::from([0, 0, 0, 0])),
        destination: SocketAddr::new(address, port),
    };
    Ok(authorize(&snapshot, &connection, explanation))
}

fn authorize(snapshot: &Snapshot, connection: &Connection<'_>, mut explanation: Explanation) -> Explanation {
    let Connection { workload, peer, source, destination } = *connection;
    let verdict = snapshot.authorize(workload, peer, source, destination);
    let request = Request {
        peer: peer.map(|peer| Peer {
            principal: peer.principal(),
            namespace: peer.namespace(),
            service_account: peer.service_account(),
        }),
        source_ip: source,
        destination_ip: destination.ip(),
        destination_port: destination.port(),
    };
    let mut applying: Vec<&Policy> = snapshot
        .policies()
        .applying(&workload.namespace, &workload.policies)
        .map(|policy| &**policy)
        .collect();
    applying.sort_by_key(|policy| (policy.action() == Action::Allow, policy.name().clone()));
    let considered =
        applying.iter().map(|policy| considered(policy, &request, verdict.by() == Some(policy.name())));
    let considered = considered.collect();
    let who = peer.map_or_else(|| "a client without identity".to_owned(), ToString::to_string);
    let text = format!("{who} to {}, port {}: {}", workload.uid, destination.port(), verdict.decision);
    if !verdict.allowed() {
        return explanation.refuses("authorize", text, considered);
    }
    if verdict.dry_run_differs() {
        explanation.warns("authorize", format!("{text}; a dry-run policy would deny it"), considered);
    } else {
        explanation.passes("authorize", text, considered);
    }
    explanation.goes(Next::Workload {
        workload: named(workload),
        address: destination,
        tunnel: false,
        identity: None,
    })
}

/// A policy that applies, and whether it matches.
fn considered(policy: &Policy, request: &Request<'_>, decides: bool) -> Considered {
    let action = match policy.action() {
        Action::Allow => "ALLOW",
        Action::Deny => "DENY",
    };
    let dry_run = if policy.dry_run() { ", dry run" } else { "" };
    let object = format!("policy {} ({action}{dry_run})", policy.name());
    match policy.unmet(request, Content::Unread) {
        None if decides => Considered::counts(object, "matches and decides"),
        None => Considered::passed_over(object, "matches"),
        Some(fields) if fields.is_empty() => {
            Considered::passed_over(object, "has no rule, so it matches nothing")
        }
        Some(fields) => Considered::passed_over(object, format!("does not match: {}", fields.join(", "))),
    }
}
