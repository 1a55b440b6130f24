//! `ambit waypoint`: the Gateways that are waypoints. The control plane deploys them; this command writes and shows the objects.

use std::process::ExitCode;
use std::time::Duration;

use ambit_api::ports::INBOUND_HBONE;
use ambit_control::api_server::{FIELD_MANAGER, call};
use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand, ValueEnum};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use crate::cluster::{Access, Cluster, block_on};
use crate::gateways::{self, CLASS, CLASSES, WAYPOINT_FOR, Waypoint};
use crate::output::{Format, Wait, emit, print};

/// Label by which a namespace names its waypoint.
const USE_WAYPOINT: &str = "istio.io/use-waypoint";
/// Between two looks at a waypoint.
const LOOK: Duration = Duration::from_secs(1);

/// Commands for waypoints.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Makes a waypoint, or changes it.
    Apply(Apply),
    /// Prints the Gateway that `apply` would write.
    Generate(Generate),
    /// Lists waypoints.
    List(List),
    /// Shows a waypoint, and fails while it is not ready.
    Status(Status),
    /// Deletes waypoints.
    Delete(Delete),
}

/// What a waypoint is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum For {
    /// Connections to services.
    #[default]
    Service,
    /// Connections to addresses of pods.
    Workload,
    /// Both.
    All,
    /// Neither, as for trying it out.
    None,
}

/// A waypoint as it is to be.
#[derive(Clone, Debug, Args)]
pub(crate) struct Wanted {
    /// Its name.
    #[arg(default_value = "waypoint")]
    name: String,
    /// Its namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    /// What it is for.
    #[arg(long = "for", value_enum, default_value_t)]
    serves: For,
    /// Let objects of every namespace use it; default is its own namespace only.
    #[arg(long)]
    allow_all_namespaces: bool,
}

/// Options of `ambit waypoint generate`.
#[derive(Debug, Args)]
pub(crate) struct Generate {
    #[command(flatten)]
    wanted: Wanted,
    /// Form of the object.
    #[arg(short, long, value_enum, default_value_t = Format::Yaml)]
    output: Format,
}

/// Options of `ambit waypoint apply`.
#[derive(Debug, Args)]
pub(crate) struct Apply {
    #[command(flatten)]
    wanted: Wanted,
    /// Label its namespace with istio.io/use-waypoint, so that everything in it uses the waypoint.
    #[arg(long)]
    enroll_namespace: bool,
    /// Wait until it is ready. The namespace is labelled only then.
    #[arg(long)]
    wait: bool,
    /// Seconds to wait.
    #[arg(long, default_value_t = 90, value_name = "SECONDS")]
    timeout: u64,
    #[command(flatten)]
    access: Access,
}

/// Options of `ambit waypoint list`.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only of this namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Form of the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    access: Access,
}

/// Options of `ambit waypoint status`.
#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Its name.
    #[arg(default_value = "waypoint")]
    name: String,
    /// Its namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Wait until it is ready.
    #[arg(long)]
    wait: bool,
    /// Seconds to wait.
    #[arg(long, default_value_t = 90, value_name = "SECONDS")]
    timeout: u64,
    /// Form of the result.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    access: Access,
}

/// Options of `ambit waypoint delete`.
#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Their names.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    names: Vec<String>,
    /// Every waypoint of the namespace that Ambit deploys.
    #[arg(long)]
    all: bool,
    /// Their namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    #[command(flatten)]
    access: Access,
}

/// Runs a command for waypoints.
///
/// # Errors
/// When the cluster can't be reached or refuses.
pub(crate) fn run(command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Generate(options) => generate(options),
        Command::Apply(options) => block_on(apply(options)),
        Command::List(options) => {
            let found = block_on(async {
                let cluster = options.access.connect().await?;
                Ok(gateways::waypoints(&cluster, options.namespace.as_deref()).await?)
            })?;
            emit(options.output, &found, |paint| gateways::render(&found, paint))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Status(options) => block_on(status(options)),
        Command::Delete(options) => block_on(delete(options)),
    }
}

/// The Gateway of a waypoint.
fn manifest(wanted: &Wanted, namespace: Option<&str>) -> Value {
    let serves = match wanted.serves {
        For::Service => "service",
        For::Workload => "workload",
        For::All => "all",
        For::None => "none",
    };
    let mut listener = json!({ "name": "mesh", "port": INBOUND_HBONE, "protocol": "HBONE" });
    if wanted.allow_all_namespaces {
        listener["allowedRoutes"] = json!({ "namespaces": { "from": "All" } });
    }
    let mut metadata = json!({ "name": wanted.name, "labels": { WAYPOINT_FOR: serves } });
    if let Some(namespace) = namespace {
        metadata["namespace"] = namespace.into();
    }
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": metadata,
        "spec": { "gatewayClassName": CLASS, "listeners": [listener] },
    })
}

fn generate(options: &Generate) -> anyhow::Result<ExitCode> {
    let manifest = manifest(&options.wanted, options.wanted.namespace.as_deref());
    // A table of an object is the object.
    let format = if options.output == Format::Table { Format::Yaml } else { options.output };
    emit(format, &manifest, |_| String::new())?;
    Ok(ExitCode::SUCCESS)
}

async fn apply(options: &Apply) -> anyhow::Result<ExitCode> {
    let Apply { wanted, enroll_namespace, wait, timeout, access } = options;
    let cluster = access.connect().await?;
    let namespace = wanted.namespace.as_deref().unwrap_or(&cluster.namespace);
    let manifest = manifest(wanted, Some(namespace));
    let params = PatchParams::apply(&manager()).force();
    let gateways = gateways::api(&cluster, Some(namespace));
    // A Gateway of another class is not this command's to change.
    if let Some(present) = call(gateways.get_opt(&wanted.name)).await? {
        let class = present.data["spec"]["gatewayClassName"].as_str().unwrap_or_default();
        let name = &wanted.name;
        ensure!(
            class == CLASS,
            "Gateway {namespace}/{name} has class {class:?} and is not changed: take another name"
        );
    }
    let applied = call(gateways.patch(&wanted.name, &params, &Patch::Apply(&manifest))).await;
    applied.with_context(|| format!("apply Gateway {namespace}/{}", wanted.name))?;
    print(&format!("waypoint {namespace}/{} applied\n", wanted.name));
    if *wait {
        let waypoint = wait_ready(&cluster, namespace, &wanted.name, Duration::from_secs(*timeout)).await?;
        print(&format!("waypoint {namespace}/{} is {}\n", wanted.name, waypoint.state()));
    }
    if *enroll_namespace {
        let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
        let label = json!({ "metadata": { "labels": { USE_WAYPOINT: wanted.name } } });
        let params = PatchParams { field_manager: Some(manager()), ..PatchParams::default() };
        call(namespaces.patch(namespace, &params, &Patch::Merge(&label)))
            .await
            .context("label the namespace")?;
        print(&format!("namespace {namespace} labelled with {USE_WAYPOINT}={}\n", wanted.name));
    }
    Ok(ExitCode::SUCCESS)
}

fn manager() -> String {
    format!("{FIELD_MANAGER}-cli")
}

/// Waits until a waypoint can be used.
async fn wait_ready(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
    limit: Duration,
) -> anyhow::Result<Waypoint> {
    let wait = Wait::start("waiting for the waypoint");
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        let waypoint = find(cluster, namespace, name).await?;
        if waypoint.is_ready() {
            return Ok(waypoint);
        }
        wait.show(&format!("waypoint {namespace}/{name}: {}", waypoint.state()));
        if tokio::time::Instant::now() >= deadline {
            bail!("waypoint {namespace}/{name} after {limit:?}: {}", waypoint.state());
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn find(cluster: &Cluster, namespace: &str, name: &str) -> anyhow::Result<Waypoint> {
    let gateway = call(gateways::api(cluster, Some(namespace)).get_opt(name)).await?;
    let gateway = gateway.with_context(|| format!("there is no Gateway {namespace}/{name}"))?;
    let read = Waypoint::read(&gateway);
    read.with_context(|| {
        format!("Gateway {namespace}/{name} is no waypoint: its class is none of {}", CLASSES.join(", "))
    })
}

async fn status(options: &Status) -> anyhow::Result<ExitCode> {
    let cluster = options.access.connect().await?;
    let namespace = options.namespace.as_deref().unwrap_or(&cluster.namespace);
    let waypoint = if options.wait {
        wait_ready(&cluster, namespace, &options.name, Duration::from_secs(options.timeout)).await?
    } else {
        find(&cluster, namespace, &options.name).await?
    };
    emit(options.output, &waypoint, |paint| gateways::render(std::slice::from_ref(&waypoint), paint))?;
    Ok(if waypoint.is_ready() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn delete(options: &Delete) -> anyhow::Result<ExitCode> {
    let cluster = options.access.connect().await?;
    let namespace = options.namespace.as_deref().unwrap_or(&cluster.namespace);
    let own = gateways::own_classes(&cluster).await?;
    let is_own = |waypoint: &Waypoint| own.contains(&waypoint.class.as_str());
    let names = if options.all {
        let found = gateways::waypoints(&cluster, Some(namespace)).await?;
        let (found, others): (Vec<_>, Vec<_>) = found.into_iter().partition(is_own);
        for Waypoint { name, class, .. } in others {
            print(&format!(
                "waypoint {namespace}/{name} is kept: another controller owns its class {class}\n"
            ));
        }
        found.into_iter().map(|waypoint| waypoint.name).collect()
    } else {
        options.names.clone()
    };
    let api = gateways::api(&cluster, Some(namespace));
    for name in &names {
        // A Gateway of another class is not this command's to delete.
        let waypoint = find(&cluster, namespace, name).await?;
        ensure!(
            is_own(&waypoint),
            "Gateway {namespace}/{name} is not deleted: another controller owns its class {}",
            waypoint.class
        );
        call(api.delete(name, &DeleteParams::default())).await?;
        print(&format!("waypoint {namespace}/{name} deleted\n"));
    }
    warn_of_users(&cluster, namespace, &names).await;
    Ok(ExitCode::SUCCESS)
}

/// Traffic to what still names a deleted waypoint is refused.
async fn warn_of_users(cluster: &Cluster, namespace: &str, names: &[String]) {
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    let Ok(Some(object)) = call(namespaces.get_opt(namespace)).await else { return };
    if let Some(name) = object.labels().get(USE_WAYPOINT).filter(|name| names.contains(name)) {
        print(&format!(
            "namespace {namespace} still names {name}: connections to it are refused until you \
             kubectl label namespace {namespace} {USE_WAYPOINT}-\n"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waypoint_is_a_gateway_with_the_mesh_listener() {
        let wanted = Wanted {
            name: "waypoint".into(),
            namespace: Some("shop".into()),
            serves: For::All,
            allow_all_namespaces: true,
        };
        let manifest = manifest(&wanted, Some("shop"));
        assert_eq!(manifest["spec"]["gatewayClassName"], "ambit-waypoint");
        let listener = json!({
            "name": "mesh", "port": 15008, "protocol": "HBONE",
            "allowedRoutes": { "namespaces": { "from": "All" } },
        });
        assert_eq!(manifest["spec"]["listeners"], json!([listener]));
        let read = Waypoint::read(&gateways::gateway(manifest));
        assert_eq!(read.map(|waypoint| waypoint.serves), Some("all".to_owned()));
    }
}
