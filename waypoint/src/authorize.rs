//! Step 5: whether the client may make this request. Asked anew for each.

use http::request::Parts;

use crate::accept::Inbound;
use crate::failure::Failure;
use crate::sanitise::Sane;

/// Asks whether the client is still believed: its certificate may have been revoked since its tunnel was opened.
///
/// # Errors
/// [`Failure::Denied`].
pub fn authorize(inbound: &Inbound, _sane: &Sane, _parts: &Parts) -> Result<(), Failure> {
    let rechecked = inbound.worker.proxy.trust.recheck(&inbound.certificate, std::time::SystemTime::now());
    rechecked.map_err(|error| Failure::Denied(error.to_string()))
}
