//! A wall clock that is set while certificates live by it.
//!
//! The kernel has no wall clock of a namespace's own, so a small library that is loaded before all others adds an offset
//! to what the programs of the mesh are told. It needs a C compiler, as building Ambit does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ambit_local::Cluster;
use ambit_tests::credentials::end_of_dumped;
use ambit_tests::wait;

use crate::bed::{Bed, ECHO, ping};

/// Adds the seconds in the file that `CLOCK_OFFSET` names to the wall clock.
const LIBRARY: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static int (*real)(clockid_t, struct timespec *);
static volatile int64_t *offset;

__attribute__((constructor)) static void begin(void) {
    real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("CLOCK_OFFSET");
    int file = path ? open(path, O_RDONLY) : -1;
    if (file < 0) return;
    void *map = mmap(0, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (map != MAP_FAILED) offset = map;
}

int clock_gettime(clockid_t id, struct timespec *time) {
    if (!real) begin();
    int result = real(id, time);
    if (result == 0 && id == CLOCK_REALTIME && offset) time->tv_sec += *offset;
    return result;
}
"#;
const HOUR: i64 = 3600;
/// Between two messages on a kept connection: longer in all than the proxies take to look at their peers again.
const KEPT_PACE: Duration = Duration::from_millis(300);
/// Control plane and proxies look at the clock every ten seconds.
const RECOVERED: Duration = Duration::from_secs(30);

/// The wall clock of the mesh's programs.
struct Clock {
    file: PathBuf,
    library: PathBuf,
}

impl Clock {
    fn new(directory: &Path) -> Self {
        let (source, library) = (directory.join("clock.c"), directory.join("clock.so"));
        fs::write(&source, LIBRARY).unwrap();
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([&library, &source])
            .arg("-ldl")
            .status()
            .expect("a C compiler");
        assert!(compiled.success());
        let clock = Self { file: directory.join("offset"), library };
        clock.set(0);
        clock
    }

    /// Sets the clock by so many seconds. In place: the programs have the file mapped.
    fn set(&self, seconds: i64) {
        use std::os::unix::fs::FileExt;
        let file = fs::OpenOptions::new().create(true).write(true).truncate(false).open(&self.file).unwrap();
        file.write_all_at(&seconds.to_ne_bytes(), 0).unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_set_past_every_certificate_and_back_again_costs_no_more_than_a_moment() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Clock::new(directory.path());
    let (library, file) = (clock.library.to_str().unwrap(), clock.file.to_str().unwrap());
    let builder = Cluster::builder()
        .nodes(2)
        // The tokens are of the clock that is not set.
        .token_lifetime(Duration::from_secs(30 * 24 * 3600))
        .ztunnel_env("LD_PRELOAD", library)
        .ztunnel_env("CLOCK_OFFSET", file)
        .control_env("LD_PRELOAD", library)
        .control_env("CLOCK_OFFSET", file);
    let bed = Bed::on(builder, true, &[1]).await;
    // The proxy asks for a pod's certificate when the pod is first dialled from.
    drop(bed.echo(bed.vip(ECHO)).await);
    let first = end_of_certificate(&bed).await;
    let mut before = first;
    for (offset, what) in [(48 * HOUR, "two days ahead"), (0, "back again")] {
        clock.set(offset);
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
        // Of the older connections, those on tunnels whose certificates are not valid by the clock may be closed (contracts.md,
        // section 5). One that was opened since then stays.
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
