//! What the levels of Telemetry objects come to together, as Istio has it. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_api::l7;

use crate::mesh_config::{OWN_LOG, Provider, TelemetryProviders};
use crate::object::{AccessLogRule, Mode, Telemetry, TracingRule};

/// How many requests begin a trace where nobody says it, in percent (Istio's default).
const SAMPLING: f64 = 1.0;

/// What is reported where nobody says anything: the proxy's own log, and no spans.
pub(super) fn by_default() -> l7::Telemetry {
    l7::Telemetry { access_logs: vec![l7::AccessLog::default()], ..l7::Telemetry::default() }
}

/// What a proxy reports. `levels` come in order, the farthest first.
pub(super) fn merge(levels: &[&Telemetry], own: Mode, providers: &TelemetryProviders) -> l7::Telemetry {
    l7::Telemetry {
        tracing: tracing(levels, own, providers),
        access_logs: access_logs(levels, own, providers),
        metrics: metrics(levels, own),
    }
}

fn applies(mode: Mode, own: Mode) -> bool {
    mode == Mode::Both || mode == own
}

/// Each field has the value that the nearest level gives it.
fn tracing(levels: &[&Telemetry], own: Mode, providers: &TelemetryProviders) -> Option<l7::Tracing> {
    let rules = levels.iter().flat_map(|level| &level.tracing).filter(|rule| applies(rule.mode, own));
    let mut provider = providers.default_tracing.as_ref();
    let (mut sampling, mut disabled, mut tags) = (SAMPLING, false, Vec::new());
    for TracingRule {
        mode: _,
        providers,
        sampling: share,
        disabled: off,
        tags: own_tags,
        without_effect: _,
    } in rules
    {
        provider = providers.first().or(provider);
        sampling = share.unwrap_or(sampling);
        disabled = off.unwrap_or(disabled);
        if let Some(own_tags) = own_tags {
            tags.clone_from(own_tags);
        }
    }
    match providers.get(provider?)? {
        Provider::Spans { collector, max_tag_length } if !disabled => Some(l7::Tracing {
            collector: Some(collector.clone()),
            sampling,
            tags,
            max_tag_length: *max_tag_length,
        }),
        _ => None,
    }
}

/// The nearest level that names providers says which there are; each level changes those of them that it is for.
fn access_logs(levels: &[&Telemetry], own: Mode, providers: &TelemetryProviders) -> Vec<l7::AccessLog> {
    let rules_of = |level: &Telemetry| -> Vec<AccessLogRule> {
        level.access_logs.iter().filter(|rule| applies(rule.mode, own)).cloned().collect()
    };
    let by_default = || providers.default_access_logs.clone().unwrap_or_else(|| vec![Arc::from(OWN_LOG)]);
    let named = levels.iter().rev().find_map(|level| {
        let named: Vec<Arc<str>> = rules_of(level).into_iter().flat_map(|rule| rule.providers).collect();
        (!named.is_empty()).then_some(named)
    });
    let in_force = named.unwrap_or_else(by_default);
    let mut logs: BTreeMap<&Arc<str>, Option<Arc<str>>> = in_force.iter().map(|name| (name, None)).collect();
    for rule in levels.iter().flat_map(|level| rules_of(level)) {
        let is_for = |name: &Arc<str>| rule.providers.is_empty() || rule.providers.contains(name);
        for name in in_force.iter().filter(|name| is_for(name)) {
            match rule.disabled {
                true => drop(logs.remove(name)),
                false => drop(logs.insert(name, rule.filter.clone())),
            }
        }
    }
    let log = |(name, filter): (&Arc<str>, Option<Arc<str>>)| {
        let filter = filter.map(|filter| filter.to_string()).unwrap_or_default();
        match providers.get(name)? {
            Provider::OwnLog => Some(l7::AccessLog { filter, ..l7::AccessLog::default() }),
            Provider::Logs { collector, log_name } => {
                Some(l7::AccessLog { collector: Some(collector.clone()), filter, log_name: log_name.clone() })
            }
            Provider::Spans { .. } | Provider::Metrics | Provider::Unsupported(_) => None,
        }
    };
    logs.into_iter().filter_map(log).collect()
}

/// Overrides in their order: the nearest comes last, and counts.
fn metrics(levels: &[&Telemetry], own: Mode) -> Vec<l7::MetricOverride> {
    let rules = levels.iter().flat_map(|level| &level.metrics);
    let overrides = rules.flat_map(|rule| &rule.overrides).filter(|change| applies(change.mode, own));
    let mut merged: Vec<l7::MetricOverride> = Vec::new();
    for change in overrides {
        let family = change.family.as_deref().unwrap_or_default();
        let known = merged.iter_mut().find(|known| known.family == family);
        let mut next = l7::MetricOverride { family: family.to_owned(), ..l7::MetricOverride::default() };
        let target = match known {
            Some(known) => known,
            None => &mut next,
        };
        target.disabled = change.disabled.unwrap_or(target.disabled);
        for label in &change.removed {
            if !target.removed_labels.iter().any(|known| **known == **label) {
                target.removed_labels.push(label.to_string());
            }
        }
        if next.disabled || !next.removed_labels.is_empty() {
            merged.push(next);
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::object::Object;

    const PROVIDERS: &str = "
extensionProviders:
- {name: otel, opentelemetry: {service: obs/otel, port: 4317}}
- {name: other, opentelemetry: {service: obs/other, port: 4318, http: {path: /v1/traces}}}
- {name: als, envoyOtelAls: {service: obs/otel, port: 4317}}
- {name: zipkin, zipkin: {service: z, port: 1}}
";

    /// Levels by their specs, the farthest first, and what they come to for a waypoint.
    fn merged(defaults: &str, specs: &[&str]) -> l7::Telemetry {
        merged_for(Mode::Server, defaults, specs)
    }

    fn merged_for(mode: Mode, defaults: &str, specs: &[&str]) -> l7::Telemetry {
        let providers = crate::mesh_config::parse(&format!("{PROVIDERS}{defaults}")).unwrap().telemetry;
        let levels: Vec<Arc<Telemetry>> = specs
            .iter()
            .map(|spec| {
                let text = format!(
                    "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {{name: t, namespace: a}}\nspec: {{{spec}}}\n"
                );
                let (mut objects, problems) = crate::source::parse(Path::new("t.yaml"), &text);
                assert!(problems.is_empty(), "{problems:?}");
                let Some(Object::Telemetry(telemetry)) = objects.pop() else { panic!("{text}") };
                telemetry
            })
            .collect();
        let levels: Vec<&Telemetry> = levels.iter().map(AsRef::as_ref).collect();
        merge(&levels, mode, &providers)
    }

    /// Provider and share of what is traced.
    fn traced(telemetry: &l7::Telemetry) -> Option<(String, f64)> {
        let tracing = telemetry.tracing.as_ref()?;
        Some((tracing.collector.as_ref()?.provider.clone(), tracing.sampling))
    }

    /// Logs by provider, with their filters.
    fn logged(telemetry: &l7::Telemetry) -> Vec<String> {
        let log = |log: &l7::AccessLog| {
            let provider = log.collector.as_ref().map_or("own", |collector| &collector.provider);
            format!("{provider}{}{}", if log.filter.is_empty() { "" } else { ":" }, log.filter)
        };
        telemetry.access_logs.iter().map(log).collect()
    }

    #[test]
    fn the_nearest_level_that_says_something_of_tracing_counts() {
        let default = "defaultProviders: {tracing: [otel]}";
        type Row = (&'static str, &'static [&'static str], Option<(&'static str, f64)>);
        let table: [Row; 13] = [
            ("", &[], None),
            (default, &[], Some(("otel", 1.0))),
            ("", &["tracing: [{randomSamplingPercentage: 50}]"], None),
            (default, &["tracing: [{randomSamplingPercentage: 50}]"], Some(("otel", 50.0))),
            ("", &["tracing: [{providers: [{name: other}]}]"], Some(("other", 1.0))),
            (
                default,
                &["tracing: [{randomSamplingPercentage: 50}]", "tracing: [{providers: [{name: other}]}]"],
                Some(("other", 50.0)),
            ),
            (
                default,
                &["tracing: [{randomSamplingPercentage: 50}]", "tracing: [{randomSamplingPercentage: 0}]"],
                Some(("otel", 0.0)),
            ),
            (default, &["tracing: [{disableSpanReporting: true}]"], None),
            (
                default,
                &["tracing: [{disableSpanReporting: true}]", "tracing: [{disableSpanReporting: false}]"],
                Some(("otel", 1.0)),
            ),
            (
                default,
                &["tracing: [{match: {mode: CLIENT}, disableSpanReporting: true}]"],
                Some(("otel", 1.0)),
            ),
            (default, &["tracing: [{match: {mode: SERVER}, disableSpanReporting: true}]"], None),
            (default, &["tracing: [{providers: [{name: none}]}]"], None),
            (default, &["tracing: [{providers: [{name: zipkin}]}]"], None),
        ];
        for (defaults, specs, wanted) in table {
            let wanted = wanted.map(|(provider, sampling)| (provider.to_owned(), sampling));
            assert_eq!(traced(&merged(defaults, specs)), wanted, "{defaults} {specs:?}");
        }
        let only_clients = "tracing: [{match: {mode: CLIENT}, disableSpanReporting: true}]";
        assert_eq!(traced(&merged_for(Mode::Client, default, &[only_clients])), None);
    }

    #[test]
    fn tags_of_a_level_replace_those_above() {
        let default = "defaultProviders: {tracing: [otel]}";
        let tags = |specs: &[&str]| -> Vec<String> {
            merged(default, specs).tracing.unwrap().tags.into_iter().map(|tag| tag.name).collect()
        };
        let above = "tracing: [{customTags: {a: {literal: {value: x}}, b: {header: {name: x-b}}}}]";
        assert_eq!(tags(&[above]), ["a", "b"]);
        assert_eq!(tags(&[above, "tracing: [{randomSamplingPercentage: 5}]"]), ["a", "b"]);
        assert_eq!(tags(&[above, "tracing: [{customTags: {c: {environment: {name: C}}}}]"]), ["c"]);
        assert!(tags(&[above, "tracing: [{customTags: {}}]"]).is_empty());
    }

    #[test]
    fn the_nearest_level_that_names_logs_says_which_there_are() {
        let both = "defaultProviders: {accessLogging: [als, envoy]}";
        let table: [(&str, &[&str], &[&str]); 14] = [
            ("", &[], &["own"]),
            (both, &[], &["als", "own"]),
            ("defaultProviders: {accessLogging: []}", &[], &[]),
            ("", &["accessLogging: [{disabled: true}]"], &[]),
            ("", &["accessLogging: [{providers: [{name: als}]}]"], &["als"]),
            ("", &["accessLogging: [{providers: [{name: als}, {name: envoy}]}]"], &["als", "own"]),
            (
                "",
                &["accessLogging: [{filter: {expression: 'response.code >= 400'}}]"],
                &["own:response.code >= 400"],
            ),
            (both, &["accessLogging: [{providers: [{name: als}], disabled: true}]"], &[]),
            (
                both,
                &["accessLogging: [{disabled: true}]", "accessLogging: [{providers: [{name: als}]}]"],
                &["als"],
            ),
            (
                "",
                &[
                    "accessLogging: [{providers: [{name: als}]}]",
                    "accessLogging: [{filter: {expression: a}}]",
                ],
                &["als:a"],
            ),
            ("", &["accessLogging: [{filter: {expression: a}}]", "accessLogging: [{disabled: true}]"], &[]),
            ("", &["accessLogging: [{disabled: true}]", "accessLogging: [{disabled: false}]"], &["own"]),
            ("", &["accessLogging: [{match: {mode: CLIENT}, disabled: true}]"], &["own"]),
            ("", &["accessLogging: [{providers: [{name: none}]}]"], &[]),
        ];
        for (defaults, specs, wanted) in table {
            assert_eq!(logged(&merged(defaults, specs)), wanted, "{defaults} {specs:?}");
        }
    }

    #[test]
    fn overrides_of_metrics_add_up_and_the_nearest_counts() {
        let of = |specs: &[&str]| -> Vec<(String, bool, usize)> {
            let all = merged("", specs).metrics;
            all.into_iter().map(|it| (it.family, it.disabled, it.removed_labels.len())).collect()
        };
        let count = "istio_requests_total".to_owned();
        let off = "metrics: [{providers: [{name: prometheus}], overrides: [{match: {metric: REQUEST_COUNT}, disabled: true}]}]";
        let on = "metrics: [{overrides: [{match: {metric: REQUEST_COUNT}, disabled: false}]}]";
        let without = "metrics: [{overrides: [{match: {metric: REQUEST_COUNT}, tagOverrides: {source_app: {operation: REMOVE}}}]}]";
        assert_eq!(of(&[off]), [(count.clone(), true, 0)]);
        assert_eq!(of(&[off, on]), [(count.clone(), false, 0)]);
        assert_eq!(of(&[off, without]), [(count, true, 1)]);
        assert_eq!(of(&["metrics: [{overrides: [{disabled: true}]}]"]), [(String::new(), true, 0)]);
        assert!(of(&["metrics: [{overrides: [{match: {mode: CLIENT}, disabled: true}]}]"]).is_empty());
    }

    #[test]
    fn without_any_object_it_is_the_default() {
        assert_eq!(merged("", &[]), by_default());
    }
}
