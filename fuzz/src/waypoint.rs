//! What a waypoint reads beside requests: the beginning of TLS, answers of authorizers, and its own configuration.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use ::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use ambit_api::external_auth::CheckResponse;
use ambit_api::{l7, workload as wire};
use ambit_directory::{Directory, NamespacedHost, Service, Update};
use ambit_identity::SpiffeId;
use ambit_policy::{Content, HttpRequest};
use ambit_route::{ClientHello, ConnectionHead, StreamMatched, StreamTable, Table};
use ambit_token::rules;
use ambit_waypoint::accept::Destination;
use ambit_waypoint::backend_policies::BackendPolicies;
use ambit_waypoint::backend_tls::TlsClients;
use ambit_waypoint::client_hello::{Parsed, parse};
use ambit_waypoint::dump;
use ambit_waypoint::external::{Verdict, grpc, http, is_framing};
use ambit_waypoint::policies::Policies;
use ambit_waypoint::proxy::Published;
use prost::Message;

use crate::pieces::cut;
use crate::requests::{CLIENT, SERVICE, each_draw_chooses, sane};

/// A header says the same whatever follows it, and not a byte of that is a part of it.
pub(crate) fn proxy_header(data: &[u8]) {
    use ambit_waypoint::proxy_protocol::{Parsed, parse};
    let found = parse(data);
    let Parsed::Header { length, .. } = found else { return };
    assert_eq!(parse(&data[..length]), found);
    assert_eq!(parse(&[data, b"GET / HTTP/1.1\r\n"].concat()), found);
    for end in 0..length {
        assert_ne!(parse(&data[..end]), found, "{end} of {length}");
    }
}

/// What a beginning is, is decided once: while there are too few bytes nothing is said, and more bytes change nothing.
pub(crate) fn client_hello(data: &[u8]) {
    let mut decided = None;
    // Of a long input only some lengths: each is parsed from its first byte.
    let step = (data.len() / 64).max(1);
    for length in (0..data.len()).step_by(step).chain([data.len()]) {
        let parsed = parse(&data[..length]);
        if let Some(before) = &decided {
            assert_eq!(&parsed, before, "after {length} bytes");
        }
        if let Parsed::Hello(hello) = &parsed {
            let name = hello.server_name.as_deref().unwrap_or_default();
            assert!(!name.bytes().any(|byte| byte.is_ascii_uppercase()), "{name}");
        }
        decided = (parsed != Parsed::Incomplete).then_some(parsed);
    }
}

/// An answer of gRPC (`g`) or HTTP (any other first byte), and the request that it changes. An answer that refuses never
/// lets through, and none changes what frames a message.
pub(crate) fn authorizer_answer(data: &[u8]) {
    let Some((first, data)) = data.split_first() else { return };
    let pieces = cut(data);
    let [answer, head, ..] = &pieces[..] else { return };
    let Some((_, mut parts)) = sane(head, false) else { return };
    let (verdict, refuses) = match first {
        b'g' => {
            let Ok(answer) = CheckResponse::decode(*answer) else { return };
            let refuses = answer.status.as_ref().is_some_and(|status| status.code != 0);
            (grpc::verdict(answer), refuses)
        }
        _ => {
            let check =
                pieces.get(2).and_then(|bytes| l7::HttpCheck::decode(*bytes).ok()).unwrap_or_default();
            let Some((status, headers)) = answer_head(answer) else { return };
            match http::Check::new(&check).verdict(status, &headers, "".into()) {
                Ok(verdict) => (verdict, status != StatusCode::OK),
                Err(_) => return,
            }
        }
    };
    match verdict {
        Verdict::Allowed(changes) => {
            assert!(!refuses, "a refused request is let through");
            let before = framing(&parts.headers);
            let mut response = HeaderMap::new();
            changes.apply(&mut parts.headers).apply(&mut response);
            assert_eq!(framing(&parts.headers), before);
            assert!(framing(&response).is_empty(), "{response:?}");
        }
        Verdict::Denied(denial) => {
            let response = denial.answer().response;
            assert!(!response.status().is_informational(), "{}", response.status());
            assert!(framing(response.headers()).is_empty(), "{response:?}");
        }
    }
}

/// A status in the first line, header fields in the others.
fn answer_head(text: &[u8]) -> Option<(StatusCode, HeaderMap)> {
    let mut lines = text.split(|byte| *byte == b'\n');
    let status = StatusCode::from_bytes(lines.next()?).ok()?;
    let mut headers = HeaderMap::new();
    for line in lines {
        let at = line.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&line[..at]).ok()?;
        headers.try_append(name, HeaderValue::from_bytes(&line[at + 1..]).ok()?).ok()?;
    }
    Some((status, headers))
}

fn framing(headers: &HeaderMap) -> Vec<(HeaderName, HeaderValue)> {
    let mut fields: Vec<_> = headers
        .iter()
        .filter(|(name, _)| is_framing(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    fields.sort_by(|(one, _), (other, _)| one.as_str().cmp(other.as_str()));
    fields
}

/// The service that everything is for.
static BOUND: LazyLock<Arc<Service>> = LazyLock::new(|| {
    let (mut directory, reader) = Directory::new();
    let service = wire::Service {
        name: "web".to_owned(),
        namespace: SERVICE.0.to_owned(),
        hostname: SERVICE.1.to_owned(),
        ..wire::Service::default()
    };
    let address = wire::Address { r#type: Some(wire::address::Type::Service(service)) };
    let name = format!("{}/{}", SERVICE.0, SERVICE.1);
    assert!(directory.apply(std::iter::once(Update::Address { name, address })).is_empty());
    let host = ambit_directory::HostRef { namespace: SERVICE.0, hostname: SERVICE.1 };
    reader.snapshot().service(host).expect("it was put there").clone()
});

/// The head of a request, then resources: of each the first byte says which kind it is. All of them are for one service.
/// Whatever they are, decisions are made, and policies that can't be read let nothing through.
pub(crate) fn config(data: &[u8]) {
    let pieces = cut(data);
    let Some((head, resources)) = pieces.split_first() else { return };
    let mut backends = Vec::new();
    let mut policies = BTreeMap::new();
    let mut streams = Vec::new();
    let mut routes = Vec::new();
    for (number, resource) in resources.iter().enumerate().take(16) {
        match resource.split_first() {
            Some((b'b', bytes)) => backends.extend(l7::BackendPolicy::decode(bytes)),
            Some((b'p', bytes)) => {
                policies.extend(l7::Policy::decode(bytes).map(|policy| (number.to_string(), policy)));
            }
            Some((b'r', bytes)) => routes.extend(l7::Route::decode(bytes)),
            Some((b's', bytes)) => streams.extend(l7::StreamRoute::decode(bytes)),
            _ => {}
        }
    }
    let streams_dump = dump::stream_routes(&streams).into();
    dump::routes(&Published { routes: table_of(&routes).into(), streams_dump, ..Published::default() });
    stream_routes(streams);
    backend_policies(&mut backends);
    decide(policies, head);
}

/// A table after routes came and went.
fn table_of(routes: &[l7::Route]) -> Table {
    let mut table = Table::new(routes);
    let before = table.clone();
    for (at, route) in routes.iter().enumerate().step_by(2) {
        table.remove(&at.to_string());
        table.insert("last", route);
    }
    assert_eq!(before.listed().len(), routes.len());
    table
}

fn stream_routes(mut streams: Vec<l7::StreamRoute>) {
    for target in streams.iter_mut().flat_map(|route| &mut route.targets) {
        SERVICE.0.clone_into(&mut target.namespace);
        SERVICE.1.clone_into(&mut target.hostname);
    }
    let table = StreamTable::new(&streams);
    let head = ConnectionHead {
        port: 80,
        destination: CLIENT,
        client_namespace: "shop",
        client_address: CLIENT,
        tls: None,
    };
    let names = [None, Some("a.example"), Some("*")].map(|server_name| Some(ClientHello { server_name }));
    for tls in names.into_iter().chain([None]) {
        let head = ConnectionHead { tls, ..head };
        if let StreamMatched::Rule(rule) = table.find(SERVICE.0, SERVICE.1, &head) {
            each_draw_chooses(&rule.backends);
        }
    }
    table.needs_client_hello(SERVICE.0, SERVICE.1, 80);
}

fn backend_policies(backends: &mut [l7::BackendPolicy]) {
    for backend in &mut *backends {
        SERVICE.1.clone_into(&mut backend.host);
        backend.mesh_wide = true;
    }
    static TLS: LazyLock<TlsClients> = LazyLock::new(|| TlsClients::new(None).expect("no file to read"));
    let compiled = BackendPolicies::new(1, &*backends, &TLS);
    let service = NamespacedHost { namespace: SERVICE.0.into(), hostname: SERVICE.1.into() };
    assert!(compiled.find(&service, 80, None).is_ok(), "the service itself is always known");
    for subset in backends.iter().flat_map(|backend| &backend.subsets) {
        assert!(compiled.find(&service, 80, Some(&subset.name)).is_ok(), "{} is not known", subset.name);
    }
}

fn decide(mut policies: BTreeMap<String, l7::Policy>, head: &[u8]) {
    let Some((sane, mut parts)) = sane(head, false) else { return };
    for policy in policies.values_mut() {
        policy.gateways = vec!["own".to_owned()];
    }
    let unreadable = policies.values().any(|policy| {
        policy.authorization.is_none() && policy.authentication.is_none() && policy.external.is_none()
    });
    let compiled = Policies::new(&policies, &Policies::default(), |_| true);
    let destination = Destination::Service { service: BOUND.clone(), port: 80, dialled: None };
    let client = SpiffeId::new("cluster.local", "shop", "cli").expect("an identity");
    rules::remove_outputs(compiled.tokens(&destination), &mut parts.headers);
    let mut uri = parts.uri.clone();
    let token = rules::authenticate(compiled.tokens(&destination), &mut parts.headers, &mut uri, 0.0);
    let token = token.ok().flatten();
    let http = HttpRequest {
        authority: &sane.authority,
        host: &sane.host,
        method: parts.method.as_str(),
        path: parts.uri.path(),
        headers: &parts.headers,
        remote_ip: Some(CLIENT),
        server_name: None,
        token: token.as_ref(),
    };
    compiled.needs_requests(&destination);
    compiled.authorizers(&destination, Some(&client), CLIENT, &http, false);
    compiled.authorizers(&destination, Some(&client), CLIENT, &http, true);
    let _audited = compiled.audits(&destination, Some(&client), CLIENT, &http).count();
    for content in [Content::Request(&http), Content::Passed(Some("a.example")), Content::Unread] {
        let verdict = compiled.decide(&destination, Some(&client), CLIENT, content);
        assert!(!(unreadable && verdict.allowed()), "a policy without content lets through");
    }
}
