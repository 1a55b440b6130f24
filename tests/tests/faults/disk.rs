//! A disk that is full below the access log.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use ambit_local::Cluster;
use ambit_tests::wait;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::bed::{Bed, ECHO};

/// Size of the disk.
const SIZE: &str = "size=1m";
const DROPPED: &str = "ambit_access_log_dropped_total";
const FAILED_WRITES: &str = "ambit_access_log_failed_writes_total";

/// A file system in memory, for as long as this lives.
struct Disk {
    directory: tempfile::TempDir,
}

impl Disk {
    fn mount() -> Self {
        let directory = tempfile::tempdir().unwrap();
        mount(Some("tmpfs"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some(SIZE))
            .expect("a file system in memory needs root");
        Self { directory }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Takes all space that is left.
    fn fill(&self) -> PathBuf {
        let path = self.path().join("filler");
        let mut file = File::create(&path).unwrap();
        let chunk = [0; 4096];
        while file.write_all(&chunk).is_ok() {}
        path
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Detached, for node proxies of a failed test may still have the log open.
        if let Err(error) = umount2(self.path(), MntFlags::MNT_DETACH) {
            eprintln!("{} stays mounted: {error}", self.path().display());
        }
    }
}

/// Lines of the log that are whole, and how many are not.
fn lines(path: &Path) -> (usize, usize) {
    let text = std::fs::read_to_string(path).unwrap();
    let whole = text.lines().filter(|line| serde_json::from_str::<Value>(line).is_ok()).count();
    (whole, text.lines().count() - whole)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_drops_log_lines_but_no_traffic() {
    let disk = Disk::mount();
    let path = disk.path().join("access.json");
    let config = json!({ "format": "json", "path": path });
    let bed =
        Bed::on(Cluster::builder().nodes(2).ztunnel_config_of(0, "accessLog", config), true, &[1]).await;
    drop(bed.echo(bed.vip(ECHO)).await);
    wait::until("a line is logged", wait::SOON, || async { lines(&path).0 > 0 }).await;
    let load = bed.load().await;
    load.more(50).await;
    let filler = disk.fill();
    wait::until("lines are dropped and counted", wait::SOON, || async {
        bed.count(0, DROPPED, &[]).await > 50.0
    })
    .await;
    assert!(bed.count(0, FAILED_WRITES, &[]).await > 0.0);
    load.more(100).await;
    std::fs::remove_file(filler).unwrap();
    let (before, _) = lines(&path);
    wait::until("logging goes on", wait::SOON, || async { lines(&path).0 > before + 50 }).await;
    let dropped = bed.count(0, DROPPED, &[]).await;
    load.more(50).await;
    assert_eq!(bed.count(0, DROPPED, &[]).await, dropped, "nothing is dropped any more");
    let (_, torn) = lines(&path);
    assert!(torn <= 1, "{torn} lines are torn");
    let tally = load.finish().await;
    bed.end(&tally, |_| false).await;
    drop(disk);
}
