//! `ambit analyze`: every object that has no effect, or another than its author thinks, in files or in a cluster.
//!
//! The control plane's own library reads the objects and finds what is to be said of them ([`judge()`]); what it does not read
//! at all is in the table of [`foreign`].

mod cluster;
mod files;
mod foreign;
mod judge;
mod remedies;
mod shadows;

use std::path::PathBuf;
use std::process::ExitCode;

use ambit_control::index::Settings;
use clap::Args;

use crate::cluster::{Access, block_on};
use crate::finding::Level;
use crate::output::{Format, Wait, emit};

pub(crate) use cluster::{read as read_cluster, settings as cluster_settings};
pub(crate) use files::{read as read_files, read_text};
pub(crate) use judge::{Item, Report, judge, render};

/// Options of `ambit analyze`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Files or directories of manifests; `-` is standard input. Without any, the cluster.
    files: Vec<PathBuf>,
    /// Look at the files as if they were applied to the cluster.
    #[arg(long, requires = "files")]
    with_cluster: bool,
    /// Only objects of this namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Namespace whose policies are for the whole mesh, where no cluster says it.
    #[arg(long, default_value = "ambit-system", value_name = "NAMESPACE")]
    root_namespace: String,
    /// Fail on warnings too.
    #[arg(long)]
    strict: bool,
    /// Form of the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    access: Access,
}

/// Reads objects and prints what is to be said of them.
///
/// # Errors
/// When a file can't be read or the cluster can't be reached.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut items = Vec::new();
    let mut settings =
        Settings { root_namespace: options.root_namespace.as_str().into(), ..Settings::default() };
    if options.files.is_empty() || options.with_cluster {
        (items, settings) = block_on(async {
            let cluster = options.access.connect().await?;
            let _wait = Wait::start("reading the cluster");
            anyhow::Ok((read_cluster(&cluster).await?, cluster_settings(&cluster).await?))
        })?;
    }
    let from_files = files::read(&options.files)?;
    if !from_files.is_empty() {
        // The cluster is only what the files would meet.
        items.iter_mut().for_each(|item| item.is_context = true);
    }
    let complete = options.files.is_empty() || options.with_cluster;
    items.extend(from_files);
    let reports = judge(items, settings, complete);
    let reports: Vec<Report> = reports.into_iter().filter(|report| concerns(report, options)).collect();
    emit(options.output, &reports, |paint| render(&reports, paint))?;
    let fails =
        |report: &Report| report.level == Level::Error || options.strict && report.level == Level::Warning;
    Ok(if reports.iter().any(fails) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn concerns(report: &Report, options: &Options) -> bool {
    options.namespace.as_ref().is_none_or(|namespace| *namespace == report.namespace)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::output::Palette;

    /// Services for the rules of the tutorials, with a waypoint.
    const WORLD: &str = "\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: bookinfo}
spec: {gatewayClassName: ambit-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: bookinfo, labels: {istio.io/use-waypoint: waypoint}}
spec: {clusterIP: 10.0.0.1, ports: [{name: http, port: 9080}]}
---
apiVersion: v1
kind: Service
metadata: {name: ratings, namespace: bookinfo, labels: {istio.io/use-waypoint: waypoint}}
spec: {clusterIP: 10.0.0.2, ports: [{name: http, port: 9080}]}
";

    #[test]
    fn fields_of_old_tutorials_without_effect_are_named_with_line_and_remedy() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/old-tutorials");
        let mut items = read_files(std::slice::from_ref(&folder)).unwrap();
        let prefix = format!("{}/", folder.display());
        for place in items.iter_mut().filter_map(|item| item.place.as_mut()) {
            place.file = place.file.replace(&prefix, "");
        }
        let context = read_text("world.yaml", WORLD).into_iter();
        items.extend(context.map(|item| Item { is_context: true, ..item }));
        let reports = judge(items, Settings::default(), false);
        insta::assert_snapshot!(render(&reports, Palette::new(false)));
    }
}
