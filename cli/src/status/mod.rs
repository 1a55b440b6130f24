//! `ambit status`: the mesh at a glance, or whether and how one pod is protected.

mod mesh;
mod pod;

use std::process::ExitCode;

use clap::Args;

use crate::cluster::{Access, PodName, block_on};
use crate::output::{Format, Wait, emit};

/// Options of `ambit status`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// A pod, as NAME or NAMESPACE/NAME; without one, the mesh as a whole.
    pod: Option<String>,
    /// Namespace of the pod.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Form of the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    access: Access,
}

/// Shows the status of the mesh or of a pod. A pod that should be protected and is not makes the command fail.
///
/// # Errors
/// When the cluster can't be reached or has no such pod.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let Options { pod, namespace, output, access } = options;
    let Some(pod) = pod else {
        let overview = block_on(async {
            let cluster = access.connect().await?;
            let _wait = Wait::start("reading the cluster");
            mesh::read(&cluster).await
        })?;
        emit(*output, &overview, |paint| mesh::render(&overview, paint))?;
        return Ok(ExitCode::SUCCESS);
    };
    let status = block_on(async {
        let cluster = access.connect().await?;
        let name = PodName::parse(pod, namespace.as_deref().unwrap_or(&cluster.namespace));
        let _wait = Wait::start("asking the proxy of the pod's node");
        pod::read(&cluster, &name).await
    })?;
    let now = time::OffsetDateTime::now_utc();
    emit(*output, &status, |paint| pod::render(&status, now, paint))?;
    Ok(if status.is_failure() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
