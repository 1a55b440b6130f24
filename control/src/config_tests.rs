//! Tests of settings: defaults, what overrides what, and what is refused.

use super::*;

fn parse(arguments: &[&str]) -> Result<Config, ConfigError> {
    from_environment(std::iter::once(&"ambit-control").chain(arguments).map(OsString::from))
}

const NEEDED: [&str; 6] = ["--source", "dir:/objects", "--ca-dir", "/ca", "--jwks", "/jwks.json"];

#[test]
fn what_is_not_said_has_the_documented_default() {
    let config = parse(&NEEDED).unwrap();
    assert_eq!(config.listen.to_string(), "0.0.0.0:15012");
    assert_eq!(config.index, index::Settings::default());
    assert_eq!(config.audiences, ["istio-ca"]);
    assert_eq!(config.root_propagation, None);
    assert_eq!(config.trusted_node_proxies, ambit_ca::IssuancePolicy::default().trusted_node_proxies);
    assert!(config.server_names.contains(&"ambit-control.ambit-system.svc".to_owned()));
}

#[test]
fn a_flag_overrides_the_file_and_unknown_keys_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("control.yaml");
    std::fs::write(&file, "sources: [\"dir:/a\"]\ncaDir: /ca\njwks: /keys\nclusterId: one\nnetwork: n\n")
        .unwrap();
    let path = file.to_str().unwrap();
    let config = parse(&["--config", path, "--cluster-id", "two"]).unwrap();
    assert_eq!((&*config.index.cluster_id, &*config.index.network), ("two", "n"));
    std::fs::write(&file, "clusterID: one\n").unwrap();
    let error = parse(&["--config", path]).unwrap_err().to_string();
    assert!(error.contains("did you mean `clusterId`?"), "{error}");
}

#[test]
fn the_reference_page_is_that_of_the_program() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/control-settings.md");
    if std::env::var_os("AMBIT_WRITE_DOCS").is_some() {
        std::fs::write(path, reference()).unwrap();
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), reference());
}

#[test]
fn every_setting_has_a_meaning_and_a_flag_of_its_own() {
    assert_eq!(configuration::faults::<ControlSettings>(), Vec::<String>::new());
}

#[test]
fn lists_may_be_repeated_or_separated_by_commas() {
    let config = parse(&[&NEEDED[..], &["--source", "dir:/b,dir:/c", "--audience", "x"]].concat()).unwrap();
    assert_eq!((config.sources.len(), config.audiences), (3, vec!["x".to_owned()]));
}

#[test]
fn a_lifetime_limit_that_cannot_work_is_refused() {
    let default = parse(&NEEDED).unwrap().max_certificate_lifetime;
    assert_eq!(default, AuthorityConfig::DEFAULT_MAX_LIFETIME);
    let with = |seconds| parse(&[&NEEDED[..], &["--max-certificate-lifetime", seconds]].concat());
    assert_eq!(with("20s").unwrap().max_certificate_lifetime, Duration::from_secs(20));
    assert_eq!(with("90d").unwrap().max_certificate_lifetime, AuthorityConfig::MAX_LIFETIME);
    for seconds in ["9s", "7776001s"] {
        let error = with(seconds).unwrap_err().to_string();
        assert!(error.starts_with("`maxCertificateLifetime` "), "{error}");
    }
}

#[test]
fn a_source_of_an_unknown_kind_is_refused() {
    let error = parse(&["--source", "etcd:x", "--ca-dir", "/ca", "--jwks", "/j"]).unwrap_err().to_string();
    assert!(error.contains("expected dir:PATH"), "{error}");
}

#[test]
fn kubernetes_needs_neither_key_set_nor_directory_and_stands_alone() {
    let config = parse(&["--source", "kubernetes"]).unwrap();
    assert_eq!(config.sources, [SourceName::Kubernetes { kubeconfig: None }]);
    assert_eq!((config.ca_dir, config.jwks), (None, None));
    let config = parse(&["--source", "kubernetes:/admin.kubeconfig"]).unwrap();
    assert_eq!(config.sources, [SourceName::Kubernetes { kubeconfig: Some("/admin.kubeconfig".into()) }]);
    let error = parse(&["--source", "kubernetes,dir:/objects"]).unwrap_err().to_string();
    assert!(error.starts_with("`sources` "), "{error}");
    let error = parse(&["--source", "dir:/objects"]).unwrap_err().to_string();
    assert!(error.contains("`caDir`"), "{error}");
}
