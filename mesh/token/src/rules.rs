//! Rules for tokens, and what a request is by them: refused, of nobody in particular, or its token's.

use std::collections::HashMap;
use std::sync::Arc;

use ambit_api::l7;
use ambit_policy::Token;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::uri::Uri;
use serde_json::{Map, Value};

use crate::keys::{KeySet, SignedToken, TokenError, check_audience, check_times};
use crate::location::{Locations, MAX_TOKENS};

/// What a request is refused for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// It has a token that is not valid.
    #[error(transparent)]
    Invalid(#[from] TokenError),
    /// It has no token, and a rule requires one.
    #[error("{}", self.message())]
    Missing,
}

impl Rejection {
    /// What clients read, in Envoy's words.
    pub fn message(&self) -> &'static str {
        match self {
            Self::Invalid(error) => error.message(),
            Self::Missing => "Jwt is missing",
        }
    }
}

/// One issuer's tokens.
#[derive(Debug)]
pub struct Rule {
    /// Empty in no rule that a control plane makes; such a rule finds no token valid, so that it cannot speak for another issuer.
    issuer: Box<str>,
    audiences: Box<[Box<str>]>,
    /// `None` where they are not known: then no token of the issuer is valid.
    keys: Option<KeySet>,
    locations: Locations,
    is_required: bool,
    forwards_token: bool,
    payload_header: Option<HeaderName>,
    claim_headers: Vec<(HeaderName, Box<[Box<str>]>)>,
    space_delimited: Box<[Box<str>]>,
}

/// The rules of one object, in order.
#[derive(Debug, Clone, Default)]
pub struct Rules(Arc<[Rule]>);

impl Rules {
    /// Compiles rules. A key set that can't be read is one that is not known.
    pub fn new(source: &l7::Authentication) -> Self {
        Self(source.rules.iter().map(Rule::new).collect())
    }

    /// The rules.
    pub fn iter(&self) -> impl Iterator<Item = &Rule> {
        self.0.iter()
    }
}

impl Rule {
    fn new(source: &l7::TokenRule) -> Self {
        let boxed = |texts: &[String]| texts.iter().map(|text| text.as_str().into()).collect();
        let claim_header = |header: &l7::ClaimHeader| {
            let path = header.claim.split('.').map(Into::into).collect();
            Some((HeaderName::try_from(&header.name).ok()?, path))
        };
        Self {
            issuer: source.issuer.as_str().into(),
            audiences: boxed(&source.audiences),
            keys: KeySet::parse(&source.jwks).ok(),
            locations: Locations::new(source),
            is_required: source.required,
            forwards_token: source.forward_token,
            payload_header: HeaderName::try_from(&source.payload_header).ok(),
            claim_headers: source.claim_headers.iter().filter_map(claim_header).collect(),
            space_delimited: boxed(&source.space_delimited),
        }
    }

    /// The claims of a token, if it is one that the rule is for and valid at `now`.
    fn verify(&self, token: &SignedToken<'_>, now: f64) -> Result<Map<String, Value>, TokenError> {
        let claims = &token.claims;
        if self.issuer.is_empty() || claims.get("iss").and_then(Value::as_str) != Some(&self.issuer) {
            return Err(TokenError::Issuer);
        }
        self.keys.as_ref().ok_or(TokenError::NoKeys)?.verify(token)?;
        check_times(claims, now)?;
        let audience = claims.get("aud");
        let list = audience.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let audiences = audience.and_then(Value::as_str).into_iter();
        check_audience(&self.audiences, audiences.chain(list.iter().filter_map(Value::as_str)))?;
        Ok(claims.clone())
    }

    /// Verifies every token that the request has where the rule looks; the first one counts.
    fn apply(&self, tokens: &[String], parsed: &Parsed<'_>, now: f64) -> Applied {
        if tokens.len() > MAX_TOKENS {
            return Applied::Invalid(TokenError::Malformed);
        }
        let mut first = None;
        for text in tokens {
            let token = parsed
                .get(text.as_str())
                .map_or(Err(TokenError::Malformed), |token| token.as_ref().map_err(|error| *error));
            match token.and_then(|token| self.verify(token, now)) {
                Ok(claims) if first.is_none() => {
                    first = Some((Token::new(claims, &self.space_delimited), text.clone()));
                }
                Ok(_) => {}
                Err(error) => return Applied::Invalid(error),
            }
        }
        first.map_or(Applied::Missing, |(claims, token)| Applied::Valid(Box::new(claims), token))
    }

    /// Whether nothing but a request can meet the rule: it requires a token, or promises fields that only a valid token fills.
    pub fn needs_request(&self) -> bool {
        self.is_required || self.payload_header.is_some() || !self.claim_headers.is_empty()
    }

    /// Writes the fields that the rule fills of its valid token.
    fn output(&self, claims: &Token, token: &str, headers: &mut HeaderMap) {
        if let Some(name) = &self.payload_header
            && let Some(payload) = token.split('.').nth(1).and_then(|text| HeaderValue::try_from(text).ok())
        {
            headers.insert(name, payload);
        }
        for (name, path) in &self.claim_headers {
            if let Some(value) = claims.value(path).and_then(header_value) {
                headers.insert(name, value);
            }
        }
    }
}

/// The tokens of a request, each taken apart once, whatever number of rules looks at it.
type Parsed<'a> = HashMap<&'a str, Result<SignedToken<'a>, TokenError>>;

enum Applied {
    Missing,
    Invalid(TokenError),
    Valid(Box<Token>, String),
}

/// The fields that rules write claims to. Clients may not send them, in trailers neither.
pub fn outputs<'a>(rules: impl Iterator<Item = &'a Rule>) -> impl Iterator<Item = &'a HeaderName> {
    rules.flat_map(|rule| rule.claim_headers.iter().map(|(name, _)| name).chain(&rule.payload_header))
}

/// Removes what clients sent in fields that rules write claims to.
pub fn remove_outputs<'a>(rules: impl Iterator<Item = &'a Rule>, headers: &mut HeaderMap) {
    outputs(rules).for_each(|name| {
        headers.remove(name);
    });
}

/// Verifies the tokens of a request at `now`, seconds since the epoch, and changes the request as the rules say. `None`: it has
/// no token.
///
/// As in Istio, a token that one rule finds valid is enough, as rules for several issuers look in the same places; rules that
/// require a token must each find one. The first valid token is the request's, and only its rule writes fields: these and the
/// principal never come from different tokens. Every rule removes its own valid token unless it forwards it.
///
/// # Errors
/// [`Rejection`].
pub fn authenticate<'a>(
    rules: impl Iterator<Item = &'a Rule>,
    headers: &mut HeaderMap,
    uri: &mut Uri,
    now: f64,
) -> Result<Option<Token>, Rejection> {
    let found: Vec<(&Rule, Vec<String>)> =
        rules.map(|rule| (rule, rule.locations.tokens(headers, uri))).collect();
    let mut parsed = Parsed::new();
    for token in found.iter().flat_map(|(_, tokens)| tokens.iter().take(MAX_TOKENS)) {
        parsed.entry(token).or_insert_with(|| SignedToken::parse(token));
    }
    let mut valid = Vec::new();
    let mut invalid = None;
    for (rule, tokens) in &found {
        match rule.apply(tokens, &parsed, now) {
            Applied::Valid(claims, token) => valid.push((*rule, claims, token)),
            Applied::Missing if rule.is_required => return Err(Rejection::Missing),
            Applied::Missing => {}
            Applied::Invalid(error) if rule.is_required => return Err(error.into()),
            // Of several reasons, the one of the rule for the token's issuer.
            Applied::Invalid(error) => {
                if invalid.is_none_or(|known| known == TokenError::Issuer) {
                    invalid = Some(error);
                }
            }
        }
    }
    if let (true, Some(error)) = (valid.is_empty(), invalid) {
        return Err(error.into());
    }
    for (rule, ..) in valid.iter().filter(|(rule, ..)| !rule.forwards_token) {
        rule.locations.remove(headers, uri);
    }
    Ok(valid.into_iter().next().map(|(rule, claims, token)| {
        rule.output(&claims, &token, headers);
        *claims
    }))
}

/// A claim as a header: texts, numbers and truth values as they are, others as JSON in base64 (as Envoy has it).
fn header_value(claim: &Value) -> Option<HeaderValue> {
    let text = match claim {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        Value::Bool(truth) => truth.to_string(),
        Value::Null => return None,
        Value::Array(_) | Value::Object(_) => URL_SAFE_NO_PAD.encode(claim.to_string()),
    };
    HeaderValue::try_from(text).ok()
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
