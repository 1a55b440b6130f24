//! What commands that look for faults report: what is wrong, how it shows, and what to do about it.

use std::fmt::Write as _;

use serde::Serialize;

use crate::output::Palette;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// The mesh does not work, or does not protect what it should.
    Error,
    /// It works, with less than it promises, or not for long.
    Warning,
    /// Worth knowing.
    Note,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// How much it matters.
    pub(crate) level: Level,
    /// What it is about: a node, an object.
    pub(crate) subject: String,
    /// What is wrong.
    pub(crate) problem: String,
    /// How it shows; empty where the problem says it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) symptom: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) remedy: String,
}

impl Finding {
    /// A finding that is an error.
    pub(crate) fn error(subject: impl Into<String>, problem: impl Into<String>) -> Finding {
        Finding::new(Level::Error, subject, problem)
    }

    /// A finding that is a warning.
    pub(crate) fn warning(subject: impl Into<String>, problem: impl Into<String>) -> Finding {
        Finding::new(Level::Warning, subject, problem)
    }

    /// A finding that is a note.
    pub(crate) fn note(subject: impl Into<String>, problem: impl Into<String>) -> Finding {
        Finding::new(Level::Note, subject, problem)
    }

    fn new(level: Level, subject: impl Into<String>, problem: impl Into<String>) -> Finding {
        let (subject, problem) = (subject.into(), problem.into());
        Finding { level, subject, problem, symptom: String::new(), remedy: String::new() }
    }

    /// How it shows.
    pub(crate) fn shows(self, symptom: impl Into<String>) -> Finding {
        Finding { symptom: symptom.into(), ..self }
    }

    /// What to do about it.
    pub(crate) fn remedy(self, remedy: impl Into<String>) -> Finding {
        Finding { remedy: remedy.into(), ..self }
    }
}

/// A check and what it found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Section {
    /// What is checked.
    pub(crate) title: String,
    /// What was found; empty when all is well.
    pub(crate) findings: Vec<Finding>,
}

/// The gravest level among sections.
pub(crate) fn gravest(sections: &[Section]) -> Option<Level> {
    sections.iter().flat_map(|section| &section.findings).map(|finding| finding.level).min()
}

/// Sections for people, the findings of each below its title.
pub(crate) fn render(sections: &[Section], paint: Palette) -> String {
    let mut text = String::new();
    for Section { title, findings } in sections {
        let mark = match findings.iter().map(|finding| finding.level).min() {
            None => paint.green("✓"),
            Some(level) => mark(level, paint),
        };
        let _ = writeln!(text, "{mark} {title}");
        for finding in findings {
            render_one(finding, paint, &mut text);
        }
    }
    text
}

fn render_one(finding: &Finding, paint: Palette, text: &mut String) {
    let Finding { level, subject, problem, symptom, remedy } = finding;
    let _ = writeln!(text, "    {} {}: {problem}", mark(*level, paint), paint.bold(subject));
    if !symptom.is_empty() {
        let _ = writeln!(text, "      shows as: {symptom}");
    }
    if !remedy.is_empty() {
        let _ = writeln!(text, "      remedy:   {remedy}");
    }
}

fn mark(level: Level, paint: Palette) -> String {
    match level {
        Level::Error => paint.red("✗"),
        Level::Warning => paint.yellow("!"),
        Level::Note => paint.dim("–"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_below_the_title_of_their_check() {
        let finding =
            Finding::error("node n1", "no plugin").shows("pods in the clear").remedy("set platform");
        let sections = [
            Section { title: "nodes".into(), findings: vec![finding, Finding::note("node n2", "old")] },
            Section { title: "version".into(), findings: Vec::new() },
        ];
        let expected = "✗ nodes\n    ✗ node n1: no plugin\n      shows as: pods in the clear\n      \
                        remedy:   set platform\n    – node n2: old\n✓ version\n";
        assert_eq!(render(&sections, Palette::new(false)), expected);
        assert_eq!(gravest(&sections), Some(Level::Error));
    }
}
