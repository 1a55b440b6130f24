//! nginx: wrk on kept and on new connections, and a file of 100 MB.

use std::fs;
use std::io;
use std::path::Path;

use ambit_local::Command;

use crate::{Place, Programs, Talk, random_words, run, shell, text};

const PORT: u16 = 80;
/// Size of the big file, bytes.
const BIG: u64 = 100 * 1024 * 1024;
const PAGE: usize = 2_000;
/// Connections at once that are kept, and such that serve one request each.
const KEPT: usize = 20;
const NEW: usize = 10;

pub(crate) async fn serves(bed: &Programs, place: Place) {
    let talk = Talk::new(bed, "nginx", place, PORT).await;
    fs::write(talk.file("page"), random_words(PAGE)).unwrap();
    let mut noise = io::Read::take(fs::File::open("/dev/urandom").unwrap(), BIG);
    io::copy(&mut noise, &mut fs::File::create(talk.file("big")).unwrap()).unwrap();
    fs::write(talk.file("nginx.conf"), configuration(&talk.directory)).unwrap();
    let command = Command::new("/usr/sbin/nginx").args(["-c", text(&talk.file("nginx.conf"))]);
    let server = talk.serve(command, PORT).await;
    let kept = load(&talk, &["-c", &KEPT.to_string()]).await;
    let new = load(&talk, &["-c", &NEW.to_string(), "-H", "Connection: close"]).await;
    a_big_file(&talk).await;
    let complaints = talk.assert_carried(KEPT + new).await;
    // At its end wrk resets what is under way; each proxy on the way says that it was the client.
    assert!(complaints.iter().all(|error| error.contains("downstream")), "{complaints:?}");
    assert!(complaints.len() <= 2 * (KEPT + NEW), "{complaints:?}");
    let log = fs::read_to_string(talk.file("access.log")).unwrap();
    let whole = log.lines().filter(|line| *line == format!("200 {PAGE}")).count();
    assert!(whole >= kept + new, "wrk counts {kept} + {new} answers, nginx {whole}");
    talk.end(server).await;
}

/// Everything that nginx writes goes to the test's own directory.
fn configuration(directory: &Path) -> String {
    let at = directory.display();
    let kinds = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
    let temporary: String = kinds.iter().map(|kind| format!("{kind}_temp_path {at}/{kind};\n")).collect();
    format!(
        "daemon off;\nuser root;\nworker_processes 2;\npid {at}/pid;\nerror_log {at}/error.log;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\n{temporary}log_format short '$status $body_bytes_sent';\naccess_log {at}/access.log short;\n\
         sendfile on;\nkeepalive_requests 1000000;\n\
         server {{ listen {PORT}; listen [::]:{PORT}; root {at}; }}\n}}\n"
    )
}

/// Loads the page for two seconds; how many answers came.
async fn load(talk: &Talk<'_>, args: &[&str]) -> usize {
    let command = Command::new("wrk").args(["-t", "2", "-d", "2s", "--timeout", "20s"]).args(args);
    let said = talk.ask(command.arg(format!("http://{}/page", talk.host))).await;
    for complaint in ["Socket errors", "Non-2xx"] {
        assert!(!said.contains(complaint), "{said}");
    }
    let answers = said.lines().find_map(|line| line.trim().split_once(" requests in ")?.0.parse().ok());
    let answers = answers.unwrap_or_else(|| panic!("{said}"));
    assert!(answers > 0, "{said}");
    answers
}

async fn a_big_file(talk: &Talk<'_>) {
    let sum = run(&talk.server, &talk.directory, shell("sha256sum < $1", [text(&talk.file("big"))])).await;
    let url = format!("http://{}/big", talk.host);
    let script = "curl --fail --silent --show-error --max-time 80 $1 | sha256sum";
    assert_eq!(talk.ask(shell(script, [&url])).await, sum);
}
