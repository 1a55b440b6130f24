//! What all proxies observed.

use ambit_flows::{Flow, Report};
use anyhow::{Context, bail};
use futures_util::{StreamExt as _, stream};

use crate::mesh::{Mesh, Proxy};

/// Proxies that are asked at once.
const AT_ONCE: usize = 8;

/// The flows of the mesh.
#[derive(Debug, Default)]
pub(super) struct Observed {
    /// Rows of all proxies; the same flow may come from several.
    pub(super) flows: Vec<Flow>,
    /// What is missing from them, one sentence each.
    pub(super) gaps: Vec<String>,
}

impl Observed {
    /// Asks every proxy for what it saw since a time.
    ///
    /// # Errors
    /// When the mesh can't be asked, or no proxy answers.
    pub(super) async fn read(mesh: &Mesh, since: u64) -> anyhow::Result<Observed> {
        let proxies = mesh.proxies(None).await?;
        let reports: Vec<(Proxy, anyhow::Result<Report>)> = stream::iter(proxies)
            .map(async |proxy: Proxy| {
                let report = mesh.get(&proxy, "/flows").await.and_then(|text| {
                    serde_json::from_str(&text).context("its answer can't be read: is it of this version?")
                });
                (proxy, report)
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        let (answered, total) = (reports.iter().filter(|(_, report)| report.is_ok()).count(), reports.len());
        if answered == 0 {
            let first = reports.into_iter().find_map(|(proxy, report)| Some((proxy, report.err()?)));
            return match first {
                Some((proxy, error)) => {
                    Err(error.context(format!("none of {total} proxies answers: {}", proxy.name)))
                }
                None => bail!("there is no proxy"),
            };
        }
        let mut observed = Observed::default();
        for (proxy, report) in reports {
            match report {
                Ok(report) => observed.add(&proxy.name, report, since),
                Err(error) => observed.gaps.push(format!("{} was not asked: {error:#}", proxy.name)),
            }
        }
        observed.sort();
        Ok(observed)
    }

    /// Adds what a proxy reports, as far as it was seen since then.
    pub(super) fn add(&mut self, proxy: &str, report: Report, since: u64) {
        if !report.enabled {
            self.gaps.push(format!("{proxy} does not observe flows (its setting flows.enabled is false)"));
            return;
        }
        if report.since > since {
            let when = crate::output::duration(i64::try_from(report.since - since).unwrap_or(i64::MAX));
            self.gaps
                .push(format!("{proxy} has observed only since it started: the first {when} are missing"));
        }
        if report.lost.queue > 0 || report.lost.full > 0 {
            let (queue, full) = (report.lost.queue, report.lost.full);
            self.gaps
                .push(format!("{proxy} lost {queue} for haste and {full} for want of memory (flows.memory)"));
        }
        self.flows.extend(report.flows.into_iter().filter(|flow| flow.last_seen >= since));
    }

    /// Brings flows and gaps into an order that does not depend on which proxy answered first.
    pub(super) fn sort(&mut self) {
        self.flows.sort_by(|a, b| {
            let key = |it: &Flow| (it.kind, it.service.clone(), it.destination.clone(), it.source.clone());
            key(a).cmp(&key(b)).then_with(|| (a.port, &a.path, &a.method).cmp(&(b.port, &b.path, &b.method)))
        });
        self.gaps.sort();
    }
}
