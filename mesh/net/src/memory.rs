//! A process's resident memory: no huge pages for small needs, and code that only starting needed given back.
//!
//! Programs that run on every node call this; nothing of it changes what the program does.

use std::io;

/// Has the kernel back this process's memory by small pages from now on (prctl(2), `PR_SET_THP_DISABLE`).
///
/// An allocator asks for huge pages, and then a few bytes in each of its regions cost 2 MiB of memory.
pub fn without_huge_pages() -> io::Result<()> {
    Ok(nix::sys::prctl::set_thp_disable(true)?)
}

/// Drops the pages of programs and libraries from this process; they stay in the page cache, and what is
/// used again is mapped again at its next use, for about a microsecond a page. Returns the bytes dropped.
///
/// Starting touches most of a program once: configuration, command line, handshakes.
pub fn release_code() -> io::Result<u64> {
    let mut released = 0;
    for mapping in clean_file_mappings(&std::fs::read_to_string("/proc/self/smaps")?) {
        released += mapping.resident;
        release(&mapping)?;
    }
    Ok(released)
}

#[allow(unsafe_code, reason = "madvise takes addresses")]
fn release(mapping: &Mapping) -> io::Result<()> {
    // SAFETY: the mapping is private, of a file, read-only and without a page of its own, so that every page
    // of it is read again from the file as it was. One that was unmapped meanwhile fails with ENOMEM; a
    // program unmaps its code only when it unloads a library, which ours never does.
    let outcome = unsafe {
        libc::madvise(
            std::ptr::with_exposed_provenance_mut(mapping.start),
            mapping.length,
            libc::MADV_DONTNEED,
        )
    };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: usize,
    length: usize,
    resident: u64,
}

/// The read-only private mappings of files of which no page was changed (proc(5), `/proc/pid/smaps`).
///
/// Read-only data that was relocated has changed pages and must stay.
fn clean_file_mappings(smaps: &str) -> Vec<Mapping> {
    let mut found = Vec::new();
    let mut current: Option<Mapping> = None;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        match (words.next(), &mut current) {
            (Some("Rss:"), Some(mapping)) => mapping.resident = kilobytes(words.next()) * 1024,
            (Some("Anonymous:"), Some(_)) => {
                let mapping = current.take();
                if kilobytes(words.next()) == 0 {
                    found.extend(mapping);
                }
            }
            (Some(range), _) if !range.ends_with(':') => current = mapping(range, words),
            _ => {}
        }
    }
    found
}

fn kilobytes(word: Option<&str>) -> u64 {
    // What can't be read counts as a page of its own, which leaves the mapping alone.
    word.and_then(|word| word.parse().ok()).unwrap_or(1)
}

/// The first line of a mapping: range, permissions, offset, device, inode, path.
fn mapping<'a>(range: &str, mut words: impl Iterator<Item = &'a str>) -> Option<Mapping> {
    let (start, end) = range.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    let read_only = matches!(words.next()?, "r-xp" | "r--p");
    let of_file = words.nth(3)?.starts_with('/');
    (read_only && of_file).then_some(Mapping { start, length: end.checked_sub(start)?, resident: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0c0000000-55d0c0100000 r--p 00000000 fe:00 42 /usr/bin/ztunnel
Size:               1024 kB
Rss:                 512 kB
Anonymous:             0 kB
55d0c0100000-55d0c0200000 r-xp 00100000 fe:00 42 /usr/bin/ztunnel
Rss:                1024 kB
Anonymous:             0 kB
55d0c0200000-55d0c0201000 r--p 00200000 fe:00 42 /usr/bin/ztunnel
Rss:                   4 kB
Anonymous:             4 kB
55d0c0201000-55d0c0202000 rw-p 00201000 fe:00 42 /usr/bin/ztunnel
Rss:                   4 kB
Anonymous:             0 kB
7f0000000000-7f0000001000 r--p 00000000 00:00 0
Rss:                   4 kB
Anonymous:             0 kB
7f0000002000-7f0000003000 r-xp 00000000 00:00 0 [vdso]
Rss:                   4 kB
Anonymous:             0 kB
";

    #[test]
    fn only_unchanged_read_only_pages_of_files_are_released() {
        let found = clean_file_mappings(SMAPS);
        assert_eq!(
            found,
            [
                Mapping { start: 0x55d0_c000_0000, length: 0x10_0000, resident: 512 * 1024 },
                Mapping { start: 0x55d0_c010_0000, length: 0x10_0000, resident: 1024 * 1024 },
            ]
        );
    }

    #[test]
    fn a_process_goes_on_after_its_code_was_released() {
        let released = release_code().unwrap();
        assert!(released > 0);
        assert_eq!(format!("{:?}", [1, 2, 3]), "[1, 2, 3]");
        assert!(release_code().unwrap() < released, "what was not used since is not resident");
    }
}
