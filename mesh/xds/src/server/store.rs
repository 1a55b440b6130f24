//! The store as the control plane sees it: changes in, wake-ups for subscribers out.
//!
//! One lock guards the resources of all types, so that a batch of changes becomes visible at once. It is held for the
//! changes of one batch or for the making of one answer, never across an await.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use tokio::sync::Notify;

use super::batch::{Announce, Batcher};
use super::shared::SharedAnswers;
use super::state::State;
use super::wakeup::Wakeup;

/// Settings of a store.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Changes that follow one another within this time are announced together.
    pub batch: Duration,
    /// Largest answer, in bytes, unless a single resource is larger, or the subscriber needs its opening state in one.
    pub answer_limit: usize,
    /// Removals remembered per type; a subscriber that is further behind must reconnect.
    pub max_removals: usize,
    /// Answers kept for subscribers at the same position.
    pub shared_answers: usize,
}

impl Default for StoreConfig {
    /// 50 ms, 64 KiB, 65,536 removals, 64 answers.
    fn default() -> Self {
        Self {
            batch: Duration::from_millis(50),
            answer_limit: 64 << 10,
            max_removals: 65_536,
            shared_answers: 64,
        }
    }
}

/// A resource to be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    pub(crate) name: Arc<str>,
    pub(crate) aliases: Vec<Arc<str>>,
    pub(crate) parents: Vec<Arc<str>>,
    pub(crate) body: Bytes,
    pub(crate) urgent: bool,
}

impl Resource {
    /// Encodes a message under a name.
    pub fn new(name: impl Into<Arc<str>>, message: &impl prost::Message) -> Self {
        Self::from_bytes(name, message.encode_to_vec().into())
    }

    /// Takes an encoded message.
    pub fn from_bytes(name: impl Into<Arc<str>>, body: Bytes) -> Self {
        Self { name: name.into(), aliases: Vec::new(), parents: Vec::new(), body, urgent: false }
    }

    /// Adds a name under which the resource may be demanded: `<network>/<ip>`, `<namespace>/<hostname>`.
    #[must_use]
    pub fn alias(mut self, alias: impl Into<Arc<str>>) -> Self {
        self.aliases.push(alias.into());
        self
    }

    /// Adds the name of a resource that brings this one along when it is demanded: a workload's
    /// services.
    #[must_use]
    pub fn parent(mut self, parent: impl Into<Arc<str>>) -> Self {
        self.parents.push(parent.into());
        self
    }

    /// Announces this change at once, as for an endpoint that starts to terminate.
    #[must_use]
    pub fn urgent(mut self) -> Self {
        self.urgent = true;
        self
    }
}

/// A change to the resources of one type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The resource is new or changed. Equal content is not sent again.
    Upsert(Resource),
    /// The resource of that name is gone. Always announced at once.
    Remove(Arc<str>),
}

/// The effect of applied changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    /// Resources that are new or differ.
    pub changed: usize,
    /// Resources that were removed.
    pub removed: usize,
    /// Changes without effect.
    pub unchanged: usize,
    pub(crate) urgent: bool,
}

/// Resources by type. Cheap to clone; all clones are the same store.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

/// What a store holds.
#[derive(Debug)]
pub(crate) struct Content {
    /// In the order in which subscribers get updates.
    types: Vec<State>,
    /// Number of the last batch that changed something.
    batch: u64,
    /// When the last batches came, oldest first.
    recent: VecDeque<(u64, Instant)>,
    max_removals: usize,
}

/// Batches of which the time is remembered.
const RECENT: usize = 64;

impl Content {
    /// The types, in order; their number never falls.
    pub(crate) fn types(&self) -> &[State] {
        &self.types
    }

    /// Number of the last batch.
    pub(crate) fn batch(&self) -> u64 {
        self.batch
    }

    /// When the first batch after number `seen` came, or the oldest of which that is known.
    pub(crate) fn changed_after(&self, seen: u64) -> Option<Instant> {
        self.recent.iter().find(|(number, _)| *number > seen).map(|(_, at)| *at)
    }

    fn count_batch(&mut self, now: Instant) {
        self.batch += 1;
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back((self.batch, now));
    }

    fn get(&self, type_url: &str) -> Option<&State> {
        self.types.iter().find(|state| *state.type_url == *type_url)
    }

    fn apply(&mut self, type_url: &str, changes: Vec<Change>, applied: &mut Applied) {
        let known = self.types.iter().position(|state| *state.type_url == *type_url);
        let at = known.unwrap_or_else(|| {
            self.types.push(State::new(type_url, self.max_removals));
            self.types.len() - 1
        });
        if let Some(state) = self.types.get_mut(at) {
            state.apply(changes, applied);
        }
    }
}

#[derive(Debug)]
pub(crate) struct Inner {
    content: RwLock<Content>,
    pub(crate) config: StoreConfig,
    pub(crate) shared: SharedAnswers,
    /// Wakes the streams of all servers of this store.
    pub(crate) wakeup: Wakeup,
    batcher: Mutex<Batcher>,
    /// Wakes the publisher: a deadline was set, or the store is gone.
    plan: Arc<Plan>,
}

#[derive(Debug, Default)]
struct Plan {
    at: Mutex<Option<Instant>>,
    changed: Notify,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.plan.changed.notify_one();
    }
}

/// Announces batched changes when their time has come. Run it on a task; it ends with the store.
#[derive(Debug)]
#[must_use = "batched changes are not announced unless the publisher runs"]
pub struct Publisher {
    store: Weak<Inner>,
    plan: Arc<Plan>,
}

impl Publisher {
    /// Runs until the last clone of the store is dropped.
    pub async fn run(self) {
        while self.store.strong_count() > 0 {
            let deadline = *self.plan.at.lock();
            match deadline {
                Some(deadline) => {
                    tokio::time::sleep_until(deadline.into()).await;
                    *self.plan.at.lock() = None;
                    if let Some(store) = self.store.upgrade() {
                        store.announce_planned();
                    }
                }
                None => self.plan.changed.notified().await,
            }
        }
    }
}

impl Inner {
    fn announce_planned(&self) {
        if self.batcher.lock().handle_deadline(tokio::time::Instant::now().into_std()) {
            self.wakeup.wake_all();
        }
    }

    /// The content, for one answer.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Content> {
        self.content.read()
    }
}

impl Store {
    /// An empty store, and the publisher that announces its batched changes. Subscribers get updates of the types in the
    /// given order and removals in the reverse order, so a type must come before those whose resources refer to it.
    pub fn new(type_urls: &[&str], config: StoreConfig) -> (Self, Publisher) {
        let plan = Arc::new(Plan::default());
        let types = type_urls.iter().map(|type_url| State::new(type_url, config.max_removals)).collect();
        let inner = Arc::new(Inner {
            content: RwLock::new(Content {
                types,
                batch: 0,
                recent: VecDeque::with_capacity(RECENT),
                max_removals: config.max_removals,
            }),
            batcher: Mutex::new(Batcher::new(config.batch)),
            shared: SharedAnswers::new(config.shared_answers),
            config,
            wakeup: Wakeup::default(),
            plan: Arc::clone(&plan),
        });
        let publisher = Publisher { store: Arc::downgrade(&inner), plan };
        (Self { inner }, publisher)
    }

    /// Applies changes of one type as a batch; see [`apply_batch`](Self::apply_batch).
    pub fn apply(&self, type_url: &str, changes: Vec<Change>) -> Applied {
        self.apply_batch([(type_url, changes)])
    }

    /// Applies changes of several types at once: no subscriber sees a part of them as complete. They are announced at
    /// once if they are the first after a quiet time, remove something or are urgent; else together with what follows within
    /// the batch time. A type that the store does not have yet is added after the others.
    pub fn apply_batch<'a>(&self, batch: impl IntoIterator<Item = (&'a str, Vec<Change>)>) -> Applied {
        let mut applied = Applied::default();
        let now = tokio::time::Instant::now().into_std();
        {
            let mut content = self.inner.content.write();
            for (type_url, changes) in batch {
                content.apply(type_url, changes, &mut applied);
            }
            if applied.changed + applied.removed == 0 {
                return applied;
            }
            content.count_batch(now);
        }
        let announce = self.inner.batcher.lock().handle_change(now, applied.urgent);
        match announce {
            Announce::Now => self.inner.wakeup.wake_all(),
            Announce::At(deadline) => {
                *self.inner.plan.at.lock() = Some(deadline);
                self.inner.plan.changed.notify_one();
            }
            Announce::Planned => {}
        }
        applied
    }

    /// How many resources of a type there are.
    pub fn len(&self, type_url: &str) -> usize {
        self.inner.read().get(type_url).map_or(0, State::len)
    }

    /// Whether there are no resources of any type.
    pub fn is_empty(&self) -> bool {
        self.inner.read().types.iter().all(|state| state.len() == 0)
    }

    /// The version of a resource, if it is there.
    pub fn version(&self, type_url: &str, name: &str) -> Option<Arc<str>> {
        self.inner.read().get(type_url)?.get(name).map(|entry| Arc::clone(&entry.version))
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }
}
