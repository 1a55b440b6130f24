//! Closes an open connection from another task: because of policy, trust, idleness or the end of a drain.
//!
//! The connection's task wraps its relay in [`Cut::race`]. Whoever holds the [`Cut`] may call [`Cut::cut`]. An idle
//! connection needs no task and no allocation for this.

use std::future::Future;
use std::pin::Pin;
use std::sync::OnceLock;
use std::task::{Context, Poll};
use std::time::Duration;

use ambit_policy::Decision;
use futures_util::task::AtomicWaker;
use pin_project_lite::pin_project;

/// Why a live connection was closed by the proxy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CutReason {
    /// A policy that changed no longer lets it in.
    #[error("closed by policy: {0}")]
    Policy(Decision),
    /// The peer's certificate was revoked.
    #[error("closed: the peer's certificate was revoked")]
    Revoked,
    /// The peer's certificate expired, and the peer has had time to renew it.
    #[error("closed: the peer's certificate expired")]
    Expired,
    /// The root of the peer's certificate was taken out.
    #[error("closed: the peer's certificate is not trusted any more")]
    Untrusted,
    /// No byte moved for too long.
    #[error("closed: no byte moved for {0:?}")]
    Idle(Duration),
    /// The drain's deadline passed.
    #[error("closed: the proxy's drain time is over")]
    Drained,
}

/// Closes one connection.
#[derive(Debug, Default)]
pub struct Cut {
    reason: OnceLock<CutReason>,
    waker: AtomicWaker,
}

impl Cut {
    /// Closes the connection. The first reason is kept.
    pub fn cut(&self, reason: CutReason) {
        // A connection that is already being closed keeps its first reason.
        if self.reason.set(reason).is_ok() {
            self.waker.wake();
        }
    }

    /// Why the connection was closed, if it was.
    pub fn reason(&self) -> Option<&CutReason> {
        self.reason.get()
    }

    /// Runs `work` until it ends or the connection is closed, whichever is first. One task at a time.
    ///
    /// # Errors
    /// The reason of the close. `work` is dropped with the returned future.
    pub fn race<F: Future>(&self, work: F) -> Race<'_, F> {
        Race { cut: self, work }
    }
}

pin_project! {
    /// Work that ends when its connection is closed; see [`Cut::race`]. As large as the work and a pointer.
    #[derive(Debug)]
    #[must_use = "futures do nothing unless awaited"]
    pub struct Race<'a, F> {
        cut: &'a Cut,
        #[pin]
        work: F,
    }
}

impl<F: Future> Future for Race<'_, F> {
    type Output = Result<F::Output, CutReason>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Some(reason) = this.cut.reason.get() {
            return Poll::Ready(Err(reason.clone()));
        }
        if let Poll::Ready(done) = this.work.poll(cx) {
            return Poll::Ready(Ok(done));
        }
        this.cut.waker.register(cx.waker());
        // A close between the check above and the registration would wake nobody.
        match this.cut.reason.get() {
            Some(reason) => Poll::Ready(Err(reason.clone())),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    #[tokio::test]
    async fn a_cut_ends_waiting_work_with_its_first_reason() {
        let cut = Arc::new(Cut::default());
        let waiting = tokio::spawn({
            let cut = cut.clone();
            async move { cut.race(std::future::pending::<()>()).await }
        });
        tokio::time::sleep(Duration::from_millis(10)).await;
        cut.cut(CutReason::Drained);
        cut.cut(CutReason::Revoked);
        assert_eq!(waiting.await.unwrap(), Err(CutReason::Drained));
        assert_eq!(cut.race(async { 1 }).await, Err(CutReason::Drained));
    }

    #[tokio::test]
    async fn finished_work_is_not_lost() {
        assert_eq!(Cut::default().race(async { 7 }).await, Ok(7));
    }
}
