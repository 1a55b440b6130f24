//! Step 5: whether the client may make this request. Asked anew for each.

use std::time::SystemTime;

use http::request::Parts;

use crate::accept::Inbound;
use crate::failure::Failure;
use crate::proxy::Published;
use crate::sanitise::Sane;

/// Asks whether the client is still believed, as its certificate may have been revoked since its tunnel was opened, and
/// whether policies let the request through.
///
/// # Errors
/// [`Failure::Denied`].
pub fn authorize(
    published: &Published,
    inbound: &Inbound,
    _sane: &Sane,
    _parts: &Parts,
) -> Result<(), Failure> {
    authorize_connection(published, inbound)
}

/// The same for a connection whose bytes are passed on unread.
///
/// # Errors
/// [`Failure::Denied`].
pub fn authorize_connection(published: &Published, inbound: &Inbound) -> Result<(), Failure> {
    let rechecked = inbound.worker.proxy.trust.recheck(&inbound.certificate, SystemTime::now());
    rechecked.map_err(|error| Failure::Denied(error.to_string()))?;
    published.policies.decide(&inbound.destination).map_err(Failure::Denied)
}
