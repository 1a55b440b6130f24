//! PostgreSQL: `COPY` in and out, and `pgbench` on kept and on new connections.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use ambit_local::{Command, Process};
use nix::sys::signal::Signal;

use crate::{GRACE, LIMIT, Place, Programs, Talk, assert_same, random_words, run, text};

const BIN: &str = "/usr/lib/postgresql/15/bin";
const PORT: u16 = 5432;
/// The user that the package makes: the server does not run as root.
const USER: &str = "postgres";
const PASSWORD: &str = "a password of the tests";
/// 40,000 lines of about 200 bytes.
const ROWS: usize = 40_000;
const CLIENTS: usize = 8;
const TRANSACTIONS: usize = 100;

pub(crate) async fn copies_and_counts(bed: &Programs, place: Place) {
    let talk = Talk::new(bed, "postgres", place, PORT).await;
    let server = start(&talk).await;
    copies(&talk).await;
    counts(&talk).await;
    // Each client's in the first run, and each transaction's in the second.
    assert!(talk.assert_carried(CLIENTS + CLIENTS * TRANSACTIONS / 4).await.is_empty());
    // Fast shutdown: sessions are not waited for.
    server.signal(Signal::SIGINT).await;
    assert!(server.wait_within(GRACE).await.unwrap().success(), "{:#?}", server.logs());
    talk.end(server).await;
}

async fn start(talk: &Talk<'_>) -> Process {
    let (data, password) = (talk.file("data"), talk.file("password"));
    fs::create_dir(&data).unwrap();
    fs::write(&password, PASSWORD).unwrap();
    let uid = nix::unistd::User::from_name(USER).unwrap().expect("tests/packages.sh has run").uid;
    std::os::unix::fs::chown(&data, Some(uid.as_raw()), None).unwrap();
    let init = as_user(&format!("{BIN}/initdb"))
        .args([
            "--no-sync",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--auth=scram-sha-256",
            "--username=postgres",
        ])
        .args(["--pwfile", text(&password), "--pgdata", text(&data)]);
    run(&talk.server, &talk.directory, init).await;
    let mut rules = fs::read_to_string(data.join("pg_hba.conf")).unwrap();
    writeln!(rules, "host all all all scram-sha-256").unwrap();
    fs::write(data.join("pg_hba.conf"), rules).unwrap();
    let mut command = as_user(&format!("{BIN}/postgres")).args(["-D", text(&data)]).directory(&data);
    for setting in
        ["listen_addresses=*", "unix_socket_directories=", "fsync=off", "dynamic_shared_memory_type=mmap"]
    {
        command = command.args(["-c", setting]);
    }
    let server = talk.server.spawn(command).await.unwrap();
    let ready = server.wait_for_line(LIMIT, |line| line.contains("ready to accept connections")).await;
    ready.unwrap_or_else(|error| panic!("{error}: {:#?}", server.logs()));
    server
}

/// A command as the package's user, which still ends with the test, and its shared memory with it.
fn as_user(program: &str) -> Command {
    Command::new("unshare")
        .args(["--ipc", "setpriv"])
        .args(["--reuid", USER, "--regid", USER, "--clear-groups", "--pdeathsig", "KILL"])
        .arg(program)
}

fn client(program: &str, talk: &Talk<'_>) -> Command {
    Command::new(format!("{BIN}/{program}"))
        .env("PGHOST", &talk.host)
        .env("PGPORT", PORT.to_string())
        .env("PGUSER", "postgres")
        .env("PGDATABASE", "postgres")
        .env("PGPASSWORD", PASSWORD)
        // The mesh encrypts; what psql asks for first here is answered with a single byte by the server.
        .env("PGSSLMODE", "prefer")
}

async fn query(talk: &Talk<'_>, statements: &[&str]) -> String {
    let mut command = client("psql", talk).args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]);
    for statement in statements {
        command = command.args(["-c", statement]);
    }
    talk.ask(command).await.trim().to_owned()
}

async fn copies(talk: &Talk<'_>) {
    let (sent, got) = (talk.file("sent"), talk.file("got"));
    let words = random_words(ROWS * 192);
    let mut lines = String::with_capacity(words.len() + ROWS * 8);
    for row in 0..ROWS {
        writeln!(lines, "{row}\t{}", &words[row * 192..(row + 1) * 192]).unwrap();
    }
    fs::write(&sent, &lines).unwrap();
    let copy = |statement: &str, path: &Path| format!("\\copy {statement} '{}'", path.display());
    query(
        talk,
        &[
            "create table notes (id bigint primary key, words text not null)",
            &copy("notes from", &sent),
            &copy("(select id, words from notes order by id) to", &got),
        ],
    )
    .await;
    assert_same(&fs::read(&got).unwrap(), lines.as_bytes());
}

/// Every transaction of `pgbench` moves an amount in three tables and notes it in a fourth.
async fn counts(talk: &Talk<'_>) {
    talk.ask(client("pgbench", talk).args(["--initialize", "--quiet", "--scale=1"])).await;
    let mut done = 0;
    // Kept connections, and a new one for every transaction.
    for (transactions, args) in [(TRANSACTIONS, ["-M", "prepared"].as_slice()), (TRANSACTIONS / 4, &["-C"])] {
        let said = client("pgbench", talk)
            .args(["--no-vacuum", "--client", &CLIENTS.to_string(), "--jobs=2"])
            .args(["--transactions", &transactions.to_string()])
            .args(args);
        let said = talk.ask(said).await;
        let all = CLIENTS * transactions;
        assert!(said.contains(&format!("number of transactions actually processed: {all}/{all}")), "{said}");
        assert!(said.contains("number of failed transactions: 0 "), "{said}");
        done += all;
    }
    let sums = "select count(*), sum(delta) = (select sum(abalance) from pgbench_accounts), \
                sum(delta) = (select sum(tbalance) from pgbench_tellers), \
                sum(delta) = (select sum(bbalance) from pgbench_branches) from pgbench_history";
    assert_eq!(query(talk, &[sums]).await, format!("{done}|t|t|t"));
}
