//! What a match demands of an HTTP request ([`HttpMatch`]), and what a request offers ([`HttpRequest`]).
//!
//! Where an attribute has several readings (a header of several lines) or none that can be trusted, the reading counts that denies.

use std::borrow::Cow;
use std::net::IpAddr;

use ambit_api::security::{StringMatch, string_match::MatchType};
use ambit_api::{HTTP_MATCH_TYPE_URL, l7, security};
use http::HeaderMap;
use http::header::HeaderName;
use prost::Message;
use serde::Serialize;

use crate::compile::{Action, CompileError, Field};
use crate::matcher::{Nets, Texts};
use crate::normal::compared;
use crate::path::{Paths, Template};
use crate::place::Place;
use crate::token::Token;

/// An HTTP request that asks to be let through.
#[derive(Debug, Clone, Copy)]
pub struct HttpRequest<'a> {
    /// The authority as the client wrote it.
    pub authority: &'a str,
    /// Its host in lower case, without port.
    pub host: &'a str,
    /// The method.
    pub method: &'a str,
    /// The normalised path, without query.
    pub path: &'a str,
    /// The headers.
    pub headers: &'a HeaderMap,
    /// The client's address as trusted proxies in front report it; `None` where they report none that can be read.
    pub remote_ip: Option<IpAddr>,
    /// The server name of the client's TLS connection.
    pub server_name: Option<&'a str>,
    /// The token that was found valid.
    pub token: Option<&'a Token>,
}

/// What policies for requests see of a connection.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    /// Nobody reads what is sent.
    Unread,
    /// It is passed on. Its beginning was read: TLS that asks for this name, or for none, or no TLS.
    Passed(Option<&'a str>),
    /// A request.
    Request(&'a HttpRequest<'a>),
}

/// An attribute that is compared as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
enum Attribute {
    Host,
    Method,
    RequestPrincipal,
    RequestAudience,
    RequestPresenter,
    ServerName,
    Header(#[serde(serialize_with = "as_str")] HeaderName),
    Claim(Box<[Box<str>]>),
}

fn as_str<S: serde::Serializer>(name: &HeaderName, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(name.as_str())
}

/// How a value that has several readings is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// One reading that matches is enough.
    Any,
    /// Every reading must match: each line, and all of them as one list.
    Whole,
}

impl Attribute {
    /// The field or condition of an AuthorizationPolicy that it stands for.
    fn field(&self) -> &'static str {
        match self {
            Self::Host => "hosts",
            Self::Method => "methods",
            Self::RequestPrincipal => "requestPrincipals",
            Self::RequestAudience => "request.auth.audiences",
            Self::RequestPresenter => "request.auth.presenter",
            Self::ServerName => "connection.sni",
            Self::Header(_) => "request.headers",
            Self::Claim(_) => "request.auth.claims",
        }
    }

    /// Whether one of `texts` matches the attribute of `request`; one that is not there matches nothing.
    fn matches(&self, texts: &Texts, request: &HttpRequest<'_>, reading: Reading) -> bool {
        let token = request.token;
        match self {
            Self::Host => {
                let authority = match request.authority.bytes().any(|byte| byte.is_ascii_uppercase()) {
                    true => Cow::Owned(request.authority.to_ascii_lowercase()),
                    false => Cow::Borrowed(request.authority),
                };
                texts.matches(Some(request.host)) || texts.matches(Some(&authority))
            }
            Self::Method => texts.matches(Some(request.method)),
            Self::RequestPrincipal => texts.matches(token.and_then(Token::principal)),
            Self::RequestAudience => {
                token.is_some_and(|token| token.audiences().any(|audience| texts.matches(Some(audience))))
            }
            Self::RequestPresenter => texts.matches(token.and_then(Token::presenter)),
            Self::ServerName => texts.matches(request.server_name),
            Self::Header(name) => header_matches(texts, request.headers, name, reading),
            Self::Claim(path) => {
                token.is_some_and(|token| token.claim(path).any(|value| texts.matches(Some(&value))))
            }
        }
    }
}

/// RFC 9110 §5.3: several lines of a field are one list. Programs differ in which line they heed.
fn header_matches(texts: &Texts, headers: &HeaderMap, name: &HeaderName, reading: Reading) -> bool {
    let mut lines = headers.get_all(name).iter().map(|line| String::from_utf8_lossy(line.as_bytes()));
    let Some(first) = lines.next() else { return false };
    if headers.get_all(name).iter().nth(1).is_none() {
        return texts.matches(Some(&first));
    }
    let all: Vec<Cow<'_, str>> = std::iter::once(first).chain(lines).collect();
    let one = |line: &Cow<'_, str>| texts.matches(Some(line));
    let joined = || texts.matches(Some(&all.join(",")));
    match reading {
        Reading::Any => all.iter().any(one) || joined(),
        Reading::Whole => all.iter().all(one) && joined(),
    }
}

/// Values of one attribute, of which one must match and none may.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct AttributeMatch {
    attribute: Attribute,
    #[serde(skip_serializing_if = "Texts::is_empty")]
    values: Texts,
    #[serde(skip_serializing_if = "Texts::is_empty")]
    not_values: Texts,
}

/// What a match demands beside the fields that L4 sees. All must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct HttpMatch {
    /// That of the policy: decides what counts where something is not known.
    #[serde(skip)]
    action: Action,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    attributes: Box<[AttributeMatch]>,
    #[serde(skip_serializing_if = "Paths::is_empty")]
    paths: Paths,
    #[serde(skip_serializing_if = "Paths::is_empty")]
    not_paths: Paths,
    #[serde(skip_serializing_if = "Nets::is_empty")]
    remote_ips: Nets,
    #[serde(skip_serializing_if = "Nets::is_empty")]
    not_remote_ips: Nets,
}

impl HttpMatch {
    /// Reads the extensions of a match; `None` where there are none that demand anything.
    pub(crate) fn compile(
        extensions: &[security::Extension],
        place: Place<'_>,
    ) -> Result<Option<Box<Self>>, CompileError> {
        let [extension] = extensions else {
            return if extensions.is_empty() { Ok(None) } else { Err(place.extension("several")) };
        };
        let config = extension.config.as_ref().ok_or_else(|| place.extension("without content"))?;
        if config.type_url != HTTP_MATCH_TYPE_URL {
            return Err(place.extension(&config.type_url));
        }
        let source = l7::HttpMatch::decode(&*config.value).map_err(|_| place.extension("unreadable"))?;
        let l7::HttpMatch { attributes, paths: some, not_paths, remote_ips, not_remote_ips } = &source;
        let compiled = Self {
            action: place.action,
            attributes: attributes.iter().map(|source| attribute(source, place)).collect::<Result<_, _>>()?,
            paths: paths(some, place)?,
            not_paths: paths(not_paths, place)?,
            remote_ips: place.nets(remote_ips, Field::RemoteIps)?,
            not_remote_ips: place.nets(not_remote_ips, Field::RemoteIps)?,
        };
        Ok((!compiled.is_empty()).then(|| Box::new(compiled)))
    }

    fn is_empty(&self) -> bool {
        let Self { action: _, attributes, paths, not_paths, remote_ips, not_remote_ips } = self;
        attributes.is_empty()
            && paths.is_empty()
            && not_paths.is_empty()
            && remote_ips.is_empty()
            && not_remote_ips.is_empty()
    }

    /// Whether nothing that an authorizer changes decides it: no header, nothing that is read from one, and no token.
    pub(crate) fn is_settled(&self) -> bool {
        let settled = |wanted: &AttributeMatch| match wanted.attribute {
            Attribute::Host | Attribute::Method | Attribute::ServerName => true,
            Attribute::RequestPrincipal
            | Attribute::RequestAudience
            | Attribute::RequestPresenter
            | Attribute::Header(_)
            | Attribute::Claim(_) => false,
        };
        self.attributes.iter().all(settled) && self.remote_ips.is_empty() && self.not_remote_ips.is_empty()
    }

    /// Whether it asks for the name that a client's TLS asks for.
    pub(crate) fn needs_server_name(&self) -> bool {
        self.attributes.iter().any(|wanted| wanted.attribute == Attribute::ServerName)
    }

    /// The field that is not met, as AuthorizationPolicy names it; `None` if it matches. Of a connection whose requests nobody
    /// reads, what is demanded counts as met by a DENY and as not met by an ALLOW, but for the name that TLS asks for where that was read.
    pub(crate) fn unmet(&self, content: Content<'_>) -> Option<&'static str> {
        let denies = self.action == Action::Deny;
        let request = match content {
            Content::Request(request) => request,
            Content::Passed(name) => return self.unmet_by_name(name, denies),
            Content::Unread => return (!denies).then_some("HTTP"),
        };
        // What matches makes a DENY deny; what may not match makes an ALLOW deny.
        let (values, not_values) =
            if denies { (Reading::Any, Reading::Whole) } else { (Reading::Whole, Reading::Any) };
        let is_unmet = |wanted: &&AttributeMatch| {
            let matches = |texts, reading| wanted.attribute.matches(texts, request, reading);
            !(wanted.values.is_empty() || matches(&wanted.values, values))
                || matches(&wanted.not_values, not_values)
        };
        if let Some(unmet) = self.attributes.iter().find(is_unmet) {
            return Some(unmet.attribute.field());
        }
        let is_path = (self.paths.is_empty() || self.paths.matches(request.path))
            && !self.not_paths.matches(request.path);
        if !is_path {
            return Some("paths");
        }
        (!self.remote_ip_matches(request.remote_ip, denies)).then_some("remoteIpBlocks")
    }

    fn unmet_by_name(&self, name: Option<&str>, denies: bool) -> Option<&'static str> {
        let is_name = |wanted: &&AttributeMatch| wanted.attribute == Attribute::ServerName;
        let is_unmet = |wanted: &AttributeMatch| {
            !(wanted.values.is_empty() || wanted.values.matches(name)) || wanted.not_values.matches(name)
        };
        if let Some(unmet) = self.attributes.iter().filter(is_name).find(|wanted| is_unmet(wanted)) {
            return Some(unmet.attribute.field());
        }
        let asks_for_requests = self.attributes.iter().any(|wanted| !is_name(&wanted))
            || !(self.paths.is_empty() && self.not_paths.is_empty())
            || !(self.remote_ips.is_empty() && self.not_remote_ips.is_empty());
        (asks_for_requests && !denies).then_some("HTTP")
    }

    fn remote_ip_matches(&self, address: Option<IpAddr>, denies: bool) -> bool {
        if self.remote_ips.is_empty() && self.not_remote_ips.is_empty() {
            return true;
        }
        let Some(address) = address.map(|address| address.to_canonical()) else { return denies };
        (self.remote_ips.is_empty() || self.remote_ips.matches(address))
            && !self.not_remote_ips.matches(address)
    }
}

fn attribute(source: &l7::AttributeMatch, place: Place<'_>) -> Result<AttributeMatch, CompileError> {
    use l7::attribute_match::Attribute as Source;
    let attribute = match &source.attribute {
        Some(Source::Named(named)) => match l7::RequestAttribute::try_from(*named) {
            Ok(l7::RequestAttribute::Host) => Attribute::Host,
            Ok(l7::RequestAttribute::Method) => Attribute::Method,
            Ok(l7::RequestAttribute::RequestPrincipal) => Attribute::RequestPrincipal,
            Ok(l7::RequestAttribute::RequestAudience) => Attribute::RequestAudience,
            Ok(l7::RequestAttribute::RequestPresenter) => Attribute::RequestPresenter,
            Ok(l7::RequestAttribute::ServerName) => Attribute::ServerName,
            Ok(l7::RequestAttribute::UnknownAttribute) | Err(_) => {
                return Err(place.extension("an unknown attribute"));
            }
        },
        Some(Source::Header(name)) => {
            let name = HeaderName::from_bytes(name.as_bytes());
            Attribute::Header(name.map_err(|_| place.extension("a header of no valid name"))?)
        }
        Some(Source::Claim(path)) if !path.names.is_empty() => {
            Attribute::Claim(path.names.iter().map(|name| name.as_str().into()).collect())
        }
        Some(Source::Claim(_)) | None => return Err(place.extension("a match of no attribute")),
    };
    let field = if attribute == Attribute::Host { Field::Hosts } else { Field::Attributes };
    Ok(AttributeMatch {
        values: place.texts(&source.values, field)?,
        not_values: place.texts(&source.not_values, field)?,
        attribute,
    })
}

/// A text for paths as paths of requests are compared.
fn as_compared(text: &StringMatch) -> StringMatch {
    let match_type = text.match_type.as_ref().map(|match_type| match match_type {
        MatchType::Exact(path) => MatchType::Exact(compared(path).into_owned()),
        MatchType::Prefix(path) => MatchType::Prefix(compared(path).into_owned()),
        MatchType::Suffix(path) => MatchType::Suffix(compared(path).into_owned()),
        MatchType::Presence(()) => MatchType::Presence(()),
    });
    StringMatch { match_type }
}

fn paths(source: &[l7::PolicyPath], place: Place<'_>) -> Result<Paths, CompileError> {
    use l7::policy_path::Kind;
    let (mut texts, mut templates) = (Vec::new(), Vec::new());
    for path in source {
        match &path.kind {
            Some(Kind::Text(text)) => texts.push(as_compared(text)),
            Some(Kind::Template(text)) => {
                let template = Template::parse(&compared(text));
                templates.push(template.map_err(|error| place.extension(&error.to_string()))?);
            }
            None => return Err(place.extension("a path of no kind")),
        }
    }
    Ok(Paths { texts: place.texts(&texts, Field::Attributes)?, templates: templates.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(match_type: MatchType) -> Texts {
        match match_type {
            MatchType::Exact(text) => Texts::new(vec![text.into()], Vec::new()),
            MatchType::Prefix(text) => {
                Texts::new(Vec::new(), vec![crate::matcher::Pattern::Prefix(text.into())])
            }
            MatchType::Suffix(text) => {
                Texts::new(Vec::new(), vec![crate::matcher::Pattern::Suffix(text.into())])
            }
            MatchType::Presence(()) => Texts::new(Vec::new(), vec![crate::matcher::Pattern::Presence]),
        }
    }

    #[test]
    fn of_several_lines_the_reading_counts_that_denies() {
        let role = HeaderName::from_static("x-role");
        let admin = || texts(MatchType::Prefix("admin".to_owned()));
        for (lines, any, whole) in [
            (&["admin"][..], true, true),
            (&["admin", "admin2"], true, true),
            (&["admin", "root"], true, false),
            (&["root", "admin"], true, false),
            (&["root"], false, false),
            (&[], false, false),
        ] {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(&role, (*line).parse().unwrap());
            }
            assert_eq!(header_matches(&admin(), &headers, &role, Reading::Any), any, "{lines:?}");
            assert_eq!(header_matches(&admin(), &headers, &role, Reading::Whole), whole, "{lines:?}");
        }
    }
}
