//! Tokens of requests at waypoints: the places that they are in, and whether they are believed.

use std::sync::LazyLock;

use ambit_api::l7;
use ambit_token::location::Locations;
use ambit_token::{KeySet, Rules, SignedToken, rules};
use http::{HeaderMap, HeaderName, HeaderValue, Uri};

/// A key whose private half was thrown away: nothing is signed with it.
const KEYS: &str =
    r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

static RULE: LazyLock<l7::TokenRule> = LazyLock::new(|| l7::TokenRule {
    jwks: KEYS.as_bytes().into(),
    from_headers: vec![
        l7::TokenHeader { name: "authorization".to_owned(), prefix: "Bearer ".to_owned() },
        l7::TokenHeader { name: "x-token".to_owned(), prefix: String::new() },
    ],
    from_params: vec!["t".to_owned()],
    from_cookies: vec!["t".to_owned()],
    payload_header: "x-payload".to_owned(),
    ..l7::TokenRule::default()
});

/// A target in the first line, header fields in the others. No token is believed, since none can be signed, and once the
/// tokens were removed there are none, while the path is what it was.
pub(crate) fn request_token(data: &[u8]) {
    let mut lines = data.split(|byte| *byte == b'\n');
    let Some(Ok(mut uri)) = lines.next().map(Uri::try_from) else { return };
    let mut headers = HeaderMap::new();
    for line in lines.take(50) {
        let mut halves = line.splitn(2, |byte| *byte == b':');
        let (Some(name), Some(value)) = (halves.next(), halves.next()) else { continue };
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            headers.append(name, value);
        }
    }
    let locations = Locations::new(&RULE);
    let found = locations.tokens(&headers, &uri);
    let compiled = Rules::new(&l7::Authentication { rules: vec![RULE.clone()] });
    rules::remove_outputs(compiled.iter(), &mut headers);
    assert!(!headers.contains_key("x-payload"));
    match rules::authenticate(compiled.iter(), &mut headers, &mut uri, 0.0) {
        Ok(None) => assert!(found.is_empty(), "{found:?} were passed over"),
        Ok(Some(token)) => panic!("{token:?} was believed"),
        Err(_) => assert!(!found.is_empty(), "refused without a token"),
    }
    let path = uri.path().to_owned();
    locations.remove(&mut headers, &mut uri);
    assert_eq!(uri.path(), path);
    assert_eq!(locations.tokens(&headers, &uri), Vec::<String>::new());
}

/// A key set from an issuer: whatever it is, reading it ends, and what it holds verifies nothing that was not signed.
pub(crate) fn issuer_keys(data: &[u8]) {
    let Ok(keys) = KeySet::parse(data) else { return };
    for token in ["eyJhbGciOiJub25lIn0.e30.", "eyJhbGciOiJIUzI1NiJ9.e30.AAAA"] {
        assert!(SignedToken::parse(token).and_then(|token| keys.verify(&token)).is_err());
    }
}
