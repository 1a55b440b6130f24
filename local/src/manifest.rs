//! YAML text in, Kubernetes objects out: the edge where a directory of manifests becomes typed.
//!
//! It reads objects of any kind; callers convert them to Kubernetes types. It never accesses the
//! cluster.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};

/// Kinds that have no namespace.
const CLUSTER_SCOPED: &[&str] = &[
    "Namespace",
    "Node",
    "GatewayClass",
    "IngressClass",
    "CustomResourceDefinition",
    "ClusterRole",
    "ClusterRoleBinding",
    "PersistentVolume",
    "StorageClass",
    "PriorityClass",
];
/// A larger manifest is refused, bytes.
const LARGEST_FILE: u64 = 16 * 1024 * 1024;

/// What an object is called.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Kind, such as `Service`.
    pub kind: String,
    /// Namespace; empty for a kind that has none.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl Key {
    /// A key; the namespace is left out for kinds that have none.
    #[must_use]
    pub fn new(kind: &str, namespace: &str, name: &str) -> Self {
        let namespace = if CLUSTER_SCOPED.contains(&kind) { "" } else { namespace };
        Self { kind: kind.to_owned(), namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, namespace, name } = self;
        match namespace.as_str() {
            "" => write!(f, "{kind} {name}"),
            namespace => write!(f, "{kind} {namespace}/{name}"),
        }
    }
}

/// An object as it was written, with its namespace filled in.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Object {
    /// What it is called.
    pub(crate) key: Key,
    /// Where it came from.
    pub(crate) file: PathBuf,
    /// The whole object.
    pub(crate) body: Value,
}

impl Object {
    /// The object as a Kubernetes type.
    ///
    /// # Errors
    /// [`Error::Manifest`] with the path of the field that does not fit.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Result<T> {
        serde_path_to_error::deserialize(&self.body).map_err(|error| Error::Manifest {
            file: self.file.clone(),
            line: None,
            message: format!("{}: field {}: {}", self.key, error.path(), error.inner()),
        })
    }
}

/// Reads all objects of a file.
///
/// # Errors
/// [`Error::System`] when the file can't be read, [`Error::Manifest`] when it is not understood.
pub(crate) fn read_file(file: &Path) -> Result<Vec<Object>> {
    let attempt = || format!("read {}", file.display());
    let size = std::fs::metadata(file).map_err(Error::system(attempt()))?.len();
    if size > LARGEST_FILE {
        return Err(Error::manifest(file, format!("{size} bytes are more than a manifest may have")));
    }
    let text = std::fs::read_to_string(file).map_err(Error::system(attempt()))?;
    parse(file, &text)
}

/// Reads all objects of a text of YAML documents. `List` objects are taken apart.
///
/// # Errors
/// [`Error::Manifest`] with the line where it is known.
pub(crate) fn parse(file: &Path, text: &str) -> Result<Vec<Object>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|error| Error::Manifest {
        file: file.to_owned(),
        line: error.location().map(|location| location.line()),
        message: explained(&error.to_string()),
    })?;
    let mut objects = Vec::new();
    for document in documents.into_iter().filter(|document| !document.is_null()) {
        let is_list = document.get("kind").and_then(Value::as_str).is_some_and(|kind| kind == "List");
        match (is_list, document) {
            (true, Value::Object(mut list)) => {
                if let Some(Value::Array(items)) = list.remove("items") {
                    for item in items {
                        objects.push(object(file, item)?);
                    }
                }
            }
            (_, document) => objects.push(object(file, document)?),
        }
    }
    Ok(objects)
}

/// Names the likely cause of an object that begins inside another one.
fn explained(message: &str) -> String {
    let begins_an_object = ["apiVersion", "kind", "metadata"].iter().any(|key| message.contains(key));
    if message.contains("duplicate") && begins_an_object {
        format!("{message}; is a line \"---\" missing between two documents?")
    } else {
        message.to_owned()
    }
}

fn object(file: &Path, mut body: Value) -> Result<Object> {
    let missing = |field: &str| Error::manifest(file, format!("an object without {field}"));
    let kind = body.get("kind").and_then(Value::as_str).ok_or_else(|| missing("kind"))?.to_owned();
    if body.get("apiVersion").and_then(Value::as_str).is_none() {
        return Err(missing(&format!("apiVersion, of kind {kind}")));
    }
    let metadata = body
        .get_mut("metadata")
        .and_then(Value::as_object_mut)
        .ok_or_else(|| missing(&format!("metadata, of kind {kind}")))?;
    if let Some(name) = metadata.get("name").filter(|name| !name.is_string()) {
        // YAML 1.1: `n`, `no` and `on` are truth values, and digits are numbers.
        let message = format!("metadata.name, of kind {kind}, is {name}, not text: put it in quotes");
        return Err(Error::manifest(file, message));
    }
    let name = metadata
        .get("name")
        .and_then(Value::as_str)
        .filter(|name| !name.is_empty() && !name.contains('/'))
        .ok_or_else(|| missing(&format!("a usable metadata.name, of kind {kind}")))?
        .to_owned();
    let namespace = metadata.get("namespace").and_then(Value::as_str).unwrap_or("default").to_owned();
    let key = Key::new(&kind, &namespace, &name);
    if !key.namespace.is_empty() {
        metadata.insert("namespace".to_owned(), Value::String(key.namespace.clone()));
    }
    Ok(Object { key, file: file.to_owned(), body })
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::apps::v1::Deployment;

    fn parsed(text: &str) -> Result<Vec<Object>> {
        parse(Path::new("test.yaml"), text)
    }

    #[test]
    fn an_object_without_namespace_is_in_the_default_one() {
        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n---\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: b}\n";
        let objects = parsed(text).expect("the manifest is sound");
        let keys: Vec<_> = objects.iter().map(|object| object.key.to_string()).collect();
        assert_eq!(keys, ["Service default/a", "Namespace b"]);
    }

    #[test]
    fn a_list_is_taken_apart() {
        let text = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Service, metadata: {name: a, namespace: x}}\n";
        assert_eq!(parsed(text).expect("the manifest is sound")[0].key, Key::new("Service", "x", "a"));
    }

    #[test]
    fn a_syntax_error_names_its_line() {
        let error = parsed("apiVersion: v1\nkind: [\n").expect_err("the sequence is not closed");
        assert!(matches!(error, Error::Manifest { line: Some(line), .. } if line >= 2), "{error}");
    }

    #[test]
    fn a_missing_separator_is_named() {
        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\napiVersion: v1\nkind: Service\nmetadata: {name: b}\n";
        let error = parsed(text).expect_err("one object has two kinds").to_string();
        assert!(error.contains(r#"is a line "---" missing"#), "{error}");
        assert!(error.starts_with("test.yaml:4"), "{error}");
    }

    #[test]
    fn a_field_of_the_wrong_type_is_named() {
        let text = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\nspec: {replicas: many, selector: {}, template: {}}\n";
        let objects = parsed(text).expect("the syntax is sound");
        let error = objects[0].read::<Deployment>().expect_err("replicas is a number");
        assert!(error.to_string().contains("spec.replicas"), "{error}");
    }

    #[test]
    fn a_name_that_yaml_reads_as_a_truth_value_is_reported() {
        let error = parsed("apiVersion: v1\nkind: Service\nmetadata: {name: n}\n").expect_err("no name");
        assert!(error.to_string().contains("put it in quotes"), "{error}");
    }

    #[test]
    fn an_object_without_a_name_is_refused() {
        assert!(parsed("apiVersion: v1\nkind: Service\nmetadata: {}\n").is_err());
        assert!(parsed("apiVersion: v1\nkind: Service\nmetadata: {name: a/b}\n").is_err());
        assert!(parsed("just text").is_err());
    }
}
