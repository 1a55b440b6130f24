//! What a request must be for a rule to count: one match of a rule, compiled.
//!
//! A condition that can't be read counts as met, and a path that can't be read as the prefix `/`; the rule answers 500 then.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use ambit_api::l7;
use http::Method;
use regex::Regex;

use crate::compile::{header_name, string_match};
use crate::field::{FieldMatch, StringMatch, whole};
use crate::session::literal_prefix;
use crate::table::RequestHead;

/// What the path must be.
#[derive(Debug, Clone)]
pub(crate) enum PathMatch {
    Exact(Arc<str>),
    /// Whole segments, without a slash at its end.
    Prefix(Arc<str>),
    /// With the length of the text that it begins with, by segments.
    Regex(Regex, usize),
    /// Letters, wherever a segment ends.
    TextPrefix(Arc<str>),
    /// As `Exact`, ASCII letters in either case.
    ExactIgnoringCase(Arc<str>),
    /// As `TextPrefix`, ASCII letters in either case.
    TextPrefixIgnoringCase(Arc<str>),
}

impl PathMatch {
    /// The prefix by segments that a path as written stands for.
    pub(crate) fn prefix(path: &str) -> PathMatch {
        PathMatch::Prefix(path.trim_end_matches('/').into())
    }

    fn read(source: Option<&l7::PathMatch>) -> Result<PathMatch, String> {
        use l7::path_match::Kind;
        let Some(source) = source else { return Ok(Self::prefix("/")) };
        Ok(match (source.kind.as_ref(), source.ignore_case) {
            (None, _) => Self::prefix("/"),
            (Some(Kind::Exact(path)), false) => Self::Exact(path.as_str().into()),
            (Some(Kind::Exact(path)), true) => Self::ExactIgnoringCase(path.as_str().into()),
            (Some(Kind::Prefix(_)), true) => return Err("a prefix by segments without case".to_owned()),
            (Some(Kind::Prefix(path)), false) => Self::prefix(path),
            (Some(Kind::TextPrefix(path)), false) => Self::TextPrefix(path.as_str().into()),
            (Some(Kind::TextPrefix(path)), true) => Self::TextPrefixIgnoringCase(path.as_str().into()),
            (Some(Kind::Regex(pattern)), _) => Self::Regex(whole(pattern)?, literal_prefix(pattern)),
        })
    }

    /// How much of a path matches, if it does: all of it unless this is a prefix.
    pub(crate) fn matches(&self, path: &str) -> Option<usize> {
        let whole = |matches: bool| matches.then_some(path.len());
        match self {
            Self::Exact(wanted) => whole(**wanted == *path),
            Self::ExactIgnoringCase(wanted) => whole(wanted.eq_ignore_ascii_case(path)),
            Self::Regex(regex, _) => whole(regex.is_match(path)),
            Self::Prefix(prefix) => {
                let rest = path.strip_prefix(&**prefix)?;
                (rest.is_empty() || rest.starts_with('/')).then_some(prefix.len())
            }
            Self::TextPrefix(prefix) => path.starts_with(&**prefix).then_some(prefix.len()),
            Self::TextPrefixIgnoringCase(prefix) => {
                let start = path.as_bytes().get(..prefix.len())?;
                start.eq_ignore_ascii_case(prefix.as_bytes()).then_some(prefix.len())
            }
        }
    }

    /// How much of every path that it matches is the same, by whole segments.
    pub(crate) fn common(&self, path: &str) -> usize {
        let text =
            |prefix: &str| path.get(..prefix.len()).and_then(|same| same.rfind('/')).unwrap_or_default();
        match self {
            Self::Exact(_) | Self::ExactIgnoringCase(_) => path.len(),
            Self::Regex(_, literal) => (*literal).min(path.len()),
            Self::Prefix(prefix) => prefix.len(),
            Self::TextPrefix(prefix) | Self::TextPrefixIgnoringCase(prefix) => text(prefix),
        }
    }

    /// Its length as written, which orders patterns.
    pub(crate) fn length(&self) -> usize {
        match self {
            Self::Regex(regex, _) => regex.as_str().len(),
            Self::Exact(path)
            | Self::Prefix(path)
            | Self::TextPrefix(path)
            | Self::ExactIgnoringCase(path)
            | Self::TextPrefixIgnoringCase(path) => path.len(),
        }
    }
}

/// What else of a request must match.
#[derive(Debug, Clone, Default)]
pub(crate) struct Conditions {
    pub(crate) method: Option<Method>,
    pub(crate) headers: Box<[FieldMatch]>,
    pub(crate) query: Box<[FieldMatch]>,
    /// What only VirtualServices ask for.
    more: Option<Box<More>>,
}

#[derive(Debug, Clone, Default)]
struct More {
    scheme: Option<StringMatch>,
    authority: Option<StringMatch>,
    method: Option<StringMatch>,
    port: Option<u16>,
    source_namespace: Option<Box<str>>,
    clients: Option<HashSet<IpAddr>>,
}

impl Conditions {
    /// Reads a match; what can't be read of it is added to `faults`.
    pub(crate) fn read(source: &l7::Match, faults: &mut Vec<String>) -> (PathMatch, Conditions) {
        let mut note = |fault: String| faults.push(fault);
        let path = PathMatch::read(source.path.as_ref()).map_err(&mut note).ok();
        let method = match source.method.as_str() {
            "" => Ok(None),
            name => Method::from_bytes(name.as_bytes()).map(Some).map_err(|_| format!("no method: {name:?}")),
        };
        let method = method.map_err(&mut note).unwrap_or_default();
        let headers = source.headers.iter().map(header);
        let headers = headers.filter_map(|field| field.map_err(&mut note).ok()).collect();
        let query = source.query.iter().map(|field| {
            Ok(FieldMatch::Query(field.name.as_str().into(), string_match(field.value.as_ref())?))
        });
        let query = query.filter_map(|field: Result<_, String>| field.map_err(&mut note).ok()).collect();
        let more = More::read(source, &mut note);
        let path = path.unwrap_or_else(|| PathMatch::prefix("/"));
        (path, Conditions { method, headers, query, more: more.map(Box::new) })
    }

    pub(crate) fn matches(&self, request: &RequestHead<'_>) -> bool {
        let field = |field: &FieldMatch| field.matches(request.headers, request.query);
        self.method.as_ref().is_none_or(|method| method == request.method)
            && self.headers.iter().all(field)
            && self.query.iter().all(field)
            && self.more.as_ref().is_none_or(|more| more.matches(request))
    }
}

fn header(field: &l7::FieldMatch) -> Result<FieldMatch, String> {
    let (name, value) = (header_name(&field.name)?, string_match(field.value.as_ref())?);
    Ok(if field.invert { FieldMatch::WithoutHeader(name, value) } else { FieldMatch::Header(name, value) })
}

impl More {
    fn read(source: &l7::Match, note: &mut impl FnMut(String)) -> Option<More> {
        let mut text = |wanted: Option<&l7::StringMatch>| {
            wanted.and_then(|wanted| string_match(Some(wanted)).map_err(&mut *note).ok())
        };
        let (scheme, authority) = (text(source.scheme.as_ref()), text(source.authority.as_ref()));
        let method = text(source.method_match.as_ref());
        let port = match u16::try_from(source.port) {
            Ok(0) => None,
            Ok(port) => Some(port),
            Err(_) => {
                note(format!("no port: {}", source.port));
                None
            }
        };
        let clients = source.clients.as_ref().map(|clients| {
            clients.addresses.iter().filter_map(|bytes| address(bytes).map_err(&mut *note).ok()).collect()
        });
        let namespace = source.source_namespace.as_str();
        let source_namespace = (!namespace.is_empty()).then(|| namespace.into());
        let more = More { scheme, authority, method, port, source_namespace, clients };
        let is_empty = more.scheme.is_none()
            && more.authority.is_none()
            && more.method.is_none()
            && more.port.is_none()
            && more.source_namespace.is_none()
            && more.clients.is_none();
        (!is_empty).then_some(more)
    }

    fn matches(&self, request: &RequestHead<'_>) -> bool {
        let text = |wanted: &Option<StringMatch>, value| {
            wanted.as_ref().is_none_or(|wanted| wanted.matches(Some(value)))
        };
        text(&self.scheme, request.scheme)
            && text(&self.authority, request.authority)
            && text(&self.method, request.method.as_str())
            && self.port.is_none_or(|port| port == request.port)
            && self.source_namespace.as_ref().is_none_or(|wanted| **wanted == *request.client_namespace)
            && self.clients.as_ref().is_none_or(|clients| clients.contains(&request.client_address))
    }
}

pub(crate) fn address(bytes: &[u8]) -> Result<IpAddr, String> {
    let wrong = || format!("no address: {bytes:?}");
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).map(IpAddr::from).map_err(|_| wrong()),
        _ => {
            <[u8; 16]>::try_from(bytes).map(|octets| IpAddr::from(octets).to_canonical()).map_err(|_| wrong())
        }
    }
}
