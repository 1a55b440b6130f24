//! The first part of step 5: who made the request, by its token. Rules are those of RequestAuthentications.

use std::time::{SystemTime, UNIX_EPOCH};

use ambit_policy::Token;
use ambit_token::rules;
use http::Method;
use http::header::{ACCESS_CONTROL_REQUEST_METHOD, HeaderName, ORIGIN};
use http::request::Parts;

use crate::accept::Inbound;
use crate::failure::Failure;
use crate::proxy::Published;

/// Removes what the client sent in fields that only a valid token may fill. Before anything is matched by them.
pub fn remove_outputs(published: &Published, inbound: &Inbound, parts: &mut Parts) {
    rules::remove_outputs(published.policies.tokens(&inbound.destination), &mut parts.headers);
}

/// The fields that only a valid token may fill.
pub fn outputs(published: &Published, inbound: &Inbound) -> Vec<HeaderName> {
    rules::outputs(published.policies.tokens(&inbound.destination)).cloned().collect()
}

/// The valid token of a request, with which the request is changed as its rule says; `None` where it has none.
///
/// # Errors
/// [`Failure::Unauthenticated`].
pub fn authenticate(
    published: &Published,
    inbound: &Inbound,
    parts: &mut Parts,
) -> Result<Option<Token>, Failure> {
    let mut rules = published.policies.tokens(&inbound.destination).peekable();
    // The Fetch standard sends preflights without credentials; as in Istio, they need none.
    if rules.peek().is_none() || is_preflight(parts) {
        return Ok(None);
    }
    // Before the epoch nothing is valid yet, and what expires has not.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    rules::authenticate(rules, &mut parts.headers, &mut parts.uri, now).map_err(Failure::Unauthenticated)
}

fn is_preflight(parts: &Parts) -> bool {
    parts.method == Method::OPTIONS
        && parts.headers.contains_key(ORIGIN)
        && parts.headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
}
