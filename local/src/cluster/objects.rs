//! The cluster's objects: those of the manifest directory, those applied by call, and their published form.
//!
//! The controller reads desired state from [`Objects`] and writes what an API server would show through
//! [`Published`], into the directory that the control plane watches.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::manifest::{self, Key, Object};
use crate::token;

/// Manifest files deeper than this are not looked for.
const DEPTH: usize = 8;
/// More manifest files than this are refused.
const MOST_FILES: usize = 4096;

/// Desired state. An applied object overrides one of the same key in a file.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    files: BTreeMap<PathBuf, Vec<Object>>,
    applied: BTreeMap<Key, Object>,
    problems: BTreeMap<PathBuf, String>,
}

impl Objects {
    /// Applies an object, replacing one of the same key.
    pub(crate) fn put(&mut self, object: Object) {
        self.applied.insert(object.key.clone(), object);
    }

    /// Takes an applied object back. False when there is none.
    pub(crate) fn remove(&mut self, key: &Key) -> bool {
        self.applied.remove(key).is_some()
    }

    /// Reads a directory again. For a file that cannot be read, the previous objects stay, and the fault is listed
    /// among the problems.
    ///
    /// # Errors
    /// When the directory itself can't be read.
    pub(crate) fn load(&mut self, directory: &Path) -> Result<()> {
        let mut found = Vec::new();
        list(directory, DEPTH, &mut found)?;
        self.files.retain(|file, _| found.contains(file));
        self.problems.retain(|file, _| found.contains(file));
        for file in found {
            match manifest::read_file(&file) {
                Ok(objects) => {
                    self.problems.remove(&file);
                    self.files.insert(file, objects);
                }
                Err(error) => {
                    tracing::warn!(%error, "a manifest is left as it was before");
                    self.problems.insert(file, error.to_string());
                }
            }
        }
        Ok(())
    }

    /// Faults of the manifests, one sentence each.
    pub(crate) fn problems(&self) -> Vec<String> {
        self.problems.values().cloned().collect()
    }

    /// The object of a key.
    pub(crate) fn get(&self, key: &Key) -> Option<&Object> {
        self.applied
            .get(key)
            .or_else(|| self.files.values().flatten().rev().find(|object| object.key == *key))
    }

    /// All objects, one a key.
    pub(crate) fn all(&self) -> BTreeMap<Key, Object> {
        let files = self.files.values().flatten();
        files.chain(self.applied.values()).map(|object| (object.key.clone(), object.clone())).collect()
    }

    /// Keys of objects that were applied by call: they are in no file that the control plane reads.
    pub(crate) fn applied(&self) -> impl Iterator<Item = &Object> {
        self.applied.values()
    }
}

fn list(directory: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
    let attempt = || format!("read directory {}", directory.display());
    let entries = std::fs::read_dir(directory).map_err(Error::system(attempt()))?;
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry.map_err(Error::system(attempt()))?.path());
    }
    paths.sort();
    for path in paths {
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        let manifest = path.extension().is_some_and(|ext| ext == "yaml" || ext == "yml" || ext == "json");
        if hidden {
            continue;
        }
        if path.is_dir() && depth > 0 {
            list(&path, depth - 1, found)?;
        } else if manifest && path.is_file() {
            if found.len() >= MOST_FILES {
                return Err(Error::manifest(directory, format!("more than {MOST_FILES} manifest files")));
            }
            found.push(path);
        }
    }
    Ok(())
}

/// The directory of published objects, one file each.
#[derive(Debug)]
pub(crate) struct Published {
    directory: PathBuf,
    written: BTreeMap<Key, Value>,
}

impl Published {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory, written: BTreeMap::new() }
    }

    /// Makes the directory show exactly `objects`; files that need no change are not touched.
    ///
    /// # Errors
    /// When a file can't be written; those before it are.
    pub(crate) fn publish(&mut self, objects: &BTreeMap<Key, Value>) -> Result<()> {
        let gone: Vec<Key> = self.written.keys().filter(|key| !objects.contains_key(key)).cloned().collect();
        for key in gone {
            let file = self.file(&key);
            std::fs::remove_file(&file).map_err(Error::system(format!("remove {}", file.display())))?;
            self.written.remove(&key);
        }
        for (key, object) in objects {
            if self.written.get(key) == Some(object) {
                continue;
            }
            let text = serde_json::to_vec_pretty(object)
                .map_err(|error| Error::System { attempt: format!("encode {key}"), source: error.into() })?;
            token::replace(&self.file(key), &text)?;
            self.written.insert(key.clone(), object.clone());
        }
        Ok(())
    }

    fn file(&self, key: &Key) -> PathBuf {
        let Key { kind, namespace, name } = key;
        // Names of Kubernetes objects have neither a slash nor an underscore.
        self.directory.join(format!("{kind}_{namespace}_{name}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(port: u16) -> String {
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: s}}\nspec: {{ports: [{{port: {port}}}]}}\n")
    }

    fn port(objects: &Objects) -> Option<u64> {
        let object = objects.get(&Key::new("Service", "default", "s"))?;
        object.body["spec"]["ports"][0]["port"].as_u64()
    }

    #[test]
    fn a_broken_file_keeps_its_last_objects_and_is_reported() {
        let directory = tempfile::tempdir().expect("a directory can be made");
        let file = directory.path().join("a.yaml");
        let mut objects = Objects::default();
        std::fs::write(&file, service(1)).expect("the file can be written");
        objects.load(directory.path()).expect("the directory can be read");
        std::fs::write(&file, "kind: [").expect("the file can be written");
        objects.load(directory.path()).expect("the directory can be read");
        assert_eq!((port(&objects), objects.problems().len()), (Some(1), 1));
        std::fs::write(&file, service(2)).expect("the file can be written");
        objects.load(directory.path()).expect("the directory can be read");
        assert_eq!((port(&objects), objects.problems().len()), (Some(2), 0));
        std::fs::remove_file(&file).expect("the file can be removed");
        objects.load(directory.path()).expect("the directory can be read");
        assert_eq!(port(&objects), None);
    }

    #[test]
    fn an_applied_object_overrides_a_file_until_it_is_removed() {
        let directory = tempfile::tempdir().expect("a directory can be made");
        std::fs::write(directory.path().join("a.yaml"), service(1)).expect("the file can be written");
        let mut objects = Objects::default();
        objects.load(directory.path()).expect("the directory can be read");
        for object in manifest::parse(Path::new("applied"), &service(3)).expect("a sound manifest") {
            objects.put(object);
        }
        assert_eq!(port(&objects), Some(3));
        assert!(objects.remove(&Key::new("Service", "default", "s")));
        assert_eq!(port(&objects), Some(1));
    }

    #[test]
    fn published_files_come_and_go_with_their_objects() {
        let directory = tempfile::tempdir().expect("a directory can be made");
        let mut published = Published::new(directory.path().to_owned());
        let key = Key::new("Pod", "n", "p");
        let objects = [(key, serde_json::json!({"kind": "Pod"}))].into();
        published.publish(&objects).expect("it can be written");
        assert!(directory.path().join("Pod_n_p.json").is_file());
        published.publish(&BTreeMap::new()).expect("it can be removed");
        assert_eq!(std::fs::read_dir(directory.path()).expect("it can be read").count(), 0);
    }
}
