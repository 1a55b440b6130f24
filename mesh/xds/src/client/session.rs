//! The client's half of the delta protocol, without I/O: answers and demands in, requests out.
//!
//! Driven by [`super::driver`]; it never sleeps, sends or reads a clock. What is held (names and
//! versions) survives disconnections, so that a new stream asks only for what differs.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use ambit_api::core::Node;
use ambit_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use ambit_api::rpc::Status;

use super::handler::{Rejected, Sink};
use super::{DemandError, Found};
use crate::WILDCARD;
use crate::batch_mark::BatchMark;

/// `google.rpc.Code.INVALID_ARGUMENT`.
const INVALID_ARGUMENT: i32 = 3;
/// Longest message of a nack, in bytes; further rejections are only counted.
const MAX_NACK_MESSAGE: usize = 4096;
/// With more requests than this waiting, a plain ack replaces an older one of its type: servers look
/// at the latest nonce only.
const COALESCE_ABOVE: usize = 32;
/// Maximum number of requests that wait. Beyond it, the newest nack replaces the oldest.
const MAX_OUTBOX: usize = 256;

/// Maximum number of dropped resources that are remembered; see [`Subscription::dropped`].
const MAX_DROPPED: usize = 8192;

/// How a type is subscribed.
pub(crate) enum Mode {
    Wildcard,
    /// The demanded names, each with the server's answer once it has arrived.
    OnDemand(HashMap<String, Option<Found>>),
}

/// Names to subscribe and unsubscribe with the next request; none is in both, as servers differ in which they read first.
#[derive(Debug, Default)]
struct Changes {
    /// With whether the server has the name subscribed already, as when it was about to be unsubscribed.
    subscribe: BTreeMap<String, bool>,
    /// Names that the server has subscribed.
    unsubscribe: BTreeSet<String>,
}

impl Changes {
    fn subscribe(&mut self, name: &str) {
        let known = self.unsubscribe.remove(name);
        self.subscribe.insert(name.to_owned(), known);
    }

    fn unsubscribe(&mut self, name: &str) {
        if self.subscribe.remove(name) != Some(false) {
            self.unsubscribe.insert(name.to_owned());
        }
    }

    fn is_empty(&self) -> bool {
        self.subscribe.is_empty() && self.unsubscribe.is_empty()
    }
}

/// One type: how it is subscribed and what is held of it.
pub(crate) struct Subscription {
    type_url: Arc<str>,
    mode: Mode,
    /// Name to version of everything that was accepted.
    held: HashMap<String, String>,
    /// The first state has been applied completely, on this or an earlier stream.
    complete: bool,
    /// An answer of this type has arrived on this stream.
    is_answered: bool,
    /// Names that the server has answered since the last complete state, on this stream or an earlier one.
    answered: HashSet<String>,
    /// Changes of what is subscribed that were not sent yet.
    changes: Changes,
    /// Resources that were dropped with a name: the server may have sent one again before it saw that the
    /// name was given up. Bounded by [`MAX_DROPPED`].
    dropped: HashSet<String>,
    /// Dropped resources that came again in a batch that is not complete yet.
    returned: Vec<String>,
    /// Names without an answer that this stream's first request asked for. Those that the first complete state does not
    /// mention exist and are unchanged: the request named their versions.
    opening: Vec<String>,
}

impl Subscription {
    pub(crate) fn new(type_url: &str, mode: Mode) -> Self {
        Self {
            type_url: type_url.into(),
            mode,
            held: HashMap::new(),
            complete: false,
            is_answered: false,
            answered: HashSet::new(),
            changes: Changes::default(),
            dropped: HashSet::new(),
            returned: Vec::new(),
            opening: Vec::new(),
        }
    }

    pub(crate) fn type_url(&self) -> &Arc<str> {
        &self.type_url
    }

    /// The request that opens this type on a new stream.
    fn open(&mut self) -> DeltaDiscoveryRequest {
        self.is_answered = false;
        self.opening = match &self.mode {
            Mode::Wildcard => Vec::new(),
            Mode::OnDemand(names) => {
                let waiting = names.iter().filter(|(_, found)| found.is_none());
                waiting.map(|(name, _)| name.clone()).collect()
            }
        };
        let initial = self.held.iter().map(|(name, version)| (name.clone(), version.clone())).collect();
        let all = || std::iter::once(WILDCARD.to_owned());
        let (subscribe, unsubscribe) = match &self.mode {
            // An empty first request means all resources; every known server understands that form.
            Mode::Wildcard => (Vec::new(), Vec::new()),
            // xDS contract: the form of istio's ztunnel. istiod sends everything to one that only unsubscribes.
            Mode::OnDemand(names) => (all().chain(names.keys().cloned()).collect(), all().collect()),
        };
        DeltaDiscoveryRequest {
            type_url: self.type_url.to_string(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            initial_resource_versions: initial,
            ..DeltaDiscoveryRequest::default()
        }
    }

    /// Records the resources that are held after an answer was applied, and the demanded names that it answers.
    fn note(&mut self, response: &DeltaDiscoveryResponse, refused: &HashSet<&str>) {
        for name in &response.removed_resources {
            self.held.remove(name);
        }
        for resource in &response.resources {
            // A rejected resource keeps its earlier version, so a new stream brings it again.
            if !refused.contains(resource.name.as_str()) {
                self.held.insert(resource.name.clone(), resource.version.clone());
            }
            if self.dropped.remove(&resource.name) {
                self.returned.push(resource.name.clone());
            }
        }
        let Mode::OnDemand(names) = &mut self.mode else { return };
        let mut answer = |name: &String, found: Found| {
            if let Some(state) = names.get_mut(name) {
                *state = Some(found);
                self.answered.insert(name.clone());
            }
        };
        for name in &response.removed_resources {
            answer(name, Found::Absent);
        }
        for resource in &response.resources {
            answer(&resource.name, Found::Present);
            for alias in &resource.aliases {
                answer(alias, Found::Present);
            }
        }
    }

    /// Drops resources that were held only because of `name`, which is no longer subscribed.
    fn drop_unsubscribed(&mut self, sink: &mut dyn Sink, name: &str) {
        let Mode::OnDemand(names) = &self.mode else { return };
        for dropped in sink.release(&self.type_url, name, &|name| names.contains_key(name)) {
            self.held.remove(&dropped);
            if self.dropped.len() < MAX_DROPPED {
                self.dropped.insert(dropped);
            }
        }
    }

    /// Drops resources again that arrived after their name was unsubscribed, unless another name covers them by now.
    fn drop_returned(&mut self, sink: &mut dyn Sink) {
        for name in std::mem::take(&mut self.returned) {
            self.drop_unsubscribed(sink, &name);
        }
    }

    /// Called when the state is complete. Returns the demanded names that the server has answered since the last call.
    fn complete(&mut self) -> Vec<Answered> {
        self.complete |= self.is_answered;
        let Mode::OnDemand(names) = &mut self.mode else { return Vec::new() };
        if self.is_answered {
            for name in std::mem::take(&mut self.opening) {
                if let Some(unanswered @ None) = names.get_mut(&name) {
                    *unanswered = Some(Found::Present);
                    self.answered.insert(name);
                }
            }
        }
        let answered = std::mem::take(&mut self.answered).into_iter();
        let found = answered.filter_map(|name| {
            let found = names.get(&name).copied().flatten()?;
            Some(Answered { type_url: Arc::clone(&self.type_url), name, found })
        });
        found.collect()
    }
}

/// A demanded name that the server has answered.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answered {
    pub(crate) type_url: Arc<str>,
    pub(crate) name: String,
    pub(crate) found: Found,
}

/// What one answer did.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) rejected: Vec<Rejected>,
    pub(crate) answered: Vec<Answered>,
    /// A batch was larger than what is held back, and was applied before it was complete.
    pub(crate) split: bool,
}

/// Answers that wait for the rest of their batch.
#[derive(Default)]
struct Pending {
    answers: Vec<DeltaDiscoveryResponse>,
    bytes: usize,
}

/// All types of one client.
pub(crate) struct Session {
    node: Node,
    types: Vec<Subscription>,
    sink: Box<dyn Sink>,
    outbox: VecDeque<DeltaDiscoveryRequest>,
    pending: Pending,
    connected: bool,
    limits: Limits,
}

/// Bounds of what a session holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Names demanded, per type.
    pub(crate) names: usize,
    /// Bytes of answers that wait for the rest of their batch.
    pub(crate) batch: usize,
}

impl Session {
    pub(crate) fn new(node: Node, types: Vec<Subscription>, sink: Box<dyn Sink>, limits: Limits) -> Self {
        let (outbox, pending) = (VecDeque::new(), Pending::default());
        Self { node, types, sink, outbox, pending, connected: false, limits }
    }

    /// A stream is open: requests every type, with the versions of the held resources.
    pub(crate) fn handle_connected(&mut self) {
        self.connected = true;
        self.outbox.clear();
        for subscription in &mut self.types {
            subscription.changes = Changes::default();
            self.outbox.push_back(subscription.open());
        }
        if let Some(first) = self.outbox.front_mut() {
            first.node = Some(self.node.clone());
        }
    }

    /// The stream has ended: discards requests and answers that wait, and keeps the held resources.
    pub(crate) fn handle_disconnected(&mut self) {
        self.connected = false;
        self.outbox.clear();
        self.pending = Pending::default();
        for subscription in &mut self.types {
            subscription.is_answered = false;
            subscription.changes = Changes::default();
        }
    }

    /// Applies an answer once its batch is complete, and queues the ack or nack of what was applied.
    pub(crate) fn handle_response(&mut self, response: DeltaDiscoveryResponse) -> Outcome {
        let Some(subscription) = self.types.iter_mut().find(|known| *known.type_url == *response.type_url)
        else {
            let (type_url, name) = (response.type_url.clone(), response.type_url.clone());
            let reason = "this type was never subscribed".to_owned();
            let rejected = vec![Rejected { type_url, name, reason }];
            self.acknowledge(&response, &rejected);
            return Outcome { rejected, ..Outcome::default() };
        };
        subscription.is_answered = true;
        let mark = BatchMark::read(&response.system_version_info);
        let is_incomplete = match mark {
            // A server with batches answers every type that a stream opens: the first batch ends with the last of them.
            Some(mark) => mark.more || self.types.iter().any(|subscription| !subscription.is_answered),
            None => false,
        };
        let has_more = mark.is_some_and(|mark| mark.more);
        self.pending.bytes = self.pending.bytes.saturating_add(weight(&response));
        self.pending.answers.push(response);
        let is_full = self.pending.bytes > self.limits.batch;
        // Nothing relies on the state before it is complete, so a large first state is applied as it arrives.
        if is_incomplete && self.is_ready() && !is_full {
            return Outcome::default();
        }
        let mut outcome = self.apply_pending();
        outcome.split = is_incomplete && self.is_ready();
        if !has_more {
            for subscription in &mut self.types {
                subscription.drop_returned(&mut *self.sink);
            }
            outcome.answered = self.types.iter_mut().flat_map(Subscription::complete).collect();
        }
        outcome
    }

    /// Applies everything that waits, as one batch.
    fn apply_pending(&mut self) -> Outcome {
        let answers = std::mem::take(&mut self.pending).answers;
        let rejected = self.sink.apply(&answers);
        for response in &answers {
            let named = |name: &str| {
                response.resources.iter().any(|it| it.name == name)
                    || response.removed_resources.iter().any(|removed| removed == name)
            };
            let refused: Vec<Rejected> = match rejected.is_empty() {
                true => Vec::new(),
                false => rejected
                    .iter()
                    .filter(|it| it.type_url == response.type_url && named(&it.name))
                    .cloned()
                    .collect(),
            };
            if let Some(subscription) = self.types.iter_mut().find(|it| *it.type_url == *response.type_url) {
                let names = refused.iter().map(|rejected| rejected.name.as_str()).collect();
                subscription.note(response, &names);
            }
            self.acknowledge(response, &refused);
        }
        Outcome { rejected, ..Outcome::default() }
    }

    fn acknowledge(&mut self, response: &DeltaDiscoveryResponse, rejected: &[Rejected]) {
        let error_detail = (!rejected.is_empty()).then(|| nack(rejected));
        if error_detail.is_none() && self.outbox.len() >= COALESCE_ABOVE {
            self.outbox.retain(|request| !is_plain_ack_of(request, &response.type_url));
        }
        if self.outbox.len() >= MAX_OUTBOX
            && let Some(oldest) = self.outbox.iter().position(|request| !request.response_nonce.is_empty())
        {
            self.outbox.remove(oldest);
        }
        self.outbox.push_back(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail,
            ..DeltaDiscoveryRequest::default()
        });
    }

    /// Asks for one name. `Ok(None)`: the answer is still to come.
    pub(crate) fn handle_demand(&mut self, type_url: &str, name: &str) -> Result<Option<Found>, DemandError> {
        let max_names = self.limits.names;
        let not_on_demand =
            || DemandError::NotOnDemand { type_url: type_url.to_owned(), name: name.to_owned() };
        let subscription =
            self.types.iter_mut().find(|known| *known.type_url == *type_url).ok_or_else(not_on_demand)?;
        let Mode::OnDemand(names) = &mut subscription.mode else { return Err(not_on_demand()) };
        if let Some(state) = names.get(name) {
            return Ok(*state);
        }
        if names.len() >= max_names {
            return Err(DemandError::TooMany { type_url: type_url.to_owned(), name: name.to_owned() });
        }
        names.insert(name.to_owned(), None);
        if self.connected {
            subscription.changes.subscribe(name);
        }
        Ok(None)
    }

    /// Unsubscribes from a demanded name, and drops resources that were held only because of it.
    pub(crate) fn handle_release(&mut self, type_url: &str, name: &str) {
        let Some(subscription) = self.types.iter_mut().find(|known| *known.type_url == *type_url) else {
            return;
        };
        let Mode::OnDemand(names) = &mut subscription.mode else { return };
        if names.remove(name).is_none() {
            return;
        }
        subscription.answered.remove(name);
        subscription.drop_unsubscribed(&mut *self.sink, name);
        if self.connected {
            subscription.changes.unsubscribe(name);
        }
    }

    /// Whether a request waits to be sent.
    pub(crate) fn wants_to_send(&self) -> bool {
        !self.outbox.is_empty() || self.types.iter().any(|known| !known.changes.is_empty())
    }

    /// The next request to send.
    pub(crate) fn poll_request(&mut self) -> Option<DeltaDiscoveryRequest> {
        self.outbox.pop_front().or_else(|| {
            let changed = self.types.iter_mut().find(|known| !known.changes.is_empty())?;
            let Changes { subscribe, unsubscribe } = std::mem::take(&mut changed.changes);
            Some(DeltaDiscoveryRequest {
                type_url: changed.type_url.to_string(),
                resource_names_subscribe: subscribe.into_keys().collect(),
                resource_names_unsubscribe: unsubscribe.into_iter().collect(),
                ..DeltaDiscoveryRequest::default()
            })
        })
    }

    /// Whether the first state of every type has been applied.
    pub(crate) fn is_ready(&self) -> bool {
        self.types.iter().all(|subscription| subscription.complete)
    }
}

/// Approximate memory of an answer that waits, in bytes.
fn weight(response: &DeltaDiscoveryResponse) -> usize {
    let body = |resource: &ambit_api::discovery::Resource| {
        let any = resource.resource.as_ref().map_or(0, |any| any.value.len() + any.type_url.len());
        let aliases: usize = resource.aliases.iter().map(|alias| alias.len() + size_of::<String>()).sum();
        size_of_val(resource) + resource.name.len() + resource.version.len() + any + aliases
    };
    let removed = response.removed_resources.iter().map(|name| name.len() + size_of::<String>());
    size_of_val(response) + response.resources.iter().map(body).sum::<usize>() + removed.sum::<usize>()
}

fn is_plain_ack_of(request: &DeltaDiscoveryRequest, type_url: &str) -> bool {
    request.type_url == type_url
        && !request.response_nonce.is_empty()
        && request.error_detail.is_none()
        && request.resource_names_subscribe.is_empty()
}

fn nack(rejected: &[Rejected]) -> Status {
    let mut message = String::new();
    for (index, Rejected { name, reason, .. }) in rejected.iter().enumerate() {
        let next = format!("{name}: {reason}");
        if message.len() + next.len() + 2 > MAX_NACK_MESSAGE {
            if message.is_empty() {
                message.extend(next.chars().take(MAX_NACK_MESSAGE / 4));
            }
            message.push_str(&format!("; {} more", rejected.len() - index));
            break;
        }
        if index > 0 {
            message.push_str("; ");
        }
        message.push_str(&next);
    }
    Status { code: INVALID_ARGUMENT, message, details: Vec::new() }
}
