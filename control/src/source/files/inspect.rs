//! The documents of a text one by one, with their lines: for commands that explain manifests. The watch does not use it.

use std::sync::Arc;

use serde_json::Value;

use super::document::{self, List, Outcome};
use super::yaml;
use crate::object::{Object, ObjectRef};

/// A document, or an item of a `List`.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// The line that it begins at, or that is wrong, from 1.
    pub line: u64,
    /// What it is.
    pub content: Content,
    /// Where its fields are.
    pub fields: Fields,
}

/// Where the fields of an object are in the text that it was read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fields {
    /// Lines before the document.
    before: u64,
    text: Arc<str>,
    /// Its place, if it is an item of a `List`.
    item: Option<usize>,
}

impl Fields {
    /// The line of a field, as `spec.ports[0].port`, from 1; of what encloses it if it is not there.
    pub fn line(&self, field: &str) -> Option<u64> {
        let line = match self.item {
            Some(item) => yaml::locate_name(&self.text, &format!("items[{item}].{field}")),
            None => yaml::locate_name(&self.text, field),
        };
        line.map(|line| self.before + line)
    }
}

/// What a document is.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// An object that the control plane reads.
    Object(Object),
    /// An object of a kind that it does not read.
    Foreign(Value),
    /// What it cannot take.
    Fault {
        /// The object, if its identity is known.
        object: Option<ObjectRef>,
        /// The field that is wrong.
        field: Option<String>,
        /// What is wrong.
        message: String,
        /// What counts instead: policies fail closed.
        stand_in: Option<Box<Object>>,
    },
}

/// Reads every document of a text.
pub fn documents(text: &str) -> Vec<Document> {
    document::split(text).into_iter().flat_map(|(before, text)| read(before, &text)).collect()
}

fn read(before: u64, text: &str) -> Vec<Document> {
    let entries = document::read_document(before, text);
    let is_list = entries.len() != 1;
    let mut foreign =
        foreign(text, is_list || matches!(yaml::read::<List>(text), Ok(list) if !list.items.is_empty()));
    let first = before + first_line(text);
    let shared: Arc<str> = text.into();
    let mut documents = Vec::with_capacity(entries.len());
    for (index, entry) in entries.into_iter().enumerate() {
        let content = match entry.outcome {
            Outcome::Object(object) => Content::Object(object),
            Outcome::Ignored => Content::Foreign(foreign.get_mut(index).map(Value::take).unwrap_or_default()),
            Outcome::StandIn(object) => {
                let message = "it may be in the document that cannot be read, and fails closed".to_owned();
                let reference = Some(object.reference());
                Content::Fault { object: reference, field: None, message, stand_in: Some(Box::new(object)) }
            }
            Outcome::Faulty(fault) => Content::Fault {
                object: fault.object,
                field: fault.field,
                message: fault.message,
                stand_in: fault.stand_in,
            },
        };
        // Where no line of its own is known, an entry has that of the marker before the document.
        let fields = Fields { before, text: shared.clone(), item: is_list.then_some(index) };
        documents.push(Document { line: entry.line.max(first), content, fields });
    }
    documents
}

/// The line of a document's text, from 1, that its content begins at.
fn first_line(text: &str) -> u64 {
    let is_content = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
    text.lines().take_while(|line| !is_content(line)).count() as u64 + 1
}

/// The objects of a text as they are written, in the order of its entries.
fn foreign(text: &str, is_list: bool) -> Vec<Value> {
    if is_list {
        let list = yaml::read::<List>(text).ok();
        return list.into_iter().flat_map(|list| list.items).map(|item| item.value).collect();
    }
    yaml::read::<Value>(text).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {ports: [{port: 80}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: store, namespace: shop}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: broken, namespace: shop}
spec:
  action: FORBID
---
apiVersion: v1
kind: List
items:
  - {apiVersion: v1, kind: Namespace, metadata: {name: shop}}
  - {apiVersion: batch/v1, kind: CronJob, metadata: {name: nightly}}
";

    #[test]
    fn every_document_is_there_with_its_line() {
        let documents = documents(TEXT);
        let shown: Vec<String> = documents
            .iter()
            .map(|document| {
                let what = match &document.content {
                    Content::Object(object) => object.reference().to_string(),
                    Content::Foreign(value) => {
                        format!("foreign {}", value["kind"].as_str().unwrap_or_default())
                    }
                    Content::Fault { object, stand_in, .. } => {
                        let object = object.as_ref().map(ToString::to_string).unwrap_or_default();
                        format!("fault {object}, stand-in: {}", stand_in.is_some())
                    }
                };
                format!("{}: {what}", document.line)
            })
            .collect();
        let expected = [
            "1: Service shop/web",
            "6: foreign StatefulSet",
            "14: fault AuthorizationPolicy shop/broken, stand-in: true",
            "19: Namespace shop",
            "20: foreign CronJob",
        ];
        assert_eq!(shown, expected);
    }
}
