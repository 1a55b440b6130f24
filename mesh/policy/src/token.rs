//! What a request's token says of who made the request. It was found valid by whoever makes a [`Token`].

use std::borrow::Cow;

use serde_json::{Map, Value};

/// Claims that are lists of words separated by spaces (RFC 8693 §4.2; Istio's default).
const SPACE_DELIMITED: [&str; 2] = ["scope", "permission"];

/// The claims of a valid token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    principal: Option<Box<str>>,
    claims: Map<String, Value>,
    space_delimited: Box<[Box<str>]>,
}

impl Token {
    /// A token with these claims; `space_delimited` names further claims that are lists of words.
    pub fn new(claims: Map<String, Value>, space_delimited: &[Box<str>]) -> Self {
        let text = |name: &str| claims.get(name).and_then(Value::as_str);
        let principal = text("iss").zip(text("sub")).map(|(issuer, subject)| format!("{issuer}/{subject}"));
        Self { principal: principal.map(Into::into), claims, space_delimited: space_delimited.into() }
    }

    /// `<iss>/<sub>`.
    pub fn principal(&self) -> Option<&str> {
        self.principal.as_deref()
    }

    /// `aud`: one text, or a list of them.
    pub fn audiences(&self) -> impl Iterator<Item = &str> {
        texts(self.claims.get("aud"))
    }

    /// `azp`.
    pub fn presenter(&self) -> Option<&str> {
        self.claims.get("azp").and_then(Value::as_str)
    }

    /// All claims.
    pub fn claims(&self) -> &Map<String, Value> {
        &self.claims
    }

    /// The claim at `path` as it is in the token.
    pub fn value(&self, path: &[Box<str>]) -> Option<&Value> {
        let (first, inner) = path.split_first()?;
        inner.iter().try_fold(self.claims.get(&**first)?, |value, name| value.get(&**name))
    }

    /// The values of a claim at `path`: a text, the texts of a list, numbers and truth values as JSON writes them. The words of a
    /// claim that is delimited by spaces are values too.
    pub fn claim(&self, path: &[Box<str>]) -> impl Iterator<Item = Cow<'_, str>> {
        let value = self.value(path);
        let name = path.last().map_or("", |name| name);
        let is_delimited =
            SPACE_DELIMITED.contains(&name) || self.space_delimited.iter().any(|it| **it == *name);
        let words = value.and_then(Value::as_str).filter(|_| is_delimited).unwrap_or_default();
        let list = value.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let whole = value.into_iter().chain(list).filter_map(scalar);
        whole.chain(words.split_ascii_whitespace().map(Cow::Borrowed))
    }
}

fn scalar(value: &Value) -> Option<Cow<'_, str>> {
    match value {
        Value::String(text) => Some(Cow::Borrowed(text)),
        Value::Number(number) => Some(Cow::Owned(number.to_string())),
        Value::Bool(truth) => Some(Cow::Borrowed(if *truth { "true" } else { "false" })),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn texts(value: Option<&Value>) -> impl Iterator<Item = &str> {
    let list = value.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    value.and_then(Value::as_str).into_iter().chain(list.iter().filter_map(Value::as_str))
}
