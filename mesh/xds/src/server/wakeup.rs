//! Wakes every stream of a store. A stream waits in this one place only.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::FutureExt;
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

/// Wakes all its listeners, when changes are announced or a server drains. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wakeup(Arc<Notify>);

impl Wakeup {
    pub(crate) fn wake_all(&self) {
        self.0.notify_waiters();
    }

    /// Gets every wake-up from now on.
    pub(crate) fn listen(&self) -> Listener {
        Listener { wakeup: self.clone(), next: Box::pin(Arc::clone(&self.0).notified_owned()) }
    }
}

/// One stream's end.
#[derive(Debug)]
pub(crate) struct Listener {
    wakeup: Wakeup,
    next: Pin<Box<OwnedNotified>>,
}

impl Listener {
    /// Ready if there was a wake-up since this was ready last. Read the state after this call, never before.
    pub(crate) fn poll_woken(&mut self, context: &mut Context<'_>) -> Poll<()> {
        std::task::ready!(self.next.poll_unpin(context));
        self.next.set(Arc::clone(&self.wakeup.0).notified_owned());
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    #[test]
    fn each_listener_is_woken_once_even_before_it_first_waits() {
        let wakeup = Wakeup::default();
        let mut context = Context::from_waker(Waker::noop());
        let (mut first, mut second) = (wakeup.listen(), wakeup.listen());
        assert!(first.poll_woken(&mut context).is_pending());
        wakeup.wake_all();
        wakeup.wake_all();
        for listener in [&mut first, &mut second] {
            assert!(listener.poll_woken(&mut context).is_ready());
            assert!(listener.poll_woken(&mut context).is_pending());
        }
        assert!(wakeup.listen().poll_woken(&mut context).is_pending());
    }
}
