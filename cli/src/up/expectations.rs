//! What a directory of manifests expects `ambit up` to show, by annotations on its services and pods.
//!
//! - `ambit.dev/open: "9080/productpage"` on a service, or on a Gateway for its first listener: at which port of this machine,
//!   and under which path, a person opens it;
//! - `ambit.dev/expect-spread: "true"` on a service: connections or requests reach every workload behind it;
//! - `ambit.dev/expect-unreadable: "Shakespeare,Reviewer1"` on a service: words of its answers that must not
//!   be readable on the wire;
//! - `ambit.dev/expect-denied: "http://ratings:9080/ratings/0"` on a pod: addresses that must refuse its requests, with 403
//!   or without any answer;
//! - `ambit.dev/expect-answers` on a pod: requests that it makes and what comes of them, as YAML ([`Exchange`]).

use std::collections::BTreeMap;
use std::path::Path;

use ambit_local::{Cluster, Pod};
use anyhow::Context;
use serde::Deserialize;
use serde_json::Value;

const OPEN: &str = "ambit.dev/open";
const SPREAD: &str = "ambit.dev/expect-spread";
const UNREADABLE: &str = "ambit.dev/expect-unreadable";
const DENIED: &str = "ambit.dev/expect-denied";
const ANSWERS: &str = "ambit.dev/expect-answers";
/// The beginning of every HTTP message, which is searched for without an annotation.
const HTTP: &str = "HTTP/1.1";

/// A service by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServiceName {
    /// Its namespace.
    pub(crate) namespace: String,
    /// Its name.
    pub(crate) name: String,
}

/// All expectations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Expectations {
    /// The service or Gateway that can be opened, with port and path.
    pub(crate) open: Option<(ServiceName, u16, String)>,
    /// Services that are spread over all workloads behind them.
    pub(crate) spread: Vec<ServiceName>,
    /// Words that must not be readable.
    pub(crate) unreadable: Vec<String>,
}

impl Expectations {
    /// Reads the annotations of a cluster's services.
    pub(crate) fn read(cluster: &Cluster) -> Self {
        // The Service of a Gateway has its name.
        let opened = cluster.objects("Gateway").into_iter().filter(opens);
        Self::of(&opened.chain(cluster.objects("Service")).collect::<Vec<_>>())
    }

    fn of(services: &[Value]) -> Self {
        let mut expectations = Self { unreadable: vec![HTTP.to_owned()], ..Self::default() };
        for service in services {
            let text = |field: &str| service["metadata"][field].as_str().unwrap_or_default().to_owned();
            let name = ServiceName { namespace: text("namespace"), name: text("name") };
            let annotation = |key: &str| service["metadata"]["annotations"][key].as_str();
            if let Some((port, path)) = annotation(OPEN).and_then(port_and_path) {
                expectations.open.get_or_insert((name.clone(), port, path));
            }
            if annotation(SPREAD) == Some("true") {
                expectations.spread.push(name);
            }
            expectations.unreadable.extend(words(annotation(UNREADABLE)));
        }
        expectations
    }

    /// The path that a person opens.
    pub(crate) fn page_path(&self) -> &str {
        self.open.as_ref().map_or("/", |(_, _, path)| path)
    }
}

/// Whether a person opens an object.
pub(crate) fn opens(object: &Value) -> bool {
    object["metadata"]["annotations"][OPEN].as_str().and_then(port_and_path).is_some()
}

/// The addresses that must not answer a pod.
pub(crate) fn denied(pod: &Pod) -> Vec<String> {
    words(pod.annotations().get(DENIED).map(String::as_str)).collect()
}

/// A request that a pod makes, and its answer.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Exchange {
    /// What is asked for, `http://host:port/path`.
    pub(crate) url: String,
    /// With which method.
    #[serde(default = "get")]
    pub(crate) method: String,
    /// Headers of the request.
    #[serde(default)]
    pub(crate) headers: BTreeMap<String, String>,
    /// Status of the answer.
    pub(crate) status: u16,
    /// Services that answer, each with its share of the requests in percent.
    #[serde(default)]
    pub(crate) from: BTreeMap<String, u8>,
    /// Whether the waypoint sends some of the requests again.
    #[serde(default)]
    pub(crate) retried: bool,
    /// The longest that an answer takes.
    #[serde(default)]
    pub(crate) within_seconds: Option<u16>,
}

fn get() -> String {
    "GET".to_owned()
}

/// What a pod's requests must be answered with.
///
/// # Errors
/// When the annotation can't be read, with the reason.
pub(crate) fn answers(pod: &Pod) -> anyhow::Result<Vec<Exchange>> {
    pod.annotations().get(ANSWERS).map_or_else(|| Ok(Vec::new()), |text| exchanges(text))
}

fn exchanges(text: &str) -> anyhow::Result<Vec<Exchange>> {
    serde_saphyr::from_str(text).with_context(|| format!("read {ANSWERS}"))
}

fn words(list: Option<&str>) -> impl Iterator<Item = String> {
    let words = list.unwrap_or_default().split(',').map(str::trim).filter(|word| !word.is_empty());
    words.map(str::to_owned).collect::<Vec<_>>().into_iter()
}

/// Reads `9080` or `9080/path`.
fn port_and_path(text: &str) -> Option<(u16, String)> {
    let (port, path) = text.split_once('/').unwrap_or((text, ""));
    Some((port.trim().parse().ok()?, format!("/{path}")))
}

/// The port that the manifests of a directory want to open. It is found by a search of the text, because the port is needed
/// before the cluster parses the manifests.
pub(crate) fn port_to_open(directory: &Path) -> Option<u16> {
    let entries = std::fs::read_dir(directory).ok()?;
    let mut files: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    files.iter().find_map(|file| in_text(&std::fs::read_to_string(file).ok()?))
}

fn in_text(text: &str) -> Option<u16> {
    let value = text.split_once(OPEN)?.1.lines().next()?;
    let value = value.trim_start_matches(['"', '\'', ':', ' ']);
    let end = value.find(['"', '\'', ',', '}', ' ']).unwrap_or(value.len());
    port_and_path(value.get(..end)?).map(|(port, _)| port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn annotations_of_services_say_what_is_to_be_shown() {
        let service = json!({ "metadata": { "name": "p", "namespace": "n", "annotations": {
            OPEN: "9080/productpage", SPREAD: "true", UNREADABLE: "one, two",
        } } });
        let expectations = Expectations::of(&[service]);
        let name = ServiceName { namespace: "n".to_owned(), name: "p".to_owned() };
        assert_eq!(expectations.open, Some((name.clone(), 9080, "/productpage".to_owned())));
        assert_eq!(expectations.spread, [name]);
        assert_eq!(expectations.unreadable, ["HTTP/1.1", "one", "two"]);
    }

    #[test]
    fn expected_answers_are_read_and_a_misspelt_key_is_named() {
        let text = "- {url: 'http://a:80/', status: 200, headers: {who: me}, from: {a-v1: 90, a-v2: 10}}\n\
                    - {url: 'http://a:80/', method: POST, status: 403, retried: true, within-seconds: 2}\n";
        let [first, second] = &exchanges(text).expect("sound YAML")[..] else { panic!("two are expected") };
        assert_eq!((first.method.as_str(), first.from["a-v2"], first.retried), ("GET", 10, false));
        assert_eq!((second.method.as_str(), second.within_seconds), ("POST", Some(2)));
        let error = exchanges("- {url: 'http://a/', status: 200, form: {}}").expect_err("no such key");
        assert!(format!("{error:#}").contains("form"), "{error:#}");
    }

    #[test]
    fn the_port_is_found_in_the_text_however_it_is_quoted() {
        for text in [
            "  annotations:\n    ambit.dev/open: \"9080/productpage\"\n",
            "annotations: {ambit.dev/open: '9080'}\n",
            "annotations: {\"ambit.dev/open\": \"9080\", other: x}\n",
        ] {
            assert_eq!(in_text(text), Some(9080), "{text}");
        }
        assert_eq!(in_text("kind: Service\n"), None);
    }
}
