//! The table as the control plane sees it: changes in, wake-ups for subscribers out.
//!
//! One lock guards the state; it is held for the changes of one `apply` or for the making of one
//! answer, never across an await.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;

use super::answer::{Answer, Builder};
use super::batch::{Announce, Batcher};
use super::bell::Bell;
use super::state::{Position, State};

/// How a table batches and what it remembers.
#[derive(Debug, Clone)]
pub struct TableConfig {
    /// Changes that follow one another within this time are announced together.
    pub batch: Duration,
    /// Largest answer, in bytes, unless a single resource is larger.
    pub answer_limit: usize,
    /// Removals remembered; a subscriber that is further behind must reconnect.
    pub max_removals: usize,
    /// Answers kept for subscribers that stand at the same place.
    pub shared_answers: usize,
}

impl Default for TableConfig {
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

/// A change to a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The resource is new or changed. Equal content is not sent again.
    Upsert(Resource),
    /// The resource of that name is gone. Always announced at once.
    Remove(Arc<str>),
}

/// What applying changes did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    /// Resources that are new or differ.
    pub changed: usize,
    /// Resources that went.
    pub removed: usize,
    /// Changes that changed nothing.
    pub unchanged: usize,
    /// The log's head afterwards.
    pub position: u64,
    pub(crate) urgent: bool,
}

/// One type's resources. Cheap to clone; all clones are the same table.
#[derive(Debug, Clone)]
pub struct Table {
    inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) state: RwLock<State>,
    pub(crate) config: TableConfig,
    batcher: Mutex<Batcher>,
    shared: Mutex<Shared>,
    /// The bells of the servers that serve this table.
    bells: RwLock<Vec<Bell>>,
    /// Wakes the publisher: a deadline was set, or the table is gone.
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

/// Announces batched changes when their time has come. Run it on a task; it ends with the table.
#[derive(Debug)]
#[must_use = "batched changes are not announced unless the publisher runs"]
pub struct Publisher {
    table: Weak<Inner>,
    plan: Arc<Plan>,
}

impl Publisher {
    /// Runs until the last clone of the table is dropped.
    pub async fn run(self) {
        while self.table.strong_count() > 0 {
            let deadline = *self.plan.at.lock();
            match deadline {
                Some(deadline) => {
                    tokio::time::sleep_until(deadline.into()).await;
                    *self.plan.at.lock() = None;
                    if let Some(table) = self.table.upgrade() {
                        table.announce_planned();
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
            self.ring();
        }
    }

    fn ring(&self) {
        self.bells.read().iter().for_each(Bell::ring);
    }
}

impl Table {
    /// An empty table of a type, and what announces its batched changes.
    pub fn new(type_url: &str, config: TableConfig) -> (Self, Publisher) {
        let plan = Arc::new(Plan::default());
        let inner = Arc::new(Inner {
            state: RwLock::new(State::new(type_url, config.max_removals)),
            batcher: Mutex::new(Batcher::new(config.batch)),
            shared: Mutex::new(Shared { answers: VecDeque::new(), capacity: config.shared_answers }),
            config,
            bells: RwLock::default(),
            plan: Arc::clone(&plan),
        });
        let publisher = Publisher { table: Arc::downgrade(&inner), plan };
        (Self { inner }, publisher)
    }

    /// Applies changes in order and announces them: at once if they are the first after quiet, remove
    /// something or are urgent; else together with what follows within the batch time.
    pub fn apply(&self, changes: Vec<Change>) -> Applied {
        let applied = self.inner.state.write().apply(changes);
        if applied.changed + applied.removed == 0 {
            return applied;
        }
        let now = tokio::time::Instant::now().into_std();
        let announce = self.inner.batcher.lock().handle_change(now, applied.urgent);
        match announce {
            Announce::Now => self.inner.ring(),
            Announce::At(deadline) => {
                *self.inner.plan.at.lock() = Some(deadline);
                self.inner.plan.changed.notify_one();
            }
            Announce::Planned => {}
        }
        applied
    }

    /// The type served.
    pub fn type_url(&self) -> Arc<str> {
        Arc::clone(&self.inner.state.read().type_url)
    }

    /// How many resources there are.
    pub fn len(&self) -> usize {
        self.inner.state.read().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The names of all resources, in no order.
    pub fn names(&self) -> Vec<Arc<str>> {
        self.inner.state.read().entries().map(|entry| Arc::clone(&entry.name)).collect()
    }

    /// The version of a resource, if it is there.
    pub fn version(&self, name: &str) -> Option<Arc<str>> {
        self.inner.state.read().get(name).map(|entry| Arc::clone(&entry.version))
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.inner
    }

    /// Rings that bell whenever changes are announced.
    pub(crate) fn announce_to(&self, bell: Bell) {
        self.inner.bells.write().push(bell);
    }
}

/// Where a wildcard subscriber stands: removals and live resources are sent up to different places,
/// because removals overtake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub(crate) removed: Position,
    pub(crate) live: Position,
}

/// An answer for everyone who stands at the same place, and where it leads.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub(crate) answer: Answer,
    pub(crate) to: Cursor,
    /// More of the same state follows.
    pub(crate) more: bool,
}

/// What an answer depends on besides the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Start {
    from: Cursor,
    head: Position,
    hold_removals: bool,
}

/// The answers made last, by what they were made for.
#[derive(Debug)]
struct Shared {
    answers: VecDeque<(Start, Step)>,
    capacity: usize,
}

impl Inner {
    /// The next answer for a wildcard subscriber, made at most once for all of them.
    pub(crate) fn step(&self, from: Cursor, state: &State, hold_removals: bool) -> Option<Step> {
        let head = state.head();
        if from.removed >= head && from.live >= head {
            return None;
        }
        let start = Start { from, head, hold_removals };
        let known = |shared: &Shared| {
            let found = shared.answers.iter().rev().find(|(known, _)| *known == start);
            found.map(|(_, step)| step.clone())
        };
        if let Some(step) = known(&self.shared.lock()) {
            return Some(step);
        }
        let step = make_step(start, state, self.config.answer_limit)?;
        let mut shared = self.shared.lock();
        if shared.answers.len() >= shared.capacity {
            shared.answers.pop_front();
        }
        if shared.capacity > 0 {
            shared.answers.push_back((start, step.clone()));
        }
        Some(step)
    }
}

/// Removals first unless they are held, then live resources, until the answer is full.
fn make_step(start: Start, state: &State, limit: usize) -> Option<Step> {
    let Start { from, head, hold_removals } = start;
    let mut builder = Builder::new(limit, &state.type_url);
    let mut to = from;
    let mut full = false;
    if !hold_removals {
        for (position, name) in state.removed_after(from.removed) {
            if !builder.remove(name) {
                full = true;
                break;
            }
            to.removed = position;
        }
    }
    if !full {
        for (position, entry) in state.live_after(from.live) {
            if !builder.resource(&entry.field) {
                full = true;
                break;
            }
            to.live = position;
        }
        if !hold_removals {
            to.removed = head;
        }
    }
    if !full {
        to.live = head;
    }
    if builder.is_empty() {
        return None;
    }
    let more = full || state.removed_after(to.removed).next().is_some();
    let nonce = format!("{}-{}", to.removed, to.live);
    Some(Step { answer: builder.finish(&nonce, head, more), to, more })
}
