//! One subscriber's stream: requests in, answers out, made only when the transport takes them.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use ambit_api::core::Node;
use ambit_api::discovery::DeltaDiscoveryRequest;
use futures_util::{FutureExt, StreamExt};
use prost_types::value::Kind;
use tokio::time::Sleep;
use tonic::{Status, Streaming};
use tracing::{debug, info, warn};

use super::admission::Subscriber;
use super::answer::{Answer, Builder};
use super::observed::Entered;
use super::service::{Place, Shared};
use super::shared::Turn;
use super::store::Content;
use super::subscription::{Lagged, Subscription, TooManyNames};
use super::wakeup::Listener;
use crate::batch_mark::BatchMark;
use crate::client::PARTIAL_STATE;

/// Unknown types that a stream may request.
const MAX_UNKNOWN_TYPES: usize = 16;
/// Requests that are read before answers are sent, so that a subscriber that keeps sending requests still gets answers and
/// does not delay others on its thread.
const REQUESTS_PER_POLL: usize = 32;

pub(super) struct Stream {
    shared: Arc<Shared>,
    subscriber: Subscriber,
    requests: Streaming<DeltaDiscoveryRequest>,
    /// By type, as in the store.
    subscriptions: Vec<Option<Subscription>>,
    unknown: Vec<String>,
    /// Empty answers due to types that are not served.
    unserved: Vec<Answer>,
    wakeup: Listener,
    node: String,
    /// The subscriber waits for the last part of a state that comes in several answers.
    takes_partial_state: bool,
    /// The type whose answer last said that more of its batch follows.
    unfinished: Option<usize>,
    /// When the stream ends if nothing was asked; `None` once something was.
    silence: Option<Pin<Box<Sleep>>>,
    /// Number of the last batch that was sent completely; `None` until the opening state was.
    seen: Option<u64>,
    /// Whether an answer was sent since.
    sent: bool,
    entered: Entered,
    _place: Place,
}

impl Stream {
    pub(super) fn new(
        shared: Arc<Shared>,
        subscriber: Subscriber,
        requests: Streaming<DeltaDiscoveryRequest>,
        place: Place,
    ) -> Self {
        let wakeup = shared.store.inner().wakeup.listen();
        let silence = Some(Box::pin(tokio::time::sleep(shared.config.first_request)));
        let entered = Entered::new(&shared.metrics, Arc::clone(&subscriber.identity));
        Self {
            shared,
            subscriber,
            requests,
            subscriptions: Vec::new(),
            unknown: Vec::new(),
            unserved: Vec::new(),
            wakeup,
            node: String::new(),
            takes_partial_state: false,
            unfinished: None,
            silence,
            seen: None,
            sent: false,
            entered,
            _place: place,
        }
    }

    /// The next answer, once there is one; `None` when the subscriber is done.
    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Answer>, Status>> {
        // Waiting requests are read first, so that a withdrawn subscription is not answered.
        let mut taken = 0;
        while taken < REQUESTS_PER_POLL
            && let Poll::Ready(request) = self.requests.poll_next_unpin(context)?
        {
            match request {
                Some(request) => self.handle_request(&request)?,
                None => return Poll::Ready(Ok(None)),
            }
            taken += 1;
        }
        loop {
            self.shared.check_draining()?;
            if let Some(answer) = self.poll_answer()? {
                return Poll::Ready(Ok(Some(answer)));
            }
            if self.silence.as_mut().is_some_and(|silence| silence.poll_unpin(context).is_ready()) {
                return Poll::Ready(Err(Status::deadline_exceeded("no discovery request arrived")));
            }
            if taken == REQUESTS_PER_POLL {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            std::task::ready!(self.wakeup.poll_woken(context));
        }
    }

    fn handle_request(&mut self, request: &DeltaDiscoveryRequest) -> Result<(), Status> {
        self.silence = None;
        self.shared.metrics.requests.fetch_add(1, Ordering::Relaxed);
        if let Some(node) = request.node.as_ref().filter(|_| self.node.is_empty()) {
            self.node = node.id.chars().take(256).collect();
            self.takes_partial_state = takes_partial_state(node);
            // Set once, with the node's name.
            self.entered.record.node.get_or_init(|| self.node.clone());
            info!(node = self.node, identity = %self.subscriber.identity, "discovery stream opened");
        }
        self.note_nack(request);
        if !self.subscriber.view.has_type(&request.type_url) {
            debug!(identity = %self.subscriber.identity, type_url = request.type_url, "a type that the subscriber may not see");
            return self.handle_unserved(request);
        }
        let shared = Arc::clone(&self.shared);
        let content = shared.store.inner().read();
        let known = content.types().iter().position(|state| *state.type_url == *request.type_url);
        let Some((index, state)) = known.and_then(|index| Some((index, content.types().get(index)?))) else {
            return self.handle_unserved(request);
        };
        if self.subscriptions.len() <= index {
            self.subscriptions.resize_with(index + 1, || None);
        }
        let Some(place) = self.subscriptions.get_mut(index) else { return Ok(()) };
        let max_names = shared.config.max_names;
        let outcome = match place {
            Some(subscription) => subscription.handle_request(request, state, max_names),
            None => Subscription::open(request, self.subscriber.view.root(), state, max_names)
                .map(|opened| *place = Some(opened)),
        };
        outcome.map_err(|TooManyNames| Status::resource_exhausted("too many names are subscribed"))
    }

    fn note_nack(&self, request: &DeltaDiscoveryRequest) {
        let Some(error) = &request.error_detail else { return };
        self.shared.metrics.nacks.fetch_add(1, Ordering::Relaxed);
        self.entered.record.nacks.fetch_add(1, Ordering::Relaxed);
        let reason: String = error.message.chars().take(1024).collect();
        let (type_url, nonce) = (&request.type_url, &request.response_nonce);
        warn!(node = self.node, identity = %self.subscriber.identity, type_url, nonce, reason, "nack");
    }

    /// A type that is not served is answered once, empty, so that the subscriber does not wait.
    fn handle_unserved(&mut self, request: &DeltaDiscoveryRequest) -> Result<(), Status> {
        if self.unknown.contains(&request.type_url) {
            return Ok(());
        }
        if self.unknown.len() >= MAX_UNKNOWN_TYPES || request.type_url.len() > 1024 {
            return Err(Status::invalid_argument("too many unknown types are subscribed"));
        }
        debug!(node = self.node, type_url = request.type_url, "a type that is not served");
        self.unknown.push(request.type_url.clone());
        let mark = BatchMark { number: 0, more: false };
        self.unserved.push(Builder::new(usize::MAX, &request.type_url).finish("own-0", mark));
        Ok(())
    }

    fn poll_answer(&mut self) -> Result<Option<Answer>, Status> {
        let due = match self.unserved.pop() {
            Some(empty) => Some(empty),
            None => self.poll_store()?,
        };
        if let Some(answer) = &due {
            self.sent = true;
            let metrics = &self.shared.metrics;
            metrics.answers.fetch_add(1, Ordering::Relaxed);
            metrics.bytes.fetch_add(answer.frame.len() as u64, Ordering::Relaxed);
            metrics.resources.fetch_add(answer.resources, Ordering::Relaxed);
            metrics.removals.fetch_add(answer.removals, Ordering::Relaxed);
        }
        Ok(due)
    }

    /// Answers the types in order. Removals of a type are held back until the types that may refer to it are up to date, so
    /// that no workload lists a policy that was removed before it.
    fn poll_store(&mut self) -> Result<Option<Answer>, Status> {
        let shared = Arc::clone(&self.shared);
        let store = shared.store.inner();
        let content = store.read();
        self.catch_up(&content)?;
        loop {
            let mut held = false;
            for (index, state) in content.types().iter().enumerate() {
                let turn = self.turn(index, &content);
                held |= turn.hold_removals;
                let Some(Some(subscription)) = self.subscriptions.get_mut(index) else { continue };
                if let Some(answer) = subscription.poll_answer(&store.shared, (index, state), turn) {
                    self.unfinished = answer.more.then_some(index);
                    return Ok(Some(answer));
                }
            }
            if !held {
                break;
            }
        }
        // Nothing is due any more: the batch ends here.
        self.note_batch(&content);
        let Some(index) = self.unfinished.take() else { return Ok(None) };
        let turn = self.turn(index, &content);
        let subscription = self.subscriptions.get_mut(index).and_then(Option::as_mut);
        Ok(subscription.zip(content.types().get(index)).map(|(it, state)| it.empty_answer(state, turn)))
    }

    /// Notes that everything up to the last batch was sent, and how long that took. The opening state took no change.
    fn note_batch(&mut self, content: &Content) {
        let batch = content.batch();
        if self.seen == Some(batch) || self.subscriptions.is_empty() {
            return;
        }
        let sent = std::mem::take(&mut self.sent);
        if let Some(changed) = self.seen.filter(|_| sent).and_then(|seen| content.changed_after(seen)) {
            let now = tokio::time::Instant::now().into_std();
            self.shared.metrics.convergence.observe(now.saturating_duration_since(changed));
        }
        self.seen = Some(batch);
        self.entered.record.batch.store(batch, Ordering::Relaxed);
    }

    fn catch_up(&mut self, content: &Content) -> Result<(), Status> {
        for (subscription, state) in self.subscriptions.iter_mut().zip(content.types()) {
            let Some(subscription) = subscription else { continue };
            subscription.catch_up(state).map_err(|Lagged| {
                self.shared.metrics.lagged.fetch_add(1, Ordering::Relaxed);
                Status::aborted("the subscriber fell behind the change log; reconnect with versions")
            })?;
        }
        Ok(())
    }

    /// The circumstances of an answer of type number `index`.
    fn turn(&self, index: usize, content: &Content) -> Turn {
        let behind = |other: &usize| {
            let subscription = self.subscriptions.get(*other).and_then(Option::as_ref);
            subscription.zip(content.types().get(*other)).is_some_and(|(it, state)| it.is_behind(state))
        };
        let hold_removals = (index + 1..self.subscriptions.len()).any(|other| behind(&other));
        let more_elsewhere = hold_removals || (0..index).any(|other| behind(&other));
        // xDS contract: other clients are ready after the first answer of each type.
        let is_opening =
            self.subscriptions.get(index).and_then(Option::as_ref).is_some_and(Subscription::is_opening);
        let in_one = is_opening && !self.takes_partial_state;
        let limit = if in_one { usize::MAX } else { self.shared.store.inner().config.answer_limit };
        Turn { batch: content.batch(), hold_removals, more_elsewhere, limit }
    }
}

/// Whether a node's metadata says that it waits for the last part of a state.
fn takes_partial_state(node: &Node) -> bool {
    let value = node.metadata.as_ref().and_then(|metadata| metadata.fields.get(PARTIAL_STATE));
    matches!(value.and_then(|value| value.kind.as_ref()), Some(Kind::StringValue(text)) if text == "true")
}
