//! `ambit tap`: follows connections and requests while they happen, as the proxies record them.
//!
//! Every proxy that is asked streams the records of its access log that the filter wants; here they are merged and shown.

mod show;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use form_urlencoded::Serializer;
use serde_json::Value;
use tokio::sync::mpsc;

use crate::cluster::until_interrupted;
use crate::mesh::{self, Mesh, Proxy};
use crate::output::{Palette, print};

use show::Seen;

/// Records that wait to be printed.
const WAITING: usize = 256;
/// An answer that went on for so long was one, although it had no record.
const LASTING: Duration = Duration::from_secs(3);
/// Pause before a proxy whose answer ended is asked again.
const PAUSE: Duration = Duration::from_secs(1);

/// The form of a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// One line each, for people.
    #[default]
    Table,
    /// One JSON object a line.
    Json,
}

/// The direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Direction {
    /// To a pod of the proxy's node.
    Inbound,
    /// From a pod of the proxy's node.
    Outbound,
}

/// How a connection or request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Status {
    /// It did not fail in the mesh.
    Ok,
    /// Policy denied it.
    Denied,
    /// It failed otherwise.
    Failed,
}

/// Options of `ambit tap`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// A node, a pod of a waypoint or gateway, or a pod of an application, whose node's proxy is asked. Default is every proxy.
    target: Option<String>,
    /// Only with a source or destination in this namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Only to or from this pod or workload: NAME or NAMESPACE/NAME.
    #[arg(short, long, value_name = "NAME")]
    workload: Option<String>,
    /// Only from this pod, workload, address or SPIFFE id.
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Only to this pod, workload, service, address or SPIFFE id.
    #[arg(long, value_name = "NAME")]
    destination: Option<String>,
    /// Only connections that node proxies see in this direction.
    #[arg(long, value_enum)]
    direction: Option<Direction>,
    /// Only to this host: the one that a request names, or that of a service, in full or up to a dot.
    #[arg(long)]
    host: Option<String>,
    /// Only requests of this method.
    #[arg(short = 'X', long)]
    method: Option<String>,
    /// Only requests whose path begins so.
    #[arg(long, value_name = "PREFIX")]
    path: Option<String>,
    /// Only requests with this status, as 403, or a class of them, as 5xx.
    #[arg(long)]
    code: Option<String>,
    /// Only what ended so.
    #[arg(long, value_enum)]
    status: Option<Status>,
    /// Only what policy denied: --status denied.
    #[arg(long, conflicts_with = "status")]
    denied: bool,
    /// Say why, below each that was denied or failed.
    #[arg(long)]
    why: bool,
    /// End after this many.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// End after this time, as 30s, 5m or 1h.
    #[arg(long = "for", value_name = "DURATION", value_parser = duration)]
    limit: Option<Duration>,
    /// Form of a record.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    mesh: mesh::Selection,
}

/// Reads a number with one of the units s, m and h.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no number of s, m or h, as in 30s");
    let number = |digits: &str, seconds: u64| {
        digits.parse::<u64>().ok().and_then(|count| count.checked_mul(seconds)).ok_or_else(wrong)
    };
    let seconds = match text.as_bytes().last() {
        Some(b's') => number(text.strip_suffix('s').unwrap_or_default(), 1)?,
        Some(b'm') => number(text.strip_suffix('m').unwrap_or_default(), 60)?,
        Some(b'h') => number(text.strip_suffix('h').unwrap_or_default(), 3600)?,
        _ => return Err(wrong()),
    };
    Ok(Duration::from_secs(seconds))
}

impl Options {
    /// What a proxy is asked, as the path of its admin server.
    fn question(&self) -> String {
        let direction =
            self.direction.and_then(|it| it.to_possible_value()).map(|it| it.get_name().to_owned());
        let status = match self.denied {
            true => Some("denied".to_owned()),
            false => self.status.and_then(|it| it.to_possible_value()).map(|it| it.get_name().to_owned()),
        };
        let parameters = [
            ("namespace", self.namespace.clone()),
            ("workload", self.workload.clone()),
            ("source", self.source.clone()),
            ("destination", self.destination.clone()),
            ("direction", direction),
            ("host", self.host.clone()),
            ("method", self.method.clone()),
            ("path", self.path.clone()),
            ("code", self.code.clone()),
            ("status", status),
        ];
        let mut query = Serializer::new(String::new());
        for (name, value) in parameters {
            if let Some(value) = value {
                query.append_pair(name, &value);
            }
        }
        format!("/tap?{}", query.finish())
    }
}

/// What comes from the proxies.
enum Event {
    Record {
        proxy: String,
        record: Value,
    },
    /// The stream of a proxy ended.
    Interrupted {
        proxy: String,
        error: String,
    },
}

/// Follows connections and requests until enough were seen, the time is over, or Ctrl-C.
///
/// # Errors
/// When the mesh or none of its proxies can be reached, or the filter can't be read.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let (shown, lost) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let following = follow(options, &shown, &lost);
    let outcome = until_interrupted(async {
        match options.limit {
            Some(limit) => tokio::time::timeout(limit, following).await.unwrap_or(Ok(())),
            None => following.await,
        }
    });
    let lost = lost.load(Ordering::Relaxed);
    if lost > 0 {
        eprintln!("ambit: {lost} more were not shown, as they came too fast: a filter helps");
    }
    outcome?;
    Ok(ExitCode::SUCCESS)
}

async fn follow(options: &Options, shown: &AtomicU64, lost: &AtomicU64) -> anyhow::Result<()> {
    let mesh = Arc::new(options.mesh.connect().await?);
    let proxies = mesh.proxies(options.target.as_deref()).await?;
    let (events, mut received) = mpsc::channel(WAITING);
    let question: Arc<str> = options.question().into();
    let mut asking = tokio::task::JoinSet::new();
    for proxy in proxies {
        asking.spawn(ask(mesh.clone(), proxy, question.clone(), events.clone()));
    }
    drop(events);
    let paint = Palette::detect();
    if options.output == Format::Table {
        print(&show::heading(paint));
    }
    while let Some(event) = received.recv().await {
        let (proxy, record) = match event {
            Event::Record { proxy, record } => (proxy, record),
            Event::Interrupted { proxy, error } => {
                eprintln!("ambit: {proxy}: {error}");
                continue;
            }
        };
        if let Some(count) = record["dropped"].as_u64() {
            lost.fetch_add(count, Ordering::Relaxed);
            continue;
        }
        match options.output {
            Format::Json => print(&format!("{}\n", show::named(record, &proxy))),
            Format::Table => print(&Seen { proxy: &proxy, record: &record }.render(options.why, paint)),
        }
        if options.count.is_some_and(|count| shown.fetch_add(1, Ordering::Relaxed) + 1 >= count) {
            return Ok(());
        }
    }
    while let Some(ended) = asking.join_next().await {
        ended??;
    }
    bail!("no proxy can be asked")
}

/// Asks a proxy until nobody listens; again where its answer ended. An error of the first time is final.
async fn ask(
    mesh: Arc<Mesh>,
    proxy: Proxy,
    question: Arc<str>,
    events: mpsc::Sender<Event>,
) -> anyhow::Result<()> {
    let mut has_answered = false;
    loop {
        let began = Instant::now();
        let (taken, mut lines) = mpsc::channel::<String>(WAITING);
        let pass_on = async {
            let mut count = 0_u64;
            while let Some(line) = lines.recv().await {
                count += 1;
                let Ok(record) = serde_json::from_str(&line) else { continue };
                if events.send(Event::Record { proxy: proxy.name.clone(), record }).await.is_err() {
                    break;
                }
            }
            // Its sender learns that nobody takes more.
            drop(lines);
            count
        };
        let asked = async {
            let outcome = mesh.lines(&proxy, &question, &taken).await;
            drop(taken);
            outcome
        };
        let (outcome, count) = tokio::join!(asked, pass_on);
        has_answered |= count > 0 || began.elapsed() > LASTING;
        if events.is_closed() {
            return Ok(());
        }
        let error = match outcome {
            // It refuses the filter, or is of another version.
            Err(error) if !has_answered => {
                let shown = Event::Interrupted { proxy: proxy.name.clone(), error: format!("{error:#}") };
                // Nobody listens: then the command has ended.
                events.send(shown).await.ok();
                return Err(error).with_context(|| proxy.name.clone());
            }
            Err(error) => format!("{error:#}"),
            Ok(()) => "its answer ended; it is asked again".to_owned(),
        };
        if events.send(Event::Interrupted { proxy: proxy.name.clone(), error }).await.is_err() {
            return Ok(());
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn question(args: &[&str]) -> Option<String> {
        let line = Line::try_parse_from(["tap"].iter().chain(args)).ok()?;
        Some(line.options.question())
    }

    #[test]
    fn options_become_the_filter_of_a_proxy() {
        for (args, expected) in [
            (&[][..], Some("/tap?")),
            (&["--denied"], Some("/tap?status=denied")),
            (
                &["-n", "shop", "--source", "a/b", "-X", "GET", "--path", "/api", "--code", "5xx"],
                Some("/tap?namespace=shop&source=a%2Fb&method=GET&path=%2Fapi&code=5xx"),
            ),
            (&["--direction", "inbound", "--status", "failed"], Some("/tap?direction=inbound&status=failed")),
            (&["--denied", "--status", "ok"], None),
            (&["--for", "5"], None),
            (&["--count", "0"], None),
        ] {
            assert_eq!(question(args).as_deref(), expected, "{args:?}");
        }
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("2h"), Ok(Duration::from_secs(7200)));
        for wrong in ["5", "s", "", "-1s", "5d"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
