//! Everything that is shown on a real Kubernetes: one cluster, one build, cases in the order of their [`Stage`]s.
//!
//! The first case that runs starts the cluster, the last ends it. What failed leaves its programs' logs in
//! `target/cluster/failed`. `AMBIT_CLUSTER=NAME` runs the cases on a cluster that `ambit-cluster up NAME` started;
//! `AMBIT_CASES=PART,…` runs only those whose name has one of the parts, after an installation of the mesh if they need it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that can't go on says so and ends"
)]

#[path = "cases/annotations.rs"]
mod annotations;
#[path = "cases/apps.rs"]
mod apps;
#[path = "cases/bed.rs"]
mod bed;
#[path = "cases/certificates.rs"]
mod certificates;
#[path = "cases/cli.rs"]
mod cli;
#[path = "cases/disruption.rs"]
mod disruption;
#[path = "cases/mesh.rs"]
mod mesh;
#[path = "cases/misconfigured.rs"]
mod misconfigured;
#[path = "cases/node.rs"]
mod node;
#[path = "cases/nodes.rs"]
mod nodes;
#[path = "cases/observe.rs"]
mod observe;
#[path = "cases/planted.rs"]
mod planted;
#[path = "cases/prometheus.rs"]
mod prometheus;
#[path = "cases/rights.rs"]
mod rights;
#[path = "cases/uninstall.rs"]
mod uninstall;
#[path = "cases/waypoint.rs"]
mod waypoint;

use std::collections::BTreeSet;
use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use ambit_cluster::{Cluster, Options};
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::runtime::Runtime;
use tokio::sync::OnceCell;

/// What a case gives back.
type Outcome = Result<(), Box<dyn Error>>;

/// When a case runs. Cases of one stage run in the order in which they are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Needs no mesh; the last one installs it.
    Cluster,
    /// On the mesh.
    Mesh,
    /// Judges what the programs did in every case of the mesh.
    Review,
    /// Removes the mesh.
    Removal,
    /// Needs a cluster without the mesh, and each needs what the one before left.
    Agent,
}

impl Stage {
    /// Whether a case of this stage begins with a mesh.
    fn needs_mesh(self) -> bool {
        matches!(self, Stage::Mesh | Stage::Review | Stage::Removal)
    }
}

/// What all cases share.
struct Shared {
    runtime: Runtime,
    cluster: OnceCell<Result<Cluster, String>>,
    /// The mesh, once a case needed it.
    mesh: OnceCell<Result<(), String>>,
    /// Cases before [`Stage::Review`] that have not passed yet.
    pending: Mutex<BTreeSet<String>>,
}

impl Shared {
    fn pending(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The cases.
struct Cases {
    shared: Arc<Shared>,
    trials: Vec<(Stage, Trial)>,
}

impl Cases {
    /// Adds a case of [`Stage::Mesh`].
    fn add<F>(&mut self, name: &str, case: F)
    where
        F: AsyncFnOnce(&Cluster) -> Outcome + Send + 'static,
    {
        self.add_to(Stage::Mesh, name, case);
    }

    /// Adds a case of a stage.
    fn add_to<F>(&mut self, stage: Stage, name: &str, case: F)
    where
        F: AsyncFnOnce(&Cluster) -> Outcome + Send + 'static,
    {
        let (shared, own) = (Arc::clone(&self.shared), name.to_owned());
        if stage < Stage::Review {
            shared.pending().insert(own.clone());
        }
        let trial = Trial::test(name, move || {
            let cluster = shared.runtime.block_on(shared.cluster.get_or_init(start)).as_ref();
            let cluster = cluster.map_err(|error| Failed::from(format!("no cluster: {error}")))?;
            if stage.needs_mesh() {
                let installed = shared.runtime.block_on(shared.mesh.get_or_init(|| ensure_mesh(cluster)));
                installed.clone().map_err(|error| Failed::from(format!("no mesh: {error}")))?;
            }
            let began = Instant::now();
            let run = || shared.runtime.block_on(case(cluster)).map_err(|error| error.to_string());
            let outcome = catch_unwind(AssertUnwindSafe(run));
            eprint!("{} s ", began.elapsed().as_secs());
            if matches!(outcome, Ok(Ok(()))) {
                shared.pending().remove(&own);
            } else {
                show(cluster);
                if let Ok(Err(error)) = &outcome {
                    eprintln!("{own}: {error}");
                }
                if stage == Stage::Review {
                    eprintln!("cases that have not passed before: {:?}", shared.pending());
                }
                shared.runtime.block_on(restore(cluster));
            }
            outcome.unwrap_or_else(|panic| resume_unwind(panic)).map_err(Failed::from)
        });
        self.trials.push((stage, trial));
    }

    /// The cases that are asked for, in the order in which they run.
    fn in_order(mut self, asked_for: Option<&str>) -> (Arc<Shared>, Vec<Trial>) {
        if let Some(parts) = asked_for {
            let is_asked_for = |name: &str| parts.split(',').any(|part| name.contains(part.trim()));
            self.trials.retain(|(_, trial)| is_asked_for(trial.name()));
            self.shared.pending().retain(|name| is_asked_for(name));
        }
        // Stable: the order within a stage stays.
        self.trials.sort_by_key(|(stage, _)| *stage);
        (self.shared, self.trials.into_iter().map(|(_, trial)| trial).collect())
    }
}

/// Undoes what a failed case may have left, so that those after it fail by themselves only. A cluster that somebody else
/// started stays as it is, to be looked at.
async fn restore(cluster: &Cluster) {
    if std::env::var_os("AMBIT_CLUSTER").is_some() {
        return;
    }
    let mut outcomes = Vec::new();
    for program in ["etcd", "kube-apiserver"] {
        outcomes.push(cluster.start_program(program).await.map(drop));
    }
    let kubectl = cluster.kubectl();
    for node in ["n1", "n2"] {
        outcomes.push(cluster.set_link(node, true).await);
        outcomes.push(cluster.boot(node).await);
        // Fails where it is not there.
        kubectl.run(&["taint", "node", node, "ambit.dev/not-ready-"]).await.ok();
    }
    let namespaces = kubectl.list(&["namespaces"]).await.unwrap_or_default();
    let names = namespaces.iter().filter_map(|namespace| namespace["metadata"]["name"].as_str());
    let of_cases = |name: &&str| {
        !name.starts_with("kube-")
            && !["default", ambit_cluster::mesh::NAMESPACE, node::NAMESPACE].contains(name)
    };
    for name in names.filter(of_cases) {
        outcomes.push(kubectl.run(&["delete", "namespace", name, "--wait"]).await.map(drop));
    }
    for error in outcomes.into_iter().filter_map(Result::err) {
        eprintln!("not restored: {error}");
    }
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Cases stop nodes and programs under each other's feet otherwise.
    arguments.test_threads = Some(1);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let (cluster, mesh) = (OnceCell::new(), OnceCell::new());
    let shared = Arc::new(Shared { runtime, cluster, mesh, pending: Mutex::default() });
    let mut cases = Cases { shared, trials: Vec::new() };
    bed::add(&mut cases);
    nodes::add_before_mesh(&mut cases);
    misconfigured::add_before_mesh(&mut cases);
    mesh::add(&mut cases);
    annotations::add(&mut cases);
    cli::add(&mut cases);
    waypoint::add(&mut cases);
    observe::add(&mut cases);
    planted::add(&mut cases);
    certificates::add(&mut cases);
    nodes::add(&mut cases);
    misconfigured::add(&mut cases);
    prometheus::add(&mut cases);
    disruption::add(&mut cases);
    rights::add(&mut cases);
    uninstall::add(&mut cases);
    node::add(&mut cases);
    let (shared, trials) = cases.in_order(std::env::var("AMBIT_CASES").ok().as_deref());
    let conclusion = libtest_mimic::run(&arguments, trials);
    let Shared { runtime, cluster, .. } = Arc::into_inner(shared).expect("every case has ended");
    if let Some(Ok(cluster)) = cluster.into_inner() {
        if conclusion.has_failed() {
            keep_logs(&cluster);
        }
        if std::env::var_os("AMBIT_CLUSTER").is_none() {
            runtime.block_on(cluster.down()).expect("the cluster ends without a trace");
        }
    }
    conclusion.exit_code()
}

/// The program that keeps clusters.
fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_ambit-cluster"))
}

async fn start() -> Result<Cluster, String> {
    let started = match std::env::var("AMBIT_CLUSTER") {
        Ok(name) => Cluster::attach(name),
        Err(_) => Cluster::start(Options::new("test", program())).await,
    };
    started.map_err(|error| error.to_string())
}

/// Installs the mesh where it is not: a run of single cases begins without.
async fn ensure_mesh(cluster: &Cluster) -> Result<(), String> {
    let proxies = ["get", "daemonset", "ztunnel", "--namespace", ambit_cluster::mesh::NAMESPACE];
    if cluster.kubectl().run(&proxies).await.is_ok() {
        return Ok(());
    }
    mesh::install(cluster).await.map_err(|error| error.to_string())
}

/// Copies the logs to where the end of the cluster does not remove them.
fn keep_logs(cluster: &Cluster) {
    let kept = cluster.layout().target().join("cluster/failed");
    std::fs::remove_dir_all(&kept).ok();
    Command::new("cp").arg("--recursive").arg(cluster.logs()).arg(&kept).status().ok();
    eprintln!("logs of the cluster's programs: {}", kept.display());
}

/// Shows the pods and events.
fn show(cluster: &Cluster) {
    let kubectl = cluster.layout().program("kubectl");
    for what in
        [&["get", "pods", "--all-namespaces", "--output", "wide"][..], &["get", "events", "--all-namespaces"]]
    {
        Command::new(&kubectl).args(what).env("KUBECONFIG", cluster.kubectl().kubeconfig()).status().ok();
    }
}
