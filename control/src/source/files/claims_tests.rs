//! What files do to objects, without a file system.

use super::super::document::read_all;
use super::*;
use crate::object::{Action, PolicyBody};

fn id(name: &str) -> FileId {
    (0, Path::new(name).into())
}

fn content(text: &str) -> Content {
    Content::Read(read_all(text))
}

fn service(name: &str, port: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  ports:\n  - port: {port}\n"
    )
}

fn names(changes: &[Change]) -> Vec<String> {
    let name = |change: &Change| match change {
        Change::Apply(object) => format!("+{}", object.reference().name.name),
        Change::Delete(reference) => format!("-{}", reference.name.name),
    };
    changes.iter().map(name).collect()
}

#[test]
fn an_unreadable_object_is_absent_and_others_of_its_file_change() {
    let mut files = Files::default();
    let start = format!("{}{}", service("a", "80"), service("b", "80"));
    assert_eq!(names(&files.apply(&id("f"), content(&start)).changes), ["+a", "+b"]);
    let edited = format!("{}{}", service("a", "many"), service("b", "81"));
    let effect = files.apply(&id("f"), content(&edited));
    assert_eq!(names(&effect.changes), ["-a", "+b"]);
    let [problem] = &effect.new_problems[..] else { panic!("{effect:?}") };
    assert_eq!(problem.line, Some(8));
    assert_eq!(problem.field.as_deref(), Some("spec.ports[0].port"));
    assert_eq!(problem.object.as_ref().map(|o| o.name.name.to_string()).as_deref(), Some("a"));
    assert_eq!(files.problems(), 1);
    let repaired = files.apply(&id("f"), content(&start));
    assert_eq!(names(&repaired.changes), ["+a", "+b"]);
    assert_eq!(files.problems(), 0);
}

#[test]
fn broken_syntax_leaves_other_documents_of_its_file() {
    let mut files = Files::default();
    files.apply(&id("f"), content(&format!("{}{}", service("a", "80"), service("b", "80"))));
    let effect = files.apply(&id("f"), content(&format!("{}---\nkind: [Service\n", service("a", "80"))));
    assert_eq!(names(&effect.changes), ["-b"]);
    assert_eq!(effect.new_problems.len(), 1);
    assert!(effect.new_problems[0].line >= Some(9), "{effect:?}");
}

/// A restarted control plane knows nothing of what a broken file was before.
#[test]
fn broken_syntax_means_the_same_after_a_restart() {
    let texts = [
        format!("{}---\nkind: [Service\n", service("a", "80")),
        policy("DENY", "'80'").replace("rules:", "rules: ["),
        format!("{}---\n- nothing\n", policy("ALLOW", "'80'").replace("metadata:", "metadata: [")),
    ];
    for broken in texts {
        let (mut before, mut fresh) = (Files::default(), Files::default());
        before.apply(&id("f"), content(&format!("{}{}", service("b", "80"), policy("ALLOW", "'80'"))));
        before.apply(&id("f"), content(&broken));
        fresh.apply(&id("f"), content(&broken));
        assert_eq!(before.claims, fresh.claims, "{broken}");
    }
}

#[test]
fn a_policy_with_broken_syntax_fails_closed() {
    let mut files = Files::default();
    files.apply(&id("f"), content(&policy("DENY", "'80'")));
    let effect = files.apply(&id("f"), content(&policy("DENY", "'80'").replace("rules:", "rules: [")));
    assert_eq!(effect.new_problems.len(), 1);
    assert!(matches!(body(&files), PolicyBody::Unreadable { action: Action::Deny, .. }));
}

#[test]
fn a_file_that_cannot_be_read_keeps_what_it_had() {
    let mut files = Files::default();
    let unreadable = || Content::Unreadable("cannot be read".to_owned());
    files.apply(&id("f"), unreadable());
    assert_eq!(files.unread(), 1, "nobody knows what is in it");
    files.apply(&id("f"), content(&service("a", "80")));
    assert_eq!(files.apply(&id("f"), unreadable()).changes, []);
    assert_eq!((files.unread(), files.len()), (0, 1));
}

#[test]
fn a_file_that_is_gone_takes_its_objects_along() {
    let mut files = Files::default();
    files.apply(&id("f"), content(&service("a", "80")));
    assert_eq!(names(&files.apply(&id("f"), Content::Gone).changes), ["-a"]);
    assert_eq!(files.len(), 0);
}

#[test]
fn of_two_files_with_one_object_the_first_counts_until_it_goes() {
    let mut files = Files::default();
    files.apply(&id("b"), content(&service("a", "80")));
    let first = files.apply(&id("a"), content(&service("a", "81")));
    assert_eq!(names(&first.changes), ["+a"]);
    let shadowed = files.apply(&id("b"), content(&service("a", "82")));
    assert_eq!(shadowed.changes, []);
    assert_eq!(shadowed.new_problems.len(), 1);
    assert_eq!(names(&files.apply(&id("a"), Content::Gone).changes), ["+a"]);
}

#[test]
fn of_an_object_that_is_twice_in_a_file_the_first_counts() {
    let mut files = Files::default();
    let effect = files.apply(&id("f"), content(&format!("{}{}", service("a", "80"), service("a", "81"))));
    assert_eq!(names(&effect.changes), ["+a"]);
    assert_eq!(effect.new_problems.len(), 1);
}

fn policy(action: &str, ports: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: p\nspec:\n  action: {action}\n  \
         rules:\n  - to:\n    - operation:\n        ports: [{ports}]\n"
    )
}

fn body(files: &Files) -> PolicyBody {
    let claims = files.claims.values().next().unwrap();
    match &claims.first().unwrap().1 {
        Object::AuthorizationPolicy(policy) => policy.body.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_policy_that_was_never_readable_fails_closed() {
    for (text, expected) in [("DENY", Action::Deny), ("ALLOW", Action::Allow), ("DENNY", Action::Deny)] {
        let mut files = Files::default();
        let effect = files.apply(&id("f"), content(&policy(text, "'http'")));
        assert_eq!(effect.new_problems.len(), 1, "{text}");
        assert!(
            matches!(body(&files), PolicyBody::Unreadable { action, .. } if action == expected),
            "{text}"
        );
    }
}

/// The same objects give the same resources after a restart, which knows nothing of what was.
#[test]
fn an_unreadable_object_is_the_same_whatever_it_was_before() {
    let unreadable = policy("ALLOW", "'http'");
    let (mut before, mut fresh) = (Files::default(), Files::default());
    before.apply(&id("f"), content(&policy("ALLOW", "'80'")));
    before.apply(&id("f"), content(&unreadable));
    fresh.apply(&id("f"), content(&unreadable));
    assert_eq!(body(&before), body(&fresh));
    assert!(matches!(body(&fresh), PolicyBody::Unreadable { action: Action::Allow, .. }));
}

#[test]
fn an_unknown_field_in_a_policy_is_reported_with_its_line() {
    let text = policy("ALLOW", "'80'").replace("ports:", "port:");
    let effect = Files::default().apply(&id("f"), content(&text));
    let [problem] = &effect.new_problems[..] else { panic!("{effect:?}") };
    assert_eq!(problem.line, Some(10), "{problem}");
    assert!(problem.message.contains("port"), "{problem}");
}

#[test]
fn foreign_kinds_are_ignored_and_misspelt_ones_reported() {
    let mut files = Files::default();
    let effect = files.apply(&id("f"), content("apiVersion: batch/v1\nkind: CronJob\nmetadata: {name: a}\n"));
    assert_eq!(effect, Effect::default());
    let effect = files.apply(
        &id("f"),
        content("apiVersion: security.istio.io/v1\nkind: AuthorisationPolicy\nmetadata: {name: a}\n"),
    );
    assert!(effect.new_problems[0].message.contains("did you mean AuthorizationPolicy"), "{effect:?}");
}

#[test]
fn faults_of_a_lists_items_have_line_and_field() {
    let text = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: a}\n\
                - apiVersion: v1\n  kind: Service\n  metadata: {name: b}\n  spec:\n    ports:\n    - port: x\n";
    let mut files = Files::default();
    let effect = files.apply(&id("f"), content(text));
    assert_eq!(names(&effect.changes), ["+a"]);
    let [problem] = &effect.new_problems[..] else { panic!("{effect:?}") };
    assert_eq!((problem.line, problem.field.as_deref()), (Some(12), Some("items[1].spec.ports[0].port")));
    assert_eq!(problem.object.as_ref().map(|o| o.kind), Some(Kind::Service));
}

#[test]
fn content_that_lacks_objects_or_cannot_be_read_is_held_back() {
    let mut files = Files::default();
    files.apply(&id("f"), content(&service("a", "80")));
    assert!(files.would_lose(&id("f"), &content("")));
    assert!(files.would_lose(&id("f"), &content(&service("a", "x"))));
    assert!(files.would_lose(&id("f"), &Content::Gone));
    assert!(!files.would_lose(&id("f"), &content(&service("a", "81"))));
}

#[test]
fn a_file_of_pods_is_taken_to_be_gone_as_soon_as_it_is() {
    let pod = "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: p\nspec:\n  containers: []\n";
    let mut files = Files::default();
    files.apply(&id("f"), content(pod));
    assert!(!files.would_lose(&id("f"), &Content::Gone));
    assert!(files.would_lose(&id("f"), &content("")), "half of a file may be all that is written yet");
    files.apply(&id("f"), content(&format!("{pod}{}", service("a", "80"))));
    assert!(files.would_lose(&id("f"), &Content::Gone));
}
