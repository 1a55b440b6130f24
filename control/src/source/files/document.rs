//! A file's text into objects, document by document.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_saphyr::Spanned;

use super::{salvage, yaml};
use crate::intake::{self, Document, Fault, Header, Mismatch, Recognised};
use crate::kind::Kind;
use crate::object::Object;

/// What one document came to.
#[derive(Debug, PartialEq)]
pub(super) enum Outcome {
    /// An object.
    Object(Object),
    /// An object of a kind that the mesh does not read.
    Ignored,
    /// Nothing that can be taken.
    Faulty(Fault),
    /// A policy that refuses, in place of what the document before it may hold.
    StandIn(Object),
}

/// An outcome and the line of the file that it belongs to.
#[derive(Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) line: u64,
    pub(super) outcome: Outcome,
}

/// Reads every document of a file.
pub(super) fn read_all(text: &str) -> Vec<Entry> {
    split(text).into_iter().flat_map(|(before, text)| read_document(before, &text)).collect()
}

/// Cuts a stream at its `---` lines: the lines before each document, and its text. Documents without content are left out.
pub(super) fn split(text: &str) -> Vec<(u64, String)> {
    let mut documents = vec![(0, String::new())];
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let bare = line.trim_end();
        if let Some(rest) = bare.strip_prefix("---").filter(|r| r.is_empty() || r.starts_with([' ', '\t'])) {
            // What follows the marker on its line keeps its column.
            documents.push((number as u64, format!("   {rest}\n")));
        } else if bare != "..."
            && let Some((_, document)) = documents.last_mut()
        {
            document.push_str(line);
        }
    }
    let has_content =
        |text: &str| text.lines().map(str::trim).any(|line| !line.is_empty() && !line.starts_with('#'));
    documents.retain(|(_, document)| has_content(document));
    documents
}

/// The text of one document.
struct Text<'a>(&'a str);

impl Document for Text<'_> {
    fn read<T: DeserializeOwned>(&self) -> Result<T, Mismatch> {
        yaml::read(self.0)
    }
}

pub(super) fn read_document(before: u64, text: &str) -> Vec<Entry> {
    let at = |line: Option<u64>| before + line.unwrap_or(1);
    let faulty = |mismatch: Mismatch| {
        let stand_ins = salvage::policies(text, at(None), &mismatch.message).into_iter();
        let stand_ins = stand_ins.map(|object| Entry { line: at(None), outcome: Outcome::StandIn(object) });
        let fault = Entry { line: at(mismatch.line), outcome: Outcome::Faulty(Fault::new(mismatch)) };
        std::iter::once(fault).chain(stand_ins).collect()
    };
    let header: Header = match yaml::read(text) {
        Ok(header) => header,
        Err(mismatch) => return faulty(mismatch),
    };
    match intake::recognise(&header) {
        Recognised::Foreign => vec![Entry { line: at(None), outcome: Outcome::Ignored }],
        Recognised::Wrong(message) => {
            faulty(Mismatch { line: yaml::locate(text, "kind"), field: Some("kind".to_owned()), message })
        }
        Recognised::List => match yaml::read::<List>(text) {
            Ok(list) => read_items(before, text, list),
            Err(mismatch) => faulty(mismatch),
        },
        Recognised::Kind(kind) => vec![read_one(kind, &header, text, at)],
    }
}

fn read_one(kind: Kind, header: &Header, text: &str, at: impl Fn(Option<u64>) -> u64) -> Entry {
    match intake::read_document(kind, header, &Text(text)) {
        Ok(object) => Entry { line: at(None), outcome: Outcome::Object(object) },
        Err(fault) => {
            let found = || fault.field.as_deref().and_then(|field| yaml::locate(text, field));
            Entry { line: at(fault.line.or_else(found)), outcome: Outcome::Faulty(fault) }
        }
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct List {
    #[serde(default)]
    pub(super) items: Vec<Spanned<Value>>,
}

/// Faults of one list that are reported with the line of their field; later ones with the line of their item, as each
/// search goes through the whole text.
const MAX_SEARCHES: usize = 10;

fn read_items(before: u64, text: &str, list: List) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut searches = 0;
    for (i, Spanned { value: item, referenced, .. }) in list.items.into_iter().enumerate() {
        let start = referenced.line().max(1);
        let mut entry = Entry { line: before + start, outcome: read_item(&item) };
        if let Outcome::Faulty(fault) = &mut entry.outcome {
            let field =
                fault.field.take().map_or_else(|| format!("items[{i}]"), |f| format!("items[{i}].{f}"));
            searches += 1;
            let found = (searches <= MAX_SEARCHES).then(|| yaml::locate(text, &field)).flatten();
            entry.line = before + found.unwrap_or(start);
            fault.field = Some(field);
        }
        entries.push(entry);
    }
    entries
}

fn read_item(item: &Value) -> Outcome {
    let wrong = |message: String| Outcome::Faulty(Fault::new(Mismatch { line: None, field: None, message }));
    let header = match Document::read::<Header>(item) {
        Ok(header) => header,
        Err(mismatch) => return wrong(mismatch.message),
    };
    match intake::recognise(&header) {
        Recognised::Foreign => Outcome::Ignored,
        Recognised::Wrong(message) => wrong(message),
        Recognised::List => wrong("a List within a List".to_owned()),
        Recognised::Kind(kind) => {
            intake::read_document(kind, &header, item).map_or_else(Outcome::Faulty, Outcome::Object)
        }
    }
}
