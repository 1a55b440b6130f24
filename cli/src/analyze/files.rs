//! Manifests from files, directories and standard input.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use ambit_control::source::files::inspect;
use anyhow::{Context, bail};

use super::judge::{Item, Place};

/// Directories deeper than this are an error.
const DEEPEST: usize = 32;

/// The documents of files, in the order of their names.
///
/// # Errors
/// When a file can't be read.
pub(crate) fn read(paths: &[PathBuf]) -> anyhow::Result<Vec<Item>> {
    let mut items = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("read standard input")?;
            add(Path::new("-"), &text, &mut items);
        } else {
            let mut files = Vec::new();
            walk(path, 0, &mut files)?;
            for file in files {
                let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
                add(&file, &text, &mut items);
            }
        }
    }
    Ok(items)
}

/// The documents of a text that is called `name`.
pub(crate) fn read_text(name: &str, text: &str) -> Vec<Item> {
    let mut items = Vec::new();
    add(Path::new(name), text, &mut items);
    items
}

fn add(file: &Path, text: &str, items: &mut Vec<Item>) {
    items.extend(inspect::documents(text).into_iter().map(|document| Item {
        place: Some(Place { file: file.display().to_string(), line: document.line }),
        content: document.content,
        fields: Some(document.fields),
        is_context: false,
    }));
}

/// A file, or every manifest below a directory.
fn walk(path: &Path, depth: usize, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let attempt = || format!("read {}", path.display());
    if !fs::metadata(path).with_context(attempt)?.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    if depth > DEEPEST {
        bail!("{} is nested too deeply", path.display());
    }
    let mut entries =
        fs::read_dir(path).with_context(attempt)?.collect::<Result<Vec<_>, _>>().with_context(attempt)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let is_hidden = entry.file_name().to_string_lossy().starts_with('.');
        let extension = path.extension().and_then(|extension| extension.to_str());
        let is_manifest = matches!(extension, Some("yaml" | "yml" | "json"));
        if !is_hidden && (is_manifest || path.is_dir()) {
            walk(&path, depth + 1, files)?;
        }
    }
    Ok(())
}
