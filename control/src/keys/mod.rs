//! Keys of token issuers: fetched, refreshed in the background, and kept while they can't be.
//!
//! [`schedule`] says when what is fetched, without I/O; [`fetch`] fetches. The index says which keys are wanted and gets
//! those that change; it knows nothing of this module.

mod addresses;
mod fetch;
mod schedule;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use ipnet::IpNet;
use tokio::sync::{mpsc, watch};
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};

use addresses::Addresses;
pub(crate) use fetch::RootsError;
use fetch::{FetchError, Fetcher};
use schedule::Schedule;

use crate::index::{FetchedKeys, WantedKeys};
use crate::object::KeyAddress;

/// The keys that are wanted.
pub(crate) type Wanted = BTreeMap<KeyAddress, WantedKeys>;

/// What became of an attempt, and of which task.
type Ended = Result<(Id, Result<Option<Bytes>, FetchError>), JoinError>;

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
    /// Key sets dropped as they could not be refreshed for too long.
    pub(crate) expired: AtomicU64,
}

/// Fetches keys.
pub(crate) struct Keys {
    fetcher: Arc<Fetcher>,
    schedule: Schedule,
    metrics: Arc<KeyMetrics>,
    /// The attempts, all of which count until they have ended.
    fetching: JoinSet<Result<Option<Bytes>, FetchError>>,
    addresses_of: HashMap<Id, KeyAddress>,
}

impl Keys {
    /// Trusts servers by Mozilla's roots and those of the file `roots`; refreshes keys after `refresh`. Connects neither to
    /// addresses of `blocked` nor to those of this host or link.
    ///
    /// # Errors
    /// [`RootsError`] if the file cannot be used.
    pub(crate) fn new(
        roots: Option<&Path>,
        refresh: Duration,
        blocked: &[IpNet],
        metrics: Arc<KeyMetrics>,
    ) -> Result<Self, RootsError> {
        Ok(Self::with(Fetcher::new(roots, Addresses::without(blocked))?, refresh, metrics))
    }

    fn with(fetcher: Fetcher, refresh: Duration, metrics: Arc<KeyMetrics>) -> Self {
        Self {
            fetcher: Arc::new(fetcher),
            schedule: Schedule::new(refresh),
            metrics,
            fetching: JoinSet::new(),
            addresses_of: HashMap::new(),
        }
    }

    /// Fetches what is wanted, for ever, and sends what changes to `changed`. Ends when nobody wants or listens any more.
    pub(crate) async fn run(
        mut self,
        mut wanted: watch::Receiver<Wanted>,
        changed: mpsc::Sender<(KeyAddress, FetchedKeys)>,
    ) {
        wanted.mark_changed();
        loop {
            self.start_due();
            let next = self.schedule.next();
            let due = async move {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            let news = tokio::select! {
                news = wanted.changed() => {
                    if news.is_err() {
                        return;
                    }
                    self.schedule.set_wanted(&wanted.borrow_and_update(), Instant::now())
                }
                Some(ended) = self.fetching.join_next_with_id() => self.handle_ended(ended).into_iter().collect(),
                () = due => Vec::new(),
            };
            for news in news {
                if changed.send(news).await.is_err() {
                    return;
                }
            }
            let (unknown, stale) = self.schedule.problems();
            self.metrics.unknown.store(unknown, Ordering::Relaxed);
            self.metrics.stale.store(stale, Ordering::Relaxed);
            self.metrics.expired.store(self.schedule.expired(), Ordering::Relaxed);
        }
    }

    fn start_due(&mut self) {
        for (address, timeout) in self.schedule.poll_due(Instant::now()) {
            let (fetcher, asked) = (self.fetcher.clone(), address.clone());
            let task = self.fetching.spawn(async move { fetcher.fetch(&asked, timeout).await });
            self.addresses_of.insert(task.id(), address);
        }
    }

    fn handle_ended(&mut self, ended: Ended) -> Option<(KeyAddress, FetchedKeys)> {
        let id = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let address = self.addresses_of.remove(&id)?;
        let fetched = match ended {
            Ok((_, Ok(keys))) => Ok(keys),
            Ok((_, Err(error))) => {
                let reason = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%address, %error, reason, "keys of tokens were not fetched");
                Err(())
            }
            Err(error) => {
                tracing::error!(%address, %error, "fetching keys of tokens ended without an outcome");
                Err(())
            }
        };
        let count = if fetched.is_ok() { &self.metrics.fetched } else { &self.metrics.failed };
        count.fetch_add(1, Ordering::Relaxed);
        let news = self.schedule.handle_fetched(&address, fetched, Instant::now())?;
        Some((address, news))
    }
}

#[cfg(test)]
mod tests;
