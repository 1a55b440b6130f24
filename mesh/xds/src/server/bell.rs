//! Wakes every stream of a server: one bell for all tables, so that a stream waits in one place only.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::FutureExt;
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

/// Rung when a table announces changes, or the server drains. All clones are the same bell.
#[derive(Debug, Clone, Default)]
pub(crate) struct Bell(Arc<Notify>);

impl Bell {
    pub(crate) fn ring(&self) {
        self.0.notify_waiters();
    }

    /// Hears everything that is rung from now on.
    pub(crate) fn listen(&self) -> Listener {
        Listener { bell: self.clone(), next: Box::pin(Arc::clone(&self.0).notified_owned()) }
    }
}

/// One stream's ear.
#[derive(Debug)]
pub(crate) struct Listener {
    bell: Bell,
    next: Pin<Box<OwnedNotified>>,
}

impl Listener {
    /// Ready if the bell was rung since this was ready last; look at the state after that, never before.
    pub(crate) fn poll_rung(&mut self, context: &mut Context<'_>) -> Poll<()> {
        std::task::ready!(self.next.poll_unpin(context));
        self.next.set(Arc::clone(&self.bell.0).notified_owned());
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    #[test]
    fn a_ring_is_heard_once_by_each_listener_even_before_it_first_looks() {
        let bell = Bell::default();
        let mut context = Context::from_waker(Waker::noop());
        let (mut first, mut second) = (bell.listen(), bell.listen());
        assert!(first.poll_rung(&mut context).is_pending());
        bell.ring();
        bell.ring();
        for listener in [&mut first, &mut second] {
            assert!(listener.poll_rung(&mut context).is_ready());
            assert!(listener.poll_rung(&mut context).is_pending());
        }
        assert!(bell.listen().poll_rung(&mut context).is_pending());
    }
}
