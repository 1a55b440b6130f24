//! Requests that change to another protocol on their connection: WebSocket and the like (RFC 9110 §7.8).

use std::sync::Arc;

use http::header::{CONNECTION, UPGRADE};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;

use crate::accept::Inbound;
use crate::authorize::{self, AllowedRequest, Began};
use crate::failure::Failure;
use crate::upstream::Returned;

/// Says in a head what is wanted, or agreed on.
pub fn announce(headers: &mut HeaderMap, protocol: HeaderValue) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, protocol);
}

/// Joins the two connections once the endpoint has agreed to what the client wanted. Bytes pass only after that, and only
/// while the client is allowed what it `asked` for. Returns what was agreed on. `returned` counts the connection at its endpoint
/// until its end.
///
/// # Errors
/// The endpoint changes to something that nobody asked for.
pub fn join(
    inbound: &Arc<Inbound>,
    client: Option<OnUpgrade>,
    wanted: Option<&HeaderValue>,
    asked: Option<AllowedRequest>,
    response: &mut Response<Incoming>,
    returned: Returned,
) -> Result<HeaderValue, Failure> {
    let wrong = || Failure::Reset("the endpoint changed to a protocol that was not asked for".to_owned());
    let (client, wanted) = client.zip(wanted).ok_or_else(wrong)?;
    let agreed = response.headers().get(UPGRADE).cloned().ok_or_else(wrong)?;
    if !is_one_of(wanted, &agreed) || response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(wrong());
    }
    let upstream = hyper::upgrade::on(response);
    let open = inbound.activity.start_upgrade();
    let inbound = inbound.clone();
    tokio::spawn(async move {
        let joined = async {
            let (client, upstream) = tokio::try_join!(client, upstream).map_err(std::io::Error::other)?;
            tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(upstream)).await
        };
        let joined = tokio::select! {
            joined = joined => joined,
            failure = authorize::denied_later(&inbound, Began::Upgrade(asked.as_ref())) => {
                tracing::info!(source = %inbound.source, to = %inbound.default_host, %failure, "an upgraded connection is closed");
                return;
            }
        };
        drop((open, returned));
        match joined {
            Ok((received, sent)) => {
                tracing::debug!(source = %inbound.source, received, sent, "an upgraded connection ended");
            }
            Err(error) => tracing::debug!(source = %inbound.source, %error, "an upgraded connection broke"),
        }
    });
    Ok(agreed)
}

/// Whether one of the protocols that the client listed is the one that the endpoint names.
fn is_one_of(wanted: &HeaderValue, agreed: &HeaderValue) -> bool {
    let (Ok(wanted), Ok(agreed)) = (wanted.to_str(), agreed.to_str()) else { return false };
    wanted.split(',').any(|wanted| wanted.trim().eq_ignore_ascii_case(agreed.trim()))
}
