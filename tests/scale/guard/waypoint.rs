//! What a waypoint does with each request beside reading and writing it: its form, its route, its policies, its fields.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};

use ambit_api::security::string_match::MatchType;
use ambit_api::security::{Action, Authorization, Clause, Extension, Match, Rule, StringMatch};
use ambit_api::{HTTP_MATCH_TYPE_URL, l7};
use ambit_policy::{Content, HttpRequest, Peer, Policy, Request as Connection, evaluate_http};
use ambit_route::{RequestHead, Table};
use ambit_scale::routes::{SERVICE, route};
use ambit_waypoint::attempt::{Form, head};
use ambit_waypoint::sanitise::{Claims, Sane, remove_hop_by_hop, sanitise};
use anyhow::{Context, Result, ensure};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Request};
use prost::Message;

/// Routes of the service.
const ROUTES: u32 = 10_000;
/// Policies that apply.
const POLICIES: u32 = 500;
/// Counted calls.
const CALLS: u32 = 1_000;
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 2, 3));

/// A request as browsers and their proxies send it.
fn request() -> Result<Parts> {
    let request = Request::get("/team-99/r9999/items/17?page=2&sort=name")
        .header("host", "web.app.svc.cluster.local:80")
        .header("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0")
        .header("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8")
        .header("accept-language", "en-US,en;q=0.5")
        .header("accept-encoding", "gzip, deflate, br")
        .header("cookie", "session=0123456789abcdef; theme=dark")
        .header("connection", "keep-alive")
        .body(());
    Ok(request.context("making a request")?.into_parts().0)
}

fn claims() -> Claims<'static> {
    static FORWARDED: HeaderValue = HeaderValue::from_static("10.1.2.3");
    Claims {
        client: CLIENT,
        forwarded_for: &FORWARDED,
        trusted: false,
        proxies: None,
        ends_tls: false,
        default_host: SERVICE.1,
        target_size: 16 << 10,
    }
}

fn sane() -> Result<(Sane, Parts)> {
    let mut parts = request()?;
    let sane = sanitise(&mut parts, &claims())?;
    Ok((sane, parts))
}

fn request_head<'a>(sane: &'a Sane, parts: &'a Parts) -> RequestHead<'a> {
    RequestHead {
        method: &parts.method,
        host: &sane.host,
        path: parts.uri.path(),
        query: parts.uri.query(),
        headers: &parts.headers,
        scheme: sane.scheme,
        authority: &sane.authority,
        port: 80,
        client_namespace: "app",
        client_address: CLIENT,
    }
}

/// The route of a request among 10,000.
pub(crate) fn matching() -> Result<()> {
    let routes: Vec<l7::Route> = (0..ROUTES).map(route).collect();
    let table = Table::new(&routes);
    let (sane, parts) = sane()?;
    let found = guarded_match(&table, &request_head(&sane, &parts));
    ensure!(found == CALLS, "{found} requests found their route");
    Ok(())
}

#[inline(never)]
fn guarded_match(table: &Table, head: &RequestHead<'_>) -> u32 {
    let found = |_: &u32| {
        let routes = table.routes(SERVICE.0, SERVICE.1, head.port, head.client_namespace);
        black_box(routes.and_then(|routes| routes.find(black_box(head)))).is_some()
    };
    (0..CALLS).filter(found).map(|_| 1).sum()
}

/// Routes become a table, as when a waypoint starts.
pub(crate) fn compile() -> Result<()> {
    let routes: Vec<l7::Route> = (0..ROUTES / 10).map(route).collect();
    let table = guarded_compile(&routes);
    ensure!(table.routes(SERVICE.0, SERVICE.1, 80, "").is_some(), "no routes");
    Ok(())
}

/// One of 10,000 routes changes, while requests go by the table before.
pub(crate) fn change() -> Result<()> {
    let routes: Vec<l7::Route> = (0..ROUTES).map(route).collect();
    let mut table = Table::new(&routes);
    let name = (ROUTES / 2).to_string();
    let changed = route(ROUTES / 2);
    let before = table.clone();
    let after = guarded_change(&mut table, &name, &changed);
    ensure!(before.listed().len() == after.listed().len(), "a route is missing");
    Ok(())
}

#[inline(never)]
fn guarded_change(table: &mut Table, name: &str, route: &l7::Route) -> Table {
    table.insert(black_box(name), black_box(route));
    table.clone()
}

#[inline(never)]
fn guarded_compile(routes: &[l7::Route]) -> Table {
    Table::new(black_box(routes))
}

/// A request that the last of many policies allows, each for a path, a method and a principal.
pub(crate) fn decide() -> Result<()> {
    let policies = (0..POLICIES).map(|number| Policy::compile_http(&policy(number)));
    let policies: Vec<Policy> = policies.collect::<Result<_, _>>()?;
    let (sane, parts) = sane()?;
    let http = HttpRequest {
        authority: &sane.authority,
        host: &sane.host,
        method: parts.method.as_str(),
        path: parts.uri.path(),
        headers: &parts.headers,
        remote_ip: Some(CLIENT),
        server_name: None,
        token: None,
    };
    let peer = Peer { principal: "cluster.local/ns/app/sa/cli", namespace: "app", service_account: "cli" };
    let connection = Connection {
        peer: Some(peer),
        source_ip: CLIENT,
        destination_ip: Ipv4Addr::new(10, 9, 9, 9).into(),
        destination_port: 80,
    };
    let allowed = guarded_decide_http(&policies, &connection, &http);
    ensure!(allowed == CALLS / 10, "{allowed} requests were allowed");
    Ok(())
}

fn policy(number: u32) -> Authorization {
    let text = |match_type| vec![StringMatch { match_type: Some(match_type) }];
    // The last one is for the path of the request.
    let paths = text(MatchType::Prefix(format!("/team-{}/", POLICIES - 1 - number + 99)));
    let method = l7::AttributeMatch {
        attribute: Some(l7::attribute_match::Attribute::Named(l7::RequestAttribute::Method.into())),
        values: text(MatchType::Exact("GET".to_owned())),
        ..l7::AttributeMatch::default()
    };
    let paths =
        paths.into_iter().map(|path| l7::PolicyPath { kind: Some(l7::policy_path::Kind::Text(path)) });
    let http = l7::HttpMatch { attributes: vec![method], paths: paths.collect(), ..l7::HttpMatch::default() };
    let config = prost_types::Any { type_url: HTTP_MATCH_TYPE_URL.to_owned(), value: http.encode_to_vec() };
    let from = Match {
        principals: text(MatchType::Exact("cluster.local/ns/app/sa/cli".to_owned())),
        ..Match::default()
    };
    let to = Match {
        extensions: vec![Extension { name: "http".to_owned(), config: Some(config) }],
        ..Match::default()
    };
    Authorization {
        name: format!("p{number}"),
        namespace: "app".to_owned(),
        action: Action::Allow.into(),
        rules: vec![Rule { clauses: [from, to].map(|only| Clause { matches: vec![only] }).into() }],
        ..Authorization::default()
    }
}

#[inline(never)]
fn guarded_decide_http(policies: &[Policy], connection: &Connection<'_>, http: &HttpRequest<'_>) -> u32 {
    let allowed = |_: &u32| {
        let content = Content::Request(black_box(http));
        evaluate_http(black_box(policies).iter(), connection, content).allowed()
    };
    (0..CALLS / 10).filter(allowed).map(|_| 1).sum()
}

/// A request is brought into its one form.
pub(crate) fn sanitised() -> Result<()> {
    let requests = (0..CALLS).map(|_| request()).collect::<Result<Vec<Parts>>>()?;
    let sane = guarded_sanitise(requests);
    ensure!(sane == CALLS, "{sane} requests are sane");
    Ok(())
}

#[inline(never)]
fn guarded_sanitise(requests: Vec<Parts>) -> u32 {
    let sane = |mut parts: Parts| black_box(sanitise(&mut parts, &claims())).map(|_| 1).unwrap_or_default();
    requests.into_iter().map(sane).sum()
}

/// The head that is sent on is made, and the fields of an answer are cleaned.
pub(crate) fn fields() -> Result<()> {
    let (sane, parts) = sane()?;
    let form = Form { parts: &parts, sane: &sane, host: None, at_gateway: false };
    let mut answer = HeaderMap::new();
    for name in ["content-type", "content-length", "server", "date", "cache-control", "set-cookie"] {
        answer.insert(name, "0".parse()?);
    }
    answer.insert("connection", "keep-alive".parse()?);
    guarded_fields(&form, (0..CALLS).map(|_| answer.clone()).collect())
}

#[inline(never)]
fn guarded_fields(form: &Form<'_>, answers: Vec<HeaderMap>) -> Result<()> {
    for mut answer in answers {
        black_box(head(black_box(form), false, false));
        remove_hop_by_hop(&mut answer)?;
        black_box(answer);
    }
    Ok(())
}
