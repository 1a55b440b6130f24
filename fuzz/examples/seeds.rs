//! Writes the inputs that the fuzzer starts from: one of each form that a target distinguishes.
//!
//! `cargo run -p ambit-fuzz --example seeds` writes to `fuzz/corpus/`; what is there already under another name stays.

#![allow(clippy::unwrap_used, missing_docs, reason = "a generator that can't go on ends")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ambit_api::core::{HeaderValue, HeaderValueOption};
use ambit_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use ambit_api::external_auth::check_response::HttpResponse;
use ambit_api::external_auth::{CheckResponse, DeniedHttpResponse, HttpStatus, OkHttpResponse};
use ambit_api::security::StringMatch;
use ambit_api::security::string_match::MatchType;
use ambit_api::workload::zds::{WorkloadInfo, ZdsHello};
use ambit_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, l7, rpc};
use ambit_control::index::{Index, ResourceType, Settings};
use ambit_control::object::Change;
use ambit_control::source;
use ambit_fuzz::pieces::join;
use ambit_node::zds::{Request, encode_request};
use hickory_proto::op::{Edns, Message, MessageType, Query};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use prost::Message as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, IsCa, KeyIdMethod,
    KeyPair, RevokedCertParams, SanType, SerialNumber,
};
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;

struct Seeds(PathBuf);

impl Seeds {
    fn put(&self, target: &str, name: &str, bytes: impl AsRef<[u8]>) {
        assert!(ambit_fuzz::target(target).is_some(), "no target {target}");
        let directory = self.0.join(target);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(format!("seed-{name}")), bytes).unwrap();
    }
}

fn main() {
    let seeds = Seeds(Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus"));
    tunnel(&seeds);
    proxies(&seeds);
    configuration(&seeds);
    dns(&seeds);
    identity(&seeds);
    credentials(&seeds);
    objects(&seeds);
    requests(&seeds);
    waypoint(&seeds);
    traffic(&seeds);
}

fn traffic(seeds: &Seeds) {
    for (name, text) in [
        ("method", "request.method in ['GET', \"HEAD\"] && !request.path.startsWith('/admin')"),
        ("header", "'x-user' in request.headers && request.headers['x-user'] == r'anna'"),
        ("claims", "has(request.auth.claims.groups) && 'a' in request.auth.claims.groups"),
        ("numbers", "size(request.path) + 2 * -3 >= 1 || 1.5e3 < 2u % 3u || destination.port != 0x50"),
        ("choice", "source.namespace == 'shop' ? request.query.a == '1' : false"),
        ("literals", "{'a': [1, null, b'x'], true: '''long'''}['a'][0] == int('1')"),
        ("loop", "[1, 2].all(x, x > 0)"),
        ("deep", "((((((!(!(-(-(1)))) == 1))))))"),
    ] {
        seeds.put("traffic-expression", name, text);
    }
}

fn tunnel(seeds: &Seeds) {
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let baggage = "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=reviews-v1,\
                   service.name=reviews,service.version=v%201,cloud.region=r,cloud.availability_zone=z;p=1";
    let forwarded = "for=\"10.0.0.1:4660\";host=reviews.shop.svc.cluster.local";
    let all = format!(
        "CONNECT\n[fd00::7]:9080\nbaggage: {baggage}\nforwarded: {forwarded}\ntraceparent: {trace}\nx-forwarded-network: east"
    );
    seeds.put("connect", "all-headers", all);
    seeds.put("connect", "bare", "CONNECT\n10.0.0.1:80");
    seeds.put("connect", "host", "CONNECT\nReviews.shop.svc:443\nbaggage: k8s.job.name=j");
    seeds.put("connect", "get", "GET\nhttps://10.0.0.1:80/path");
    seeds.put("connect", "mapped", "CONNECT\n[::ffff:10.0.0.1]:80\nforwarded: for=\"[::1]\"");
    tls_records(seeds);
    seeds.put("baggage", "all", baggage);
    seeds.put(
        "baggage",
        "kinds",
        "k8s.job.name=j,k8s.pod.name=p, k8s.cronjob.name = c ;x=y,service.name=%4,=,,",
    );
    seeds.put("forwarded", "quoted", "For=\"[2001:db8::1]:80\" ; HOST=\"a\\\"b\\\\c\", for=9.9.9.9");
    seeds.put("forwarded", "plain", "proto=http;by=_x;for=192.0.2.43:80;host=a.b");
    seeds.put("traceparent", "level-0", trace);
    seeds.put("traceparent", "later", format!("01{}-more", &trace[2..]));
    seeds.put("spiffe", "ours", "spiffe://cluster.local/ns/shop/sa/reviews");
    seeds.put("spiffe", "dots", "spiffe://a-b_c.d/ns/..a/sa/B.c");
}

fn proxies(seeds: &Seeds) {
    let numbers: Vec<u8> = (0..36).collect();
    for (name, flags) in [("v4", 4), ("v6", 7), ("mixed", 2), ("long-identity", 0xc)] {
        let input = [&[flags][..], &numbers, b"spiffe://cluster.local/ns/shop/sa/reviews"].concat();
        seeds.put("proxy-protocol", name, input);
    }
    let mapped = [
        &[4; 1][..],
        &[0; 10],
        &[0xff; 2],
        &[10, 0, 0, 1],
        &[0; 10],
        &[0xff; 2],
        &[10, 0, 0, 2],
        &[0, 1, 0, 2],
    ];
    seeds.put("proxy-protocol", "mapped", [&[7u8][..], &mapped.concat()[1..], b"x"].concat());
    seeds.put("socks5", "v4", b"\x05\x01\x00\x05\x01\x00\x01\x0a\x00\x00\x01\x00\x50behind");
    seeds.put("socks5", "v6", b"\x05\x01\x00\x05\x01\x00\x04\xfd\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\x00\x50");
    seeds.put("socks5", "name", b"\x05\x02\x02\x00\x05\x01\x00\x03\x07reviews\x23\x78");
    seeds.put("socks5", "name-of-address", b"\x05\x01\x00\x05\x01\x00\x03\x0810.0.0.2\x00\x01");
    seeds.put("socks5", "bind", b"\x05\x01\x00\x05\x02\x00\x01\x0a\x00\x00\x01\x00\x50");
    let info = || WorkloadInfo { name: "n".into(), namespace: "shop".into(), service_account: "sa".into() };
    let listener = |port| ambit_api::workload::zds::Listener { port, udp: false, ipv6: true };
    let packet = |descriptors: u8, request| [vec![descriptors], encode_request(request).unwrap()].concat();
    let add = |uid: &str| packet(3, Request::Add(uid.into(), info(), vec![listener(15001), listener(15008)]));
    let (keep, delete) = (packet(0, Request::Keep("b".into())), packet(0, Request::Del("a".into())));
    let sent = packet(0, Request::SnapshotSent);
    let session = [add("a"), keep, add("c"), delete.clone(), sent.clone(), add("d"), delete];
    seeds.put("zds-proxy", "session", join(&session));
    seeds.put("zds-proxy", "two-snapshots", join(&[add("a"), sent.clone(), sent]));
    let hello = ZdsHello { version: 1, takes_listeners: true }.encode_to_vec();
    seeds.put("zds-agent", "hello", [&[0][..], &hello].concat());
    for (name, result) in [("ack", Ok(())), ("nack", Err("why".to_owned()))] {
        seeds.put("zds-agent", name, [&[1][..], &ztunnel::zds::session::answer(&result)].concat());
    }
    let parts: [&[u8]; 5] = [b"uid", b"name", b"shop", b"account", b"\x3a\x99\x00\x3a\xa0\x03"];
    seeds.put("zds-agent", "order", [&[2][..], &join(&parts.map(<[u8]>::to_vec))].concat());
}

fn configuration(seeds: &Seeds) {
    let config = "node: a\nnetwork: east\ntrustDomainAliases: [old.local]\nworkers: 2\nsameNode: tunnel\n\
                  drainTimeout: 1m30s\ndns:\n  enabled: true\n  upstreams: ['10.96.0.10:53', '[fd00::10]:53']\n\
                  accessLog: {format: json, path: /dev/null}\nlimits: {connectAttempts: 7, poolIdle: 500ms}\n\
                  certificates: {lifetime: 24h, cipher: aes256}\ncrlFile: ~\n";
    seeds.put("ztunnel-config", "many-keys", config);
    seeds.put(
        "ztunnel-config",
        "json",
        r#"{"node": "a", "instanceIp": "fd00::1", "xds": {"onDemand": true}}"#,
    );
    seeds.put("ztunnel-config", "unknown-key", "node: a\ndns: {upstream: []}");
    seeds.put("admin-query", "level", "level=info%2Cambit%3Ddebug&seconds=5&x+y=%C3%A4&&=&a");
    let resolvers = "# comment\nsearch a.b\nnameserver 10.96.0.10\nnameserver 127.0.0.53\nnameserver fd00::10\n\
                     nameserver fe80::1%eth0\noptions ndots:5\n";
    seeds.put("resolv-conf", "file", resolvers);
}

fn query(name: &str, kind: RecordType, payload: Option<u16>) -> Message {
    let mut message = Message::query();
    message.metadata.id = 7;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    if let Some(payload) = payload {
        let mut edns = Edns::new();
        edns.set_max_payload(payload);
        message.set_edns(edns);
    }
    message
}

fn dns(seeds: &Seeds) {
    use RecordType::{A as V4, AAAA as V6, MX, SRV};
    let asked = [
        ("address", "db.shop.svc.cluster.local.", V4, None),
        ("address-6", "DB.shop.", V6, Some(1232)),
        ("headless", "peers.shop.svc.cluster.local.", V4, None),
        ("headless-large", "peers.", V4, Some(4096)),
        ("endpoint", "10-0-0-3.peers.shop.svc.cluster.local.", V4, None),
        ("service-records", "_http._tcp.peers.shop.svc.cluster.local.", SRV, None),
        ("service-record", "_80._tcp.db.shop.", SRV, None),
        ("nothing-of-the-kind", "db.shop.svc.cluster.local.", MX, None),
        ("outside", "api.example.com.", V4, None),
        ("wildcard", "a.example.net.", V4, None),
        ("machine", "machine.example.org.", V4, None),
        ("unknown", "www.example.org.", V4, None),
    ];
    for (name, host, kind, payload) in asked {
        let message = query(host, kind, payload).to_vec().unwrap();
        seeds.put("dns-question", name, [&[0][..], &message].concat());
        seeds.put("dns-question", &format!("{name}-tcp"), [&[3][..], &message].concat());
    }
    let question = query("db.shop.", V4, None);
    let mut response = question.clone();
    response.metadata.message_type = MessageType::Response;
    let record = |last| {
        Record::from_rdata(Name::from_ascii("db.shop.").unwrap(), 30, RData::A(A::new(10, 0, 0, last)))
    };
    response.answers = (0..3).map(record).collect();
    let (question, response) = (question.to_vec().unwrap(), response.to_vec().unwrap());
    seeds.put("dns-answer", "answer", join(&[question.clone(), response]));
    let bare = [&question[..2], &[0x81, 0x82, 0, 0, 0, 0, 0, 0, 0, 0]].concat();
    seeds.put("dns-answer", "failure-without-question", join(&[question.clone(), bare]));
    // A name that points to itself, and one that goes round in a circle.
    let looping =
        [&question[..2], b"\x81\x80\0\x01\0\x01\0\0\0\0\x02db\x04shop\0\0\x01\0\x01\xc0\x1a\xc0\x1c\0\x01"]
            .concat();
    seeds.put("dns-answer", "name-in-a-circle", join(&[question, looping]));
}

fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn leaf(uris: &[&str], key: &KeyPair) -> CertificateParams {
    let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
    params.subject_alt_names.extend(uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())));
    assert!(key.is_compatible(&rcgen::PKCS_ECDSA_P256_SHA256));
    params
}

const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";

fn identity(seeds: &Seeds) {
    let authority = authority();
    let key = KeyPair::generate().unwrap();
    for (name, uris) in
        [("one-name", &[SERVER][..]), ("two-names", &[SERVER, "spiffe://a/ns/b/sa/c"]), ("no-name", &[])]
    {
        let der = leaf(uris, &key).signed_by(&key, &authority).unwrap().der().to_vec();
        seeds.put("certificate", name, join(&[der, authority.der().to_vec()]));
    }
    let twice = format!("# roots\n{}{}", authority.pem(), self::authority().pem());
    seeds.put("trust-roots", "two", twice);
    seeds.put("trust-roots", "cut-short", &authority.pem()[..300]);
    let revoked = RevokedCertParams {
        serial_number: SerialNumber::from_slice(&[7, 8, 9]),
        revocation_time: rcgen::date_time_ymd(2025, 1, 1),
        reason_code: Some(rcgen::RevocationReason::KeyCompromise),
        invalidity_date: None,
    };
    let list = CertificateRevocationListParams {
        this_update: rcgen::date_time_ymd(2025, 1, 1),
        next_update: rcgen::date_time_ymd(2099, 1, 1),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: vec![revoked],
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let list = list.signed_by(&authority).unwrap();
    seeds.put("revocations", "der", list.der());
    seeds.put("revocations", "pem", list.pem().unwrap());
}

fn credentials(seeds: &Seeds) {
    let key = KeyPair::generate().unwrap();
    let request = leaf(&[SERVER], &key).serialize_request(&key).unwrap().pem().unwrap();
    let der = CertificateSigningRequestDer::from_pem_slice(request.as_bytes()).unwrap();
    seeds.put("certificate-request", "pem", &request);
    seeds.put("certificate-request", "der", &der);
    let other = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let request = CertificateParams::default().serialize_request(&other).unwrap();
    seeds.put("certificate-request", "p384", request.der());
    let claims = r#"{"iss":"https://kubernetes.default.svc","aud":["istio-ca"],"exp":4102444800,"nbf":1,"sub":"system:serviceaccount:shop:server","kubernetes.io":{"namespace":"shop","serviceaccount":{"name":"server","uid":"1"},"pod":{"name":"server-1","uid":"2"},"node":{"name":"node-1"}}}"#;
    seeds.put("token-claims", "bound", claims);
    seeds.put(
        "token-claims",
        "short",
        r#"{"aud":"istio-ca","exp":4102444800.5,"sub":"system:serviceaccount:a:b"}"#,
    );
    let contradicting = claims.replace("\"namespace\":\"shop\"", "\"namespace\":\"bank\"");
    seeds.put("token-claims", "contradicting", contradicting);
    use base64::Engine;
    let part = |text: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
    for (name, header) in [
        ("es256", r#"{"alg":"ES256","kid":"1"}"#),
        ("none", r#"{"alg":"none"}"#),
        ("hs256", r#"{"typ":"JWT","alg":"HS256"}"#),
    ] {
        seeds.put("token", name, format!("{}.{}.{}", part(header), part(claims), part(&"s".repeat(64))));
    }
    let keys = r#"{"keys":[{"kty":"EC","crv":"P-256","kid":"1","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"},{"kty":"oct","k":"c2VjcmV0"},{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"},{"kty":"RSA","n":"0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw","e":"AQAB"}]}"#;
    seeds.put("token-keys", "kinds", keys);
}

/// What the control plane makes of a case of its translation.
fn index_of(case: &str) -> Index {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("../control/tests/translation/cases");
    let text = std::fs::read_to_string(cases.join(case).join("objects.yaml")).unwrap();
    let (objects, _problems) = source::parse(Path::new("objects.yaml"), &text);
    let mut index = Index::new(Settings::default());
    index.apply(objects.into_iter().map(Change::Apply));
    index
}

/// The cases of the control plane's translation: as text, and as what became of them.
fn objects(seeds: &Seeds) {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("../control/tests/translation/cases");
    for case in std::fs::read_dir(cases).unwrap() {
        let case = case.unwrap();
        let name = case.file_name().into_string().unwrap();
        let text = std::fs::read_to_string(case.path().join("objects.yaml")).unwrap();
        seeds.put("objects", &name, &text);
        let (objects, _problems) = source::parse(Path::new("objects.yaml"), &text);
        let mut index = Index::new(Settings::default());
        index.apply(objects.into_iter().map(Change::Apply));
        resources(seeds, &name, &index);
    }
    let list = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 80}]}}\n- {apiVersion: v1, kind: Service, metadata: {name: b}, spec: {ports: [{port: x}]}}\n";
    seeds.put("objects", "list", list);
    let request = |names: &[&str], versions: &[(&str, &str)]| {
        let request = DeltaDiscoveryRequest {
            type_url: ADDRESS_TYPE_URL.into(),
            resource_names_subscribe: names.iter().map(ToString::to_string).collect(),
            initial_resource_versions: versions
                .iter()
                .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
                .collect(),
            ..DeltaDiscoveryRequest::default()
        };
        [&b"r"[..], &request.encode_to_vec()].concat()
    };
    let all =
        [b"\x10one".to_vec(), request(&[], &[]), b"\x01two".to_vec(), b"\x11three".to_vec(), vec![0x08]];
    seeds.put("xds-server", "everything", join(&all));
    let again = [b"\x00one".to_vec(), request(&[], &[("name-0", "x"), ("name-7", "y")]), b"\x07z".to_vec()];
    seeds.put("xds-server", "reconnect", join(&again));
    let asks = [
        request(&["name-1", "alias-0"], &[]),
        b"\x10one".to_vec(),
        b"\x01two".to_vec(),
        drops(),
        b"\x02x".to_vec(),
    ];
    seeds.put("xds-server", "on-demand", join(&asks));
    seeds.put("xds-server", "broken", join(&[b"x\x01\0\0\0\x02ab".to_vec()]));
}

fn drops() -> Vec<u8> {
    let request = DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE_URL.into(),
        resource_names_unsubscribe: vec!["name-1".into()],
        response_nonce: "own-1".into(),
        error_detail: Some(rpc::Status { code: 3, message: "no".into(), details: Vec::new() }),
        ..DeltaDiscoveryRequest::default()
    };
    [&b"r"[..], &request.encode_to_vec()].concat()
}

/// Resources as the directory gets them, and as answers of a control plane.
fn resources(seeds: &Seeds, name: &str, index: &Index) {
    let mut sent = Vec::new();
    let mut answers = Vec::new();
    for (number, ((kind, _), resource)) in index.resources().into_iter().enumerate() {
        let (letter, type_url) = match kind {
            ResourceType::Authorization => (b'p', AUTHORIZATION_TYPE_URL),
            ResourceType::Address => (b'a', ADDRESS_TYPE_URL),
            // Node proxies do not get these.
            ResourceType::Gateway
            | ResourceType::Policy
            | ResourceType::BackendPolicy
            | ResourceType::Listener
            | ResourceType::KeyPair
            | ResourceType::Route
            | ResourceType::StreamRoute => continue,
        };
        sent.push([&[letter][..], &resource.body].concat());
        let any = prost_types::Any { type_url: type_url.into(), value: resource.body.to_vec() };
        let answer = DeltaDiscoveryResponse {
            system_version_info: format!("{number}+"),
            type_url: type_url.into(),
            nonce: number.to_string(),
            resources: vec![Resource {
                name: resource.name.to_string(),
                version: "1".into(),
                resource: Some(any),
                aliases: resource.aliases.iter().map(ToString::to_string).collect(),
                ..Resource::default()
            }],
            removed_resources: if number % 4 == 3 { vec![resource.name.to_string()] } else { Vec::new() },
        };
        answers.push(answer.encode_to_vec());
    }
    sent.truncate(24);
    answers.truncate(12);
    let dialled = ["10.96.0.1:80", "reviews.shop.svc.cluster.local:80", "[fd00::1]:80"];
    sent.extend(dialled.map(|text| format!("d{text}").into_bytes()));
    seeds.put("directory", name, join(&sent));
    seeds.put("xds-client", name, [&[0][..], &join(&answers)].concat());
}

fn tls_records(seeds: &Seeds) {
    let update = |requested| vec![22, 24, 0, 0, 1, requested];
    let data = [&[23][..], b"bytes of an application"].concat();
    seeds.put(
        "tls-record",
        "updates",
        join(&[data.clone(), update(1), data.clone(), update(0), vec![21, 1, 0]]),
    );
    seeds.put("tls-record", "ticket", join(&[vec![22, 4, 0, 0, 2, 7, 7, 24, 0, 0, 1, 0], data]));
    seeds.put("tls-record", "alerts", join(&[vec![21, 2, 80], vec![21, 1, 90], vec![21], vec![23]]));
    let forged = [&[0, 23, 3, 3, 0, 24][..], &[5; 24]].concat();
    seeds.put("tls-record", "forged", join(&[forged, vec![0, 23, 3, 3, 0, 0], vec![0, 20, 3, 3, 0, 1, 1]]));
}

/// The head of a request.
const PLAIN: &str =
    "1\nGET\n/shop/items?who=me&who=you\nhost: Web.shop.svc:80\ncookie: a=b; c=d\nend-user: jason";

fn requests(seeds: &Seeds) {
    for (name, path) in [
        ("plain", "/a/b.c"),
        ("dots", "/a/./b/../c//d/"),
        ("escapes", "/%41%2e%2E/%2f%5c/%7e"),
        ("above", "/../a"),
        ("bad", "/%zz\\"),
    ] {
        seeds.put("http-path", name, path);
    }
    for (name, bytes) in [
        ("http1", &b"GET / HTTP/1.1\r\n"[..]),
        ("http2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("almost", b"PRI * HTTP/1.1\r\n"),
        ("tls", b"\x16\x03\x01\x02\x00\x01"),
        ("long", b"AVERYLONGMETHODINDEED / HTTP/1.1"),
    ] {
        seeds.put("http-sniff", name, bytes);
    }
    let heads = [
        ("plain", PLAIN),
        (
            "absolute",
            "1\nGET\nhttp://web.shop/a%2e\nhost: web.shop\nconnection: x-a, close\nx-a: 1\nte: trailers, gzip",
        ),
        ("http10", "0\nPOST\n/\ncontent-length: 3"),
        ("http2", "2\nPOST\nhttp://[fd00::1]:80/pkg.Svc/Call\ncontent-type: application/grpc+proto"),
        ("websocket", "websocket\nCONNECT\nhttps://web.shop/ws\nsec-websocket-version: 13"),
        ("upgrade", "1\nGET\n/ws\nhost: web\nconnection: Upgrade\nupgrade: websocket"),
        ("two-hosts", "1\nGET\n/\nhost: a\nhost: b"),
        (
            "forwarded",
            "1\nGET\n/\nhost: a.\nx-forwarded-for: 1.2.3.4, ::1\nx-forwarded-proto: https\nforwarded: for=x",
        ),
        ("options", "1\nOPTIONS\n*\nhost: a"),
    ];
    for (name, head) in heads {
        seeds.put("http-request", name, head);
    }
    for case in ["l7-routes", "l7-virtual-services", "l7-policies", "l7-deny"] {
        let index = index_of(case);
        let of_requests = index.resources().into_iter().filter_map(|((kind, _), resource)| match kind {
            ResourceType::Route => Some(("http-route", resource.body.to_vec())),
            ResourceType::Policy => {
                let policy = l7::Policy::decode(&*resource.body).unwrap();
                Some(("http-policy", policy.authorization?.encode_to_vec()))
            }
            _ => None,
        });
        for (number, (target, body)) in of_requests.take(12).enumerate() {
            seeds.put(target, &format!("{case}-{number}"), join(&[body, PLAIN.as_bytes().to_vec()]));
        }
    }
}

fn waypoint(seeds: &Seeds) {
    for (name, server_name) in [("named", "Web.shop.example"), ("address", "10.0.0.1")] {
        seeds.put("client-hello", name, client_hello(server_name));
    }
    seeds.put("client-hello", "strange", [22, 3, 1, 0, 4, 9, 9, 9, 9]);
    seeds.put("proxy-header", "text", "PROXY TCP4 192.0.2.1 198.51.100.1 4711 80\r\nGET / HTTP/1.1\r\n");
    seeds.put("proxy-header", "unknown", "PROXY UNKNOWN\r\n");
    let binary = *b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xcb\0\x71\x0a\xc0\0\x02\x01\x12\x67\0\x50";
    seeds.put("proxy-header", "binary", binary);
    let field = |key: &str, value: &str| HeaderValueOption {
        header: Some(HeaderValue { key: key.to_owned(), value: value.to_owned(), ..HeaderValue::default() }),
        ..HeaderValueOption::default()
    };
    let fields = vec![field("x-user", "jason"), field("Host", "elsewhere"), field("a b", "c")];
    let ok = HttpResponse::OkResponse(OkHttpResponse {
        headers: fields.clone(),
        headers_to_remove: vec!["cookie".to_owned(), "content-length".to_owned()],
        response_headers_to_add: fields.clone(),
    });
    let denied = HttpResponse::DeniedResponse(DeniedHttpResponse {
        status: Some(HttpStatus { code: 101 }),
        headers: fields,
        body: "no".to_owned(),
    });
    for (name, code, http_response) in [
        ("allowed", 0, Some(ok.clone())),
        ("contradicting", 7, Some(ok)),
        ("denied", 7, Some(denied)),
        ("bare", 16, None),
    ] {
        let status = Some(rpc::Status { code, ..rpc::Status::default() });
        let answer = CheckResponse { status, http_response };
        let input = join(&[answer.encode_to_vec(), PLAIN.as_bytes().to_vec()]);
        seeds.put("authorizer-answer", &format!("grpc-{name}"), [&b"g"[..], &input].concat());
    }
    let any = StringMatch { match_type: Some(MatchType::Prefix("x-".to_owned())) };
    let check = l7::HttpCheck {
        to_upstream: vec![any.clone()],
        to_downstream_on_allow: vec![any],
        ..l7::HttpCheck::default()
    };
    for (name, head) in [
        ("allowed", "200\nx-user: a\nx-user: b\ntransfer-encoding: chunked"),
        ("redirected", "302\nlocation: /login\nset-cookie: a=b"),
        ("failed", "503"),
        ("switching", "101\nupgrade: websocket"),
    ] {
        let parts = [head.as_bytes().to_vec(), PLAIN.as_bytes().to_vec(), check.encode_to_vec()];
        seeds.put("authorizer-answer", &format!("http-{name}"), [&b"h"[..], &join(&parts)].concat());
    }
    for case in [
        "l7-deny",
        "l7-destination-rules",
        "l7-external-authorizers",
        "l7-policies",
        "l7-request-authentication",
        "l7-routes",
        "l7-streams",
    ] {
        let index = index_of(case);
        let resources = index.resources().into_iter().filter_map(|((kind, _), resource)| {
            let letter = match kind {
                ResourceType::BackendPolicy => b'b',
                ResourceType::Policy => b'p',
                ResourceType::Route => b'r',
                ResourceType::StreamRoute => b's',
                ResourceType::Address
                | ResourceType::Authorization
                | ResourceType::Gateway
                | ResourceType::Listener
                | ResourceType::KeyPair => return None,
            };
            Some([&[letter][..], &resource.body].concat())
        });
        let parts: Vec<Vec<u8>> = [PLAIN.as_bytes().to_vec()].into_iter().chain(resources.take(12)).collect();
        seeds.put("waypoint-config", case, join(&parts));
    }
}

/// The beginning of a client's TLS.
fn client_hello(name: &str) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.unwrap().with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
    let name = rustls_pki_types::ServerName::try_from(name.to_owned()).unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}
