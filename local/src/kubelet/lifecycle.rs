//! One pod's task: init containers one after another, then its containers side by side, until it is stopped.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::task::JoinSet;

use crate::kubelet::container::{self, Planned, Restart, Surroundings};
use crate::kubelet::plan::{Programs, Unplannable};
use crate::kubelet::status::{ContainerView, PodView, State};

/// What a pod without a grace period of its own gets, as in Kubernetes.
const DEFAULT_GRACE: Duration = Duration::from_secs(30);

/// The time a pod's containers have between SIGTERM and SIGKILL.
pub(crate) fn grace(pod: &Pod) -> Duration {
    let seconds = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    seconds.and_then(|seconds| u64::try_from(seconds).ok()).map_or(DEFAULT_GRACE, Duration::from_secs)
}

/// The view of a pod that was just set up.
pub(crate) fn first_view(pod: &Pod) -> PodView {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    PodView {
        containers: containers
            .map(|container| {
                ContainerView::waiting(&container.name, container.image.as_deref().unwrap_or_default())
            })
            .collect(),
        redirection: None,
        terminating: None,
        gone: false,
        failure: None,
        initialized: pod.spec.as_ref().is_none_or(|spec| spec.init_containers.is_none()),
        started: std::time::SystemTime::now(),
    }
}

/// Runs the pod's containers. Returns when all have ended for good, or all are stopped after the pod was asked
/// to stop.
pub(crate) async fn run(pod: Arc<Pod>, programs: Arc<Programs>, around: Surroundings) {
    let Some(spec) = &pod.spec else { return };
    let restart = Restart::of(&pod);
    for init in spec.init_containers.iter().flatten() {
        // An init container is tried again unless the pod is never to restart (Kubernetes: Always acts as
        // OnFailure here).
        let policy = if restart == Restart::Never { Restart::Never } else { Restart::OnFailure };
        // Its place is past the containers' ones, so that its states don't overwrite theirs.
        match Planned::new(&programs, &pod, init, usize::MAX, policy) {
            Ok(planned) => {
                if container::run(planned, around.clone()).await != Some(0) {
                    fail(&around, format!("init container {} failed", init.name));
                    return;
                }
            }
            Err(Unplannable { reason, message }) => {
                fail(&around, format!("{reason}: {message}"));
                return;
            }
        }
        if around.stop.borrow().is_some() {
            return;
        }
    }
    around.view.send_modify(|view| view.initialized = true);
    let mut running = JoinSet::new();
    for (index, container) in spec.containers.iter().enumerate() {
        if let Some(planned) = plan(&programs, &pod, container, index, restart, &around) {
            running.spawn(container::run(planned, around.clone()));
        }
    }
    while let Some(ended) = running.join_next().await {
        if let Err(error) = ended {
            tracing::error!(pod = &*around.pod, %error, "the task of a container failed");
            fail(&around, "the task of a container failed".to_owned());
        }
    }
}

fn plan(
    programs: &Programs,
    pod: &Pod,
    container: &Container,
    index: usize,
    restart: Restart,
    around: &Surroundings,
) -> Option<Planned> {
    match Planned::new(programs, pod, container, index, restart) {
        Ok(planned) => Some(planned),
        Err(Unplannable { reason, message }) => {
            tracing::warn!(pod = &*around.pod, container = container.name, reason, message, "cannot run");
            around.view.send_modify(|view| {
                if let Some(container) = view.containers.get_mut(index) {
                    container.state = State::Waiting { reason: reason.to_owned(), message };
                }
            });
            None
        }
    }
}

fn fail(around: &Surroundings, why: String) {
    if around.stop.borrow().is_none() {
        around.view.send_modify(|view| view.failure = Some(why));
    }
}
