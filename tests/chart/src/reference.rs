//! The reference page of the chart's values, from `values.yaml` and its comments.

use anyhow::{Context, ensure};
use serde_json::Value;

/// A value of the chart, or a group of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The key with its path, dotted.
    pub key: String,
    /// The default as JSON; none for a group.
    pub default: Option<String>,
    /// The comment above it.
    pub meaning: String,
}

/// A line of `values.yaml` that has a key.
struct Line<'a> {
    indent: usize,
    key: &'a str,
    comment: String,
}

/// The values of a `values.yaml`, in its order. A value is what carries a comment and holds nothing that carries one; what
/// holds values is a group.
///
/// # Errors
/// It is not YAML.
pub fn rows(text: &str) -> anyhow::Result<Vec<Row>> {
    let values: Value = serde_saphyr::from_str(text).context("values.yaml is not YAML")?;
    let lines = lines(text);
    let mut path: Vec<(usize, &str)> = Vec::new();
    let mut found = Vec::new();
    let mut inside_value = None;
    for (index, line) in lines.iter().enumerate() {
        if inside_value.is_some_and(|indent| line.indent > indent) {
            continue;
        }
        inside_value = None;
        path.retain(|(indent, _)| *indent < line.indent);
        path.push((line.indent, line.key));
        let nested = lines[index + 1..].iter().take_while(|other| other.indent > line.indent);
        let is_group = nested.into_iter().any(|other| !other.comment.is_empty());
        let keys: Vec<&str> = path.iter().map(|(_, key)| *key).collect();
        let default = if is_group {
            None
        } else {
            inside_value = Some(line.indent);
            let value = values.pointer(&format!("/{}", keys.join("/")));
            Some(value.with_context(|| format!("no {} in values.yaml", keys.join(".")))?.to_string())
        };
        found.push(Row { key: keys.join("."), default, meaning: line.comment.clone() });
    }
    Ok(found)
}

/// Lines with keys, each with the comment above it.
fn lines(text: &str) -> Vec<Line<'_>> {
    let mut found = Vec::new();
    let mut comment: Vec<&str> = Vec::new();
    for line in text.lines() {
        let content = line.trim_start();
        if let Some(words) = content.strip_prefix('#') {
            comment.push(words.trim());
            continue;
        }
        let key = content.split_once(':').map(|(key, _)| key).filter(|_| !content.starts_with('-'));
        if let Some(key) = key {
            let indent = line.len() - content.len();
            found.push(Line { indent, key, comment: comment.join(" ") });
        }
        comment.clear();
    }
    found
}

/// Every key of a schema with its path, but for those that lie in a value, and `global`, which Helm adds.
///
/// # Errors
/// A reference leads nowhere.
pub fn schema_keys(schema: &Value) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    collect(schema, schema, "", &mut found)?;
    found.retain(|key| key != "global");
    Ok(found)
}

fn collect(schema: &Value, node: &Value, prefix: &str, found: &mut Vec<String>) -> anyhow::Result<()> {
    let Some(properties) = node.get("properties").and_then(Value::as_object) else { return Ok(()) };
    ensure!(node.get("additionalProperties") == Some(&Value::Bool(false)), "`{prefix}` takes unknown keys");
    for (name, property) in properties {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        found.push(key.clone());
        match property.get("$ref").and_then(Value::as_str) {
            None => collect(schema, property, &key, found)?,
            Some("#/$defs/image") => {
                let image = schema.pointer("/$defs/image").context("no definition of an image")?;
                collect(schema, image, &key, found)?;
            }
            // What the definition holds are parts of one value.
            Some(_) => {}
        }
    }
    Ok(())
}

/// The reference page, in Markdown.
pub fn page(rows: &[Row]) -> String {
    let mut page = String::from(
        "# Values of the chart\n\nWritten from `charts/ambit/values.yaml`; `AMBIT_WRITE_DOCS=1 cargo test -p ambit-chart reference` \
         writes it anew. Keys that are not here are refused, with their path. How to set them: [Install](install.md).\n\n\
         | key | default | meaning |\n| --- | --- | --- |\n",
    );
    for row in rows {
        let default = match row.default.as_deref() {
            None => String::new(),
            Some("\"\"" | "null" | "[]" | "{}") => "none".to_owned(),
            Some(text) if text.starts_with('"') => text.trim_matches('"').to_owned(),
            Some(text) if text.starts_with(['{', '[']) => format!("`{text}`"),
            Some(text) => text.to_owned(),
        };
        let key = match row.default {
            Some(_) => format!("`{}`", row.key),
            None => format!("**`{}`**", row.key),
        };
        page.push_str(&format!("| {key} | {default} | {} |\n", row.meaning.replace('|', "\\|")));
    }
    page
}
