//! Between the session, which knows names and bytes, and a handler, which knows one type of message.

use std::marker::PhantomData;

use ambit_api::discovery::Resource;

/// One change, in the order of arrival; within an answer removals come first.
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

/// A resource that the handler could not take. The rest of the answer applies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// The resource's name.
    pub name: String,
    /// Why, in words for the server's log.
    pub reason: String,
}

/// Applies the changes of one type. Called by the driver, one answer at a time, and expected to be
/// quick: it runs between two reads of the stream.
pub trait Handler<M>: Send + 'static {
    /// Applies the updates in order and returns those that were rejected.
    fn handle(&mut self, updates: Vec<Update<M>>) -> Vec<Rejected>;

    /// A demanded `name` is no longer subscribed. Drops the resources that were there only because of it and returns
    /// their names; `is_subscribed` says of other names whether they still are. Also called with the name of a resource.
    ///
    /// By default nothing is dropped.
    fn release(&mut self, name: &str, is_subscribed: &dyn Fn(&str) -> bool) -> Vec<String> {
        let _ = (name, is_subscribed);
        Vec::new()
    }
}

impl<M, F> Handler<M> for F
where
    F: FnMut(Vec<Update<M>>) -> Vec<Rejected> + Send + 'static,
{
    fn handle(&mut self, updates: Vec<Update<M>>) -> Vec<Rejected> {
        self(updates)
    }
}

/// A handler whose message type is hidden from the session.
pub(crate) trait Sink: Send {
    /// Decodes and applies; returns what was rejected, by decoding or by the handler.
    fn apply(&mut self, removed: &[String], resources: &[Resource]) -> Vec<Rejected>;
    /// As [`Handler::release`].
    fn release(&mut self, name: &str, is_subscribed: &dyn Fn(&str) -> bool) -> Vec<String>;
}

pub(crate) fn typed<M>(type_url: &str, handler: impl Handler<M>) -> Box<dyn Sink>
where
    M: prost::Message + Default + 'static,
{
    Box::new(Typed { type_url: type_url.to_owned(), handler, message: PhantomData::<fn() -> M> })
}

struct Typed<M, H> {
    type_url: String,
    handler: H,
    message: PhantomData<fn() -> M>,
}

impl<M, H> Typed<M, H>
where
    M: prost::Message + Default + 'static,
{
    fn decode(&self, resource: &Resource) -> Result<M, String> {
        let any = resource.resource.as_ref().ok_or("the resource has no body")?;
        if any.type_url != self.type_url {
            return Err(format!("expected {}, got {}", self.type_url, any.type_url));
        }
        M::decode(any.value.as_slice()).map_err(|error| format!("not a {}: {error}", self.type_url))
    }
}

impl<M, H> Sink for Typed<M, H>
where
    M: prost::Message + Default + 'static,
    H: Handler<M>,
{
    fn apply(&mut self, removed: &[String], resources: &[Resource]) -> Vec<Rejected> {
        let mut rejected = Vec::new();
        let mut updates = Vec::with_capacity(removed.len() + resources.len());
        updates.extend(removed.iter().map(|name| Update::Remove { name: name.clone() }));
        for resource in resources {
            // xDS "TTL": a resource without a body only prolongs the life of what is held.
            if resource.resource.is_none() && resource.ttl.is_some() {
                continue;
            }
            let name = resource.name.clone();
            match self.decode(resource) {
                Ok(message) => updates.push(Update::Upsert { name, resource: message }),
                Err(reason) => rejected.push(Rejected { name, reason }),
            }
        }
        if !updates.is_empty() {
            rejected.extend(self.handler.handle(updates));
        }
        rejected
    }
    fn release(&mut self, name: &str, is_subscribed: &dyn Fn(&str) -> bool) -> Vec<String> {
        self.handler.release(name, is_subscribed)
    }
}
