//! Tables of the fields of a kind, to name those of an object that have no effect: misspelt, withdrawn, or not supported.

use serde_json::Value;

/// What a value may hold.
#[derive(Clone, Copy)]
pub(super) enum Shape {
    /// Nothing that is looked at here.
    Any,
    /// These fields.
    Fields(&'static [(&'static str, Shape)]),
    /// Values of this shape.
    Each(&'static Shape),
}

use Shape::{Each, Fields};

/// A field of an earlier version or of examples on the web, and what has its effect today.
pub(super) type Withdrawn = (&'static str, &'static str);

/// A field that has no effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unknown {
    /// Its path below the spec.
    pub(super) path: String,
    /// What to write instead.
    pub(super) advice: String,
}

/// The fields of a spec that the table does not have.
pub(super) fn unknown(spec: &Value, table: &Shape, withdrawn: &[Withdrawn]) -> Vec<Unknown> {
    /// So many are enough to begin with.
    const MOST: usize = 50;
    let mut found = Vec::new();
    walk(spec, table, withdrawn, "", &mut found);
    found.truncate(MOST);
    found
}

fn walk(value: &Value, shape: &Shape, withdrawn: &[Withdrawn], at: &str, found: &mut Vec<Unknown>) {
    match (shape, value) {
        (Fields(known), Value::Object(fields)) => {
            for (name, value) in fields {
                let path = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
                match known.iter().find(|(known, _)| known == name) {
                    Some((_, shape)) => walk(value, shape, withdrawn, &path, found),
                    None => found.push(Unknown { path, advice: advice(name, known, withdrawn) }),
                }
            }
        }
        (Each(shape), Value::Array(items)) => {
            for (index, item) in items.iter().enumerate() {
                walk(item, shape, withdrawn, &format!("{at}[{index}]"), found);
            }
        }
        // Of another type than it must be: reading it says so.
        (Shape::Any | Fields(_) | Each(_), _) => {}
    }
}

fn advice(name: &str, known: &[(&'static str, Shape)], withdrawn: &[Withdrawn]) -> String {
    if let Some((_, advice)) = withdrawn.iter().find(|(field, _)| *field == name) {
        return (*advice).to_owned();
    }
    let plain = name.replace(['_', '-'], "").to_ascii_lowercase();
    let near = known.iter().find(|(known, _)| {
        plain.len() < 64 && strsim::damerau_levenshtein(&known.to_ascii_lowercase(), &plain) <= 2
    });
    match near {
        Some((known, _)) => format!("did you mean `{known}`?"),
        None => "there is no such field".to_owned(),
    }
}
