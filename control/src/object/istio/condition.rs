//! Conditions of an AuthorizationPolicy (`when`): which attribute, and its values.

use http::header::HeaderName;
use serde::Deserialize;

use super::authorization::{IpBlock, Pattern, PortNumber};

/// An attribute of a connection that a condition names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attribute {
    /// `source.ip`
    SourceIp {
        /// One of these.
        values: Vec<IpBlock>,
        /// None of these.
        not_values: Vec<IpBlock>,
    },
    /// `destination.ip`
    DestinationIp {
        /// One of these.
        values: Vec<IpBlock>,
        /// None of these.
        not_values: Vec<IpBlock>,
    },
    /// `destination.port`
    DestinationPort {
        /// One of these.
        values: Vec<PortNumber>,
        /// None of these.
        not_values: Vec<PortNumber>,
    },
    /// `source.namespace`
    SourceNamespace {
        /// One of these.
        values: Vec<Pattern>,
        /// None of these.
        not_values: Vec<Pattern>,
    },
    /// `source.principal`
    SourcePrincipal {
        /// One of these.
        values: Vec<Pattern>,
        /// None of these.
        not_values: Vec<Pattern>,
    },
    /// `source.serviceAccount`
    SourceServiceAccount {
        /// One of these.
        values: Vec<String>,
        /// None of these.
        not_values: Vec<String>,
    },
    /// An attribute of the request, which L4 cannot see.
    Http(HttpAttribute),
}

/// An attribute of a request that a condition names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HttpAttribute {
    /// `remote.ip`
    RemoteIp {
        /// One of these.
        values: Vec<IpBlock>,
        /// None of these.
        not_values: Vec<IpBlock>,
    },
    /// One that is compared as text.
    Text {
        /// Which one.
        key: TextKey,
        /// One of these.
        values: Vec<Pattern>,
        /// None of these.
        not_values: Vec<Pattern>,
    },
    /// One that is not known, by its key.
    Unknown(String),
}

/// An attribute of a request that is compared as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TextKey {
    /// `request.headers[name]`, in lower case.
    Header(String),
    /// `request.auth.principal`
    RequestPrincipal,
    /// `request.auth.audiences`
    RequestAudience,
    /// `request.auth.presenter`
    RequestPresenter,
    /// `request.auth.claims[outer][name]`
    Claim(Vec<String>),
    /// `connection.sni`
    ServerName,
}

/// A further condition of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawCondition")]
pub struct Condition(pub Attribute);

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawCondition {
    key: String,
    #[serde(default)]
    values: Vec<String>,
    #[serde(default)]
    not_values: Vec<String>,
}

impl TryFrom<RawCondition> for Condition {
    type Error = String;

    fn try_from(raw: RawCondition) -> Result<Condition, String> {
        let RawCondition { key, values, not_values } = raw;
        if values.is_empty() && not_values.is_empty() {
            return Err(format!("condition {key:?} has neither values nor notValues"));
        }
        let attribute = match key.as_str() {
            "source.ip" => Attribute::SourceIp { values: read(values)?, not_values: read(not_values)? },
            "destination.ip" => {
                Attribute::DestinationIp { values: read(values)?, not_values: read(not_values)? }
            }
            "destination.port" => {
                Attribute::DestinationPort { values: read(values)?, not_values: read(not_values)? }
            }
            "source.namespace" => {
                Attribute::SourceNamespace { values: patterns(values), not_values: patterns(not_values) }
            }
            "source.principal" => {
                Attribute::SourcePrincipal { values: patterns(values), not_values: patterns(not_values) }
            }
            "source.serviceAccount" => Attribute::SourceServiceAccount { values, not_values },
            key if ["request.", "remote.", "connection.", "experimental."]
                .iter()
                .any(|p| key.starts_with(p)) =>
            {
                Attribute::Http(http_attribute(key, values, not_values)?)
            }
            _ => return Err(format!("unknown condition key {key:?}")),
        };
        Ok(Condition(attribute))
    }
}

fn http_attribute(key: &str, values: Vec<String>, not_values: Vec<String>) -> Result<HttpAttribute, String> {
    let text = |key, values, not_values| HttpAttribute::Text {
        key,
        values: patterns(values),
        not_values: patterns(not_values),
    };
    Ok(match key {
        "remote.ip" => HttpAttribute::RemoteIp { values: read(values)?, not_values: read(not_values)? },
        "connection.sni" => text(TextKey::ServerName, values, not_values),
        "request.auth.principal" => text(TextKey::RequestPrincipal, values, not_values),
        "request.auth.audiences" => text(TextKey::RequestAudience, values, not_values),
        "request.auth.presenter" => text(TextKey::RequestPresenter, values, not_values),
        _ => match (key.strip_prefix("request.headers"), key.strip_prefix("request.auth.claims")) {
            (Some(name), _) => match bracketed(name).as_deref() {
                Some([name]) if HeaderName::from_bytes(name.as_bytes()).is_ok() => {
                    text(TextKey::Header(name.to_ascii_lowercase()), values, not_values)
                }
                // Pseudo-headers have attributes of their own.
                Some([name]) if name.starts_with(':') => HttpAttribute::Unknown(key.to_owned()),
                _ => return Err(format!("condition key {key:?} names no header")),
            },
            (_, Some(path)) => match bracketed(path) {
                Some(path) => text(TextKey::Claim(path), values, not_values),
                None => return Err(format!("condition key {key:?} names no claim")),
            },
            _ => HttpAttribute::Unknown(key.to_owned()),
        },
    })
}

/// The names of `[one][two]`, of which none is empty.
fn bracketed(text: &str) -> Option<Vec<String>> {
    let inner = text.strip_prefix('[')?.strip_suffix(']')?;
    inner
        .split("][")
        .map(|name| (!name.is_empty() && !name.contains(['[', ']'])).then(|| name.to_owned()))
        .collect()
}

fn read<T: TryFrom<String, Error = String>>(values: Vec<String>) -> Result<Vec<T>, String> {
    values.into_iter().map(T::try_from).collect()
}

fn patterns(values: Vec<String>) -> Vec<Pattern> {
    values.into_iter().map(Pattern::from).collect()
}
