//! Policy, as connections meet it: refused, let in, and closed when it changes.

use std::net::SocketAddr;

use ambit_api::security::string_match::MatchType;
use ambit_api::security::{Action, Address, Authorization, Clause, Match, Rule, Scope, StringMatch};
use serde_json::json;
use tokio::io::AsyncReadExt;

use crate::mesh::{LIMIT, Mesh, Pod, bytes, echo, eventually, exchange, ping};

/// A policy of the default namespace with one rule of one match.
fn policy(name: &str, action: Action, of: Match) -> Authorization {
    Authorization {
        name: name.into(),
        namespace: "default".into(),
        scope: Scope::Namespace.into(),
        action: action.into(),
        rules: vec![Rule { clauses: vec![Clause { matches: vec![of] }] }],
        ..Authorization::default()
    }
}

/// Nobody without an identity is let in.
pub(crate) fn strict() -> Authorization {
    let anybody = StringMatch { match_type: Some(MatchType::Presence(())) };
    policy("strict", Action::Deny, Match { not_principals: vec![anybody], ..Match::default() })
}

/// Lets in one namespace.
pub(crate) fn allow_namespace(namespace: &str) -> Authorization {
    policy("allow", Action::Allow, Match { namespaces: vec![exact(namespace)], ..Match::default() })
}

fn exact(text: &str) -> StringMatch {
    StringMatch { match_type: Some(MatchType::Exact(text.into())) }
}

fn principal(account: &str) -> Match {
    Match { principals: vec![exact(&format!("cluster.local/ns/default/sa/{account}"))], ..Match::default() }
}

async fn works(from: &Pod, to: SocketAddr) -> bool {
    let Ok(mut stream) = from.net.dial(to).await else { return false };
    exchange(&mut stream, b"hello").await.is_ok_and(|answer| answer == b"hello")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_policy_closes_and_admits_connections() {
    let mesh = Mesh::start(2, json!({})).await;
    let far = mesh.pod(0, "far", "far-account").await;
    let near = mesh.pod(1, "near", "near-account").await;
    let server = mesh.pod(1, "server", "server-account").await;
    let _seen = echo(server.net.listen(server.net.v4.into(), 8080).await);
    let address = SocketAddr::new(server.net.v4.into(), 8080);
    let mut open = Vec::new();
    for client in [&far, &near] {
        let mut stream = client.net.dial(address).await.unwrap();
        assert_eq!(ping(&mut stream, b"before").await.unwrap(), b"before");
        open.push(stream);
    }
    let everyone = Match { namespaces: vec![exact("default")], ..Match::default() };
    mesh.control.policy(&policy("deny-all", Action::Deny, everyone));
    for stream in &mut open {
        let ended = tokio::time::timeout(LIMIT, stream.read_u8()).await.expect("closed by policy");
        assert!(ended.is_err());
    }
    for client in [&far, &near] {
        assert!(!works(client, address).await);
    }
    let line = mesh.nodes[1]
        .ztunnel
        .logged("denial", |l| {
            l["direction"] == "inbound" && l["error"].to_string().contains("denied by policy")
        })
        .await;
    assert!(line["error"].to_string().contains("default/deny-all"), "{line}");
    mesh.control.remove_policy("default/deny-all");
    for client in [&far, &near] {
        eventually("open again", async || works(client, address).await).await;
    }
    let metrics = mesh.nodes[1].ztunnel.metrics().await;
    assert!(metrics.contains("response_flags=\"DENY\""), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_allow_by_principal_admits_only_that_principal() {
    let mesh = Mesh::start(2, json!({})).await;
    let friend = mesh.pod(0, "friend", "friend").await;
    let stranger = mesh.pod(0, "stranger", "stranger").await;
    let neighbour = mesh.pod(1, "neighbour", "stranger").await;
    let outside = mesh.uncaptured_pod(0, "outside", "friend").await;
    let server = mesh.pod(1, "server", "server").await;
    let _seen = echo(server.net.listen(server.net.v4.into(), 8080).await);
    let address = SocketAddr::new(server.net.v4.into(), 8080);
    assert!(works(&outside, address).await, "plaintext is let in while nothing forbids it");
    let mut plaintext = outside.net.dial(address).await.unwrap();
    assert_eq!(ping(&mut plaintext, b"x").await.unwrap(), b"x");
    mesh.control.policy(&policy("friends", Action::Allow, principal("friend")));
    assert!(tokio::time::timeout(LIMIT, plaintext.read_u8()).await.expect("closed by policy").is_err());
    eventually("friends only", async || !works(&outside, address).await).await;
    assert!(works(&friend, address).await);
    assert!(!works(&stranger, address).await);
    assert!(!works(&neighbour, address).await, "the hand-over asks the same policy");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_survives_a_change_of_unrelated_policies() {
    let mesh = Mesh::start(2, json!({})).await;
    let client = mesh.pod(0, "client", "client").await;
    let server = mesh.pod(1, "server", "server").await;
    let _seen = echo(server.net.listen(server.net.v4.into(), 8080).await);
    let mut stream = client.net.dial((server.net.v4, 8080).into()).await.unwrap();
    assert_eq!(ping(&mut stream, b"1").await.unwrap(), b"1");
    mesh.control.policy(&policy("friends", Action::Allow, principal("client")));
    mesh.control.policy(&policy("foes", Action::Deny, principal("foe")));
    mesh.wait("policies known", |dump| dump["policies"].as_array().is_some_and(|p| p.len() == 2)).await;
    assert_eq!(ping(&mut stream, b"2").await.unwrap(), b"2");
    let mut listed = policy("other-clients", Action::Deny, principal("client"));
    listed.scope = Scope::WorkloadSelector.into();
    mesh.control.policy(&listed);
    mesh.wait("policies known", |dump| dump["policies"].as_array().is_some_and(|p| p.len() == 3)).await;
    assert_eq!(ping(&mut stream, b"3").await.unwrap(), b"3", "no workload lists it");
    let mut server = server;
    server.workload.authorization_policies = vec!["default/other-clients".into()];
    mesh.control.workload(server.workload.clone());
    assert!(tokio::time::timeout(LIMIT, stream.read_u8()).await.expect("closed by the list").is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_policy_refuses_nothing_and_is_counted() {
    let mesh = Mesh::start(2, json!({})).await;
    let client = mesh.pod(0, "client", "client").await;
    let server = mesh.pod(1, "server", "server").await;
    let _seen = echo(server.net.listen(server.net.v4.into(), 8080).await);
    let mut denied = policy("rehearsal", Action::Deny, principal("client"));
    denied.dry_run = true;
    mesh.control.policy(&denied);
    mesh.wait("policy known", |dump| dump["policies"].as_array().is_some_and(|p| p.len() == 1)).await;
    assert!(works(&client, (server.net.v4, 8080).into()).await);
    let metrics = mesh.nodes[1].ztunnel.metrics().await;
    assert!(metrics.contains("ambit_policy_dry_run_differs_total 1"), "{metrics}");
}

/// `::1` needs no privilege, another address NET_ADMIN; neither is believed, on one node and across.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_address_that_a_pod_chose_is_not_believed() {
    let mesh = Mesh::start(2, json!({})).await;
    let client = mesh.pod(0, "client", "client").await;
    let servers = [mesh.pod(0, "near", "server").await, mesh.pod(1, "far", "server").await];
    let free: std::net::Ipv4Addr = "10.77.9.9".parse().unwrap();
    client.net.add_address(free.into()).await;
    for server in &servers {
        for ip in server.net.ips() {
            let mut seen = echo(server.net.listen(ip, 8080).await);
            tokio::spawn(async move { while seen.recv().await.is_some() {} });
        }
    }
    let works_from = async |source: std::net::IpAddr, to: SocketAddr| {
        let Ok(mut stream) = client.net.dial_from(source, to).await else { return false };
        exchange(&mut stream, b"hello").await.is_ok_and(|answer| answer == b"hello")
    };
    let loopback = std::net::Ipv6Addr::LOCALHOST;
    for server in &servers {
        assert!(works_from(loopback.into(), (server.net.v6, 8080).into()).await, "judged as the pod itself");
        assert!(works_from(free.into(), (server.net.v4, 8080).into()).await);
    }
    let line = mesh.nodes[0].ztunnel.logged("the hand-over", |line| {
        line["direction"] == "inbound" && line["src.addr"].to_string().contains("fd77")
    });
    assert_eq!(line.await["src.workload"], "client");
    let blocks = [
        Address { address: bytes(client.net.v4.into()), length: 32 },
        Address { address: bytes(client.net.v6.into()), length: 128 },
    ];
    let of_client = Match { source_ips: blocks.to_vec(), ..Match::default() };
    mesh.control.policy(&policy("deny-client", Action::Deny, of_client));
    for server in &servers {
        let (v4, v6) = ((server.net.v4, 8080).into(), (server.net.v6, 8080).into());
        eventually("denied", async || !works(&client, v4).await && !works(&client, v6).await).await;
        assert!(!works_from(loopback.into(), v6).await, "::1 passes a DENY of the pod's address");
        assert!(!works_from(free.into(), v4).await, "another address passes a DENY of the pod's address");
    }
}
