//! Settings of the calling process.

use std::io;

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
