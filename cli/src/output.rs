//! What commands print: tables and colours for people, JSON and YAML for programs.
//!
//! Everything here is a function of values; only [`print()`] and [`Wait`] write. A reader that closes the output is no error.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::time::Duration;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// The form of a command's result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Tables.
    #[default]
    Table,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// Prints a result in the form that was asked for; `table` renders it for people.
///
/// # Errors
/// When the value can't be serialized.
pub(crate) fn emit<T: Serialize>(
    format: Format,
    value: &T,
    table: impl FnOnce(Palette) -> String,
) -> anyhow::Result<()> {
    match format {
        Format::Table => print(&table(Palette::detect())),
        Format::Json => print(&format!("{}\n", serde_json::to_string_pretty(value)?)),
        Format::Yaml => print(&serde_saphyr::to_string(value)?),
    }
    Ok(())
}

/// Prints to standard output. A reader that closes it does not end the program.
pub(crate) fn print(text: &str) {
    let mut output = std::io::stdout().lock();
    if output.write_all(text.as_bytes()).and_then(|()| output.flush()).is_err() {
        tracing::debug!("nobody reads the output");
    }
}

/// Colours, where there is a terminal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Palette {
    on: bool,
}

impl Palette {
    /// Colours or none.
    pub(crate) fn new(on: bool) -> Palette {
        Palette { on }
    }

    /// Colours if standard output is a terminal and `NO_COLOR` is not set.
    pub(crate) fn detect() -> Palette {
        Palette { on: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() }
    }

    /// For what is well.
    pub(crate) fn green(self, text: &str) -> String {
        self.with("32", text)
    }

    /// For what is wrong.
    pub(crate) fn red(self, text: &str) -> String {
        self.with("31", text)
    }

    /// For what deserves a look.
    pub(crate) fn yellow(self, text: &str) -> String {
        self.with("33", text)
    }

    /// For headings.
    pub(crate) fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    /// For details.
    pub(crate) fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Rows below a heading, in columns as wide as their widest cell. Empty cells show as `-`.
pub(crate) fn table<const N: usize>(
    paint: Palette,
    heading: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let filled = |row: [String; N]| row.map(|cell| if cell.is_empty() { "-".to_owned() } else { cell });
    let rows: Vec<[String; N]> =
        std::iter::once(heading.map(str::to_owned)).chain(rows.into_iter().map(filled)).collect();
    let mut text = String::new();
    for (index, line) in aligned(&rows).into_iter().enumerate() {
        let line = if index == 0 { paint.bold(&line) } else { line };
        let _ = writeln!(text, "{line}");
    }
    text
}

/// Columns padded to the widest of their cells.
pub(crate) fn aligned<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    rows.iter()
        .map(|row| {
            let cells: Vec<String> =
                row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            cells.join("  ").trim_end().to_owned()
        })
        .collect()
}

/// A size for people.
pub(crate) fn bytes(count: f64) -> String {
    let mut size = count;
    for unit in ["B", "KB", "MB", "GB"] {
        if size < 1000.0 {
            return if unit == "B" { format!("{size} {unit}") } else { format!("{size:.1} {unit}") };
        }
        size /= 1000.0;
    }
    format!("{size:.1} TB")
}

/// A duration for people, in its two largest units.
pub(crate) fn duration(seconds: i64) -> String {
    let seconds = seconds.max(0);
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m{}s", seconds % 60),
        (0, hours, minutes) => format!("{hours}h{minutes}m"),
        (days, hours, _) => format!("{days}d{hours}h"),
    }
}

/// A spinner on standard error while a command waits, where that is a terminal. Dropping it clears the line.
pub(crate) struct Wait {
    spinner: Option<ProgressBar>,
}

impl Wait {
    /// Shows what is being waited for.
    pub(crate) fn start(what: &str) -> Wait {
        if !std::io::stderr().is_terminal() {
            return Wait { spinner: None };
        }
        let spinner = ProgressBar::new_spinner().with_style(ProgressStyle::default_spinner());
        spinner.set_message(what.to_owned());
        spinner.enable_steady_tick(Duration::from_millis(100));
        Wait { spinner: Some(spinner) }
    }

    /// Shows something else.
    pub(crate) fn show(&self, what: &str) {
        if let Some(spinner) = &self.spinner {
            spinner.set_message(what.to_owned());
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        if let Some(spinner) = self.spinner.take() {
            spinner.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["a".to_owned(), "b".to_owned()], ["long".to_owned(), "c".to_owned()]];
        assert_eq!(aligned(&rows), ["a     b", "long  c"]);
    }

    #[test]
    fn empty_cells_show_as_a_dash() {
        let text = table(Palette::new(false), ["A", "B"], [[String::new(), "b".to_owned()]]);
        assert_eq!(text, "A  B\n-  b\n");
    }

    #[test]
    fn sizes_have_one_digit_after_the_point() {
        assert_eq!(bytes(999.0), "999 B");
        assert_eq!(bytes(1_540_000.0), "1.5 MB");
    }

    #[test]
    fn durations_have_their_two_largest_units() {
        let shown = [-1, 59, 61, 3_700, 90_000].map(duration);
        assert_eq!(shown, ["0s", "59s", "1m1s", "1h1m", "1d1h"]);
    }

    #[test]
    fn colours_are_only_where_they_are_wanted() {
        assert_eq!(Palette::new(false).red("x"), "x");
        assert_eq!(Palette::new(true).red("x"), "\x1b[31mx\x1b[0m");
    }
}
