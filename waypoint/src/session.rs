//! Sessions: a client that brings the token of an earlier answer back gets to the endpoint that gave it (Gateway API, GEP-1619).
//!
//! Nothing is kept here: a token is good at every replica and after a restart. It names backend and endpoint by hashes, which are looked
//! up among those of the rule, so it leads nowhere else, and says no address. It is authenticated with a key that the control plane gives to
//! all replicas, so a client can neither choose its endpoint nor lengthen its session.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ambit_directory::WorkloadUid;
use ambit_route::{Backend, Rule, SessionCarrier, SessionPersistence};
use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{Context, SHA256};
use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::SET_COOKIE;
use http::{HeaderMap, HeaderValue};

use crate::balance::Endpoint;
use crate::balancers::key::cookies;

/// The form of tokens that is known.
const VERSION: u8 = 2;
/// How far clocks of replicas may be apart.
const SKEW: Duration = Duration::from_secs(60);

/// Bytes of a token's tag: half of HMAC-SHA256 (RFC 2104, section 5).
const TAG: usize = 16;

/// What tokens are authenticated with: the first key makes them, all are believed.
#[derive(Clone)]
pub struct SessionKeys {
    current: hmac::Key,
    /// The key before, as some clients have tokens of it.
    former: Option<hmac::Key>,
    /// Names the current key.
    fingerprint: [u8; 32],
    /// Whether the current key is the proxy's own choice.
    is_own: bool,
}

impl Default for SessionKeys {
    /// A key of the proxy's own, until the control plane gives it one that other replicas have too.
    fn default() -> Self {
        Self { is_own: true, ..Self::with(&rand::random::<[u8; 32]>()) }
    }
}

impl SessionKeys {
    fn with(key: &[u8]) -> Self {
        let fingerprint = hashed(&[b"ambit session key", key]);
        Self { current: hmac::Key::new(hmac::HMAC_SHA256, key), former: None, fingerprint, is_own: false }
    }

    /// These with another current key; the one before is believed as long as there is no third.
    pub fn renewed(&self, key: &[u8]) -> Self {
        let new = Self::with(key);
        match new.fingerprint == self.fingerprint {
            true => self.clone(),
            false => Self { former: (!self.is_own).then(|| self.current.clone()), ..new },
        }
    }

    fn tag(&self, token: &[u8]) -> [u8; TAG] {
        let mut tag = [0; TAG];
        let signed = hmac::sign(&self.current, token);
        tag.iter_mut().zip(signed.as_ref()).for_each(|(to, from)| *to = *from);
        tag
    }

    fn verify(&self, token: &[u8], tag: &[u8]) -> bool {
        let is_of = |key: &hmac::Key| {
            let signed = hmac::sign(key, token);
            signed.as_ref().get(..TAG).is_some_and(|known| verify_slices_are_equal(known, tag).is_ok())
        };
        is_of(&self.current) || self.former.as_ref().is_some_and(is_of)
    }
}

impl std::fmt::Debug for SessionKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SessionKeys")
    }
}

/// Names an endpoint of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EndpointId([u8; 16]);

/// Names a backend of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackendId([u8; 8]);

fn hashed<const N: usize>(parts: &[&[u8]]) -> [u8; N] {
    let mut context = Context::new(&SHA256);
    for part in parts {
        // Lengths keep parts apart.
        context.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        context.update(part);
    }
    let mut first = [0; N];
    first.iter_mut().zip(context.finish().as_ref()).for_each(|(to, from)| *to = *from);
    first
}

impl EndpointId {
    /// Of a port of a workload.
    pub fn new(workload: &WorkloadUid, port: u16) -> Self {
        Self(hashed(&[b"ambit session endpoint", workload.as_str().as_bytes(), &port.to_be_bytes()]))
    }
}

impl BackendId {
    /// Of a backend of a rule. Rules don't share sessions (GEP-1619, "Two Routes Rules have Session Persistence to the Same Service").
    pub fn new(rule: &Rule, backend: &Backend) -> Self {
        let route = &rule.route;
        let index = rule.index.to_be_bytes();
        let of_rule = if rule.name.is_empty() { &index[..] } else { rule.name.as_bytes() };
        Self(hashed(&[
            b"ambit session backend",
            route.kind.as_bytes(),
            route.namespace.as_bytes(),
            route.name.as_bytes(),
            of_rule,
            backend.namespace.as_bytes(),
            backend.hostname.as_bytes(),
            &backend.port.to_be_bytes(),
            backend.subset.as_deref().unwrap_or_default().as_bytes(),
        ]))
    }
}

/// Where a client was before, and since when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// The backend.
    pub backend: BackendId,
    /// Its endpoint.
    pub endpoint: EndpointId,
    /// Since the epoch.
    started: Duration,
    /// When it was used last, as far as that is kept.
    used: Duration,
}

impl Token {
    const LENGTH: usize = 1 + 8 + 16 + 8 + 8;

    fn encode(&self, keys: &SessionKeys) -> String {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX).to_be_bytes();
        let mut bytes = Vec::with_capacity(Self::LENGTH + TAG);
        bytes.push(VERSION);
        bytes.extend(self.backend.0);
        bytes.extend(self.endpoint.0);
        bytes.extend(millis(self.started));
        bytes.extend(millis(self.used));
        bytes.extend(keys.tag(&bytes));
        URL_SAFE_NO_PAD.encode(bytes)
    }

    fn decode(text: &str, keys: &SessionKeys) -> Option<Self> {
        let bytes = URL_SAFE_NO_PAD.decode(text).ok().filter(|bytes| bytes.len() == Self::LENGTH + TAG)?;
        let (bytes, tag) = bytes.split_at_checked(Self::LENGTH)?;
        if !keys.verify(bytes, tag) {
            return None;
        }
        let (version, rest) = bytes.split_first()?;
        let (backend, rest) = rest.split_first_chunk()?;
        let (endpoint, rest) = rest.split_first_chunk()?;
        let (started, rest) = rest.split_first_chunk()?;
        let (used, _) = rest.split_first_chunk()?;
        let time = |millis: &[u8; 8]| Duration::from_millis(u64::from_be_bytes(*millis));
        (*version == VERSION).then(|| Self {
            backend: BackendId(*backend),
            endpoint: EndpointId(*endpoint),
            started: time(started),
            used: time(used),
        })
    }

    /// Whether the session goes on at `now`.
    fn is_valid(&self, persistence: &SessionPersistence, now: Duration) -> bool {
        let lasts = |since: Duration, limit: Option<Duration>| {
            since <= now + SKEW && limit.is_none_or(|limit| now.saturating_sub(since) <= limit)
        };
        lasts(self.started, persistence.absolute_timeout) && lasts(self.used, persistence.idle_timeout)
    }
}

/// The session of a request whose rule keeps clients on their endpoints.
#[derive(Debug, Clone)]
pub struct Session {
    /// What the client brought back, if that is valid.
    pub token: Option<Token>,
    keys: Arc<SessionKeys>,
    /// When the request came, since the epoch.
    now: Duration,
    /// Where the client is to bring a cookie back.
    path: Arc<str>,
    is_secure: bool,
}

impl Session {
    /// Of a request at `now` whose path all requests of the rule begin with up to `common`.
    pub fn read(
        persistence: &SessionPersistence,
        keys: Arc<SessionKeys>,
        headers: &HeaderMap,
        (path, common): (&str, usize),
        scheme: &str,
        now: SystemTime,
    ) -> Self {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let valid = |text: &str| Token::decode(text, &keys).filter(|token| token.is_valid(persistence, now));
        let token = match &persistence.carrier {
            SessionCarrier::Cookie { name, .. } => cookies(headers, name).find_map(valid),
            SessionCarrier::Header(name) => {
                let lines = headers.get_all(name).iter().filter_map(|line| line.to_str().ok());
                lines.flat_map(|line| line.split(',')).map(str::trim).find_map(valid)
            }
        };
        Self { token, keys, now, path: cookie_path(path, common).into(), is_secure: scheme == "https" }
    }

    /// Says in the head of an answer where the client was; true if that is elsewhere than before.
    pub fn answer(
        &self,
        rule: &Rule,
        (backend, endpoint): (&Backend, &Endpoint),
        headers: &mut HeaderMap,
    ) -> bool {
        let (Some(persistence), Some(endpoint)) = (&rule.session, endpoint.session_id()) else {
            return false;
        };
        let backend = BackendId::new(rule, backend);
        let before = self.token;
        let is_kept = before.is_some_and(|token| (token.backend, token.endpoint) == (backend, endpoint));
        if is_kept && persistence.idle_timeout.is_none() {
            return false;
        }
        let started = before.map_or(self.now, |token| token.started.min(self.now));
        let token = Token { backend, endpoint, started, used: self.now };
        match &persistence.carrier {
            SessionCarrier::Header(name) => {
                if let Ok(value) = HeaderValue::try_from(token.encode(&self.keys)) {
                    headers.insert(name, value);
                }
            }
            SessionCarrier::Cookie { name, permanent } => {
                let left = persistence.absolute_timeout.filter(|_| *permanent);
                let left = left.map(|limit| limit.saturating_sub(self.now - started));
                if let Ok(value) = HeaderValue::try_from(self.cookie(name, &token, left)) {
                    headers.append(SET_COOKIE, value);
                }
            }
        }
        before.is_some() && !is_kept
    }

    /// RFC 6265 §4.1; GEP-1619, "Secure, HttpOnly, SameSite".
    fn cookie(&self, name: &str, token: &Token, left: Option<Duration>) -> String {
        let mut text =
            format!("{name}={}; Path={}; HttpOnly; SameSite=Strict", token.encode(&self.keys), self.path);
        if let Some(left) = left {
            // A browser takes 0 for "delete".
            text.push_str(&format!("; Max-Age={}", left.as_secs().max(1)));
        }
        if self.is_secure {
            text.push_str("; Secure");
        }
        text
    }
}

/// The part of a path that all requests of a rule begin with (GEP-1619, "Path"), as far as a cookie can say it.
fn cookie_path(path: &str, common: usize) -> &str {
    let shared = path.get(..common).unwrap_or_default();
    // RFC 6265 §4.1.1: a semicolon would end the attribute.
    let shared = match shared.find(';') {
        Some(end) => shared.get(..end).and_then(|text| Some(text.rsplit_once('/')?.0)).unwrap_or_default(),
        None => shared,
    };
    if shared.is_empty() { "/" } else { shared }
}

#[cfg(test)]
mod tests {
    use ambit_api::l7;
    use ambit_directory::{Directory, Update};
    use http::header::COOKIE;

    use super::*;

    fn second(at: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_000_000 + at)
    }

    /// The only rule of a route with two backends.
    fn rule(session: l7::SessionPersistence) -> Arc<Rule> {
        let backend = |hostname: &str| l7::Backend {
            namespace: "shop".into(),
            hostname: hostname.into(),
            port: 80,
            weight: 1,
            ..Default::default()
        };
        let backends = vec![backend("v1"), backend("v2")];
        let rule = l7::Rule { backends, session: Some(session), ..Default::default() };
        let object = l7::ObjectName { kind: "HTTPRoute".into(), namespace: "shop".into(), name: "r".into() };
        let target = l7::Target { namespace: "shop".into(), hostname: "web".into(), ..Default::default() };
        let route = l7::Route {
            object: Some(object),
            targets: vec![target],
            rules: vec![rule],
            ..Default::default()
        };
        let table = ambit_route::Table::new([&route]);
        let rules = table.routes("shop", "web", 80, "").unwrap();
        let request = ambit_route::RequestHead {
            method: &http::Method::GET,
            host: "web",
            path: "/",
            query: None,
            headers: &HeaderMap::new(),
            scheme: "http",
            authority: "web",
            port: 80,
            client_namespace: "",
            client_address: [10, 0, 0, 1].into(),
        };
        rules.find(&request).unwrap().rule.clone()
    }

    fn endpoint(name: &str) -> Endpoint {
        let (mut directory, reader) = Directory::new();
        let workload = ambit_api::workload::Workload {
            uid: name.to_owned(),
            name: name.to_owned(),
            namespace: "shop".to_owned(),
            addresses: vec![vec![10, 0, 0, 9].into()],
            ..Default::default()
        };
        let address = ambit_api::workload::Address {
            r#type: Some(ambit_api::workload::address::Type::Workload(workload)),
        };
        assert!(directory.apply([Update::Address { name: name.to_owned(), address }]).is_empty());
        let workload = reader.load().workload(name).unwrap().clone();
        Endpoint {
            workload: Some(workload),
            service: None,
            address: ([10, 0, 0, 9], 8080).into(),
            tunnel: None,
            tls: None,
            host: None,
            crossing: None,
            asked_of_waypoint: None,
        }
    }

    fn persistence(name: &str) -> l7::SessionPersistence {
        l7::SessionPersistence { name: name.to_owned(), ..Default::default() }
    }

    struct World {
        rule: Arc<Rule>,
        headers: HeaderMap,
        keys: SessionKeys,
    }

    impl World {
        fn new(session: l7::SessionPersistence) -> Self {
            Self { rule: rule(session), headers: HeaderMap::new(), keys: SessionKeys::with(&[1; 32]) }
        }

        fn session(&self, at: u64) -> Session {
            let persistence = self.rule.session.as_ref().unwrap();
            let keys = Arc::new(self.keys.clone());
            Session::read(persistence, keys, &self.headers, ("/cart/x", 5), "https", second(at))
        }

        /// A request at this second that this endpoint of backend `to` answers. What the client gets it brings back later. Says what it
        /// got, and whether it moved.
        fn ask(&mut self, at: u64, to: usize, by: &str) -> (Option<String>, bool) {
            let session = self.session(at);
            let backend = self.rule.backends.iter().nth(to).unwrap();
            let mut answer = HeaderMap::new();
            let moved = session.answer(&self.rule, (backend, &endpoint(by)), &mut answer);
            let text = |value: &HeaderValue| value.to_str().unwrap().to_owned();
            let cookie = answer.get(SET_COOKIE).map(text);
            if let Some(cookie) = &cookie {
                let pair = cookie.split(';').next().unwrap();
                self.headers.insert(COOKIE, format!("a=b; {pair}; s=other").parse().unwrap());
            }
            let header = answer.get("x-session").map(text);
            if let Some(header) = &header {
                self.headers.insert("x-session", header.parse().unwrap());
            }
            (cookie.or(header), moved)
        }
    }

    #[test]
    fn a_client_gets_its_token_once() {
        let mut world = World::new(persistence("s"));
        assert!(world.session(0).token.is_none());
        let (cookie, moved) = world.ask(0, 0, "a");
        let cookie = cookie.unwrap();
        assert!(cookie.starts_with("s=") && !moved, "{cookie}");
        assert!(cookie.ends_with("; Path=/cart; HttpOnly; SameSite=Strict; Secure"), "{cookie}");
        let token = world.session(1).token.unwrap();
        assert_eq!(Some(token.endpoint), endpoint("a").session_id());
        assert_eq!(token.backend, BackendId::new(&world.rule, world.rule.backends.iter().next().unwrap()));
        assert_eq!(world.ask(100_000_000, 0, "a"), (None, false));
        // Another endpoint, another backend.
        assert!(world.ask(2, 0, "b").1);
        assert!(world.ask(3, 1, "b").1);
        assert_eq!(world.ask(4, 1, "b"), (None, false));
    }

    #[test]
    fn sessions_end_after_their_time() {
        let nanos = |seconds: u64| seconds * 1_000_000_000;
        let mut world = World::new(l7::SessionPersistence {
            absolute_nanos: nanos(100),
            permanent: true,
            ..persistence("s")
        });
        assert!(world.ask(0, 0, "a").0.unwrap().contains("; Max-Age=100;"));
        assert!(world.session(100).token.is_some());
        assert!(world.session(101).token.is_none());
        // Who moves has the rest of the time.
        assert!(world.ask(90, 0, "b").0.unwrap().contains("; Max-Age=10;"));
        assert!(world.session(101).token.is_none());
    }

    #[test]
    fn idle_sessions_end_and_used_ones_go_on() {
        let idle_nanos = 10_000_000_000;
        let mut world =
            World::new(l7::SessionPersistence { idle_nanos, in_header: true, ..persistence("x-session") });
        for at in [0, 9, 18, 27] {
            let (token, moved) = world.ask(at, 0, "a");
            assert!(token.is_some() && !moved, "{at}");
        }
        assert!(world.session(37).token.is_some());
        assert!(world.session(38).token.is_none());
    }

    #[test]
    fn what_is_no_token_is_no_session() {
        let mut world = World::new(persistence("s"));
        world.ask(1_000, 0, "a");
        // From a future that no replica is in.
        assert!(world.session(900).token.is_none());
        for value in ["", "10.0.0.9:8080", "AAAA", &"A".repeat(55), &"A".repeat(100_000)] {
            world.headers.insert(COOKIE, format!("s={value}").parse().unwrap());
            assert!(world.session(1_000).token.is_none(), "{value}");
        }
    }

    /// The token of a session with one of its bytes changed.
    fn altered(token: &str, at: usize) -> String {
        let mut bytes = URL_SAFE_NO_PAD.decode(token).unwrap();
        bytes[at] ^= 1;
        URL_SAFE_NO_PAD.encode(bytes)
    }

    #[test]
    fn a_token_that_a_client_has_changed_is_no_session() {
        let in_header = || l7::SessionPersistence { in_header: true, ..persistence("x-session") };
        let mut world = World::new(in_header());
        let token = world.ask(0, 0, "a").0.unwrap();
        assert!(world.session(1).token.is_some());
        for at in 0..Token::LENGTH + TAG {
            world.headers.insert("x-session", altered(&token, at).parse().unwrap());
            assert!(world.session(1).token.is_none(), "byte {at}");
        }
    }

    #[test]
    fn tokens_of_the_key_before_are_believed_until_there_is_a_third() {
        let mut world = World::new(persistence("s"));
        world.ask(0, 0, "a");
        world.keys = world.keys.renewed(&[1; 32]);
        assert!(world.session(1).token.is_some());
        world.keys = world.keys.renewed(&[2; 32]);
        assert!(world.session(1).token.is_some());
        world.keys = world.keys.renewed(&[3; 32]);
        assert!(world.session(1).token.is_none());
        // Nobody else has a key that a proxy chose for itself.
        let own = SessionKeys::default();
        world.keys = own.clone();
        world.ask(2, 0, "a");
        assert!(world.session(3).token.is_some());
        world.keys = own.renewed(&[1; 32]);
        assert!(world.session(3).token.is_none());
    }

    #[test]
    fn cookies_are_for_the_paths_of_their_rule() {
        for (path, common, expected) in [
            ("/cart/x", 5, "/cart"),
            ("/cart/x", 7, "/cart/x"),
            ("/cart", 0, "/"),
            ("/a;b/c", 6, "/"),
            ("/a/b;c/d", 8, "/a"),
        ] {
            assert_eq!(cookie_path(path, common), expected, "{path} {common}");
        }
    }
}
