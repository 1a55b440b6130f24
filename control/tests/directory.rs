//! Watching real directories: what writers do to files, and what comes of it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ambit_control::object::{Change, Object};
use ambit_control::source::files::Directories;
use ambit_control::source::{Event, SourceMetrics};
use tokio::sync::mpsc::Receiver;

const DEADLINE: Duration = Duration::from_secs(20);

/// A watched directory, and what its followers know: services and their first port.
struct Watched {
    root: tempfile::TempDir,
    directories: Directories,
    events: Receiver<Event>,
    metrics: Arc<SourceMetrics>,
    services: BTreeMap<String, u16>,
    /// Every removal that there was.
    removed: Vec<String>,
}

impl Watched {
    async fn start(prepare: impl FnOnce(&Path)) -> Watched {
        let root = tempfile::tempdir().unwrap();
        prepare(root.path());
        let metrics = Arc::new(SourceMetrics::default());
        let roots = vec![root.path().to_owned()];
        let (directories, events) = Directories::watch(roots, metrics.clone()).unwrap();
        let mut watched =
            Watched { root, directories, events, metrics, services: BTreeMap::new(), removed: Vec::new() };
        while watched.next().await {}
        watched
    }

    /// Takes the next event; `false` if it says that the start is over.
    async fn next(&mut self) -> bool {
        let event = tokio::time::timeout(DEADLINE, self.events.recv()).await.expect("nothing came").unwrap();
        let Event::Changes(changes) = event else { return false };
        for change in changes {
            match change {
                Change::Apply(Object::Service(service)) => {
                    self.services.insert(service.meta.id.name.to_string(), service.ports[0].number);
                }
                Change::Apply(other) => panic!("{other:?}"),
                Change::Delete(reference) => {
                    self.services.remove(&*reference.name.name);
                    self.removed.push(reference.name.name.to_string());
                }
            }
        }
        true
    }

    async fn until(&mut self, services: &[(&str, u16)]) {
        let wanted: BTreeMap<String, u16> = services.iter().map(|(n, p)| ((*n).to_owned(), *p)).collect();
        while self.services != wanted {
            assert!(self.next().await);
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }
}

fn service(name: &str, port: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {port}}}]}}\n"
    )
}

#[tokio::test]
async fn files_are_followed_into_new_directories() {
    let mut watched = Watched::start(|root| fs::write(root.join("a.yaml"), service("a", 1)).unwrap()).await;
    assert_eq!(watched.services, BTreeMap::from([("a".to_owned(), 1)]));
    fs::create_dir_all(watched.path("deep/er")).unwrap();
    fs::write(watched.path("deep/er/b.yml"), service("b", 2)).unwrap();
    watched.until(&[("a", 1), ("b", 2)]).await;
    fs::write(watched.path("deep/er/b.yml"), service("b", 3)).unwrap();
    watched.until(&[("a", 1), ("b", 3)]).await;
    fs::rename(watched.path("deep"), watched.path("moved")).unwrap();
    fs::write(
        watched.path("moved/er/c.json"),
        r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"c"},"spec":{"ports":[{"port":4}]}}"#,
    )
    .unwrap();
    watched.until(&[("a", 1), ("b", 3), ("c", 4)]).await;
    fs::remove_dir_all(watched.path("moved")).unwrap();
    watched.until(&[("a", 1)]).await;
}

#[tokio::test]
async fn hidden_files_and_files_of_other_kinds_are_left_alone() {
    let mut watched = Watched::start(|_| ()).await;
    for name in [".a.yaml", "a.yaml~", "a.txt", ".hidden/a.yaml"] {
        let path = watched.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, service("hidden", 1)).unwrap();
    }
    fs::write(watched.path("z.yaml"), service("z", 1)).unwrap();
    watched.until(&[("z", 1)]).await;
    // What is written where a scan would not look is no event either.
    fs::create_dir_all(watched.path(".hidden/deep")).unwrap();
    fs::write(watched.path(".hidden/a.yaml"), service("hidden", 2)).unwrap();
    fs::write(watched.path(".hidden/deep/a.yaml"), service("hidden", 2)).unwrap();
    fs::write(watched.path("z.yaml"), service("z", 2)).unwrap();
    watched.until(&[("z", 2)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_rewritten_in_place_never_loses_an_object() {
    let start = format!("{}{}", service("a", 1), service("b", 1));
    let mut watched = Watched::start(|root| fs::write(root.join("f.yaml"), &start).unwrap()).await;
    let (path, done) = (watched.path("f.yaml"), Arc::new(AtomicBool::new(false)));
    let writer = std::thread::spawn({
        let done = done.clone();
        move || {
            for port in 2..=400 {
                // Truncated and written in place: for moments the file is empty.
                fs::write(&path, format!("{}{}", service("a", port), service("b", port))).unwrap();
            }
            done.store(true, Ordering::Release);
        }
    });
    watched.until(&[("a", 400), ("b", 400)]).await;
    writer.join().unwrap();
    assert!(done.load(Ordering::Acquire));
    assert_eq!(watched.removed, Vec::<String>::new());
}

#[tokio::test]
async fn a_file_that_an_editor_replaces_in_two_steps_does_not_flicker() {
    let mut watched = Watched::start(|root| fs::write(root.join("f.yaml"), service("a", 1)).unwrap()).await;
    for port in 2..12 {
        // As vim does with `backup`: the old file is moved away, then the new one is written.
        fs::rename(watched.path("f.yaml"), watched.path("f.yaml~")).unwrap();
        fs::write(watched.path("f.yaml"), service("a", port)).unwrap();
        watched.until(&[("a", port)]).await;
    }
    assert_eq!(watched.removed, Vec::<String>::new());
}

#[tokio::test]
async fn a_mounted_configmap_is_followed_through_its_data_link() {
    let mut watched = Watched::start(|root| {
        fs::create_dir(root.join("..one")).unwrap();
        fs::write(root.join("..one/a.yaml"), service("a", 1)).unwrap();
        symlink("..one", root.join("..data")).unwrap();
        symlink("..data/a.yaml", root.join("a.yaml")).unwrap();
    })
    .await;
    assert_eq!(watched.services, BTreeMap::from([("a".to_owned(), 1)]));
    fs::create_dir(watched.path("..two")).unwrap();
    fs::write(watched.path("..two/a.yaml"), service("a", 2)).unwrap();
    symlink("..two", watched.path("..data_tmp")).unwrap();
    fs::rename(watched.path("..data_tmp"), watched.path("..data")).unwrap();
    watched.until(&[("a", 2)]).await;
    assert_eq!(watched.removed, Vec::<String>::new());
}

#[tokio::test]
async fn a_file_that_is_not_text_keeps_what_it_had_and_is_counted() {
    let mut watched = Watched::start(|root| fs::write(root.join("f.yaml"), service("a", 1)).unwrap()).await;
    fs::write(watched.path("f.yaml"), [0xff, 0xfe, 0x00]).unwrap();
    fs::write(watched.path("g.yaml"), service("g", 1)).unwrap();
    watched.until(&[("a", 1), ("g", 1)]).await;
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while watched.metrics.problems.load(Ordering::Relaxed) == 0 {
        assert!(tokio::time::Instant::now() < deadline, "no problem was counted");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(watched.services.len(), 2);
}

#[tokio::test]
async fn of_several_directories_the_first_named_has_an_object() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(second.path().join("s.yaml"), service("s", 2)).unwrap();
    let metrics = Arc::new(SourceMetrics::default());
    let roots = vec![first.path().to_owned(), second.path().to_owned()];
    let (directories, events) = Directories::watch(roots, metrics.clone()).unwrap();
    let (services, removed) = (BTreeMap::new(), Vec::new());
    let mut watched = Watched { root: first, directories, events, metrics, services, removed };
    watched.until(&[("s", 2)]).await;
    assert!(!watched.next().await);
    fs::write(watched.path("published.yaml"), service("s", 1)).unwrap();
    watched.until(&[("s", 1)]).await;
    fs::remove_file(watched.path("published.yaml")).unwrap();
    watched.until(&[("s", 2)]).await;
    assert_eq!(watched.metrics.malformed.load(Ordering::Relaxed), 0);
    assert_eq!(watched.removed, Vec::<String>::new());
}

#[tokio::test]
async fn a_dropped_watch_ends_and_a_missing_directory_is_refused() {
    let watched = Watched::start(|_| ()).await;
    let Watched { directories, mut events, root, metrics, .. } = watched;
    drop(directories);
    assert!(tokio::time::timeout(DEADLINE, events.recv()).await.unwrap().is_none());
    let missing = vec![root.path().join("missing")];
    let error = Directories::watch(missing, metrics).unwrap_err().to_string();
    assert!(error.contains("missing"), "{error}");
}
