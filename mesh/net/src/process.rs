//! Settings of the calling process.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The limit of open files if it cannot be read.
const FEW_FILES: u64 = 1024;

/// Raises the soft limit of open files to the hard one and returns the limit that is then in force: each connection needs
/// a descriptor, and the soft limit is often 1024. A failure is logged; the limit then stays as it is.
pub fn raise_file_limit() -> u64 {
    let limits = getrlimit(Resource::RLIMIT_NOFILE);
    let raised = limits.and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((FEW_FILES, FEW_FILES));
    tracing::debug!(soft, hard, "the limit of open files");
    soft
}

/// Makes the kernel back this process's memory by small pages (prctl(2), `PR_SET_THP_DISABLE`).
///
/// With transparent huge pages, a few used bytes in each region of the allocator cost 2 MiB of memory. Call it before
/// anything is allocated. If it fails, only more memory is used.
///
/// # Errors
///
/// What prctl(2) returned.
pub fn disable_huge_pages() -> io::Result<()> {
    Ok(nix::sys::prctl::set_thp_disable(true)?)
}
