//! Redis: many commands under way on one connection, and values of megabytes.

use std::fmt::Write as _;
use std::fs;

use ambit_local::Command;

use crate::{Place, Programs, Talk, assert_same, random_words, shell, text};

const PORT: u16 = 6379;
const KEYS: usize = 10_000;
const VALUE: usize = 200;
/// Keys that one command asks for.
const AT_ONCE: usize = 500;
/// A value that no buffer on the way holds.
const BIG: usize = 8 * 1024 * 1024;

pub(crate) async fn answers_pipelines(bed: &Programs, place: Place) {
    let talk = Talk::new(bed, "redis", place, PORT).await;
    let command = Command::new("redis-server")
        .args(["--bind", "*", "--port", &PORT.to_string(), "--protected-mode", "no", "--daemonize", "no"])
        .args(["--save", "", "--appendonly", "no", "--dir", text(&talk.directory)]);
    let server = talk.serve(command, PORT).await;
    assert_eq!(talk.ask(cli(&talk).arg("ping")).await.trim(), "PONG");
    values_in_a_pipeline(&talk).await;
    a_big_value(&talk).await;
    benchmark(&talk).await;
    assert!(talk.assert_carried(20).await.is_empty());
    talk.end(server).await;
}

fn cli(talk: &Talk<'_>) -> Command {
    Command::new("redis-cli").args(["-h", &talk.host, "-p", &PORT.to_string()])
}

async fn values_in_a_pipeline(talk: &Talk<'_>) {
    let words = random_words(KEYS * VALUE);
    let value = |key: usize| &words[key * VALUE..(key + 1) * VALUE];
    let (mut sets, mut gets, mut expected) = (String::new(), String::new(), String::new());
    for key in 0..KEYS {
        let name = format!("key:{key}");
        let (long, value) = (name.len(), value(key));
        write!(sets, "*3\r\n$3\r\nSET\r\n${long}\r\n{name}\r\n${VALUE}\r\n{value}\r\n").unwrap();
        let next = if key % AT_ONCE == 0 { "\nMGET" } else { "" };
        write!(gets, "{next} {name}").unwrap();
        writeln!(expected, "{value}").unwrap();
    }
    let (set, get, got) = (talk.file("sets"), talk.file("gets"), talk.file("got"));
    fs::write(&set, sets).unwrap();
    fs::write(&get, gets.trim_start()).unwrap();
    let port = PORT.to_string();
    let said = talk.ask(shell("redis-cli -h $1 -p $2 --pipe < $3", [&talk.host, &port, text(&set)])).await;
    assert!(said.contains(&format!("errors: 0, replies: {KEYS}")), "{said}");
    talk.ask(shell("redis-cli -h $1 -p $2 --raw < $3 > $4", [&talk.host, &port, text(&get), text(&got)]))
        .await;
    assert_same(&fs::read(&got).unwrap(), expected.as_bytes());
}

async fn a_big_value(talk: &Talk<'_>) {
    let (sent, mut value) = talk.random_file("sent", BIG);
    let got = talk.file("got");
    let port = PORT.to_string();
    let said =
        talk.ask(shell("redis-cli -h $1 -p $2 -x set big < $3", [&talk.host, &port, text(&sent)])).await;
    assert_eq!(said.trim(), "OK");
    talk.ask(shell("redis-cli -h $1 -p $2 --raw get big > $3", [&talk.host, &port, text(&got)])).await;
    // What redis-cli writes, it ends with a line end.
    value.push(b'\n');
    assert_same(&fs::read(&got).unwrap(), &value);
}

async fn benchmark(talk: &Talk<'_>) {
    let command = Command::new("redis-benchmark")
        .args(["-h", &talk.host, "-p", &PORT.to_string(), "-t", "set,get,incr", "-q", "--csv"])
        .args(["-c", "20", "-n", "20000", "-P", "32", "-d", "256", "-r", "100"]);
    let said = talk.ask(command).await;
    for test in ["\"SET\"", "\"GET\"", "\"INCR\""] {
        assert!(said.lines().any(|line| line.starts_with(test)), "{said}");
    }
    assert!(!said.to_ascii_lowercase().contains("err"), "{said}");
    // Every increment of a counter among a hundred was done once.
    let count = "local sum = 0 for _, key in ipairs(redis.call('keys', 'counter:*')) do \
                 sum = sum + redis.call('get', key) end return sum";
    assert_eq!(talk.ask(cli(talk).args(["eval", count, "0"])).await.trim(), "20000");
}
