//! The CA's roots as a file, for proxies and tools that start without any trust.

use std::io;
use std::path::{Path, PathBuf};

use ambit_ca::Authority;

/// Writes the roots to a file now, and whenever they change.
///
/// The future returned ends only when the authority does.
///
/// # Errors
/// When the file cannot be written the first time.
pub async fn write_out(
    authority: Authority,
    path: PathBuf,
) -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut changes = authority.subscribe();
    let mut written = authority.roots_pem();
    replace(&path, &written).await?;
    Ok(async move {
        while changes.changed().await.is_ok() {
            let roots = authority.roots_pem();
            if roots == written {
                continue;
            }
            match replace(&path, &roots).await {
                Ok(()) => written = roots,
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "roots not written; the file is out of date");
                }
            }
        }
    })
}

/// Puts content in place at once: a reader sees the old or the new, never a part.
async fn replace(path: &Path, content: &str) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let draft = path.with_file_name(name);
    tokio::fs::write(&draft, content).await?;
    tokio::fs::rename(&draft, path).await
}
