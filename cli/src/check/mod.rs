//! `ambit check`: what is wrong with the cluster before Ambit is installed, and with Ambit after.
//!
//! [`facts`] reads the cluster, and [`probe`] tries out its nodes where that is asked for; [`before`] and [`after`] are checks, each a
//! function of the facts; the result is printed.

mod after;
mod before;
mod facts;
mod platform;
mod probe;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use clap::Args;

use crate::cluster::{Access, block_on};
use crate::finding::{Finding, Level, Section, gravest, render};
use crate::output::{Format, Wait, emit};

use facts::Facts;

/// Options of `ambit check`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    access: Access,
    /// Form of the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    /// Fail on warnings too.
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    probe: probe::ProbeOptions,
}

/// A check: what it is about, and what it finds.
type Check = (&'static str, fn(&Facts) -> Vec<Finding>);

/// Checks that hold before an installation and after it.
const BEFORE: [Check; 8] = [
    ("Kubernetes is new enough", before::version),
    ("nodes can run the mesh", before::nodes),
    ("clocks agree", before::clocks),
    ("the platform's paths are known", platform::check),
    ("the CNI plugin leaves room", before::cni),
    ("NetworkPolicies admit tunnels", before::network_policies),
    ("Ambit's pods are admitted", before::pod_security),
    ("no other mesh is in the way", before::other_meshes),
];

/// Checks of an installation.
const AFTER: [Check; 6] = [
    ("kinds are defined", after::definitions),
    ("every component is ready", after::components),
    ("versions agree", after::versions),
    ("a control plane leads", after::leader),
    ("every namespace has the mesh's roots", after::roots),
    ("node agents hold every guarantee", after::agents),
];

/// Checks the cluster.
///
/// # Errors
/// When the cluster can't be reached.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut facts = block_on(async {
        let cluster = options.access.connect().await?;
        let wait = Wait::start("reading the cluster");
        facts::read(&cluster, &wait).await
    })?;
    if options.probe.probe {
        facts.probes = Some(probe::run(&options.access, &facts.nodes, &options.probe)?);
    }
    let sections = sections(&facts);
    emit(options.output, &sections, |paint| {
        format!("{}\n{}\n", render(&sections, paint), summary(&sections, facts.is_installed()))
    })?;
    Ok(code(&sections, options.strict))
}

/// The result of every check that applies.
fn sections(facts: &Facts) -> Vec<Section> {
    let after = AFTER.iter().filter(|_| facts.is_installed());
    let mut sections: Vec<Section> = BEFORE
        .iter()
        .chain(after)
        .map(|(title, check)| Section { title: (*title).to_owned(), findings: check(facts) })
        .collect();
    if let Some(probes) = &facts.probes {
        let title = "nodes have what the agent needs".to_owned();
        sections.push(Section { title, findings: probe::findings(probes) });
    }
    if !facts.unread.is_empty() {
        let finding = |(what, why): &(&str, String)| {
            Finding::warning(*what, format!("can't be read: {why}"))
                .remedy("use a kubeconfig that may list them; what they would show is not checked")
        };
        let findings = facts.unread.iter().map(finding).collect();
        sections.push(Section { title: "everything could be read".to_owned(), findings });
    }
    sections
}

fn summary(sections: &[Section], installed: bool) -> String {
    let count = |level| sections.iter().flat_map(|s| &s.findings).filter(|f| f.level == level).count();
    let (errors, warnings) = (count(Level::Error), count(Level::Warning));
    let what = if installed { "Ambit is installed" } else { "Ambit is not installed" };
    match (errors, warnings) {
        (0, 0) if installed => format!("{what} and well."),
        (0, 0) => format!("{what}; the cluster is ready for it."),
        _ => format!("{what}: {errors} errors, {warnings} warnings."),
    }
}

/// 1 for errors, and for warnings where they count.
fn code(sections: &[Section], strict: bool) -> ExitCode {
    match gravest(sections) {
        Some(Level::Error) => ExitCode::FAILURE,
        Some(Level::Warning) if strict => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    }
}
