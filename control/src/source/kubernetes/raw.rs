//! An object as the API server sends it: any JSON, with the metadata that watching needs.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::{ApiResource, DynamicResourceScope, PartialObjectMeta};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

/// An object of any kind. One whose fields make no sense is still one: [`crate::intake`] judges it, not the watch.
#[derive(Clone, Debug)]
pub(super) struct RawObject {
    metadata: ObjectMeta,
    value: Value,
}

impl RawObject {
    /// All of it.
    pub(super) fn value(&self) -> &Value {
        &self.value
    }
}

impl From<PartialObjectMeta<RawObject>> for RawObject {
    fn from(partial: PartialObjectMeta<RawObject>) -> RawObject {
        let mut metadata = partial.metadata;
        // Nobody reads who wrote which field, and it is the largest part.
        metadata.managed_fields = None;
        // Its type is that of metadata alone, which is no type of ours.
        RawObject { value: json!({ "metadata": &metadata }), metadata }
    }
}

impl<'de> Deserialize<'de> for RawObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RawObject, D::Error> {
        let mut value = Value::deserialize(deserializer)?;
        if let Some(Value::Object(metadata)) = value.get_mut("metadata") {
            metadata.remove("managedFields");
        }
        let metadata = value.get("metadata").map(|metadata| {
            let text = |key: &str| metadata.get(key).and_then(Value::as_str).map(str::to_owned);
            // What watching needs, whatever the rest looks like.
            ObjectMeta {
                name: text("name"),
                namespace: text("namespace"),
                resource_version: text("resourceVersion"),
                ..ObjectMeta::default()
            }
        });
        Ok(RawObject { metadata: metadata.unwrap_or_default(), value })
    }
}

impl kube::Resource for RawObject {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        resource.kind.as_str().into()
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        resource.group.as_str().into()
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        resource.version.as_str().into()
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        resource.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
