//! Waiting for conditions, with a deadline.

use std::time::{Duration, Instant};

use crate::error::{Error, Result};

const POLL: Duration = Duration::from_millis(200);

/// Waits until `attempt` gives a value.
///
/// # Errors
/// [`Error::Deadline`] with the last failure when it gives none within `limit`.
pub async fn until<T, F>(what: &str, limit: Duration, mut attempt: F) -> Result<T>
where
    F: AsyncFnMut() -> Result<T, String>,
{
    let start = Instant::now();
    loop {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(detail) if start.elapsed() >= limit => {
                return Err(Error::Deadline { what: what.to_owned(), after: limit, detail });
            }
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}
