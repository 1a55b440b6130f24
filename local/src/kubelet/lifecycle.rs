//! One pod's task: init containers one after another, then its containers beside the sidecars, until it is stopped.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::kubelet::container::{self, Planned, PodContext, Restart};
use crate::kubelet::plan::{CONFIGURATION_FAULT, PlanError, Programs};
use crate::kubelet::status::{ContainerView, PodView, State, explain};

/// What a pod without a grace period of its own gets, as in Kubernetes.
const DEFAULT_GRACE: Duration = Duration::from_secs(30);
/// Delay before a container that refers to an object that is not there is looked at again.
const CONFIGURATION_RETRY: Duration = Duration::from_secs(1);

/// The time a pod's containers have between SIGTERM and SIGKILL.
pub(crate) fn grace(pod: &Pod) -> Duration {
    let seconds = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    seconds.and_then(|seconds| u64::try_from(seconds).ok()).map_or(DEFAULT_GRACE, Duration::from_secs)
}

/// The view of a pod that was just set up.
pub(crate) fn first_view(pod: &Pod) -> PodView {
    let view = |container: &Container| ContainerView {
        // The field has no meaning for the containers proper.
        sidecar: is_sidecar(container),
        ..ContainerView::waiting(&container.name, container.image.as_deref().unwrap_or_default())
    };
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers).map(view).collect();
    let init = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
    let init_containers: Vec<ContainerView> = init.map(view).collect();
    PodView {
        containers,
        initialized: init_containers.is_empty(),
        init_containers,
        redirection: None,
        terminating: None,
        gone: false,
        failure: None,
        started: std::time::SystemTime::now(),
    }
}

/// Whether an init container runs beside the others for as long as they run (KEP-753).
fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// Runs the pod's containers. Returns when all have ended for good, or all are stopped after the pod was asked
/// to stop. Sidecars stop last.
pub(crate) async fn run(pod: Arc<Pod>, programs: Arc<Programs>, around: PodContext) {
    let Some(spec) = &pod.spec else { return };
    let stop_sidecars = watch::Sender::new(None);
    let beside = PodContext { stop: stop_sidecars.subscribe(), ..around.clone() };
    let mut sidecars = JoinSet::new();
    if initialize(&pod, &programs, &around, &beside, &mut sidecars).await {
        around.view.send_modify(|view| view.initialized = true);
        let restart = Restart::of(&pod);
        let mut running = JoinSet::new();
        for (index, container) in spec.containers.iter().enumerate() {
            let (pod, programs, around) = (Arc::clone(&pod), Arc::clone(&programs), around.clone());
            let container = container.clone();
            running.spawn(async move {
                if let Some(planned) = plan(&programs, &pod, &container, index, restart, &around).await {
                    container::run(planned, around).await;
                }
            });
        }
        join(&mut running, &around).await;
    }
    // KEP-753: sidecars are stopped after the containers, with what is left of the grace period; at least two seconds.
    let grace = around.stop.borrow().map_or(DEFAULT_GRACE, |grace| grace.max(Duration::from_secs(2)));
    stop_sidecars.send_replace(Some(grace));
    join(&mut sidecars, &around).await;
}

/// Runs the init containers one after another and starts the sidecars among them. False when the containers are not
/// to run: an init container failed for good, or the pod was stopped.
async fn initialize(
    pod: &Arc<Pod>,
    programs: &Arc<Programs>,
    around: &PodContext,
    beside: &PodContext,
    sidecars: &mut JoinSet<()>,
) -> bool {
    let Some(spec) = &pod.spec else { return false };
    for (position, init) in spec.init_containers.iter().flatten().enumerate() {
        let index = spec.containers.len() + position;
        // Kubernetes: Always means OnFailure for an init container that is no sidecar.
        let policy = match (is_sidecar(init), Restart::of(pod)) {
            (true, _) => Restart::Always,
            (false, Restart::Never) => Restart::Never,
            (false, _) => Restart::OnFailure,
        };
        let Some(planned) = plan(programs, pod, init, index, policy, around).await else { return false };
        if is_sidecar(init) {
            sidecars.spawn(run_sidecar(planned, beside.clone()));
            if !started(around, position).await {
                return false;
            }
        } else {
            let code = container::run(planned, around.clone()).await;
            if code != Some(0) {
                fail(around, failure_of(around, position, &init.name));
                return false;
            }
        }
        if around.stop.borrow().is_some() {
            return false;
        }
    }
    true
}

async fn run_sidecar(planned: Planned, around: PodContext) {
    container::run(planned, around).await;
}

/// Waits until a sidecar has started. False when the pod is stopped first.
async fn started(around: &PodContext, position: usize) -> bool {
    let mut view = around.view.subscribe();
    let has_started =
        |view: &PodView| view.init_containers.get(position).is_some_and(|container| container.started);
    tokio::select! {
        started = view.wait_for(has_started) => started.is_ok(),
        _ = around.stopping() => false,
    }
}

/// The message for an init container that failed for good.
fn failure_of(around: &PodContext, position: usize, name: &str) -> String {
    let view = around.view.borrow();
    let state = view.init_containers.get(position).map(|container| &container.state);
    match state {
        Some(State::Terminated { code, message, .. }) => {
            format!("init container {name} failed ({})", explain(*code, message))
        }
        _ => format!("init container {name} failed"),
    }
}

async fn join(tasks: &mut JoinSet<()>, around: &PodContext) {
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            tracing::error!(pod = &*around.pod, %error, "the task of a container failed");
            fail(around, "the task of a container failed".to_owned());
        }
    }
}

/// Translates a container. One that refers to an object that is not there waits for it, as a kubelet does; `None` when
/// it can never run, or the pod is stopped first.
async fn plan(
    programs: &Programs,
    pod: &Pod,
    container: &Container,
    index: usize,
    restart: Restart,
    around: &PodContext,
) -> Option<Planned> {
    let mut last = String::new();
    loop {
        let configuration = (around.configuration.0)();
        let unplannable = match Planned::new(programs, pod, container, &configuration, index, restart) {
            Ok(planned) => return Some(planned),
            Err(unplannable) => unplannable,
        };
        let PlanError { reason, message } = unplannable;
        if message != last {
            tracing::warn!(pod = &*around.pod, container = container.name, reason, message, "cannot run");
            last.clone_from(&message);
        }
        around.update(index, |view| view.state = State::Waiting { reason: reason.to_owned(), message });
        if reason != CONFIGURATION_FAULT {
            return None;
        }
        tokio::select! {
            () = tokio::time::sleep(CONFIGURATION_RETRY) => {}
            _ = around.stopping() => return None,
        }
    }
}

fn fail(around: &PodContext, why: String) {
    if around.stop.borrow().is_none() {
        around.view.send_modify(|view| view.failure = Some(why));
    }
}
