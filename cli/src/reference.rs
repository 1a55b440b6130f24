//! The second part of docs/cli.md: the help of every command, written from the program.

use clap::{Command, CommandFactory};

/// Columns of the help in the page.
const WIDTH: usize = 100;

/// The line of the page after which everything is written from the program.
const MARKER: &str =
    "<!-- Written from the program: AMBIT_WRITE_DOCS=1 cargo test -p ambit-cli reference -->\n";

/// The help of every visible command, in Markdown.
fn reference() -> String {
    let mut text = String::new();
    add(&mut crate::Command::command().term_width(WIDTH), "ambit", &mut text);
    text
}

fn add(command: &mut Command, path: &str, text: &mut String) {
    if command.get_subcommands().next().is_none() {
        let mut named = command.clone().bin_name(path).display_name(path).term_width(WIDTH);
        let help = named.render_long_help().to_string();
        let help: Vec<&str> = help.lines().map(str::trim_end).collect();
        text.push_str(&format!("\n### `{path}`\n\n```text\n{}\n```\n", help.join("\n").trim_end()));
        return;
    }
    let names: Vec<String> = command
        .get_subcommands()
        .filter(|sub| !sub.is_hide_set() && sub.get_name() != "help")
        .map(|sub| sub.get_name().to_owned())
        .collect();
    for name in names {
        if let Some(sub) = command.find_subcommand_mut(&name) {
            add(sub, &format!("{path} {name}"), text);
        }
    }
}

#[test]
fn the_reference_is_that_of_the_program() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cli.md");
    let page = std::fs::read_to_string(path).unwrap_or_default();
    let (written, generated) = page.split_once(MARKER).unwrap_or((&page, ""));
    if std::env::var_os("AMBIT_WRITE_DOCS").is_some() {
        let page = format!("{written}{MARKER}{}", reference());
        std::fs::write(path, page).unwrap_or_else(|error| panic!("{path}: {error}"));
        return;
    }
    assert_eq!(generated, reference(), "AMBIT_WRITE_DOCS=1 writes it anew");
}
