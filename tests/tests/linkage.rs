//! The programs are static: they run in an empty image and on any distribution.

use object::elf::{DT_NEEDED, PT_INTERP};
use object::read::elf::{Dyn, ElfFile64, FileHeader, ProgramHeader};

/// The programs that are shipped or that tests put into images.
const PROGRAMS: [&str; 7] =
    ["ambit", "ambit-cni", "ambit-control", "ambit-node", "ambit-waypoint", "bookinfo", "ztunnel"];

#[test]
fn programs_need_no_shared_library() {
    let mut directory = std::env::current_exe().unwrap();
    directory.pop();
    directory.pop();
    for name in PROGRAMS {
        let path = directory.join(name);
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = ElfFile64::<object::Endianness>::parse(&*bytes).unwrap();
        let endian = file.endian();
        let headers = file.elf_header().program_headers(endian, &*bytes).unwrap();
        assert!(headers.iter().all(|header| header.p_type(endian) != PT_INTERP), "{name} has an interpreter");
        let mut entries =
            headers.iter().filter_map(|header| header.dynamic(endian, &*bytes).unwrap()).flatten();
        assert!(entries.all(|entry| entry.tag(endian) != DT_NEEDED), "{name} needs a shared library");
    }
}
