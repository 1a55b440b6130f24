//! RequestAuthentication: which tokens of requests are valid, as its author wrote it.
//!
//! As with AuthorizationPolicies an unknown field is an error, and one that can't be read denies what it is for.

use std::sync::Arc;
use std::time::Duration;

use ambit_api::l7;
use http::header::HeaderName;
use http::uri::Uri;
use serde::Deserialize;
use serde_json::Value;

use super::authorization::{PolicyTarget, Selector, TargetRef, salvaged_targets};
use super::meta::{self, Invalid, Labels, Meta};
use super::virtual_service_http::duration;

/// How long fetching keys may take where a rule does not say (Istio's default).
const TIMEOUT: Duration = Duration::from_secs(5);
/// The longest that fetching keys may take, whatever a rule says.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(10);
/// The most rules of one object.
const MOST_RULES: usize = 64;
/// Fields that a claim must not be written to: they frame the message, or are the mesh's own.
const RESERVED: [&str; 10] = [
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-forwarded-client-cert",
    "x-forwarded-for",
];

/// Where keys are fetched from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyAddress {
    /// A key set.
    Uri(Arc<str>),
    /// An issuer whose OpenID configuration says where its key set is.
    Issuer(Arc<str>),
}

impl std::fmt::Display for KeyAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Uri(uri) => f.write_str(uri),
            Self::Issuer(issuer) => write!(f, "the OpenID configuration of {issuer}"),
        }
    }
}

/// Where a rule has its keys from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// They are in the object.
    Inline(Arc<str>),
    /// They are fetched.
    Remote {
        /// From where.
        address: KeyAddress,
        /// How long that may take.
        timeout: Duration,
    },
}

/// One issuer's tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct JwtRule {
    /// What proxies need to know, without the keys.
    pub rule: l7::TokenRule,
    /// Its keys.
    pub keys: KeySource,
}

/// A RequestAuthentication.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestAuthentication {
    /// Name, labels, age and generation.
    pub meta: Meta,
    /// The workloads that it is for, where it has no targets.
    pub selector: Option<Labels>,
    /// The gateways and services that it is bound to.
    pub targets: Vec<PolicyTarget>,
    /// Whether it names targets of which one can't be read, so that nobody knows what it is for.
    pub lost_targets: bool,
    /// Its rules, or why they could not be read.
    pub rules: Result<Vec<JwtRule>, String>,
}

/// The manifest, strictly.
pub(crate) type Manifest = meta::Manifest<Spec>;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Spec {
    selector: Option<Selector>,
    target_ref: Option<TargetRef>,
    target_refs: Vec<TargetRef>,
    jwt_rules: Vec<RawRule>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawRule {
    issuer: String,
    audiences: Vec<String>,
    #[serde(alias = "jwks_uri")]
    jwks_uri: String,
    jwks: String,
    from_headers: Vec<RawHeader>,
    from_params: Vec<String>,
    from_cookies: Vec<String>,
    output_payload_to_header: String,
    output_claim_to_headers: Vec<RawClaim>,
    forward_original_token: bool,
    timeout: Option<String>,
    space_delimited_claims: Vec<String>,
    presence: Presence,
}

#[derive(Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "UPPERCASE")]
enum Presence {
    #[default]
    Optional,
    Required,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHeader {
    name: String,
    #[serde(default)]
    prefix: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawClaim {
    header: String,
    claim: String,
}

impl TryFrom<Manifest> for RequestAuthentication {
    type Error = Invalid;

    fn try_from(manifest: Manifest) -> Result<RequestAuthentication, Invalid> {
        let Manifest { metadata, spec: Spec { selector, target_ref, target_refs, jwt_rules } } = manifest;
        let targets: Vec<TargetRef> = target_ref.into_iter().chain(target_refs).collect();
        if !targets.is_empty() && selector.is_some() {
            return Err(Invalid::new("spec.selector", "cannot be combined with targetRefs"));
        }
        if jwt_rules.len() > MOST_RULES {
            return Err(Invalid::new("spec.jwtRules", format!("has more than {MOST_RULES} rules")));
        }
        let rules =
            jwt_rules.into_iter().enumerate().map(|(at, rule)| rule.read(at)).collect::<Result<_, _>>()?;
        let meta = Meta::read(&metadata)?;
        Ok(RequestAuthentication {
            selector: selector.and_then(Selector::labels),
            targets: targets.into_iter().map(|target| target.read(&meta.id.namespace)).collect(),
            meta,
            lost_targets: false,
            rules: Ok(rules),
        })
    }
}

impl RequestAuthentication {
    /// What stands for one that could not be read.
    ///
    /// # Errors
    /// When it has no name, so that it cannot stand for anything.
    pub(crate) fn unreadable(object: &Value, reason: String) -> Result<RequestAuthentication, Invalid> {
        let meta = Meta::salvage(object)?;
        let targets = salvaged_targets(object);
        Ok(RequestAuthentication {
            selector: None,
            lost_targets: targets.is_none(),
            targets: targets.into_iter().flatten().map(|target| target.read(&meta.id.namespace)).collect(),
            meta,
            rules: Err(reason),
        })
    }

    /// Where its keys are fetched from, and how long that may take.
    pub fn remote_keys(&self) -> impl Iterator<Item = (&KeyAddress, Duration)> {
        self.rules.iter().flatten().filter_map(|rule| match &rule.keys {
            KeySource::Inline(_) => None,
            KeySource::Remote { address, timeout } => Some((address, *timeout)),
        })
    }
}

impl RawRule {
    fn read(self, at: usize) -> Result<JwtRule, Invalid> {
        let invalid =
            |field: &str, problem: String| Invalid::new(format!("spec.jwtRules[{at}].{field}"), problem);
        // A rule for any issuer would let its keys sign for the issuers of other rules.
        if self.issuer.is_empty() {
            return Err(invalid("issuer", "is missing".to_owned()));
        }
        let keys = self.keys().map_err(|(field, problem)| invalid(field, problem))?;
        for header in &self.from_headers {
            HeaderName::try_from(&header.name)
                .map_err(|_| invalid("fromHeaders", format!("{:?} is no header", header.name)))?;
        }
        if self.from_params.iter().chain(&self.from_cookies).any(String::is_empty) {
            return Err(invalid("fromParams", "a name is empty".to_owned()));
        }
        if !self.output_payload_to_header.is_empty() {
            output(&self.output_payload_to_header)
                .map_err(|problem| invalid("outputPayloadToHeader", problem))?;
        }
        for RawClaim { header, claim } in &self.output_claim_to_headers {
            output(header).map_err(|problem| invalid("outputClaimToHeaders", problem))?;
            if claim.is_empty() {
                return Err(invalid("outputClaimToHeaders", "a claim has no name".to_owned()));
            }
        }
        let header = |RawHeader { name, prefix }| l7::TokenHeader { name, prefix };
        let claim = |RawClaim { header, claim }| l7::ClaimHeader { name: header, claim };
        let rule = l7::TokenRule {
            issuer: self.issuer,
            audiences: self.audiences,
            jwks: Default::default(),
            from_headers: self.from_headers.into_iter().map(header).collect(),
            from_params: self.from_params,
            from_cookies: self.from_cookies,
            payload_header: self.output_payload_to_header,
            claim_headers: self.output_claim_to_headers.into_iter().map(claim).collect(),
            forward_token: self.forward_original_token,
            space_delimited: self.space_delimited_claims,
            required: self.presence == Presence::Required,
        };
        Ok(JwtRule { rule, keys })
    }

    fn keys(&self) -> Result<KeySource, (&'static str, String)> {
        let timeout = match &self.timeout {
            Some(text) => duration("timeout", text).map_err(|problem| ("timeout", problem))?,
            None => 0,
        };
        let timeout = Some(Duration::from_nanos(timeout)).filter(|timeout| !timeout.is_zero());
        let timeout = timeout.unwrap_or(TIMEOUT).min(LONGEST_TIMEOUT);
        let remote = |address| KeySource::Remote { address, timeout };
        match (self.jwks.is_empty(), self.jwks_uri.is_empty()) {
            (false, false) => Err(("jwksUri", "cannot be combined with jwks".to_owned())),
            (false, true) => Ok(KeySource::Inline(self.jwks.as_str().into())),
            (true, false) => {
                fetchable(&self.jwks_uri).map_err(|problem| ("jwksUri", problem))?;
                Ok(remote(KeyAddress::Uri(self.jwks_uri.as_str().into())))
            }
            (true, true) => {
                fetchable(&self.issuer)
                    .map_err(|problem| ("issuer", format!("{problem}, and there are no keys")))?;
                Ok(remote(KeyAddress::Issuer(self.issuer.trim_end_matches('/').into())))
            }
        }
    }
}

/// Nanoseconds of a duration of Istio's API.
///
/// # Errors
/// When the text is none.
pub(in crate::object) fn nanoseconds(text: &str) -> Result<u64, String> {
    duration("timeout", text)
}

fn fetchable(text: &str) -> Result<(), String> {
    let uri: Uri = text.parse().map_err(|_| format!("{text:?} is no URL"))?;
    let is_web = matches!(uri.scheme_str(), Some("http" | "https"));
    let has_host = uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    if is_web && has_host { Ok(()) } else { Err(format!("{text:?} is no URL of http or https")) }
}

fn output(name: &str) -> Result<(), String> {
    let lower = HeaderName::try_from(name).map_err(|_| format!("{name:?} is no header"))?;
    match RESERVED.contains(&lower.as_str()) {
        true => Err(format!("{name} is a header of the proxy's own")),
        false => Ok(()),
    }
}
