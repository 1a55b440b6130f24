//! The objects that files hold, and which file counts for an object: pure, fed by [`super::Directories`].
//!
//! An object is what its document says, whatever it was before; one that cannot be read is what stands for it, or absent
//! ([`crate::intake`], and [`super::salvage`] for documents that are no YAML). A file that cannot be read at all keeps what
//! it had: it is there and unchanged, as far as anybody knows. Of several files with the same object the first in order
//! counts.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use smallvec::SmallVec;

use super::document::{Entry, Outcome};
use crate::intake::Fault;
use crate::object::{Change, Kind, Object, ObjectRef};
use crate::source::Problem;

/// Where a file stands: the order of its source, then its path.
pub(super) type FileId = (usize, Arc<Path>);

/// What was made of a file's content.
#[derive(Debug)]
pub(super) enum Content {
    /// It was read, whatever the documents came to.
    Read(Vec<Entry>),
    /// It could not be read at all.
    Unreadable(String),
    /// It is not there.
    Gone,
}

impl Content {
    /// Whether it was read and holds nothing at all.
    pub(super) fn is_empty(&self) -> bool {
        matches!(self, Content::Read(documents) if documents.is_empty())
    }
}

#[derive(Debug, Default)]
struct File {
    objects: Objects,
    problems: Vec<Problem>,
    /// Whether its content was read at least once.
    was_read: bool,
}

/// What a file has, in the order of references. Most files have one object, and there may be many files, so that no room is kept for more.
#[derive(Debug, Default)]
struct Objects(Box<[(ObjectRef, Object)]>);

impl Objects {
    fn get(&self, reference: &ObjectRef) -> Option<&Object> {
        let at = self.0.binary_search_by(|(known, _)| known.cmp(reference)).ok()?;
        self.0.get(at).map(|(_, object)| object)
    }

    fn iter(&self) -> impl ExactSizeIterator<Item = &(ObjectRef, Object)> {
        self.0.iter()
    }
}

impl From<BTreeMap<ObjectRef, Object>> for Objects {
    fn from(objects: BTreeMap<ObjectRef, Object>) -> Self {
        Objects(objects.into_iter().collect())
    }
}

/// What files say of an object, in the order of the files: nearly always it is one.
type Claims = SmallVec<[(FileId, Object); 1]>;

/// All files of all directories.
#[derive(Debug, Default)]
pub(super) struct Files {
    files: BTreeMap<FileId, File>,
    /// Problems of all files together.
    problems: usize,
    claims: HashMap<ObjectRef, Claims>,
}

/// What a file's new content did.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Effect {
    /// Changes of objects.
    pub(super) changes: Vec<Change>,
    /// Problems that the file has now and did not have before.
    pub(super) new_problems: Vec<Problem>,
}

impl Files {
    /// Takes the content of a file.
    pub(super) fn apply(&mut self, id: &FileId, content: Content) -> Effect {
        let old = self.files.remove(id).unwrap_or_default();
        self.problems -= old.problems.len();
        let new = match content {
            Content::Gone => None,
            Content::Unreadable(message) => Some(unreadable(&id.1, &old, message)),
            Content::Read(documents) => Some(read(&id.1, documents)),
        };
        let mut changes = Vec::new();
        let objects = new.as_ref().map(|file| &file.objects);
        for (reference, _) in old.objects.iter().filter(|(r, _)| objects.is_none_or(|o| o.get(r).is_none())) {
            changes.extend(self.claim(reference, id, None));
        }
        for (reference, object) in objects.into_iter().flat_map(Objects::iter) {
            changes.extend(self.claim(reference, id, Some(object.clone())));
        }
        let mut new_problems = Vec::new();
        if let Some(mut file) = new {
            for (reference, _) in file.objects.iter() {
                file.problems.extend(self.shadowed(reference, id));
            }
            new_problems = file.problems.iter().filter(|p| !old.problems.contains(p)).cloned().collect();
            self.problems += file.problems.len();
            self.files.insert(id.clone(), file);
        }
        Effect { changes, new_problems }
    }

    /// Whether content would take objects away or leave something unread: what half-written files do. That a file of pods is gone is what it
    /// seems: they are written by programs, which replace files in one step, and their peers wait to learn of it.
    pub(super) fn would_lose(&self, id: &FileId, content: &Content) -> bool {
        let old = self.files.get(id);
        let documents = match content {
            Content::Read(documents) => documents,
            Content::Unreadable(_) => return true,
            Content::Gone => {
                let is_pod = |(reference, _): &(ObjectRef, Object)| reference.kind == Kind::Pod;
                return !old.is_some_and(|old| old.objects.iter().all(is_pod));
            }
        };
        let Some(old) = old else {
            return documents.iter().any(|d| matches!(d.outcome, Outcome::Faulty(_)));
        };
        let mut seen = 0;
        for document in documents {
            match &document.outcome {
                Outcome::Faulty(_) | Outcome::StandIn(_) => return true,
                Outcome::Object(object) => {
                    seen += usize::from(old.objects.get(&object.reference()).is_some());
                }
                Outcome::Ignored => {}
            }
        }
        seen < old.objects.iter().len()
    }

    /// Files known below a path, the path itself included.
    pub(super) fn below<'a>(&'a self, source: usize, path: &'a Path) -> impl Iterator<Item = &'a FileId> {
        // Paths are ordered by their components, so what is below a directory follows it.
        let from = self.files.range((source, Arc::from(path))..).map(|(id, _)| id);
        from.take_while(move |(s, p)| *s == source && p.starts_with(path))
    }

    /// How many files could never be read.
    pub(super) fn unread(&self) -> usize {
        self.files.values().filter(|file| !file.was_read).count()
    }

    /// How many problems there are.
    pub(super) fn problems(&self) -> usize {
        self.problems
    }

    /// How many objects there are.
    pub(super) fn len(&self) -> usize {
        self.claims.len()
    }

    /// Sets or takes back what a file says of an object; a change only if it is the one that counts.
    fn claim(&mut self, reference: &ObjectRef, id: &FileId, object: Option<Object>) -> Option<Change> {
        let claims = self.claims.entry(reference.clone()).or_default();
        let before = claims.first().map(|(_, object)| object.clone());
        match (object, claims.binary_search_by(|(claimant, _)| claimant.cmp(id))) {
            (Some(object), Ok(at)) => {
                if let Some((_, claimed)) = claims.get_mut(at) {
                    *claimed = object;
                }
            }
            (Some(object), Err(at)) => claims.insert(at, (id.clone(), object)),
            (None, Ok(at)) => drop(claims.remove(at)),
            (None, Err(_)) => {}
        }
        let after = claims.first().map(|(_, object)| object.clone());
        if after.is_none() {
            self.claims.remove(reference);
        }
        match after {
            Some(after) if before.as_ref() != Some(&after) => Some(Change::Apply(after)),
            None if before.is_some() => Some(Change::Delete(reference.clone())),
            _ => None,
        }
    }

    /// The problem of an object that an earlier file of the same source has, too. Objects of another source are overridden
    /// on purpose.
    fn shadowed(&self, reference: &ObjectRef, id: &FileId) -> Option<Problem> {
        let (first, _) = self.claims.get(reference)?.first()?;
        (first.0 == id.0 && first != id).then(|| Problem {
            file: id.1.to_path_buf(),
            line: None,
            field: None,
            object: Some(reference.clone()),
            message: format!("is also in {}, which counts", first.1.display()),
        })
    }
}

fn unreadable(path: &Path, old: &File, message: String) -> File {
    let problem = Problem { file: path.to_owned(), line: None, field: None, object: None, message };
    File { objects: Objects(old.objects.0.clone()), problems: vec![problem], was_read: old.was_read }
}

fn read(path: &Path, documents: Vec<Entry>) -> File {
    let (mut objects, mut problems) = (BTreeMap::new(), Vec::new());
    let mut lines: HashMap<ObjectRef, u64> = HashMap::new();
    let (mut faults, mut stand_ins) = (Vec::new(), Vec::new());
    for Entry { line, outcome } in documents {
        match outcome {
            Outcome::Ignored => {}
            Outcome::Faulty(fault) => faults.push((line, fault)),
            Outcome::StandIn(object) => stand_ins.push(object),
            Outcome::Object(object) => {
                let reference = object.reference();
                if let Some(first) = lines.get(&reference) {
                    let message = format!("is already defined on line {first}, which counts");
                    problems.push(problem(path, line, None, Some(reference), message));
                } else {
                    lines.insert(reference.clone(), line);
                    objects.insert(reference, object);
                }
            }
        }
    }
    for (line, fault) in faults {
        let Fault { object, field, message, stand_in, line: _ } = fault;
        stand_ins.extend(stand_in.map(|stand_in| *stand_in));
        problems.push(problem(path, line, field, object, message));
    }
    for stand_in in stand_ins {
        objects.entry(stand_in.reference()).or_insert(stand_in);
    }
    File { objects: objects.into(), problems, was_read: true }
}

fn problem(
    path: &Path,
    line: u64,
    field: Option<String>,
    object: Option<ObjectRef>,
    message: String,
) -> Problem {
    Problem { file: path.to_owned(), line: Some(line), field, object, message }
}

#[cfg(test)]
#[path = "claims_tests.rs"]
mod tests;
