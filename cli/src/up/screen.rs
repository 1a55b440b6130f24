//! The table on the terminal, which is redrawn in place. Without a terminal, changes are printed.

use std::fmt::Write as _;
use std::io::IsTerminal;

use crate::output::{Palette, Wait, aligned, bytes, print};
use crate::up::flows::{Connections, Flows};
use crate::up::proof::{Outcome, Proof};
use crate::up::requests::{AllRequests, Requests};

/// Messages in addition to the flows, one line each.
#[derive(Debug, Clone, Default)]
pub(crate) struct Messages {
    /// Problems.
    pub(crate) troubles: Vec<String>,
    /// Parts of the manifests that have no effect here.
    pub(crate) notes: Vec<String>,
}

/// Where the table is shown.
pub(crate) struct Screen {
    /// Standard output is a terminal.
    terminal: bool,
    /// The table is redrawn in place.
    live: bool,
    spinner: Option<Wait>,
    /// Lines that stay above the table.
    header: String,
    /// Where there is no terminal: whether the table was printed.
    table_printed: bool,
    /// Where there is no terminal: the troubles that were printed.
    troubles: Vec<String>,
    /// Where there is no terminal: the notes that were printed.
    notes: Vec<String>,
}

impl Screen {
    /// A screen on standard output. With `once`, the table is never redrawn in place.
    pub(crate) fn new(once: bool) -> Self {
        let terminal = std::io::stdout().is_terminal();
        Self {
            terminal,
            live: terminal && !once,
            spinner: None,
            header: String::new(),
            table_printed: false,
            troubles: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Shows what is being waited for.
    pub(crate) fn wait_for(&mut self, what: &str) {
        self.end();
        if !self.terminal {
            return;
        }
        self.spinner = Some(Wait::start(what));
    }

    /// Ends the wait.
    pub(crate) fn end(&mut self) {
        self.spinner = None;
    }

    /// Prints one line that stays.
    pub(crate) fn say(&mut self, line: &str) {
        self.end();
        print(&format!("{line}\n"));
        self.header.push_str(line);
        self.header.push('\n');
    }

    /// Shows problems, ignored parts of the manifests, flows and checks.
    pub(crate) fn draw(&mut self, messages: &Messages, flows: &Flows, proof: Option<&Proof>) {
        self.end();
        let Messages { troubles, notes } = messages;
        let paint = Palette::new(self.terminal);
        let mut text = String::new();
        for line in troubles {
            let _ = writeln!(text, "{}", paint.red(&format!("! {line}")));
        }
        if self.live {
            for line in notes {
                let _ = writeln!(text, "{}", paint.dim(&format!("note: {line}")));
            }
        }
        add_connections(&mut text, &flows.connections, paint);
        add_requests(&mut text, &flows.requests, paint);
        add_identities(&mut text, &flows.connections, paint);
        if let Some(proof) = proof {
            add_proof(&mut text, proof, paint);
        } else if self.live {
            let _ = writeln!(text, "\n{}", paint.dim("proving it; Ctrl-C ends the mesh"));
        }
        if self.live {
            // Home without wrapping, the text with each line's rest cleared, then everything below cleared.
            let screen = format!("{}{text}", self.header).replace('\n', "\x1b[K\n");
            print(&format!("\x1b[?7l\x1b[H{screen}\x1b[J\x1b[?7h"));
            return;
        }
        let unread = notes.iter().filter(|line| !self.notes.contains(line));
        print(&unread.map(|line| format!("note: {line}\n")).collect::<String>());
        if proof.is_some() && !self.table_printed {
            print(&text);
            self.table_printed = true;
        } else {
            // Without a terminal, only new lines are printed.
            let unread = troubles.iter().filter(|line| !self.troubles.contains(line));
            print(&unread.map(|line| format!("! {line}\n")).collect::<String>());
            let mended = self.troubles.iter().filter(|line| !troubles.contains(line));
            print(&mended.map(|line| format!("mended: {line}\n")).collect::<String>());
        }
        self.troubles.clone_from(troubles);
        self.notes.clone_from(notes);
    }
}

fn add_connections(text: &mut String, flows: &Connections, paint: Palette) {
    let mut rows = vec![
        ["SOURCE", "DESTINATION", "SERVICE", "MTLS", "CONNECTIONS", "REFUSED", "BYTES OUT", "BYTES BACK"]
            .map(str::to_owned),
    ];
    for (pair, flow) in flows {
        let mutual_tls = match (flow.opened + flow.confirmed > 0.0, flow.mutual_tls && flow.confirmed > 0.0) {
            (false, _) => "-",
            (true, true) => "yes",
            (true, false) => "no",
        };
        rows.push([
            workload(&pair.source.workload, &pair.source.namespace),
            workload(&pair.destination.workload, &pair.destination.namespace),
            pair.service.clone(),
            mutual_tls.to_owned(),
            format!("{}", flow.opened.max(flow.confirmed)),
            format!("{}", flow.failed),
            bytes(flow.requests),
            bytes(flow.responses),
        ]);
    }
    add_table(text, &rows, paint);
}

fn add_table<const COLUMNS: usize>(text: &mut String, rows: &[[String; COLUMNS]], paint: Palette) {
    for (index, line) in aligned(rows).into_iter().enumerate() {
        let line = if index == 0 { paint.bold(&line) } else { line };
        let _ = writeln!(text, "{line}");
    }
}

/// What waypoints report, if there are any.
fn add_requests(text: &mut String, requests: &AllRequests, paint: Palette) {
    if requests.is_empty() {
        return;
    }
    let mut rows = vec![
        ["SOURCE", "SERVICE", "ANSWERED BY", "REQUESTS", "CODES", "RETRIES", "P50", "P99"].map(str::to_owned),
    ];
    for (key, row) in requests {
        let time = |share| row.quantile(share).map_or_else(|| "-".to_owned(), milliseconds);
        let answered_by = match key.workload.as_str() {
            "" => "the waypoint".to_owned(),
            name => workload(name, &key.namespace),
        };
        rows.push([
            workload(&key.source, &key.source_namespace),
            key.service.clone(),
            answered_by,
            format!("{}", row.count()),
            codes(row),
            format!("{}", row.retries),
            time(0.5),
            time(0.99),
        ]);
    }
    let _ = writeln!(text);
    add_table(text, &rows, paint);
}

/// `200`, or `200 (139) 504 (2)` if there are several.
fn codes(row: &Requests) -> String {
    // A client that left before its answer has none.
    let name = |code: u16| if code == 0 { "none".to_owned() } else { code.to_string() };
    match row.codes.first_key_value() {
        Some((code, _)) if row.codes.len() == 1 => name(*code),
        _ => {
            let each = row.codes.iter().map(|(code, count)| format!("{} ({count})", name(*code)));
            each.collect::<Vec<_>>().join(" ")
        }
    }
}

fn milliseconds(value: f64) -> String {
    if value < 10.0 { format!("{value:.1} ms") } else { format!("{value:.0} ms") }
}

fn add_identities(text: &mut String, flows: &Connections, paint: Palette) {
    let identities: std::collections::BTreeMap<String, &str> = flows
        .keys()
        .flat_map(|pair| [&pair.source, &pair.destination])
        .filter(|party| !party.principal.is_empty())
        .map(|party| (workload(&party.workload, &party.namespace), party.principal.as_str()))
        .collect();
    if !identities.is_empty() {
        let _ = writeln!(text);
        let rows: Vec<[String; 2]> = std::iter::once(["WORKLOAD".to_owned(), "IDENTITY".to_owned()])
            .chain(identities.into_iter().map(|(name, identity)| [name, identity.to_owned()]))
            .collect();
        add_table(text, &rows, paint);
    }
}

fn add_proof(text: &mut String, proof: &Proof, paint: Palette) {
    let _ = writeln!(text);
    for check in &proof.checks {
        let (mark, detail) = match &check.outcome {
            Outcome::Shown(detail) => (paint.green("✓"), detail.clone()),
            Outcome::NotShown(detail) => (paint.dim("–"), format!("not shown: {detail}")),
            Outcome::Failed(detail) => (paint.red("✗"), detail.clone()),
        };
        let _ = writeln!(text, "{mark} {}: {}", check.claim, paint.dim(&detail));
    }
}

fn workload(name: &str, namespace: &str) -> String {
    match (name, namespace) {
        ("", _) => "unknown".to_owned(),
        (name, "") => name.to_owned(),
        (name, namespace) => format!("{namespace}/{name}"),
    }
}
