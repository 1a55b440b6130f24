//! Steady load: what fails while something of the mesh or the cluster is restarted.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use hyper::Uri;
use tokio::task::LocalSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::request::{Connection, LIMIT, connect, send};

/// Connections that are kept.
const KEPT: u32 = 10;
/// Failures of which the reason is printed.
const REASONS: usize = 20;

/// The load.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// `http://HOST[:PORT]/PATH`.
    url: Uri,
    /// Requests a second.
    #[arg(long, default_value_t = 200)]
    rate: u32,
}

/// What became of the requests.
#[derive(Debug, Default, serde::Serialize)]
struct Counts {
    ok: u64,
    failed: u64,
    reasons: Vec<String>,
}

type Shared = Rc<RefCell<Counts>>;

pub(crate) async fn run(options: &Options) -> anyhow::Result<()> {
    anyhow::ensure!(options.rate >= 2, "at least two requests a second");
    let counts = Shared::default();
    let local = LocalSet::new();
    let half = Duration::from_secs(2) / options.rate;
    for _ in 0..KEPT {
        local.spawn_local(keep(options.url.clone(), half * KEPT, Rc::clone(&counts)));
    }
    local.spawn_local(renew(options.url.clone(), half, Rc::clone(&counts)));
    let report = async {
        let mut tick = interval(Duration::from_secs(1));
        loop {
            tick.tick().await;
            let line = serde_json::to_string(&*counts.borrow())?;
            println!("{line}");
        }
    };
    local.run_until(report).await
}

/// Requests on one connection, which is made again only after a failure, or where an answer says that it is the last.
async fn keep(url: Uri, pause: Duration, counts: Shared) {
    let mut tick = interval(pause);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut kept: Option<Connection> = None;
    loop {
        tick.tick().await;
        let attempt = async {
            let mut connection = match kept.take() {
                Some(connection) => connection,
                None => connect(&url).await?,
            };
            let answer = send(&mut connection, &url).await?;
            Ok(Some(connection).filter(|_| !answer.closes))
        };
        match timeout(LIMIT, attempt).await.context("no answer in time").and_then(|sent| sent) {
            Ok(connection) => {
                counts.borrow_mut().ok += 1;
                kept = connection;
            }
            Err(error) => fail(&counts, "kept", &error),
        }
    }
}

/// Each request on a connection of its own.
async fn renew(url: Uri, pause: Duration, counts: Shared) {
    let mut tick = interval(pause);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let (url, counts) = (url.clone(), Rc::clone(&counts));
        tokio::task::spawn_local(async move {
            let attempt = async { send(&mut connect(&url).await?, &url).await };
            match timeout(LIMIT, attempt).await.context("no answer in time").and_then(|sent| sent) {
                Ok(_) => counts.borrow_mut().ok += 1,
                Err(error) => fail(&counts, "new", &error),
            }
        });
    }
}

fn fail(counts: &Shared, kind: &str, error: &anyhow::Error) {
    let mut counts = counts.borrow_mut();
    counts.failed += 1;
    if counts.reasons.len() < REASONS {
        counts.reasons.push(format!("{kind} connection: {error:#}"));
    }
}
