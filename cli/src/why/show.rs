//! The answer of `ambit why` for people.

use std::fmt::Write as _;

use ambit_explain::{Considered, Effect, Explanation};

use super::path::{Answer, Hop, Outcome};
use crate::output::Palette;

/// Objects of a step that are shown; more are counted. `-o json` has all.
const SHOWN: usize = 12;

/// The outcome first, then every proxy with its steps.
pub(super) fn render(answer: &Answer, paint: Palette) -> String {
    let Answer { client, request, hops, outcome } = answer;
    let mut text = String::new();
    let _ = writeln!(text, "{} {request}", paint.bold(&format!("{client}:")));
    let _ = writeln!(text, "{}", line_of(outcome, answer.is_refused(), paint));
    for Hop { proxy, explanation } in hops {
        let _ = writeln!(text, "\n{}", paint.bold(proxy));
        add_steps(explanation, paint, &mut text);
    }
    text
}

fn line_of(outcome: &Outcome, is_refused: bool, paint: Palette) -> String {
    match outcome {
        Outcome::Delivered { to, encrypted: true } => {
            paint.green(&format!("✓ {to} gets it, encrypted and authenticated all the way"))
        }
        Outcome::Delivered { to, encrypted: false } => {
            paint.yellow(&format!("! {to} gets it, in plain text at least in part"))
        }
        Outcome::Leaves { to } => {
            paint.yellow(&format!("– it goes on to {to}, whose decisions are not known here"))
        }
        Outcome::Answered { by, status } => {
            let text = format!("{by} answers {status}");
            if is_refused { paint.red(&format!("✗ {text}")) } else { paint.green(&format!("✓ {text}")) }
        }
        Outcome::Refused { by, step, why } => paint.red(&format!("✗ {by} refuses it ({step}): {why}")),
    }
}

fn add_steps(explanation: &Explanation, paint: Palette, text: &mut String) {
    for step in &explanation.steps {
        let sign = match step.effect {
            Effect::Passes => paint.green("✓"),
            Effect::Warns => paint.yellow("!"),
            Effect::Refuses => paint.red("✗"),
        };
        let _ = writeln!(text, "  {sign} {} {}", paint.dim(&format!("{:<12}", step.step)), step.text);
        for Considered { object, counts, text: why } in step.considered.iter().take(SHOWN) {
            let sign = if *counts { "→" } else { "·" };
            let line = format!("{sign} {object}: {why}");
            let line = if *counts { line } else { paint.dim(&line) };
            let _ = writeln!(text, "      {line}");
        }
        let more = step.considered.len().saturating_sub(SHOWN);
        if more > 0 {
            let _ = writeln!(text, "      {}", paint.dim(&format!("· {more} more: -o json")));
        }
    }
}

#[cfg(test)]
mod tests {
    use ambit_explain::Next;

    use super::*;

    fn hop(proxy: &str, explanation: Explanation) -> Hop {
        Hop { proxy: proxy.to_owned(), explanation }
    }

    #[test]
    fn a_denied_request_names_the_policy_and_what_came_before() {
        let mut node = Explanation::begin();
        node.passes("capture", "this node's proxy serves the pod as spiffe://td/ns/shop/sa/cli", Vec::new());
        let endpoint = "endpoint Kubernetes//Pod/shop/web-1";
        node.passes(
            "resolve",
            "web.shop.svc.cluster.local:80 is service shop/web.shop.svc.cluster.local",
            vec![Considered::counts(endpoint, "ready, port 8080")],
        );
        let mut waypoint = Explanation::begin();
        waypoint.warns("sanitise", "the path is read as /admin", Vec::new());
        let policies = vec![
            Considered::counts("AuthorizationPolicy/shop/no-admin (DENY)", "matches and decides"),
            Considered::passed_over("AuthorizationPolicy/shop/viewers (ALLOW)", "does not match: methods"),
        ];
        let waypoint = waypoint
            .refuses("authorize", "denied by policy shop/no-admin", policies)
            .goes(Next::Answer { status: 403 });
        let answer = Answer {
            client: "shop/cli".to_owned(),
            request: "GET http://web/x/../admin".to_owned(),
            hops: vec![
                hop("node proxy ambit-system/ztunnel-a on n1", node),
                hop("waypoint shop/waypoint-1", waypoint),
            ],
            outcome: Outcome::Answered { by: "waypoint shop/waypoint-1".to_owned(), status: 403 },
        };
        insta::assert_snapshot!(render(&answer, Palette::new(false)));
    }

    #[test]
    fn the_first_line_says_what_it_comes_to() {
        let delivered = |encrypted| Outcome::Delivered { to: "shop/web-1, port 8080".to_owned(), encrypted };
        let outcomes = [
            delivered(true),
            delivered(false),
            Outcome::Leaves { to: "203.0.113.7:443".to_owned() },
            Outcome::Answered { by: "waypoint shop/w".to_owned(), status: 301 },
            Outcome::Refused {
                by: "node proxy".to_owned(),
                step: "resolve".to_owned(),
                why: "no endpoint".to_owned(),
            },
        ];
        let lines: Vec<String> =
            outcomes.iter().map(|outcome| line_of(outcome, false, Palette::new(false))).collect();
        insta::assert_snapshot!(lines.join("\n"));
    }
}
