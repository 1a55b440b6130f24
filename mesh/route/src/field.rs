//! Matches of header fields and query parameters.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName};
use regex::Regex;

/// What a value must be.
#[derive(Debug, Clone)]
pub enum StringMatch {
    /// Exactly this.
    Exact(Box<str>),
    /// Begins with this.
    Prefix(Box<str>),
    /// All of it matches.
    Regex(Regex),
    /// Is there, or is not there.
    Present(bool),
}

impl StringMatch {
    /// A pattern that all of a value must match.
    ///
    /// # Errors
    /// Why it is no pattern, or would take too much memory.
    pub fn regex(pattern: &str) -> Result<StringMatch, String> {
        whole(pattern).map(StringMatch::Regex)
    }

    /// Whether a value, or its absence, matches.
    pub fn matches(&self, value: Option<&str>) -> bool {
        match (self, value) {
            (Self::Present(wanted), value) => *wanted == value.is_some(),
            (_, None) => false,
            (Self::Exact(wanted), Some(value)) => **wanted == *value,
            (Self::Prefix(prefix), Some(value)) => value.starts_with(&**prefix),
            (Self::Regex(regex), Some(value)) => regex.is_match(value),
        }
    }
}

/// A pattern that all of a text must match.
///
/// # Errors
/// Why it is no pattern, or would take too much memory.
pub(crate) fn whole(text: &str) -> Result<Regex, String> {
    pattern(&format!("^(?:{text})$"))
}

/// A pattern that matches anywhere in a text.
///
/// # Errors
/// Why it is no pattern, or would take too much memory.
pub(crate) fn pattern(text: &str) -> Result<Regex, String> {
    /// Bytes that a compiled pattern may take.
    const LIMIT: usize = 1 << 20;
    regex::RegexBuilder::new(text).size_limit(LIMIT).build().map_err(|error| error.to_string())
}

/// A match of one header field or query parameter.
#[derive(Debug, Clone)]
pub enum FieldMatch {
    /// Of a header. Several lines of one name are one value, joined by commas (RFC 9110 §5.3).
    Header(HeaderName, StringMatch),
    /// Of a header that must not be like this. A missing one counts as an empty value.
    WithoutHeader(HeaderName, StringMatch),
    /// Of a query parameter, decoded. One of several of one name must match.
    Query(Box<str>, StringMatch),
}

impl FieldMatch {
    /// Whether the headers and the query match.
    pub(crate) fn matches(&self, headers: &HeaderMap, query: Option<&str>) -> bool {
        match self {
            Self::Header(name, wanted) => match header(headers, name) {
                Field::Missing => wanted.matches(None),
                Field::Text(value) => wanted.matches(Some(&value)),
                // Bytes that are no text are there, and equal to nothing that can be written down.
                Field::Bytes => matches!(wanted, StringMatch::Present(true)),
            },
            Self::WithoutHeader(name, unwanted) => match (header(headers, name), unwanted) {
                (Field::Missing, StringMatch::Present(wanted)) => *wanted,
                (Field::Missing, unwanted) => !unwanted.matches(Some("")),
                (Field::Text(value), unwanted) => !unwanted.matches(Some(&value)),
                (Field::Bytes, unwanted) => !matches!(unwanted, StringMatch::Present(true)),
            },
            Self::Query(name, wanted) => {
                let mut values =
                    query_pairs(query).filter(|(key, _)| **key == **name).map(|(_, value)| value).peekable();
                match values.peek() {
                    None => wanted.matches(None),
                    Some(_) => values.any(|value| wanted.matches(Some(&value))),
                }
            }
        }
    }
}

enum Field<'a> {
    Missing,
    Text(Cow<'a, str>),
    Bytes,
}

fn header<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Field<'a> {
    let mut lines = headers.get_all(name).iter();
    let Some(first) = lines.next() else { return Field::Missing };
    let Ok(first) = first.to_str() else { return Field::Bytes };
    let mut joined = Cow::Borrowed(first);
    for line in lines {
        let Ok(line) = line.to_str() else { return Field::Bytes };
        let joined = joined.to_mut();
        joined.push(',');
        joined.push_str(line);
    }
    Field::Text(joined)
}

fn query_pairs(query: Option<&str>) -> impl Iterator<Item = (Cow<'_, str>, Cow<'_, str>)> {
    form_urlencoded::parse(query.unwrap_or_default().as_bytes())
}
