//! How long one request may wait for connections in all, at however many endpoints it is tried.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// Less than this is not worth another try.
const LEAST: Duration = Duration::from_millis(50);

/// What is left of the time for connections.
#[derive(Debug)]
pub struct ConnectBudget {
    total: Duration,
    spent: AtomicU64,
}

impl ConnectBudget {
    /// So much.
    pub fn new(total: Duration) -> Self {
        Self { total, spent: AtomicU64::new(0) }
    }

    fn spent(&self) -> Duration {
        Duration::from_nanos(self.spent.load(Ordering::Relaxed))
    }

    /// How long the next connection may take that has this timeout; `None`: nothing is left. The first one has all of its timeout,
    /// which a policy may have made longer than the budget.
    pub fn limit(&self, timeout: Duration) -> Option<Duration> {
        let spent = self.spent();
        if spent.is_zero() {
            return Some(timeout);
        }
        let left = self.total.saturating_sub(spent);
        (left >= LEAST).then(|| timeout.min(left))
    }

    /// Whether nothing is left.
    pub fn is_spent(&self) -> bool {
        self.limit(Duration::MAX).is_none()
    }

    /// Counts the time until it is dropped.
    pub fn spend(&self) -> Spending<'_> {
        Spending { budget: self, since: Instant::now() }
    }
}

/// Time that a request waits for a connection.
#[derive(Debug)]
pub struct Spending<'a> {
    budget: &'a ConnectBudget,
    since: Instant,
}

impl Drop for Spending<'_> {
    fn drop(&mut self) {
        let nanos = u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.budget.spent.fetch_add(nanos, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Waits as long as the next connection may take, and says how long that was.
    async fn wait(budget: &ConnectBudget, timeout: Duration) -> Option<Duration> {
        let limit = budget.limit(timeout)?;
        let _spending = budget.spend();
        sleep(limit).await;
        Some(limit)
    }

    #[tokio::test(start_paused = true)]
    async fn endpoints_that_drop_packets_share_one_budget() {
        let budget = ConnectBudget::new(10 * SECOND);
        let waits = [
            wait(&budget, 4 * SECOND).await,
            wait(&budget, 4 * SECOND).await,
            wait(&budget, 4 * SECOND).await,
            wait(&budget, 4 * SECOND).await,
        ];
        assert_eq!(waits, [Some(4 * SECOND), Some(4 * SECOND), Some(2 * SECOND), None]);
        assert!(budget.is_spent());
    }

    #[tokio::test(start_paused = true)]
    async fn other_waits_cost_nothing_and_the_first_has_its_own_timeout() {
        let budget = ConnectBudget::new(10 * SECOND);
        sleep(60 * SECOND).await;
        assert_eq!(budget.limit(30 * SECOND), Some(30 * SECOND));
        drop(budget.spend());
        {
            let _spending = budget.spend();
            sleep(SECOND).await;
        }
        assert_eq!(budget.limit(30 * SECOND), Some(9 * SECOND));
    }
}
