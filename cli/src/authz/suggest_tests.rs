//! Flows in, policies out.

use super::super::fixtures::{connections, day, observed, requests, shop};
use super::*;

const CLI: (&str, &str, &str) = ("shop", "cli", "cli");

fn suggested(flows: Vec<Flow>) -> Suggestion {
    suggest(&observed(flows), &shop("", ""), "shop")
}

/// `NAME: TARGET` of each policy.
fn targets(suggestion: &Suggestion) -> Vec<String> {
    let shown = |policy: &Allow| match &policy.target {
        For::Pods(labels) => {
            let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
            format!("{}: {}", policy.name, labels.join(","))
        }
        For::Service(target) => format!("{}: {} {}", policy.name, target.kind, target.name),
    };
    suggestion.policies.iter().map(shown).collect()
}

#[test]
fn a_day_becomes_policies_that_are_dry_runs_first() {
    let suggestion = suggest(&day(), &shop("", ""), "shop");
    let text = suggestion.render("shop", false).unwrap_or_default();
    let page = include_str!("../../../docs/authorization.md");
    for part in text.split_inclusive("---\n").filter(|part| part.contains("requests")) {
        assert!(page.contains(part), "docs/authorization.md shows\n{part}");
    }
    insta::assert_snapshot!("suggested", text);
    let enforced = suggestion.render("shop", true).unwrap_or_default();
    assert!(!enforced.contains("istio.io/dry-run"), "{enforced}");
}

#[test]
fn what_is_written_can_be_read_and_allows_what_was_seen() {
    let yaml = suggest(&day(), &shop("", ""), "shop").render("shop", true).unwrap_or_default();
    let (before, after) = (shop("", ""), shop("", &yaml));
    assert_eq!(after.given(), 3, "{yaml}");
    let seen = observed(day().flows.into_iter().filter(|flow| flow.allowed > 0).collect());
    let differences = super::super::diff::diff(&seen, &before, &after, Some("shop"));
    let text = differences.render(crate::output::Palette::new(false));
    // Those without an identity, as the notes say.
    assert!(text.starts_with("10 flows: 2 would be denied"), "{text}");
    assert!(text.contains("plain text"), "{text}");
}

#[test]
fn pods_are_selected_by_labels_that_select_no_others() {
    let waypoint = ("shop", "waypoint", "waypoint");
    let other = ("shop", "cli", "cli");
    for (flows, expected) in [
        (vec![connections(CLI, "db", 5432, (1, 0))], vec!["allow-db-connections: app=db"]),
        // The other version has pods with the same `app`.
        (vec![connections(CLI, "web-v1", 80, (1, 0))], vec!["allow-web-v1-connections: version=v1"]),
        (
            vec![connections(waypoint, "web-v1", 80, (1, 0)), connections(waypoint, "web-v2", 80, (1, 0))],
            vec!["allow-web-connections: app=web"],
        ),
        (
            vec![connections(waypoint, "web-v1", 80, (1, 0)), connections(other, "web-v2", 80, (1, 0))],
            vec!["allow-web-v1-connections: version=v1", "allow-web-v2-connections: version=v2"],
        ),
        (vec![requests(CLI, "GET", "/", (1, 0))], vec!["allow-web-requests: Service web"]),
        (vec![connections(CLI, "gone", 80, (1, 0))], vec![]),
        (vec![connections(CLI, "db", 5432, (0, 9))], vec![]),
        (vec![connections(("other", "cli", ""), "db", 5432, (9, 0))], vec![]),
    ] {
        let shown = format!("{flows:?}");
        assert_eq!(targets(&suggested(flows)), expected, "{shown}");
    }
}

#[test]
fn what_policies_cannot_say_is_noted() {
    for (flow, wanted) in [
        (requests(CLI, "OTHER", "/", (1, 0)), "any method"),
        (requests(CLI, "GET", ANY_PATH, (1, 0)), "any path"),
        (requests(CLI, "GET", "/", (0, 4)), "left out, as denied: 4 requests from shop/cli"),
        (requests(CLI, "GET", "/", (9, 4)), "although 4 of 13 requests"),
        (requests(("", "", ""), "GET", "/", (3, 0)), "no principal: 3 requests"),
        (connections(CLI, "gone", 80, (1, 0)), "no policy for gone"),
        (connections(CLI, "db", 80, (1, 0)), "no policy for web-v1: no connection to it was allowed"),
    ] {
        let notes = suggested(vec![flow]).notes;
        assert!(notes.iter().any(|note| note.contains(wanted)), "{wanted}: {notes:?}");
    }
}
