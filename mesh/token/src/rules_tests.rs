use std::sync::LazyLock;

use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::json;

use super::*;
use crate::keys::{KeySetError, MAX_KEYS, MAX_SIZE, MEMBERS, canonical};

const NOW: f64 = 1_000_000.0;
const ISSUER: &str = "https://issuer.example";

/// An issuer's key.
struct Signer {
    key: EncodingKey,
    algorithm: Algorithm,
    id: &'static str,
}

impl Signer {
    fn new(id: &'static str) -> Self {
        let pair = rcgen::KeyPair::generate().unwrap();
        Self { key: EncodingKey::from_ec_der(&pair.serialize_der()), algorithm: Algorithm::ES256, id }
    }

    fn jwk(&self) -> Value {
        let jwk = Jwk::from_encoding_key(&self.key, self.algorithm).unwrap();
        let mut jwk = serde_json::to_value(jwk).unwrap();
        jwk["kid"] = json!(self.id);
        jwk
    }

    fn sign(&self, claims: &Value) -> String {
        let header = Header { kid: Some(self.id.to_owned()), ..Header::new(self.algorithm) };
        encode(&header, claims, &self.key).unwrap()
    }
}

static KNOWN: LazyLock<Signer> = LazyLock::new(|| Signer::new("k1"));
static OTHER: LazyLock<Signer> = LazyLock::new(|| Signer::new("k1"));

fn rule() -> l7::TokenRule {
    l7::TokenRule {
        issuer: ISSUER.to_owned(),
        jwks: json!({ "keys": [KNOWN.jwk()] }).to_string().into_bytes().into(),
        ..l7::TokenRule::default()
    }
}

fn rules(rules: Vec<l7::TokenRule>) -> Rules {
    Rules::new(&l7::Authentication { rules })
}

fn bearer(token: &str) -> (HeaderMap, Uri) {
    let mut headers = HeaderMap::new();
    headers.insert("authorization", HeaderValue::try_from(format!("Bearer {token}")).unwrap());
    (headers, Uri::from_static("/a?b"))
}

fn judged(rules: &Rules, token: &str) -> Result<Option<Token>, Rejection> {
    let (mut headers, mut uri) = bearer(token);
    authenticate(rules.iter(), &mut headers, &mut uri, NOW)
}

fn claims(more: &Value) -> Value {
    let mut claims = json!({ "iss": ISSUER, "sub": "alice", "exp": NOW + 100.0 });
    claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    claims
}

#[test]
fn a_valid_token_says_who_asks() {
    let token = KNOWN.sign(&claims(&json!({ "aud": ["a", "b"], "azp": "app", "groups": ["x", "y"] })));
    let token = judged(&rules(vec![rule()]), &token).unwrap().unwrap();
    assert_eq!(token.principal(), Some("https://issuer.example/alice"));
    assert_eq!(token.audiences().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(token.presenter(), Some("app"));
    assert_eq!(token.claim(&["groups".into()]).collect::<Vec<_>>(), ["x", "y"]);
}

#[test]
fn a_request_without_token_is_of_nobody() {
    let (mut headers, mut uri) = (HeaderMap::new(), Uri::from_static("/"));
    assert_eq!(authenticate(rules(vec![rule()]).iter(), &mut headers, &mut uri, NOW), Ok(None));
    let required = rules(vec![l7::TokenRule { required: true, ..rule() }]);
    let refused = authenticate(required.iter(), &mut headers, &mut uri, NOW);
    assert_eq!(refused, Err(Rejection::Missing));
}

#[test]
fn tokens_that_are_not_valid_are_refused() {
    let rules = rules(vec![rule()]);
    let whole = KNOWN.sign(&claims(&json!({})));
    let (unsigned, _) = whole.rsplit_once('.').unwrap();
    let secret = EncodingKey::from_secret(KNOWN.jwk()["x"].as_str().unwrap().as_bytes());
    let symmetric = encode(&Header::new(Algorithm::HS256), &claims(&json!({})), &secret).unwrap();
    // {"alg":"none"}
    let none = format!("eyJhbGciOiJub25lIn0.{}.", whole.split('.').nth(1).unwrap());
    for (token, error) in [
        ("x", TokenError::Malformed),
        ("a.b.c", TokenError::Malformed),
        (unsigned, TokenError::Malformed),
        (&none, TokenError::Malformed),
        (&symmetric, TokenError::UnknownKey),
        (&OTHER.sign(&claims(&json!({}))), TokenError::Signature),
        (&KNOWN.sign(&claims(&json!({ "iss": "https://other" }))), TokenError::Issuer),
        (&KNOWN.sign(&json!({ "sub": "alice" })), TokenError::Issuer),
        (&KNOWN.sign(&claims(&json!({ "exp": NOW - 60.0 }))), TokenError::Expired),
        (&KNOWN.sign(&claims(&json!({ "exp": "soon" }))), TokenError::Malformed),
        (&KNOWN.sign(&claims(&json!({ "nbf": NOW + 61.0 }))), TokenError::NotYetValid),
    ] {
        assert_eq!(judged(&rules, token), Err(error.into()), "{token}");
    }
    for valid in [json!({ "exp": NOW - 59.0 }), json!({ "nbf": NOW + 60.0 }), json!({})] {
        assert!(judged(&rules, &KNOWN.sign(&claims(&valid))).is_ok());
    }
    assert!(judged(&rules, &KNOWN.sign(&json!({ "iss": ISSUER }))).is_ok(), "a token may not expire");
}

/// A key that is parsed once serves every algorithm of its kind.
#[test]
fn every_algorithm_is_verified() {
    use Algorithm::{ES256, ES384, EdDSA, PS256, PS384, PS512, RS256, RS384, RS512};
    let rsa = rcgen::KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap().serialize_pem();
    let rsa = |algorithm| (algorithm, EncodingKey::from_rsa_pem(rsa.as_bytes()).unwrap());
    let der = |kind| rcgen::KeyPair::generate_for(kind).unwrap().serialize_der();
    let ed25519 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let others = [
        (ES256, EncodingKey::from_ec_der(&der(&rcgen::PKCS_ECDSA_P256_SHA256))),
        (ES384, EncodingKey::from_ec_der(&der(&rcgen::PKCS_ECDSA_P384_SHA384))),
        (EdDSA, EncodingKey::from_ed_der(&ed25519.serialize_der())),
    ];
    for (algorithm, key) in [RS256, RS384, RS512, PS256, PS384, PS512].map(rsa).into_iter().chain(others) {
        let signer = Signer { key, algorithm, id: "k" };
        let mut jwk = match algorithm {
            EdDSA => json!({ "kty": "OKP", "crv": "Ed25519", "kid": "k",
                "x": URL_SAFE_NO_PAD.encode(ed25519.public_key_raw()) }),
            _ => signer.jwk(),
        };
        // Without `alg` the key is for each algorithm of its kind.
        jwk.as_object_mut().unwrap().remove("alg");
        let jwks = json!({ "keys": [KNOWN.jwk(), jwk] }).to_string().into_bytes().into();
        let rules = rules(vec![l7::TokenRule { jwks, ..rule() }]);
        let token = signer.sign(&claims(&json!({})));
        assert!(judged(&rules, &token).unwrap().is_some(), "{algorithm:?}");
        let (rest, signature) = token.rsplit_once('.').unwrap();
        let mut bytes = URL_SAFE_NO_PAD.decode(signature).unwrap();
        bytes[0] ^= 1;
        let forged = format!("{rest}.{}", URL_SAFE_NO_PAD.encode(bytes));
        assert_eq!(judged(&rules, &forged), Err(TokenError::Signature.into()), "{algorithm:?}");
    }
}

#[test]
fn a_changed_payload_is_refused() {
    let (good, bad) = (KNOWN.sign(&claims(&json!({}))), KNOWN.sign(&claims(&json!({ "sub": "root" }))));
    let (good, bad): (Vec<&str>, Vec<&str>) = (good.split('.').collect(), bad.split('.').collect());
    let mixed = [good[0], bad[1], good[2]].join(".");
    assert_eq!(judged(&rules(vec![rule()]), &mixed), Err(TokenError::Signature.into()));
}

#[test]
fn keys_that_are_not_known_verify_nothing() {
    let token = KNOWN.sign(&claims(&json!({})));
    let secret = json!({ "keys": [{ "kty": "oct", "k": "c2VjcmV0" }] }).to_string();
    for jwks in ["", "{", "{\"keys\": []}", &secret] {
        let rules = rules(vec![l7::TokenRule { jwks: jwks.to_owned().into_bytes().into(), ..rule() }]);
        assert_eq!(judged(&rules, &token), Err(TokenError::NoKeys.into()), "{jwks}");
    }
}

#[test]
fn a_key_set_is_passed_on_with_what_verifying_needs() {
    let mut known = KNOWN.jwk();
    known["x5c"] = json!(["A".repeat(100_000)]);
    known["d"] = json!("secret");
    let other = json!({ "kty": "oct", "k": "c2VjcmV0" });
    let text = canonical(json!({ "keys": [other, known], "more": 1 }).to_string().as_bytes()).unwrap();
    let mut small = KNOWN.jwk();
    small.as_object_mut().unwrap().retain(|name, value| MEMBERS.contains(&name.as_str()) && !value.is_null());
    let passed: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(passed, json!({ "keys": [small] }));
    assert_eq!(canonical(text.as_bytes()).unwrap(), text);
    let token = KNOWN.sign(&claims(&json!({})));
    assert!(judged(&rules(vec![l7::TokenRule { jwks: text.into_bytes().into(), ..rule() }]), &token).is_ok());

    let many = json!({ "keys": vec![KNOWN.jwk(); MAX_KEYS + 5] }).to_string();
    let many: Value = serde_json::from_str(&canonical(many.as_bytes()).unwrap()).unwrap();
    assert_eq!(many["keys"].as_array().unwrap().len(), MAX_KEYS);

    known["kid"] = json!("k".repeat(MAX_SIZE));
    let large = json!({ "keys": [known] }).to_string();
    assert!(matches!(canonical(large.as_bytes()), Err(KeySetError::TooLarge)));
    assert!(matches!(canonical(b"{\"keys\": []}"), Err(KeySetError::Empty)));
    assert!(matches!(canonical(b"[]"), Err(KeySetError::Malformed(_))));
}

#[test]
fn keys_of_another_use_or_algorithm_verify_nothing() {
    let token = KNOWN.sign(&claims(&json!({})));
    for (name, value) in [("use", "enc"), ("alg", "RS256"), ("alg", "unheard-of")] {
        let mut jwk = KNOWN.jwk();
        jwk[name] = json!(value);
        let set = json!({ "keys": [jwk, OTHER.jwk()] }).to_string();
        let rules = rules(vec![l7::TokenRule { jwks: set.into_bytes().into(), ..rule() }]);
        assert_eq!(judged(&rules, &token), Err(TokenError::Signature.into()), "{name}: {value}");
    }
}

#[test]
fn a_token_is_for_an_audience() {
    let for_us = l7::TokenRule { audiences: vec!["api.example".to_owned()], ..rule() };
    let rules = rules(vec![for_us]);
    for (audience, allowed) in [
        (json!("api.example"), true),
        (json!(["x", "https://api.example/"]), true),
        (json!("other"), false),
        (json!([]), false),
        (json!(null), false),
    ] {
        let token = KNOWN.sign(&claims(&json!({ "aud": audience })));
        assert_eq!(judged(&rules, &token).is_ok(), allowed, "{audience}");
    }
}

#[test]
fn one_of_several_issuers_is_enough() {
    let other = l7::TokenRule {
        issuer: "https://other".to_owned(),
        jwks: json!({ "keys": [OTHER.jwk()] }).to_string().into_bytes().into(),
        ..rule()
    };
    let rules = rules(vec![rule(), other]);
    let token = OTHER.sign(&claims(&json!({ "iss": "https://other" })));
    let principal = judged(&rules, &token).unwrap().unwrap().principal().unwrap().to_owned();
    assert_eq!(principal, "https://other/alice");
    // The error is that of the token's own issuer.
    let expired = OTHER.sign(&claims(&json!({ "iss": "https://other", "exp": 1 })));
    assert_eq!(judged(&rules, &expired), Err(TokenError::Expired.into()));
}

/// Its keys would sign for every issuer, also those that other rules name.
#[test]
fn a_rule_without_issuer_finds_no_token_valid() {
    let anybody = l7::TokenRule {
        issuer: String::new(),
        jwks: json!({ "keys": [OTHER.jwk()] }).to_string().into_bytes().into(),
        ..rule()
    };
    for all in [vec![anybody.clone()], vec![rule(), anybody.clone()], vec![anybody, rule()]] {
        let rules = rules(all);
        assert!(judged(&rules, &OTHER.sign(&claims(&json!({})))).is_err());
        let own = OTHER.sign(&claims(&json!({ "iss": "https://other" })));
        assert_eq!(judged(&rules, &own), Err(TokenError::Issuer.into()));
        let empty = OTHER.sign(&claims(&json!({ "iss": "" })));
        assert_eq!(judged(&rules, &empty), Err(TokenError::Issuer.into()));
    }
}

/// A request with two valid tokens is the first rule's: no field says anything else.
#[test]
fn only_the_rule_of_the_principal_writes_headers() {
    let at = |name: &str| vec![l7::TokenHeader { name: name.to_owned(), prefix: String::new() }];
    let claim = |name: &str, claim: &str| l7::ClaimHeader { name: name.to_owned(), claim: claim.to_owned() };
    let first = l7::TokenRule {
        from_headers: at("x-first"),
        claim_headers: vec![claim("x-sub", "sub")],
        payload_header: "x-payload".to_owned(),
        ..rule()
    };
    let second = l7::TokenRule {
        issuer: "https://other".to_owned(),
        jwks: json!({ "keys": [OTHER.jwk()] }).to_string().into_bytes().into(),
        from_headers: at("x-second"),
        claim_headers: vec![claim("x-sub", "sub"), claim("x-role", "role")],
        payload_header: "x-payload".to_owned(),
        ..rule()
    };
    let rules = rules(vec![first, second]);
    let alice = KNOWN.sign(&claims(&json!({})));
    let root = OTHER.sign(&claims(&json!({ "iss": "https://other", "sub": "root", "role": "admin" })));
    let (mut headers, mut uri) = (HeaderMap::new(), Uri::from_static("/"));
    headers.insert("x-first", HeaderValue::try_from(&alice).unwrap());
    headers.insert("x-second", HeaderValue::try_from(&root).unwrap());
    let token = authenticate(rules.iter(), &mut headers, &mut uri, NOW).unwrap().unwrap();
    assert_eq!(token.principal(), Some("https://issuer.example/alice"));
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap());
    assert_eq!(text("x-sub"), Some("alice"));
    assert_eq!(text("x-payload"), alice.split('.').nth(1));
    assert_eq!(text("x-role"), None);
    // Both are valid and neither is forwarded.
    assert_eq!((text("x-first"), text("x-second")), (None, None));
}

#[test]
fn claims_reach_headers_and_clients_cannot_write_them() {
    let claim = |name: &str, claim: &str| l7::ClaimHeader { name: name.to_owned(), claim: claim.to_owned() };
    let rules = rules(vec![l7::TokenRule {
        payload_header: "x-payload".to_owned(),
        claim_headers: vec![
            claim("x-sub", "sub"),
            claim("x-level", "org.level"),
            claim("x-list", "list"),
            claim("x-absent", "absent"),
            claim("x-line", "line"),
        ],
        ..rule()
    }]);
    let token = KNOWN.sign(&claims(&json!({ "org": { "level": 3 }, "list": ["a"], "line": "a\r\nb: c" })));
    let (mut headers, mut uri) = bearer(&token);
    for name in ["x-sub", "x-absent", "x-line", "x-payload"] {
        headers.insert(name, HeaderValue::from_static("mine"));
    }
    remove_outputs(rules.iter(), &mut headers);
    authenticate(rules.iter(), &mut headers, &mut uri, NOW).unwrap();
    let payload = token.split('.').nth(1);
    for (name, value) in [
        ("x-sub", Some("alice")),
        ("x-level", Some("3")),
        ("x-list", Some("WyJhIl0")),
        ("x-absent", None),
        ("x-line", None),
        ("x-payload", payload),
        ("authorization", None),
    ] {
        assert_eq!(headers.get(name).map(|value| value.to_str().unwrap()), value, "{name}");
    }
}

#[test]
fn a_token_is_forwarded_where_the_rule_says_so() {
    let rules = rules(vec![l7::TokenRule { forward_token: true, ..rule() }]);
    let (mut headers, mut uri) = bearer(&KNOWN.sign(&claims(&json!({}))));
    authenticate(rules.iter(), &mut headers, &mut uri, NOW).unwrap();
    assert!(headers.contains_key("authorization"));
}

#[test]
fn all_tokens_of_a_rule_must_be_valid() {
    let rules = rules(vec![rule()]);
    let token = KNOWN.sign(&claims(&json!({})));
    for beside in ["x", &OTHER.sign(&claims(&json!({})))] {
        let (mut headers, _) = bearer(&token);
        let mut uri = format!("/?access_token={beside}").parse().unwrap();
        assert!(authenticate(rules.iter(), &mut headers, &mut uri, NOW).is_err(), "{beside}");
    }
    let (mut headers, mut uri) = bearer(&token);
    for _ in 0..MAX_TOKENS {
        headers.append("authorization", HeaderValue::try_from(format!("Bearer {token}")).unwrap());
    }
    let refused = authenticate(rules.iter(), &mut headers, &mut uri, NOW);
    assert_eq!(refused, Err(TokenError::Malformed.into()));
}
