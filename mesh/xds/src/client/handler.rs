//! Connects the session, which handles names and bytes, to the handler, which handles typed messages.

use std::collections::HashMap;
use std::sync::Arc;

use ambit_api::discovery::{DeltaDiscoveryResponse, Resource};

/// One change to a resource of one type.
#[derive(Debug, Clone, PartialEq)]
pub enum Update<M> {
    /// The resource is new or has changed.
    Upsert {
        /// The resource's name as the server gave it.
        name: String,
        /// The resource.
        resource: M,
    },
    /// The resource is gone.
    Remove {
        /// The resource's name.
        name: String,
    },
}

/// A resource that the handler rejected. The rest of the batch applies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// The resource's type.
    pub type_url: String,
    /// The resource's name.
    pub name: String,
    /// The reason, for the server's log.
    pub reason: String,
}

/// Applies batches of changes. The driver calls it for one batch at a time, between two reads of the stream, so it is
/// expected to be quick.
pub trait Handler<C>: Send + 'static {
    /// Applies one batch, in order, and returns the resources that it rejects. A batch holds changes of all types and
    /// must take effect at once: a workload must not become visible before the policies that it lists.
    fn handle(&mut self, batch: &mut dyn Iterator<Item = C>) -> Vec<Rejected>;

    /// A demanded `name` is no longer subscribed. Drops the resources that were there only because of it and returns
    /// their names; `is_subscribed` says of other names whether they still are. Also called with the name of a resource.
    ///
    /// By default nothing is dropped.
    fn release(&mut self, type_url: &str, name: &str, is_subscribed: &dyn Fn(&str) -> bool) -> Vec<String> {
        let _ = (type_url, name, is_subscribed);
        Vec::new()
    }
}

impl<C, F> Handler<C> for F
where
    F: FnMut(&mut dyn Iterator<Item = C>) -> Vec<Rejected> + Send + 'static,
{
    fn handle(&mut self, batch: &mut dyn Iterator<Item = C>) -> Vec<Rejected> {
        self(batch)
    }
}

/// A handler and its decoders, with the type of its changes hidden from the session.
pub(crate) trait Sink: Send {
    /// Decodes and applies the answers of one batch; returns what the decoders or the handler rejected.
    fn apply(&mut self, answers: &[DeltaDiscoveryResponse]) -> Vec<Rejected>;
    /// As [`Handler::release`].
    fn release(&mut self, type_url: &str, name: &str, is_subscribed: &dyn Fn(&str) -> bool) -> Vec<String>;
}

/// Decodes one resource body, or reports a removal, as the handler's kind of change.
type Decoder<C> = Box<dyn Fn(Input<'_>) -> Result<C, String> + Send>;

enum Input<'a> {
    Upsert(&'a Resource),
    Remove(&'a str),
}

/// The decoders by type URL, and the handler of their results.
pub(crate) struct Decoders<C> {
    types: HashMap<Arc<str>, Decoder<C>>,
    handler: Box<dyn Handler<C>>,
}

impl<C: 'static> Decoders<C> {
    pub(crate) fn new(handler: impl Handler<C>) -> Self {
        Self { types: HashMap::new(), handler: Box::new(handler) }
    }

    /// Adds a type whose messages `change` turns into the handler's kind of change.
    pub(crate) fn add<M>(&mut self, type_url: &str, change: impl Fn(Update<M>) -> C + Send + 'static)
    where
        M: prost::Message + Default + 'static,
    {
        let known: Arc<str> = type_url.into();
        let expected = Arc::clone(&known);
        let decoder = move |input: Input<'_>| match input {
            Input::Remove(name) => Ok(change(Update::Remove { name: name.to_owned() })),
            Input::Upsert(resource) => decode(&expected, resource)
                .map(|message| change(Update::Upsert { name: resource.name.clone(), resource: message })),
        };
        self.types.insert(known, Box::new(decoder));
    }
}

fn decode<M: prost::Message + Default>(type_url: &str, resource: &Resource) -> Result<M, String> {
    let any = resource.resource.as_ref().ok_or("the resource has no body")?;
    if *any.type_url != *type_url {
        return Err(format!("expected {type_url}, got {}", any.type_url));
    }
    M::decode(any.value.as_slice()).map_err(|error| format!("not a {type_url}: {error}"))
}

impl<C: 'static> Sink for Decoders<C> {
    fn apply(&mut self, answers: &[DeltaDiscoveryResponse]) -> Vec<Rejected> {
        let Self { types, handler } = self;
        let mut undecoded = Vec::new();
        // Lazily: a large batch is never held in decoded form as a whole.
        let mut changes = answers
            .iter()
            .filter_map(|answer| Some((answer, types.get(answer.type_url.as_str())?)))
            .flat_map(|(answer, decoder)| inputs(answer).map(move |input| (answer, decoder, input)))
            .filter_map(|(answer, decoder, input)| {
                let name = match &input {
                    Input::Upsert(resource) => resource.name.as_str(),
                    Input::Remove(name) => name,
                };
                decoder(input)
                    .map_err(|reason| {
                        let (type_url, name) = (answer.type_url.clone(), name.to_owned());
                        undecoded.push(Rejected { type_url, name, reason });
                    })
                    .ok()
            })
            .peekable();
        let mut rejected = match changes.peek() {
            Some(_) => handler.handle(&mut changes),
            None => Vec::new(),
        };
        // A handler that stops early does not decide what is decoded.
        changes.for_each(drop);
        rejected.append(&mut undecoded);
        rejected
    }

    fn release(&mut self, type_url: &str, name: &str, is_subscribed: &dyn Fn(&str) -> bool) -> Vec<String> {
        self.handler.release(type_url, name, is_subscribed)
    }
}

/// The changes of one answer: removals first.
fn inputs(answer: &DeltaDiscoveryResponse) -> impl Iterator<Item = Input<'_>> {
    let removals = answer.removed_resources.iter().map(|name| Input::Remove(name));
    // xDS "TTL": a resource without a body only prolongs the life of what is held.
    let with_body = answer.resources.iter().filter(|it| it.resource.is_some() || it.ttl.is_none());
    removals.chain(with_body.map(Input::Upsert))
}
