//! Figures with their goals, as Markdown and JSON.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

/// A figure's unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Unit {
    Seconds,
    Bytes,
    PerSecond,
}

impl Unit {
    fn show(self, value: f64) -> String {
        let (value, unit) = match self {
            Self::Seconds if value < 1e-6 => (value * 1e9, "ns"),
            Self::Seconds if value < 1e-3 => (value * 1e6, "µs"),
            Self::Seconds if value < 1.0 => (value * 1e3, "ms"),
            Self::Seconds => (value, "s"),
            Self::Bytes if value < 1e4 => (value, "B"),
            Self::Bytes => (value / 1e6, "MB"),
            Self::PerSecond => (value, "a second"),
        };
        if value >= 100.0 { format!("{value:.0} {unit}") } else { format!("{value:.1} {unit}") }
    }
}

/// What a figure should be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Goal {
    AtMost(f64),
    AtLeast(f64),
}

/// One line of a table.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    what: String,
    unit: Unit,
    value: f64,
    /// More about the figure: its spread.
    detail: String,
    goal: Option<Goal>,
}

impl Row {
    /// A line without figure as yet.
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), unit: Unit::Seconds, value: f64::NAN, detail: String::new(), goal: None }
    }

    /// Median of times, with the slowest hundredth.
    pub(crate) fn of_times(what: impl Into<String>, mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let at = |share: f64| times.get((times.len() as f64 * share) as usize).copied().unwrap_or_default();
        let detail = format!("p99 {}", Unit::Seconds.show(at(0.99).as_secs_f64()));
        Self { detail, ..Self::new(what).time(at(0.5)) }
    }

    /// A time.
    pub(crate) fn time(self, value: Duration) -> Self {
        self.seconds(value.as_secs_f64())
    }

    /// A time in seconds.
    pub(crate) fn seconds(self, value: f64) -> Self {
        Self { value, unit: Unit::Seconds, ..self }
    }

    /// A rate.
    pub(crate) fn per_second(self, value: f64) -> Self {
        Self { value, unit: Unit::PerSecond, ..self }
    }

    /// An amount of memory.
    pub(crate) fn bytes(self, value: f64) -> Self {
        Self { value, unit: Unit::Bytes, ..self }
    }

    /// The goal: no longer than this.
    pub(crate) fn at_most(self, goal: Duration) -> Self {
        self.at_most_bytes(goal.as_secs_f64())
    }

    /// The goal of times: the median and the slowest hundredth.
    pub(crate) fn within(self, (median, slowest): (Duration, Duration)) -> Self {
        let detail = format!("{}, goal {}", self.detail, Unit::Seconds.show(slowest.as_secs_f64()));
        Self { detail, ..self.at_most(median) }
    }

    /// The goal: no more memory than this.
    pub(crate) fn at_most_bytes(self, goal: f64) -> Self {
        Self { goal: Some(Goal::AtMost(goal)), ..self }
    }

    /// The goal: no less than this.
    pub(crate) fn at_least(self, goal: f64) -> Self {
        Self { goal: Some(Goal::AtLeast(goal)), ..self }
    }
}

/// A table with what it is about.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Section {
    title: String,
    introduction: String,
    rows: Vec<Row>,
}

impl Section {
    pub(crate) fn new(title: &str, introduction: &str) -> Self {
        Self { title: title.to_owned(), introduction: introduction.to_owned(), rows: Vec::new() }
    }

    pub(crate) fn push(&mut self, row: Row) {
        eprintln!("{}: {}: {} {}", self.title, row.what, row.unit.show(row.value), row.detail);
        self.rows.push(row);
    }

    /// The section as Markdown.
    pub(crate) fn markdown(&self) -> String {
        let mut text = format!("## {}\n\n{}\n\n", self.title, self.introduction);
        text.push_str("| what | figure | goal |\n| --- | --- | --- |\n");
        for row in &self.rows {
            let goal = match row.goal {
                Some(Goal::AtMost(most)) => format!("≤ {}", row.unit.show(most)),
                Some(Goal::AtLeast(least)) => format!("≥ {}", row.unit.show(least)),
                None => String::new(),
            };
            let detail = if row.detail.is_empty() { String::new() } else { format!(" ({})", row.detail) };
            let _ = writeln!(text, "| {} | {}{detail} | {goal} |", row.what, row.unit.show(row.value));
        }
        text
    }
}
