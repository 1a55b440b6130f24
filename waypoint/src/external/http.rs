//! Asks by an HTTP request that looks like the one that is asked about, without its body.

use ambit_api::l7;
use ambit_api::security::StringMatch;
use ambit_api::security::string_match::MatchType;
use bytes::Bytes;
use http::header::{
    AUTHORIZATION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, LOCATION, WWW_AUTHENTICATE,
};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};

use super::{Changes, Denial, Field, MAX_ANSWER, Question, Verdict, Write, exchange};
use crate::balance::Target;
use crate::body::RequestBody;

/// How an authorizer is asked by HTTP.
#[derive(Debug)]
pub struct Check {
    path_prefix: String,
    include: Vec<StringMatch>,
    additional: Vec<(HeaderName, HeaderValue)>,
    to_upstream: Vec<StringMatch>,
    to_downstream_on_deny: Vec<StringMatch>,
    to_downstream_on_allow: Vec<StringMatch>,
}

impl Check {
    /// Compiles what the control plane says.
    pub fn new(source: &l7::HttpCheck) -> Self {
        let additional = source.additional.iter().filter_map(|(name, value)| {
            Some((HeaderName::try_from(name).ok()?, HeaderValue::try_from(value).ok()?))
        });
        Self {
            path_prefix: source.path_prefix.trim_end_matches('/').to_owned(),
            include: source.include.clone(),
            additional: additional.collect(),
            to_upstream: source.to_upstream.clone(),
            to_downstream_on_deny: source.to_downstream_on_deny.clone(),
            to_downstream_on_allow: source.to_downstream_on_allow.clone(),
        }
    }

    /// Whether it writes this field of requests: what the client sent in it is removed. A pattern that is for every field says
    /// nothing of one.
    pub(super) fn writes(&self, name: &HeaderName) -> bool {
        let named = self.to_upstream.iter().filter(|pattern| match &pattern.match_type {
            Some(MatchType::Exact(text) | MatchType::Prefix(text) | MatchType::Suffix(text)) => {
                !text.is_empty()
            }
            Some(MatchType::Presence(())) | None => false,
        });
        is_any(named, name)
    }

    /// Asks, and reads the answer.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) async fn ask(&self, question: &Question<'_>, target: &Target) -> Result<Verdict, String> {
        let request = self.request(question).ok_or("the request can't be passed on")?;
        let answered =
            exchange(&question.inbound.worker, question.inbound.remote, target, false, request).await;
        let (answer, returned) = answered.map_err(|failure| failure.to_string())?;
        let (parts, body) = answer.into_parts();
        let body = Limited::new(body, MAX_ANSWER).collect().await;
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        returned.give_back();
        let mut verdict = self.verdict(parts.status, &parts.headers, body)?;
        if let Verdict::Allowed(changes) = &mut verdict {
            let sent = question.parts.headers.keys();
            changes.removed = sent.filter(|name| self.writes(name)).cloned().collect();
        }
        Ok(verdict)
    }

    /// What an answer says.
    ///
    /// # Errors
    /// It says nothing of the request: the authorizer failed, or wants to speak another protocol.
    pub fn verdict(&self, status: StatusCode, headers: &HeaderMap, body: Bytes) -> Result<Verdict, String> {
        if status.is_server_error() || status.is_informational() {
            return Err(format!("the answer is {status}"));
        }
        if status == StatusCode::OK {
            return Ok(Verdict::Allowed(Changes {
                removed: Vec::new(),
                request: fields(headers, |name| is_any(&self.to_upstream, name)),
                response: fields(headers, |name| is_any(&self.to_downstream_on_allow, name)),
            }));
        }
        let always = [LOCATION, WWW_AUTHENTICATE];
        let is_shown = |name: &HeaderName| {
            self.to_downstream_on_deny.is_empty()
                || always.contains(name)
                || is_any(&self.to_downstream_on_deny, name)
        };
        Ok(Verdict::Denied(Denial { status, fields: fields(headers, is_shown), body }))
    }

    fn request(&self, question: &Question<'_>) -> Option<Request<RequestBody>> {
        let Question { sane, parts, body, .. } = question;
        let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
        let body = body.as_ref().map(|body| (body.beginning.clone(), body.is_whole));
        let (content, is_whole) = body.unwrap_or((Bytes::new(), true));
        let length = content.len();
        let mut request = Request::new(RequestBody::Whole(Some(content)));
        *request.method_mut() = parts.method.clone();
        *request.uri_mut() = Uri::try_from(format!("{}{target}", self.path_prefix)).ok()?;
        let headers = request.headers_mut();
        for (name, value) in &parts.headers {
            if *name == AUTHORIZATION || is_any(&self.include, name) {
                headers.append(name, value.clone());
            }
        }
        for (name, value) in &self.additional {
            headers.insert(name, value.clone());
        }
        if question.body.is_some() {
            let partial = if is_whole { "false" } else { "true" };
            headers.insert("x-envoy-auth-partial-body", HeaderValue::from_static(partial));
        }
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        headers.insert(HOST, HeaderValue::try_from(&*sane.authority).ok()?);
        Some(request)
    }
}

/// The fields of an answer that are passed on: the first line replaces what was there.
fn fields(headers: &HeaderMap, is_passed: impl Fn(&HeaderName) -> bool) -> Vec<Field> {
    let names = headers.keys().filter(|name| is_passed(name));
    let lines = names.flat_map(|name| {
        headers.get_all(name).iter().enumerate().map(move |(at, value)| Field {
            name: name.clone(),
            value: value.clone(),
            write: if at == 0 { Write::Replace } else { Write::Append },
        })
    });
    lines.collect()
}

pub(super) fn is_any<'a>(patterns: impl IntoIterator<Item = &'a StringMatch>, name: &HeaderName) -> bool {
    let name = name.as_str();
    patterns.into_iter().filter_map(|pattern| pattern.match_type.as_ref()).any(|pattern| match pattern {
        MatchType::Exact(text) => name == text,
        MatchType::Prefix(text) => name.starts_with(text.as_str()),
        MatchType::Suffix(text) => name.ends_with(text.as_str()),
        MatchType::Presence(()) => true,
    })
}
