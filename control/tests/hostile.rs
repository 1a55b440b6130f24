//! Whatever a file contains, reading it ends, nothing panics, and what can be read is taken.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use ambit_control::index::{Index, Settings};
use ambit_control::object::Change;
use ambit_control::source;
use proptest::prelude::*;

/// The objects of the translation's cases.
static TEXTS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/translation/cases");
    let cases = std::fs::read_dir(cases).unwrap();
    cases.map(|case| std::fs::read_to_string(case.unwrap().path().join("objects.yaml")).unwrap()).collect()
});

/// Reads a text and indexes what comes of it.
fn take(text: &str) -> (usize, usize) {
    let (objects, problems) = source::parse(Path::new("hostile.yaml"), text);
    let taken = (objects.len(), problems.len());
    Index::new(Settings::default()).apply(objects.into_iter().map(Change::Apply));
    taken
}

/// Pieces that mean something to a parser.
const PIECES: [&str; 16] = [
    "---\n",
    "- ",
    ": ",
    "[",
    "]",
    "{",
    "}",
    "\"",
    "'",
    "|\n",
    "&a ",
    "*a",
    "!!binary ",
    "\t",
    "\u{0}",
    "99999999999999999999",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn objects_with_pieces_cut_out_and_put_in_never_panic(
        text in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..40, 0usize..PIECES.len()), 1..6),
    ) {
        let mut characters: Vec<char> = text.get(&TEXTS).chars().collect();
        for (at, cut, piece) in edits {
            let start = at.index(characters.len() + 1);
            let end = (start + cut).min(characters.len());
            characters.splice(start..end, PIECES[piece].chars());
        }
        take(&characters.into_iter().collect::<String>());
    }

    #[test]
    fn any_text_never_panics(text in "\\PC{0,200}") {
        take(&text);
    }
}

#[test]
fn nesting_without_end_is_a_problem_and_not_a_crash() {
    let header = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p}\nspec: ";
    for nested in ["[".repeat(200_000), "{a: ".repeat(200_000), "- ".repeat(200_000)] {
        assert_eq!(take(&format!("{header}{nested}")).1, 1);
    }
}

/// Searching the text anew for each item of a list took time with the square of its length.
#[test]
fn a_list_of_thousands_of_faults_is_read_in_one_go() {
    let item = |i| {
        format!(
            "- {{apiVersion: v1, kind: Service, metadata: {{name: s{i}}}, spec: {{ports: [{{port: x}}]}}}}\n"
        )
    };
    let items: String = (0..4_000).map(item).collect();
    let begun = Instant::now();
    assert_eq!(take(&format!("apiVersion: v1\nkind: List\nitems:\n{items}")), (0, 4_000));
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[test]
fn aliases_that_multiply_are_a_problem_and_not_an_end_of_memory() {
    let mut text =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            .to_owned();
    for i in 1..12 {
        let again = format!("*a{}, ", i - 1).repeat(10);
        text.push_str(&format!("  a{i}: &a{i} [{again}]\n"));
    }
    assert_eq!(take(&text), (0, 1));
}
