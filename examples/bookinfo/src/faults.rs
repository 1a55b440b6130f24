//! Faults that a service is asked to have, to show what a mesh does about them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::StatusCode;

use crate::server::{self, Answer};

/// How long a slow answer takes.
const SLOW: Duration = Duration::from_secs(5);

/// Options of a service that can fail.
#[derive(clap::Args, Debug, Clone, Copy)]
pub(crate) struct Options {
    /// Of 100 requests, so many are answered with 503.
    #[arg(long, env = "FAIL_PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=100))]
    fail_percent: u8,
    /// Answers about the book of this ID take five seconds.
    #[arg(long, env = "SLOW_BOOK")]
    slow_book: Option<u32>,
}

/// The faults of a running service.
#[derive(Debug)]
pub(crate) struct Faults {
    options: Options,
    requests: AtomicU64,
}

impl Faults {
    /// None has happened yet.
    pub(crate) fn new(options: Options) -> Self {
        Self { options, requests: AtomicU64::new(0) }
    }

    /// What a request about a book is answered with instead, if its turn has come.
    pub(crate) async fn instead(&self, book: u32) -> Option<Answer> {
        if self.options.slow_book == Some(book) {
            tokio::time::sleep(SLOW).await;
        }
        let failed = || server::error(StatusCode::SERVICE_UNAVAILABLE, "out of order");
        self.fails().then(failed)
    }

    /// Failures are spread evenly: of any 100 requests in a row, so many as asked for fail.
    fn fails(&self) -> bool {
        let count = self.requests.fetch_add(1, Ordering::Relaxed);
        let failures_after = |count: u64| count * u64::from(self.options.fail_percent) / 100;
        failures_after(count + 1) > failures_after(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_spread_evenly() {
        let fails = |fail_percent| {
            let faults = Faults::new(Options { fail_percent, slow_book: None });
            (0..100).map(|_| faults.fails()).collect::<Vec<_>>()
        };
        let of_30 = fails(30);
        assert_eq!(of_30.iter().filter(|failed| **failed).count(), 30);
        assert!(of_30.windows(2).all(|pair| pair != [true, true]));
        assert!(fails(0).iter().all(|failed| !failed) && fails(100).iter().all(|failed| *failed));
    }
}
