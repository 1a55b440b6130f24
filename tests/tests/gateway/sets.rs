//! ListenerSets: listeners that other namespaces add to a gateway.

use std::net::SocketAddr;

use ambit_tests::beds::Trials;

use crate::bed::Gateways;

pub(crate) fn add(trials: &mut Trials<Gateways>) {
    trials.add("ListenerSets add listeners and ports", async |bed| added(bed).await);
    trials.add("a ListenerSet takes no listener of its Gateway", async |bed| taken(bed).await);
}

fn set(name: &str, gateway: &str, listeners: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: ListenerSet\nmetadata: {{name: {name}, namespace: edge}}\n\
         spec: {{parentRef: {{name: {gateway}}}, listeners: {listeners}}}\n"
    )
}

const ALLOWED: &str = "  allowedListeners: {namespaces: {from: Same}}\n";

async fn added(bed: &Gateways) {
    bed.service("set").await;
    let own = "  listeners: [{name: own, port: 80, protocol: HTTP, hostname: own.example}]\n";
    let at = bed.gateway_with("set-gw", &format!("{ALLOWED}{own}")).await;
    let (first, second) = (SocketAddr::new(at, 80), SocketAddr::new(at, 8082));
    let listeners = "[{name: more, port: 80, protocol: HTTP, hostname: more.example}, {name: other, port: 8082, protocol: HTTP}]";
    bed.apply(&set("added", "set-gw", listeners)).await;
    bed.route("set", "[{kind: ListenerSet, name: added}]", "[]").await;
    let is_ok = |status: u16| status == 200;
    bed.eventually(first, "more.example", |answer| is_ok(answer.status)).await;
    bed.eventually(second, "any.example", |answer| is_ok(answer.status)).await;
    // The route is not attached to the Gateway's own listener.
    bed.eventually(first, "own.example", |answer| answer.status == 404).await;
    // Once nobody may add listeners any more, they are gone.
    bed.gateway_with("set-gw", own).await;
    bed.eventually(first, "more.example", |answer| answer.status == 404).await;
}

async fn taken(bed: &Gateways) {
    bed.service("set-own").await;
    bed.service("set-thief").await;
    let own = "  listeners: [{name: own, port: 80, protocol: HTTP, hostname: taken.example}]\n";
    let at = bed.gateway_with("taken-gw", &format!("{ALLOWED}{own}")).await;
    let listeners = "[{name: thief, port: 80, protocol: HTTP, hostname: taken.example}, {name: good, port: 80, protocol: HTTP, hostname: good.example}]";
    bed.apply(&set("thief", "taken-gw", listeners)).await;
    bed.route("set-own", "[{name: taken-gw}]", "[]").await;
    bed.route("set-thief", "[{kind: ListenerSet, name: thief}]", "[]").await;
    let to = SocketAddr::new(at, 80);
    bed.eventually(to, "good.example", |answer| answer.status == 200 && answer.server() == "set-thief").await;
    bed.eventually(to, "taken.example", |answer| answer.status == 200 && answer.server() == "set-own").await;
}
