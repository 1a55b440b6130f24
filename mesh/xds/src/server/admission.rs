//! Authentication of subscribers, and the resources that each may see.

use std::any::Any;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use http::Extensions;
use tonic::Status;
use tonic::metadata::MetadataMap;

/// Authenticates the callers of streams. Asked once per stream, with the request's metadata and extensions: those that the
/// listener adds say who is connected.
pub trait Admission: Send + Sync + 'static {
    /// The subscriber behind the credentials, or why there is none (`UNAUTHENTICATED`, `PERMISSION_DENIED`).
    fn admit(
        &self,
        metadata: &MetadataMap,
        extensions: &Extensions,
    ) -> BoxFuture<'static, Result<Subscriber, Status>>;
}

/// An authenticated caller.
#[derive(Debug, Clone)]
pub struct Subscriber {
    /// Its identity, for the log.
    pub identity: Arc<str>,
    /// What it may see: decided from the identity, never from what the caller asks for.
    pub view: View,
    /// By which the admission counts streams; dropped when the stream ends.
    pub permit: Option<Permit>,
}

/// A guard that is dropped when the stream ends.
#[derive(Clone)]
pub struct Permit(#[expect(dead_code, reason = "held to be dropped")] Arc<dyn Any + Send + Sync>);

impl Permit {
    /// Holds `guard` for as long as the stream lasts.
    pub fn new(guard: impl Any + Send + Sync) -> Self {
        Self(Arc::new(guard))
    }
}

impl std::fmt::Debug for Permit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Permit")
    }
}

impl Subscriber {
    /// The subscriber that represents every caller of a server without admission.
    pub(crate) fn anonymous() -> Self {
        Self { identity: "anonymous".into(), view: View::everything(), permit: None }
    }
}

/// The resources that a subscriber may see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    types: Option<Arc<[Arc<str>]>>,
    root: Option<Arc<str>>,
}

impl View {
    /// Resources of every type.
    pub fn everything() -> Self {
        Self { types: None, root: None }
    }

    /// Resources of these types.
    pub fn of_types<'a>(type_urls: impl IntoIterator<Item = &'a str>) -> Self {
        Self { types: Some(type_urls.into_iter().map(Arc::from).collect()), root: None }
    }

    /// Of these types only what names `root` among its parents, and what that brings along. The subscriber gets all of it,
    /// whatever it asks for.
    pub fn below<'a>(root: impl Into<Arc<str>>, type_urls: impl IntoIterator<Item = &'a str>) -> Self {
        Self { root: Some(root.into()), ..Self::of_types(type_urls) }
    }

    /// Whether resources of a type may be seen.
    pub(crate) fn has_type(&self, type_url: &str) -> bool {
        self.types.as_ref().is_none_or(|types| types.iter().any(|known| **known == *type_url))
    }

    /// What resources must be below to be seen.
    pub(crate) fn root(&self) -> Option<&Arc<str>> {
        self.root.as_ref()
    }
}
