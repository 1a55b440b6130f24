//! Waiting for conditions, with a deadline.

use std::future::Future;
use std::time::{Duration, Instant};

/// How long most conditions may take to come true.
pub const SOON: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(10);

/// Waits until `condition` holds.
///
/// # Panics
/// When it does not within `limit`; `what` says what was waited for.
pub async fn until<F, C>(what: &str, limit: Duration, mut condition: C)
where
    C: FnMut() -> F,
    F: Future<Output = bool>,
{
    let deadline = Instant::now() + limit;
    while !condition().await {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until `attempt` gives a value.
///
/// # Panics
/// When it does not within `limit`, with the last error.
pub async fn for_ok<T, E, F, A>(what: &str, limit: Duration, mut attempt: A) -> T
where
    A: FnMut() -> F,
    F: Future<Output = Result<T, E>>,
    E: std::fmt::Display,
{
    let deadline = Instant::now() + limit;
    loop {
        match attempt().await {
            Ok(value) => return value,
            Err(error) => assert!(Instant::now() < deadline, "not within {limit:?}: {what}: {error}"),
        }
        tokio::time::sleep(POLL).await;
    }
}
