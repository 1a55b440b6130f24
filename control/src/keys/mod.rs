//! Keys of token issuers: fetched, refreshed in the background, and kept while they can't be.
//!
//! [`schedule`] says when what is fetched, without I/O; [`fetch`] fetches. The index says which keys are wanted and gets
//! those that change; it knows nothing of this module.

mod fetch;
mod schedule;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

pub(crate) use fetch::RootsError;
use fetch::{FetchError, Fetcher};
use schedule::Schedule;

use crate::index::FetchedKeys;
use crate::object::KeyAddress;

/// The keys that are wanted, and how long fetching each may take.
pub(crate) type Wanted = BTreeMap<KeyAddress, Duration>;

/// Live counters.
#[derive(Debug, Default)]
pub(crate) struct KeyMetrics {
    /// Key sets fetched.
    pub(crate) fetched: AtomicU64,
    /// Attempts that failed.
    pub(crate) failed: AtomicU64,
    /// Key sets that are wanted and not known.
    pub(crate) unknown: AtomicU64,
    /// Key sets that are kept although they could not be refreshed.
    pub(crate) stale: AtomicU64,
}

/// Fetches keys.
pub(crate) struct Keys {
    fetcher: Arc<Fetcher>,
    schedule: Schedule,
    metrics: Arc<KeyMetrics>,
}

impl Keys {
    /// Trusts servers by Mozilla's roots and those of the file `roots`; refreshes keys after `refresh`.
    ///
    /// # Errors
    /// [`RootsError`] if the file cannot be used.
    pub(crate) fn new(
        roots: Option<&Path>,
        refresh: Duration,
        metrics: Arc<KeyMetrics>,
    ) -> Result<Self, RootsError> {
        Ok(Self { fetcher: Arc::new(Fetcher::new(roots)?), schedule: Schedule::new(refresh), metrics })
    }

    /// Fetches what is wanted, for ever, and sends what changes to `changed`. Ends when nobody wants or listens any more.
    pub(crate) async fn run(
        mut self,
        mut wanted: watch::Receiver<Wanted>,
        changed: mpsc::Sender<(KeyAddress, FetchedKeys)>,
    ) {
        wanted.mark_changed();
        let mut fetching: JoinSet<(KeyAddress, Result<bytes::Bytes, FetchError>)> = JoinSet::new();
        loop {
            for (address, timeout) in self.schedule.poll_due(Instant::now()) {
                let fetcher = self.fetcher.clone();
                fetching.spawn(async move {
                    let fetched = fetcher.fetch(&address, timeout).await;
                    (address, fetched)
                });
            }
            let next = self.schedule.next();
            let due = async move {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                news = wanted.changed() => {
                    if news.is_err() {
                        return;
                    }
                    self.schedule.set_wanted(&wanted.borrow_and_update(), Instant::now());
                }
                Some(Ok((address, fetched))) = fetching.join_next() => {
                    let count = if fetched.is_ok() { &self.metrics.fetched } else { &self.metrics.failed };
                    count.fetch_add(1, Ordering::Relaxed);
                    if let Err(error) = &fetched {
                        tracing::warn!(%address, %error, "keys of tokens were not fetched");
                    }
                    let fetched = fetched.map_err(|error| error.to_string());
                    let news = self.schedule.handle_fetched(&address, fetched, Instant::now());
                    if let Some(news) = news
                        && changed.send((address, news)).await.is_err()
                    {
                        return;
                    }
                }
                () = due => {}
            }
            let (unknown, stale) = self.schedule.problems();
            self.metrics.unknown.store(unknown, Ordering::Relaxed);
            self.metrics.stale.store(stale, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests;
