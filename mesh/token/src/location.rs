//! Where a request carries its token.

use ambit_api::l7;
use http::header::{AUTHORIZATION, COOKIE, HeaderMap, HeaderName, HeaderValue};
use http::uri::{PathAndQuery, Uri};

/// Tokens that are looked at of one rule; a request with more is refused.
pub const MAX_TOKENS: usize = 4;
/// The query parameter of a token where a rule names no place (RFC 6750 §2.3).
const ACCESS_TOKEN: &str = "access_token";

/// The places where a token may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Locations {
    headers: Vec<(HeaderName, Box<str>)>,
    parameters: Vec<Box<str>>,
    cookies: Vec<Box<str>>,
}

impl Locations {
    /// The places that a rule names; where it names none, the `Authorization` field (RFC 6750 §2.1) and the parameter
    /// `access_token`. A name that can be no header's is left out.
    pub fn new(rule: &l7::TokenRule) -> Self {
        if rule.from_headers.is_empty() && rule.from_params.is_empty() && rule.from_cookies.is_empty() {
            return Self {
                headers: vec![(AUTHORIZATION, "Bearer ".into())],
                parameters: vec![ACCESS_TOKEN.into()],
                cookies: Vec::new(),
            };
        }
        let header = |header: &l7::TokenHeader| {
            Some((HeaderName::try_from(&header.name).ok()?, header.prefix.as_str().into()))
        };
        Self {
            headers: rule.from_headers.iter().filter_map(header).collect(),
            parameters: rule.from_params.iter().map(|name| name.as_str().into()).collect(),
            cookies: rule.from_cookies.iter().map(|name| name.as_str().into()).collect(),
        }
    }

    /// The tokens of a request, at most one more than [`MAX_TOKENS`]. An empty one is none; one that is no text comes empty.
    pub fn tokens(&self, headers: &HeaderMap, uri: &Uri) -> Vec<String> {
        let mut tokens = Vec::new();
        for (name, prefix) in &self.headers {
            let lines =
                headers.get_all(name).iter().filter_map(|line| without_prefix(line.as_bytes(), prefix));
            tokens.extend(lines.map(|token| String::from_utf8(token.to_vec()).unwrap_or_default()));
        }
        for name in &self.parameters {
            let pairs = form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
            let values = pairs.filter(|(known, value)| **known == **name && !value.is_empty());
            tokens.extend(values.map(|(_, value)| value.into_owned()));
        }
        for name in &self.cookies {
            let lines = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes);
            let values = lines.flat_map(pairs).filter(|pair| is_cookie(pair, name)).map(cookie_value);
            let values = values.filter(|value| !value.is_empty());
            tokens.extend(values.map(|value| String::from_utf8(value.to_vec()).unwrap_or_default()));
        }
        tokens.truncate(MAX_TOKENS + 1);
        tokens
    }

    /// Takes the tokens out of a request.
    pub fn remove(&self, headers: &mut HeaderMap, uri: &mut Uri) {
        for (name, prefix) in &self.headers {
            retain(headers, name, |line| match without_prefix(line.as_bytes(), prefix) {
                Some(_) => None,
                None => Some(line.clone()),
            });
        }
        if !self.parameters.is_empty() {
            remove_parameters(uri, &self.parameters);
        }
        if !self.cookies.is_empty() {
            retain(headers, &COOKIE, |line| without_cookies(line, &self.cookies));
        }
    }
}

/// Replaces each line of a field; `None` removes it.
fn retain(headers: &mut HeaderMap, name: &HeaderName, keep: impl Fn(&HeaderValue) -> Option<HeaderValue>) {
    if !headers.contains_key(name) {
        return;
    }
    let kept: Vec<HeaderValue> = headers.get_all(name).iter().filter_map(keep).collect();
    headers.remove(name);
    for line in kept {
        headers.append(name, line);
    }
}

/// What follows a prefix; `None` if the value does not begin so, or nothing follows. A prefix that ends with a space is a scheme
/// (RFC 9110 §11.1): its case does not count, and any white space ends it.
fn without_prefix<'a>(value: &'a [u8], prefix: &str) -> Option<&'a [u8]> {
    let scheme = prefix.trim_end();
    let (start, rest) = value.split_at_checked(scheme.len())?;
    let is_scheme = scheme.len() < prefix.len();
    let ends = !is_scheme || rest.first().is_some_and(u8::is_ascii_whitespace);
    let token = rest.trim_ascii();
    (start.eq_ignore_ascii_case(scheme.as_bytes()) && ends && !token.is_empty()).then_some(token)
}

/// The pairs of a `Cookie` field (RFC 6265 §4.2.1).
fn pairs(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|byte| *byte == b';').map(<[u8]>::trim_ascii)
}

fn is_cookie(pair: &[u8], name: &str) -> bool {
    pair.split(|byte| *byte == b'=').next().is_some_and(|known| known.trim_ascii() == name.as_bytes())
}

fn cookie_value(pair: &[u8]) -> &[u8] {
    let at = pair.iter().position(|byte| *byte == b'=');
    let value = at.and_then(|at| pair.get(at + 1..)).unwrap_or_default().trim_ascii();
    value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value)
}

fn without_cookies(line: &HeaderValue, names: &[Box<str>]) -> Option<HeaderValue> {
    let is_other = |pair: &&[u8]| !pair.is_empty() && !names.iter().any(|name| is_cookie(pair, name));
    let kept: Vec<&[u8]> = pairs(line.as_bytes()).filter(is_other).collect();
    if kept.is_empty() { None } else { HeaderValue::from_bytes(&kept.join(&b"; "[..])).ok() }
}

/// The other parameters stay as they were written.
fn remove_parameters(uri: &mut Uri, names: &[Box<str>]) {
    let Some(query) = uri.query() else { return };
    let is_named = |pair: &str| {
        form_urlencoded::parse(pair.as_bytes()).any(|(name, _)| names.iter().any(|known| **known == *name))
    };
    if !query.split('&').any(is_named) {
        return;
    }
    let kept: Vec<&str> = query.split('&').filter(|pair| !is_named(pair)).collect();
    let target = match kept.is_empty() {
        true => uri.path().to_owned(),
        false => format!("{}?{}", uri.path(), kept.join("&")),
    };
    let mut parts = uri.clone().into_parts();
    if let Ok(target) = PathAndQuery::try_from(target) {
        parts.path_and_query = Some(target);
        if let Ok(changed) = Uri::from_parts(parts) {
            *uri = changed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(lines: &[(&'static str, &'static str)], target: &str) -> (HeaderMap, Uri) {
        let lines = lines
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        let mut headers = HeaderMap::new();
        lines.for_each(|(name, value)| {
            headers.append(name, value);
        });
        (headers, target.parse().unwrap())
    }

    #[test]
    fn tokens_are_found_where_the_rule_says() {
        let defaults = Locations::new(&l7::TokenRule::default());
        let named = Locations::new(&l7::TokenRule {
            from_headers: vec![
                l7::TokenHeader { name: "X-Jwt".to_owned(), prefix: String::new() },
                l7::TokenHeader { name: "x-scheme".to_owned(), prefix: "Jwt ".to_owned() },
            ],
            from_params: vec!["my token".to_owned()],
            from_cookies: vec!["session".to_owned()],
            ..l7::TokenRule::default()
        });
        for (locations, lines, target, found) in [
            (&defaults, &[("authorization", "Bearer a.b.c")][..], "/", &["a.b.c"][..]),
            (&defaults, &[("authorization", "bEARER\t a.b.c ")], "/", &["a.b.c"]),
            (&defaults, &[("authorization", "Basic abc")], "/", &[]),
            (&defaults, &[("authorization", "Bearerabc")], "/", &[]),
            (&defaults, &[("authorization", "Bearer ")], "/", &[]),
            (&defaults, &[("authorization", "Bearer a"), ("authorization", "Bearer b")], "/", &["a", "b"]),
            (&defaults, &[], "/?access_token=a&x=1&access%5Ftoken=b&access_token=", &["a", "b"]),
            (&named, &[("authorization", "Bearer a")], "/?access_token=b", &[]),
            (
                &named,
                &[("x-jwt", "a"), ("x-scheme", "jwt b")],
                "/?my+token=c&my%20token=d",
                &["a", "b", "c", "d"],
            ),
            (&named, &[("cookie", "a=b; session=\"t\";c"), ("cookie", "session=u")], "/", &["t", "u"]),
            (&named, &[("cookie", "session=; xsession=v; session")], "/", &[]),
        ] {
            let (headers, uri) = request(lines, target);
            assert_eq!(locations.tokens(&headers, &uri), found, "{lines:?} {target}");
        }
    }

    #[test]
    fn nothing_but_the_token_is_removed() {
        let locations = Locations::new(&l7::TokenRule {
            from_headers: vec![l7::TokenHeader {
                name: "authorization".to_owned(),
                prefix: "Bearer ".to_owned(),
            }],
            from_params: vec!["t".to_owned()],
            from_cookies: vec!["s".to_owned()],
            ..l7::TokenRule::default()
        });
        let lines = [("authorization", "Basic x"), ("authorization", "Bearer y"), ("cookie", "a=1;s=2; b=3")];
        let (mut headers, mut uri) = request(&lines, "/p%20q?x=%41&%74=1&t=2&y");
        locations.remove(&mut headers, &mut uri);
        assert_eq!(headers.get_all(AUTHORIZATION).iter().collect::<Vec<_>>(), ["Basic x"]);
        assert_eq!(headers.get_all(COOKIE).iter().collect::<Vec<_>>(), ["a=1; b=3"]);
        assert_eq!(uri, "/p%20q?x=%41&y");
        let (mut headers, mut uri) = request(&[("cookie", "s=2")], "/p?t=1");
        locations.remove(&mut headers, &mut uri);
        assert!(headers.is_empty());
        assert_eq!(uri, "/p");
    }
}
