//! What the writer of statuses must try again, and when: apart from the queue, so that what fails holds up nothing else.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use crate::api_server::Backoff;
use crate::kind::Kind;
use crate::object::ObjectRef;

/// Objects that are kept; when there are more, their kinds are looked at as a whole.
const CAPACITY: usize = 4096;

/// After so long without a failure the next pause is a short one again.
const QUIET: Duration = Duration::from_secs(60);

/// What failed, and when it is tried again.
#[derive(Debug, Default)]
pub(super) struct Retries {
    failed: Failed,
    at: Option<Instant>,
    /// When something was last tried again, or will be.
    last: Option<Instant>,
    backoff: Backoff,
}

/// Kinds that could not be listed, and objects that could not be read or written.
#[derive(Debug, Default)]
pub(super) struct Failed {
    pub(super) kinds: BTreeSet<Kind>,
    pub(super) objects: BTreeSet<ObjectRef>,
}

impl Retries {
    pub(super) fn add_kind(&mut self, kind: Kind) {
        self.failed.kinds.insert(kind);
        self.schedule();
    }

    pub(super) fn add_objects(&mut self, objects: Vec<ObjectRef>) {
        for object in objects {
            if self.failed.objects.len() < CAPACITY {
                self.failed.objects.insert(object);
            } else {
                self.failed.kinds.insert(object.kind);
            }
            self.schedule();
        }
    }

    /// Waits until something must be tried again.
    pub(super) async fn due(&self) {
        match self.at {
            Some(at) => tokio::time::sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    /// Takes everything that failed, to try it again.
    pub(super) fn take(&mut self) -> Failed {
        self.at = None;
        std::mem::take(&mut self.failed)
    }

    fn schedule(&mut self) {
        if self.at.is_some() {
            return;
        }
        let now = Instant::now();
        if self.last.is_none_or(|last| now.duration_since(last) > QUIET) {
            self.backoff.reset();
        }
        let at = now + self.backoff.pause();
        (self.at, self.last) = (Some(at), Some(at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::NamespacedName;

    fn object(n: usize) -> ObjectRef {
        ObjectRef { kind: Kind::Service, name: NamespacedName::new("shop", n.to_string()) }
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_is_tried_again_after_growing_pauses() {
        let (mut retries, mut pauses) = (Retries::default(), Vec::new());
        for _ in 0..3 {
            let start = Instant::now();
            retries.add_objects(vec![object(1)]);
            retries.due().await;
            pauses.push(start.elapsed());
            assert_eq!(retries.take().objects, [object(1)].into());
        }
        assert!(pauses.is_sorted() && pauses[2] > pauses[0] * 2, "{pauses:?}");
        tokio::time::advance(QUIET * 2).await;
        let start = Instant::now();
        retries.add_kind(Kind::Service);
        retries.due().await;
        assert!(start.elapsed() < pauses[2], "a time without failures ends the growth");
    }

    #[tokio::test]
    async fn too_many_objects_become_their_kind() {
        let mut retries = Retries::default();
        retries.add_objects((0..=CAPACITY).map(object).collect());
        let Failed { kinds, objects } = retries.take();
        assert_eq!((kinds, objects.len()), ([Kind::Service].into(), CAPACITY));
    }
}
