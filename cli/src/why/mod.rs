//! `ambit why`: what becomes of a request or connection, by the decision of every proxy on its way.
//!
//! Each proxy is asked what it would do; nothing is sent to the application. The decisions are the proxies' own: here they are only asked
//! for, in the order of the way, and shown.

mod path;
mod request;
mod show;

use std::process::ExitCode;

use clap::Args;

use crate::cluster::{Access, PodName, block_on};
use crate::output::{Format, Wait, emit};

use path::Mesh;
use request::Request;

/// Options of `ambit why`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The pod that asks, as NAME or NAMESPACE/NAME.
    client: String,
    /// What it asks for: the URL of a request (http), or HOST:PORT or ADDRESS:PORT for a TCP connection.
    target: String,
    /// Method of the request.
    #[arg(short = 'X', long, default_value = "GET")]
    method: http::Method,
    /// A header field of the request; may be repeated.
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// The connection begins with TLS that asks for this name; for HOST:PORT.
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    /// Namespace of the pod.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Asks the mesh that `ambit up` runs on this machine, not a cluster.
    #[arg(long)]
    local: bool,
    /// Process id of the `ambit up` to ask when several run.
    #[arg(long, value_name = "PID", requires = "local")]
    mesh: Option<u32>,
    /// Form of the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    access: Access,
}

/// Explains a request or connection. Ends with failure if it is refused.
///
/// # Errors
/// When the cluster or a proxy can't be reached, or the request can't be read.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let Options { client, target, method, headers, server_name, namespace, local, mesh, output, access } =
        options;
    let request = Request::parse(target, method.clone(), headers, server_name.as_deref())?;
    let answer = block_on(async {
        let (mesh, default_namespace) = if *local {
            (Mesh::Local(*mesh), "default".to_owned())
        } else {
            let cluster = access.connect().await?;
            let namespace = cluster.namespace.clone();
            (Mesh::Cluster(Box::new(cluster)), namespace)
        };
        let client = PodName::parse(client, namespace.as_deref().unwrap_or(&default_namespace));
        let wait = Wait::start("asking the proxies");
        path::follow(&mesh, &client, &request, &wait).await
    })?;
    emit(*output, &answer, |paint| show::render(&answer, paint))?;
    Ok(if answer.is_refused() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
