//! A wall clock that is set while certificates live by it.
//!
//! The kernel has no wall clock per namespace, and the programs are static, so nothing can be loaded before them. The test
//! runs copies of them in which the C library's `clock_gettime` is replaced: it adds an offset that the test writes into the
//! running process.

use std::fs;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ambit_local::Cluster;
use ambit_tests::credentials::end_of_dumped;
use ambit_tests::wait;
use object::read::elf::{ElfFile64, FileHeader};
use object::{Object, ObjectSection, ObjectSymbol};

use crate::bed::{Bed, ECHO, ping};

/// `clock_gettime` by system call, in machine code of x86-64. The last eight bytes are the offset, seconds.
const CLOCK_GETTIME: [u8; 72] = {
    const CODE: [u8; 33] = [
        0xb8, 0xe4, 0x00, 0x00, 0x00, // mov eax, SYS_clock_gettime
        0x0f, 0x05, // syscall
        0x48, 0x85, 0xc0, // test rax, rax
        0x75, 0x0f, // jne failed
        0x85, 0xff, // test edi, edi: CLOCK_REALTIME is 0
        0x75, 0x0a, // jne done
        0x48, 0x8b, 0x0d, 0x29, 0x00, 0x00, 0x00, // mov rcx, [offset]
        0x48, 0x01, 0x0e, // add [rsi], rcx: tv_sec
        0xc3, // done: ret
        0xb8, 0xff, 0xff, 0xff, 0xff, // failed: mov eax, -1
        0xc3, // ret
    ];
    let mut function = [0; 72];
    let mut at = 0;
    while at < CODE.len() {
        function[at] = CODE[at];
        at += 1;
    }
    function
};
/// Where the offset is in the function.
const OFFSET: u64 = 64;
const NODES: usize = 2;
const HOUR: i64 = 3600;
/// Between two messages on a kept connection: longer in all than the proxies take to look at their peers again.
const KEPT_PACE: Duration = Duration::from_millis(300);
/// Control plane and proxies look at the clock every ten seconds.
const RECOVERED: Duration = Duration::from_secs(30);

/// A copy of a program whose wall clock can be set.
struct Adjustable {
    program: PathBuf,
    /// Address of `clock_gettime`, as linked.
    function: u64,
}

impl Adjustable {
    fn new(directory: &Path, name: &str) -> Self {
        let mut built = std::env::current_exe().unwrap();
        built.pop();
        built.set_file_name(name);
        let mut bytes = fs::read(&built).unwrap();
        let (function, at) = find_clock_gettime(&bytes);
        bytes[at..at + CLOCK_GETTIME.len()].copy_from_slice(&CLOCK_GETTIME);
        let program = directory.join(name);
        let mut options = fs::OpenOptions::new();
        let file = options.create_new(true).write(true).mode(0o755).open(&program).unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        Self { program, function }
    }

    /// Sets the clock of a running process by so many seconds.
    fn set(&self, pid: u32, seconds: i64) {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let first = maps.lines().find(|line| line.ends_with(self.program.to_str().unwrap())).unwrap();
        let base = u64::from_str_radix(first.split('-').next().unwrap(), 16).unwrap();
        let memory = fs::OpenOptions::new().write(true).open(format!("/proc/{pid}/mem")).unwrap();
        memory.write_all_at(&seconds.to_ne_bytes(), base + self.function + OFFSET).unwrap();
    }
}

/// The linked address of `clock_gettime`, and where it is in the file.
fn find_clock_gettime(program: &[u8]) -> (u64, usize) {
    let file = ElfFile64::<object::Endianness>::parse(program).unwrap();
    let header = file.elf_header();
    assert_eq!(header.e_machine(file.endian()), object::elf::EM_X86_64, "the replacement is for x86-64");
    let symbol =
        file.symbols().find(|symbol| symbol.name() == Ok("clock_gettime")).expect("a static program");
    assert!(symbol.size() >= CLOCK_GETTIME.len() as u64, "the replacement is longer than the function");
    let section = file.section_by_index(symbol.section_index().unwrap()).unwrap();
    let (start, _) = section.file_range().unwrap();
    let at = start + (symbol.address() - section.address());
    (symbol.address(), usize::try_from(at).unwrap())
}

/// The wall clock of the mesh's programs.
struct Clock {
    control: Adjustable,
    ztunnel: Adjustable,
}

impl Clock {
    fn set(&self, cluster: &Cluster, seconds: i64) {
        self.control.set(cluster.control().unwrap().pid().unwrap(), seconds);
        for node in 0..NODES {
            self.ztunnel.set(cluster.ztunnel(node).unwrap().pid().unwrap(), seconds);
        }
    }
}

/// When the client's certificate ends, by the client's proxy, seconds since 1970.
async fn end_of_certificate(bed: &Bed) -> u64 {
    let dump = bed.cluster.ztunnel(0).unwrap().config_dump().await.unwrap();
    let certificates = dump["certificates"].as_array().cloned().unwrap_or_default();
    let identity = bed.client.spiffe_id();
    let own = certificates.iter().find(|certificate| certificate["identity"] == identity.as_str());
    own.and_then(end_of_dumped).unwrap()
}

/// Open connections last, and new ones succeed within a moment.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_set_past_every_certificate_and_back_is_survived() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Clock {
        control: Adjustable::new(directory.path(), "ambit-control"),
        ztunnel: Adjustable::new(directory.path(), "ztunnel"),
    };
    let builder = Cluster::builder()
        .nodes(NODES)
        // Tokens are issued by the real clock.
        .token_lifetime(Duration::from_secs(30 * 24 * 3600))
        .ztunnel_program(&clock.ztunnel.program)
        .control_program(&clock.control.program);
    let bed = Bed::on(builder, true, &[1]).await;
    // The proxy asks for a pod's certificate when the pod is first dialled from.
    drop(bed.echo(bed.vip(ECHO)).await);
    let first = end_of_certificate(&bed).await;
    let mut before = first;
    for (offset, what) in [(48 * HOUR, "two days ahead"), (0, "back again")] {
        clock.set(&bed.cluster, offset);
        let set = Instant::now();
        wait::until(&format!("certificates by a clock that was set {what}"), RECOVERED, || async {
            end_of_certificate(&bed).await != before
        })
        .await;
        wait::for_ok("a new connection", wait::SOON, || async {
            let mut stream = bed.client.connect_within(bed.vip(ECHO), wait::SOON).await?;
            ping(&mut stream, what).await
        })
        .await;
        eprintln!("set {what}: as before after {:?}", set.elapsed());
        // Of the older connections, those on tunnels whose certificates are not valid by the clock may be closed (certificate contract).
        // One that was opened since then stays.
        let mut kept = bed.echo(bed.vip(ECHO)).await;
        for _ in 0..20 {
            assert_eq!(ping(&mut kept, what).await.expect("an open connection goes on"), what);
            tokio::time::sleep(KEPT_PACE).await;
        }
        before = end_of_certificate(&bed).await;
    }
    assert!(before.abs_diff(first) < 3600, "by the clock that was set back: {before} after {first}");
    bed.shutdown().await;
}
