use super::*;

const LIST: &str = r#"{ "cniVersion": "1.0.0", "name": "net", "plugins": [{ "type": "bridge" }] }"#;
const SINGLE: &str = r#"{ "cniVersion": "0.4.0", "name": "net", "type": "bridge" }"#;

struct Host {
    directory: tempfile::TempDir,
    installation: Installation,
}

fn host(placement: Placement) -> Host {
    let directory = tempfile::tempdir().unwrap();
    for name in ["image", "bin", "net.d"] {
        fs::create_dir(directory.path().join(name)).unwrap();
    }
    let program = directory.path().join("image/ambit-cni");
    fs::write(&program, "program").unwrap();
    let installation = Installation {
        program,
        bin_dir: directory.path().join("bin"),
        conf_dir: directory.path().join("net.d"),
        placement,
        entry: Entry { socket: "/run/cni.sock".into(), excluded_namespaces: vec!["kube-system".into()] },
    };
    Host { directory, installation }
}

impl Host {
    fn write(&self, name: &str, text: &str) {
        replace(&self.installation.conf_dir.join(name), text.as_bytes(), 0o644).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.installation.conf_dir.join(name)).unwrap()
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.installation.conf_dir).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[test]
fn the_first_list_is_chained_once_and_restored() {
    let host = host(Placement::Chained);
    host.write("10-net.conflist", LIST);
    host.write("20-other.conflist", LIST);
    host.write("05-none.conflist", "{}");
    assert_eq!(host.installation.install().unwrap().len(), 2);
    assert!(host.read("10-net.conflist").contains(PLUGIN));
    assert_eq!(host.read("20-other.conflist"), LIST);
    assert!(is_executable(&host.directory.path().join("bin/ambit-cni")));
    assert_eq!(host.installation.install().unwrap(), [] as [PathBuf; 0]);
    host.installation.remove().unwrap();
    assert!(conflist::same(&host.read("10-net.conflist"), LIST));
    assert!(!host.directory.path().join("bin/ambit-cni").exists());
}

#[test]
fn a_single_configuration_is_converted_and_restored() {
    let host = host(Placement::Chained);
    host.write("10-net.conf", SINGLE);
    host.installation.install().unwrap();
    assert_eq!(host.files(), ["10-net.conf.ambit-converted", "10-net.conflist"]);
    assert!(host.read("10-net.conflist").contains(PLUGIN));
    // Its owner writes it again.
    host.write("10-net.conf", &SINGLE.replace("bridge", "ptp"));
    host.installation.install().unwrap();
    assert!(host.read("10-net.conflist").contains("ptp"));
    host.installation.remove().unwrap();
    assert_eq!(host.files(), ["10-net.conf"]);
    assert!(host.read("10-net.conf").contains("ptp"));
}

#[test]
fn an_outdated_single_configuration_is_not_restored() {
    let host = host(Placement::Chained);
    host.write("10-net.conf", SINGLE);
    host.installation.install().unwrap();
    // A newer version of its owner writes a list instead.
    let newer = LIST.replace("bridge", "ptp");
    host.write("10-net.conflist", &newer);
    host.installation.install().unwrap();
    host.installation.remove().unwrap();
    assert_eq!(host.files(), ["10-net.conflist"]);
    assert!(conflist::same(&host.read("10-net.conflist"), &newer));
}

#[test]
fn a_first_file_that_cannot_be_used_is_not_passed_over() {
    let host = host(Placement::Chained);
    host.write("20-other.conflist", LIST);
    for text in ["", "{", &LIST.replace("1.0.0", "0.2.0")] {
        host.write("10-net.conflist", text);
        let error = host.installation.install().unwrap_err();
        assert!(matches!(error, InstallError::Configuration { .. }), "{error}");
    }
    let net = host.installation.conf_dir.join("10-net.conflist");
    fs::write(&net, [0xff]).unwrap();
    assert!(matches!(host.installation.install(), Err(InstallError::File { .. })));
    assert_eq!(host.read("20-other.conflist"), LIST);
    host.write("10-net.conflist", LIST);
    assert_eq!(host.installation.install().unwrap(), [net]);
}

#[test]
fn without_a_network_the_plugin_waits() {
    let host = host(Placement::Chained);
    assert!(matches!(host.installation.install(), Err(InstallError::NoNetwork(_))));
    host.write("10-net.conflist", LIST);
    host.installation.install().unwrap();
}

#[test]
fn an_unchained_plugin_has_a_configuration_of_its_own() {
    let host = host(Placement::Standalone);
    host.write("10-net.conflist", LIST);
    host.installation.install().unwrap();
    assert_eq!(host.read("10-net.conflist"), LIST);
    assert!(conflist::is_standalone(&host.read(STANDALONE)));
    host.installation.remove().unwrap();
    assert_eq!(host.files(), ["10-net.conflist"]);
}

#[test]
fn a_list_that_comes_to_sort_first_is_chained_too() {
    let host = host(Placement::Chained);
    host.write("10-net.conflist", LIST);
    host.installation.install().unwrap();
    // As by a meta plugin, which calls the former list as its delegate.
    let first = LIST.replace("bridge", "multus");
    host.write("00-first.conflist", &first);
    host.installation.install().unwrap();
    assert!(host.read("00-first.conflist").contains(PLUGIN));
    assert!(host.read("10-net.conflist").contains(PLUGIN));
    // When it goes, the runtime reads the former list again, which has the entry already.
    delete(&host.installation.conf_dir.join("00-first.conflist")).unwrap();
    assert_eq!(host.installation.install().unwrap(), [] as [PathBuf; 0]);
    host.write("00-first.conflist", &first);
    host.installation.install().unwrap();
    host.installation.remove().unwrap();
    assert!(conflist::same(&host.read("00-first.conflist"), &first));
    assert!(conflist::same(&host.read("10-net.conflist"), LIST));
}

#[test]
fn an_own_list_keeps_the_entry_when_the_main_network_is_rewritten() {
    let host = host(Placement::OwnList);
    assert!(matches!(host.installation.install(), Err(InstallError::NoNetwork(_))));
    host.write("10-net.conflist", LIST);
    host.installation.install().unwrap();
    assert_eq!(host.read("10-net.conflist"), LIST);
    assert_eq!(host.files(), [OWN_LIST, "10-net.conflist"]);
    assert_eq!(host.installation.install().unwrap(), [] as [PathBuf; 0]);
    // As at a boot: the owner of the main network writes before the agent runs.
    host.write("10-net.conflist", &LIST.replace("bridge", "ptp"));
    assert!(host.read(OWN_LIST).contains(PLUGIN));
    host.installation.install().unwrap();
    let own = host.read(OWN_LIST);
    assert!(own.contains("ptp") && own.contains(PLUGIN), "{own}");
    // The network keeps its name: pods that were added by the one list are deleted by the other.
    assert!(own.contains(r#""name": "net""#), "{own}");
    host.installation.remove().unwrap();
    assert_eq!(host.files(), ["10-net.conflist"]);
}

#[test]
fn an_own_list_that_is_not_read_first_does_not_count() {
    let host = host(Placement::OwnList);
    host.write("00-aaa.conflist", LIST);
    let error = host.installation.install().unwrap_err();
    assert!(matches!(error, InstallError::NotFirst(_)), "{error}");
    assert_eq!(host.files(), ["00-aaa.conflist"]);
}

#[test]
fn another_placement_replaces_the_former_one() {
    let host = host(Placement::OwnList);
    host.write("10-net.conf", SINGLE);
    host.installation.install().unwrap();
    assert_eq!(host.files(), [OWN_LIST, "10-net.conf"]);
    let placed = |placement| Installation { placement, ..host.installation.clone() };
    placed(Placement::Standalone).install().unwrap();
    assert_eq!(host.files(), ["10-net.conf", STANDALONE]);
    placed(Placement::Chained).install().unwrap();
    assert_eq!(host.files(), ["10-net.conf.ambit-converted", "10-net.conflist"]);
    host.installation.install().unwrap();
    assert_eq!(host.files(), [OWN_LIST, "10-net.conf.ambit-converted", "10-net.conflist"]);
    host.installation.remove().unwrap();
    assert_eq!(host.files(), ["10-net.conf"]);
}

#[tokio::test]
async fn a_configuration_that_another_tool_rewrites_is_chained_again() {
    let host = host(Placement::Chained);
    let (installed, mut is_installed) = watch::channel(false);
    let keeping = tokio::spawn(host.installation.clone().keep(installed, watch::Sender::default()));
    host.write("10-net.conflist", LIST);
    is_installed.wait_for(|installed| *installed).await.unwrap();
    host.write("10-net.conflist", &LIST.replace("bridge", "ptp"));
    let chained = async {
        while !host.read("10-net.conflist").contains(PLUGIN) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LOOK * 2, chained).await.expect("it is chained again");
    assert!(host.read("10-net.conflist").contains("ptp"));
    keeping.abort();
}

#[tokio::test]
async fn a_file_that_another_tool_keeps_undoing_is_no_hot_loop() {
    let host = host(Placement::Chained);
    let (installed, mut is_installed) = watch::channel(false);
    let keeping = tokio::spawn(host.installation.clone().keep(installed, watch::Sender::default()));
    host.write("10-net.conflist", LIST);
    is_installed.wait_for(|installed| *installed).await.unwrap();
    let undo = async {
        let mut undone = 0;
        while *is_installed.borrow_and_update() {
            if host.read("10-net.conflist").contains(PLUGIN) {
                host.write("10-net.conflist", LIST);
                undone += 1;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        undone
    };
    let undone = tokio::time::timeout(WINDOW, undo).await.expect("it does not count as installed");
    assert!((REWRITES..=REWRITES + 1).contains(&undone), "{undone}");
    keeping.abort();
}

#[test]
fn rewrites_count_for_a_minute() {
    let mut rewrites = Rewrites::default();
    let now = Instant::now();
    for _ in 0..REWRITES {
        assert!(!rewrites.note(true, now));
    }
    assert!(rewrites.note(true, now + LOOK));
    assert!(rewrites.note(false, now + LOOK));
    assert!(!rewrites.note(false, now + WINDOW));
}
