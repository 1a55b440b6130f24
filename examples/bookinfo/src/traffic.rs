//! A visitor: gets one page at a steady rate and says every few seconds how it went.

use std::time::Duration;

use anyhow::Result;
use hyper::HeaderMap;
use hyper::header::HeaderValue;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::upstream::{END_USER, Upstream};

/// How often the visitor reports.
const REPORT: Duration = Duration::from_secs(5);

/// Visits `url` `rate` times a second as `user` until the program is asked to end.
pub(crate) async fn run(url: &str, rate: u32, user: Option<HeaderValue>) -> Result<()> {
    let upstream = Upstream::new();
    let headers: HeaderMap = user.map(|user| (END_USER, user)).into_iter().collect();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut visits = interval(Duration::from_secs(1) / rate);
    visits.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let (mut good, mut bad, mut reported) = (0u64, 0u64, Instant::now());
    loop {
        tokio::select! {
            _ = visits.tick() => {}
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
        match upstream.get(url, &headers).await {
            Ok(_) => good += 1,
            Err(error) => {
                bad += 1;
                eprintln!("visit: {error:#}");
            }
        }
        if reported.elapsed() >= REPORT {
            println!("visits: {good} good, {bad} bad");
            reported = Instant::now();
        }
    }
}
