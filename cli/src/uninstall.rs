//! `ambit uninstall`: takes pods out of the mesh and removes rules, CNI plugin and its configuration from every node, then the
//! release.
//!
//! Nodes come first: the plugin stays when the agent's DaemonSet goes, so that no pod of the mesh starts without it. Each
//! agent is turned into `ambit-node uninstall --wait`, as the chart's value `node.uninstall` does.

use std::process::ExitCode;
use std::time::Duration;

use ambit_control::api_server::{FIELD_MANAGER, call};
use ambit_control::write::leftovers;
use anyhow::{Context, bail, ensure};
use clap::Args;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::cluster::{Access, Cluster, Component, block_on};
use crate::output::{Wait, print};

/// Between two looks at the rollout.
const LOOK: Duration = Duration::from_secs(1);
/// Annotation by which Helm knows the objects of a release.
const RELEASE: &str = "meta.helm.sh/release-name";

/// How Helm names the templates of a release of Ambit's chart; those of a dependency begin with the chart that depends on it.
const CHART_TEMPLATES: &str = "ambit/templates/";

/// Options of `ambit uninstall`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Do it: without this, the command only says what it would do.
    #[arg(long)]
    yes: bool,
    /// Leave the release and its objects: only the nodes are cleaned.
    #[arg(long)]
    keep_release: bool,
    /// Seconds that all nodes may take.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    timeout: u64,
    #[command(flatten)]
    access: Access,
}

/// Removes Ambit from the cluster.
///
/// # Errors
/// When a node is not clean in time; the release is then left as it is.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    block_on(async {
        let cluster = options.access.connect().await?;
        let agents: Api<DaemonSet> = Api::namespaced(cluster.client.clone(), &cluster.system);
        let agent = call(agents.get_opt(Component::Node.workload())).await?;
        let agent =
            agent.with_context(|| format!("there is no DaemonSet ambit-node in {}", cluster.system))?;
        let release = agent.annotations().get(RELEASE).cloned();
        if let Some(release) = release.as_deref().filter(|_| !options.keep_release) {
            ensure_release_is_ours(&cluster, release, options).await?;
        }
        if !options.yes {
            print(&plan(&agent, &cluster.system, release.as_deref(), options.keep_release));
            return Ok(ExitCode::SUCCESS);
        }
        clean_nodes(&agents, &agent, Duration::from_secs(options.timeout)).await?;
        print("every node is clean: rules, CNI plugin and its configuration are gone\n");
        if !options.keep_release {
            remove_release(&cluster, release.as_deref(), options).await?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// What would be done.
fn plan(agent: &DaemonSet, system: &str, release: Option<&str>, keep_release: bool) -> String {
    let nodes = agent.status.as_ref().map(|status| status.desired_number_scheduled).unwrap_or(0);
    let release = match release {
        _ if keep_release => String::new(),
        Some(release) => format!(
            "- helm uninstall {release} --namespace {system}\n\
             - remove the GatewayClasses, the XMesh and the ClusterTrustBundle that the control plane made\n"
        ),
        None => "- nothing else: no Helm release is known\n".to_owned(),
    };
    format!(
        "`ambit uninstall --yes` would\n- take the pods of {nodes} nodes out of the mesh, without a restart\n\
         - remove rules, CNI plugin and its configuration from these nodes\n{release}\
         Labels, objects of the mesh's kinds, CRDs and the ConfigMaps istio-ca-root-cert stay.\n"
    )
}

async fn clean_nodes(agents: &Api<DaemonSet>, agent: &DaemonSet, limit: Duration) -> anyhow::Result<()> {
    let wait = Wait::start("turning agents into cleaners");
    let patch = Patch::Strategic(cleaner(agent)?);
    let params = PatchParams { field_manager: Some(manager()), ..PatchParams::default() };
    call(agents.patch(&agent.name_any(), &params, &patch))
        .await
        .context("change the DaemonSet ambit-node")?;
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        let now = call(agents.get(&agent.name_any())).await?;
        let Rollout { done, nodes, is_complete } = rollout(&now);
        if is_complete {
            return Ok(());
        }
        wait.show(&format!("cleaning nodes: {done} of {nodes}"));
        if tokio::time::Instant::now() >= deadline {
            bail!(
                "{done} of {nodes} nodes are clean after {limit:?}; the others go on. `ambit log node` says what keeps them; \
                 run the command again to wait on"
            );
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn manager() -> String {
    // One of its own, so that it is seen who changed the arguments.
    format!("{FIELD_MANAGER}-uninstall")
}

/// The change of the agent's arguments: those that it has, with the command in front.
fn cleaner(agent: &DaemonSet) -> anyhow::Result<Value> {
    let pod = agent.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
    let container = pod.and_then(|pod| pod.containers.iter().find(|container| container.name == "agent"));
    let container = container.context("the DaemonSet ambit-node has no container agent")?;
    let args = container.args.clone().unwrap_or_default();
    let rest = args.iter().skip_while(|arg| !arg.starts_with('-')).filter(|arg| *arg != "--wait").cloned();
    let args: Vec<String> = ["uninstall".to_owned(), "--wait".to_owned()].into_iter().chain(rest).collect();
    Ok(json!({ "spec": { "template": { "spec": { "containers": [{ "name": "agent", "args": args }] } } } }))
}

/// How far a DaemonSet's rollout is.
#[derive(Debug, PartialEq, Eq)]
struct Rollout {
    done: i32,
    nodes: i32,
    is_complete: bool,
}

fn rollout(agents: &DaemonSet) -> Rollout {
    let status = agents.status.clone().unwrap_or_default();
    let is_seen = status.observed_generation >= agents.metadata.generation;
    let nodes = status.desired_number_scheduled;
    let updated = status.updated_number_scheduled.unwrap_or(0);
    // One that is updated and ready has cleaned its node: readiness is answered only then.
    let done = if is_seen { updated.min(status.number_ready) } else { 0 };
    Rollout { done, nodes, is_complete: is_seen && updated >= nodes && status.number_ready >= nodes }
}

/// Fails where the release holds more than Ambit, as that of a chart of which Ambit is a dependency: `helm uninstall` would
/// remove all of it. Nothing is found out where Helm is not installed; then nothing is uninstalled either.
async fn ensure_release_is_ours(cluster: &Cluster, release: &str, options: &Options) -> anyhow::Result<()> {
    let system = &cluster.system;
    let asked = Command::new("helm")
        .args(["get", "manifest", release, "--namespace", system])
        .args(options.access.helm_args())
        .output()
        .await;
    let answer = match asked {
        Ok(answer) => answer,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).context("run helm"),
    };
    ensure!(
        answer.status.success(),
        "helm get manifest {release} --namespace {system} failed: {}",
        String::from_utf8_lossy(&answer.stderr).trim()
    );
    match foreign_source(&String::from_utf8_lossy(&answer.stdout)) {
        None => Ok(()),
        Some(source) => bail!(
            "the release {release} holds more than Ambit, such as {source}, and helm uninstall would remove all of it. Clean the \
             nodes with `ambit uninstall --yes --keep-release`, take Ambit out of the release's chart and upgrade the release"
        ),
    }
}

/// The first template of a release's manifest that does not belong to Ambit's chart alone.
fn foreign_source(manifest: &str) -> Option<&str> {
    let mut sources = manifest.lines().filter_map(|line| line.strip_prefix("# Source: "));
    sources.find(|source| !source.starts_with(CHART_TEMPLATES))
}

async fn remove_release(cluster: &Cluster, release: Option<&str>, options: &Options) -> anyhow::Result<()> {
    let system = &cluster.system;
    let Some(release) = release else {
        print(&format!("no Helm release is known: delete the objects of {system} as you made them\n"));
        return Ok(());
    };
    let args = options.access.helm_args();
    let ran = Command::new("helm")
        .args(["uninstall", release, "--namespace", system, "--wait"])
        .args(args)
        .status()
        .await;
    match ran {
        Ok(status) => {
            ensure!(status.success(), "helm uninstall {release} --namespace {system} failed");
            // Those that the control plane made: no release owns them.
            for object in
                leftovers::remove(&cluster.client).await.context("remove what the control plane made")?
            {
                print(&format!("{object} removed\n"));
            }
            print(&format!("what is left of it: kubectl delete namespace {system}\n"));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            print(&format!(
                "helm is not here; the rest, if the release holds nothing but Ambit, is: helm uninstall {release} \
                 --namespace {system}\n"
            ));
        }
        Err(error) => return Err(error).context("run helm"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agents(status: &Value) -> DaemonSet {
        let set = json!({
            "metadata": { "name": "ambit-node", "generation": 2 },
            "spec": { "selector": {}, "template": { "spec": { "containers": [
                { "name": "agent", "args": ["agent", "--config", "/etc/ambit/config.yaml"] },
            ] } } },
            "status": status,
        });
        serde_json::from_value(set).unwrap_or_default()
    }

    fn status(seen: i64, updated: i32, ready: i32) -> Value {
        json!({
            "observedGeneration": seen, "updatedNumberScheduled": updated, "numberReady": ready,
            "desiredNumberScheduled": 3, "currentNumberScheduled": 3, "numberMisscheduled": 0,
        })
    }

    #[test]
    fn agents_become_cleaners_with_their_own_configuration() {
        let patch = cleaner(&agents(&status(1, 0, 0))).unwrap_or_default();
        let args = &patch["spec"]["template"]["spec"]["containers"][0]["args"];
        assert_eq!(*args, json!(["uninstall", "--wait", "--config", "/etc/ambit/config.yaml"]));
    }

    #[test]
    fn nodes_are_clean_when_every_cleaner_is_ready() {
        let of = |seen, updated, ready| rollout(&agents(&status(seen, updated, ready)));
        // Ready agents of the generation before say nothing.
        assert_eq!(of(1, 3, 3), Rollout { done: 0, nodes: 3, is_complete: false });
        assert_eq!(of(2, 1, 3), Rollout { done: 1, nodes: 3, is_complete: false });
        assert_eq!(of(2, 3, 2), Rollout { done: 2, nodes: 3, is_complete: false });
        assert_eq!(of(2, 3, 3), Rollout { done: 3, nodes: 3, is_complete: true });
    }

    #[test]
    fn a_release_with_templates_of_other_charts_is_recognised() {
        let of = |sources: &[&str]| {
            let documents =
                sources.iter().map(|source| format!("---\n# Source: {source}\nkind: ConfigMap\n"));
            documents.collect::<String>()
        };
        let own = of(&["ambit/templates/node/daemonset.yaml", "ambit/templates/control/rbac.yaml"]);
        assert_eq!(foreign_source(&own), None);
        let umbrella =
            of(&["platform/charts/ambit/templates/node/daemonset.yaml", "platform/templates/app.yaml"]);
        assert_eq!(foreign_source(&umbrella), Some("platform/charts/ambit/templates/node/daemonset.yaml"));
        let dependent = of(&["ambit/templates/node/daemonset.yaml", "ambit/charts/other/templates/app.yaml"]);
        assert_eq!(foreign_source(&dependent), Some("ambit/charts/other/templates/app.yaml"));
    }

    #[test]
    fn the_plan_names_what_goes_and_what_stays() {
        let plan = plan(&agents(&status(1, 0, 0)), "ambit-system", Some("ambit"), false);
        assert!(
            plan.contains("3 nodes") && plan.contains("helm uninstall ambit --namespace ambit-system"),
            "{plan}"
        );
    }
}
