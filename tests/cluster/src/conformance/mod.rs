//! Gateway API's conformance suite, run on a cluster of its own with Ambit: the mesh profiles, or those of gateways.

mod gateways;
mod load_balancer;
mod mesh_profiles;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ambit_local::{Command, Process};
use clap::ValueEnum;
use serde_json::Value;

use crate::cluster::{self, Cluster};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::Layout;
use crate::plan::Plan;
use crate::supervisor::{API_PORT, CONTROL};
use crate::{mesh, programs};

/// The suite makes dozens of Gateways at once, which two nodes must have room for.
const SMALL: [&str; 4] = [
    "waypoint.replicas=1",
    "waypoint.resources.requests.cpu=5m",
    "waypoint.resources.requests.memory=16Mi",
    "waypoint.terminationGracePeriodSeconds=15",
];
/// How long something of the cluster may take to come up on a busy machine.
const ROLLOUT: Duration = Duration::from_secs(120);
/// How long the suite may take.
const LIMIT: Duration = Duration::from_secs(5400);

/// Which profiles are tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// Those of the mesh.
    Mesh,
    /// Those of gateways.
    Gateways,
}

/// What is run, and where the report goes.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program `ambit-cluster`.
    pub program: PathBuf,
    /// The cluster's number.
    pub number: u8,
    /// The profiles.
    pub suite: Suite,
    /// The one test to run, by its short name; a report is then not written.
    pub only: Option<String>,
    /// Features that are tested beside those that the control plane announces.
    pub features: Vec<String>,
    /// The name of a running cluster to use instead of one of its own.
    pub on: Option<String>,
    /// The report, YAML.
    pub report: PathBuf,
}

/// What a suite is called with, beside the report.
struct Arguments {
    profiles: &'static str,
    features: Vec<String>,
    others: Vec<String>,
}

/// Starts a cluster with the mesh, runs a suite and writes its report; the tests' log goes to the target directory.
///
/// # Errors
/// When something does not come up, or a test of the suite fails.
pub async fn run(options: Options) -> Result<()> {
    let layout = Layout::find();
    programs::build_conformance(&layout)?;
    if let Some(name) = &options.on {
        let cluster = Cluster::attach(name)?;
        cluster.load(&images(&layout, options.suite)?).await?;
        return run_on(&cluster, &options).await;
    }
    let images = images(&layout, options.suite)?;
    let (number, program) = (options.number, options.program.clone());
    let started = cluster::Options { number, images, ..cluster::Options::new("conformance", program) };
    let cluster = Cluster::start(started).await?;
    let outcome = run_on(&cluster, &options).await;
    cluster.down().await?;
    outcome
}

fn images(layout: &Layout, suite: Suite) -> Result<Vec<Image>> {
    let mut images = mesh::images(layout)?;
    match suite {
        Suite::Mesh => images.push(mesh_profiles::image(layout)?),
        Suite::Gateways => images.extend(gateways::images(layout)),
    }
    Ok(images)
}

async fn run_on(cluster: &Cluster, options: &Options) -> Result<()> {
    mesh::install(cluster, &[&mesh::SETTINGS[..], &SMALL].concat()).await?;
    match options.suite {
        Suite::Mesh => {
            let arguments = mesh_profiles::prepare(cluster).await?;
            run_suite(cluster, options, arguments).await
        }
        Suite::Gateways => {
            let plan = Plan { number: options.number, ..Plan::default() };
            let arguments = gateways::arguments(cluster, plan).await?;
            tokio::select! {
                ended = load_balancer::run(cluster.kubectl(), plan) => ended,
                outcome = run_suite(cluster, options, arguments) => outcome,
            }
        }
    }
}

/// Runs the suite as a client outside the nodes, in the namespace of the control plane.
async fn run_suite(cluster: &Cluster, options: &Options, arguments: Arguments) -> Result<()> {
    let report = std::path::absolute(&options.report).map_err(Error::system("find the report"))?;
    if let Some(directory) = report.parent() {
        fs::create_dir_all(directory).map_err(Error::system(format!("make {}", directory.display())))?;
    }
    let log = cluster.layout().target().join("conformance.log");
    fs::write(&log, "").map_err(Error::system(format!("write {}", log.display())))?;
    let mut features = arguments.features;
    features.extend(options.features.iter().cloned());
    let mut command = Command::new(cluster.layout().program("conformance.test"))
        .args(["-test.run", "^TestConformance$", "-test.v", "-test.timeout", "0"])
        .arg(format!("--conformance-profiles={}", arguments.profiles))
        .arg(format!("--supported-features={}", features.join(",")))
        // The cluster ends anyway, and a namespace lasts as long as its waypoint's connections drain.
        .arg("--cleanup-base-resources=false")
        .args(arguments.others)
        .args(["--organization=ambit", "--project=ambit", "--url=https://ambit.dev"])
        .args(["--contact=https://ambit.dev", &format!("--version=v{}", env!("CARGO_PKG_VERSION"))])
        .env("KUBECONFIG", inner_kubeconfig(cluster, options.number)?)
        .log_file(&log);
    command = match &options.only {
        Some(test) => command.arg(format!("--run-test={test}")),
        None => command.arg(format!("--report-output={}", report.display())),
    };
    let outside = cluster.network(CONTROL).await?;
    let suite = Process::start("conformance.test", &outside, command).await?;
    let status = suite.wait_within(LIMIT).await?;
    if status.success() {
        eprintln!("passed; report: {}, log: {}", report.display(), log.display());
        return Ok(());
    }
    let text = fs::read_to_string(&log).unwrap_or_default();
    let failed: Vec<&str> = text.lines().filter(|line| line.trim_start().starts_with("--- FAIL")).collect();
    let message = format!("{status}, log: {}\n{}", log.display(), failed.join("\n"));
    Err(Error::program("conformance.test", message))
}

/// A kubeconfig for the namespace of the control plane, where the API server has another address than on this machine.
fn inner_kubeconfig(cluster: &Cluster, number: u8) -> Result<PathBuf> {
    let outer = cluster.kubectl().kubeconfig();
    let text = fs::read_to_string(outer).map_err(Error::system(format!("read {}", outer.display())))?;
    let server = format!("https://{}:{API_PORT}", Plan { number, ..Plan::default() }.control());
    let inner = outer.with_file_name("kubeconfig-inside");
    fs::write(&inner, with_server(&text, &server))
        .map_err(Error::system(format!("write {}", inner.display())))?;
    Ok(inner)
}

/// A kubeconfig of one cluster with another address of its API server.
fn with_server(kubeconfig: &str, server: &str) -> String {
    let Ok(Value::Object(mut config)) = serde_json::from_str(kubeconfig) else {
        return kubeconfig.to_owned();
    };
    for cluster in config.get_mut("clusters").and_then(Value::as_array_mut).into_iter().flatten() {
        cluster["cluster"]["server"] = server.into();
    }
    Value::Object(config).to_string()
}

/// Features that a GatewayClass of the control plane announces.
async fn announced(cluster: &Cluster, class: &str) -> Result<Vec<String>> {
    let named = |class: &Value| -> Vec<String> {
        let features = class["status"]["supportedFeatures"].as_array().into_iter().flatten();
        features.filter_map(|feature| feature["name"].as_str()).map(str::to_owned).collect()
    };
    let what = ["gatewayclass", class];
    let class = cluster.kubectl().wait_for(ROLLOUT, &what, |class| !named(class).is_empty()).await?;
    Ok(named(&class))
}

fn echo(layout: &Layout, name: &str, folder: &str, context: &Path, files: &[&str]) -> Image {
    let dockerfile = layout.source("images").join(folder).join("Dockerfile");
    let files = files.iter().map(|file| context.join(file)).collect();
    Image { name: name.to_owned(), dockerfile, context: context.to_owned(), files }
}
