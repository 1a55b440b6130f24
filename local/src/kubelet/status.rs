//! The state of a running pod, and its translation to a Kubernetes status.

use std::time::SystemTime;

use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus,
    HostIP, PodCondition, PodIP, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use crate::addresses::Addresses;

/// Reason of a container that waits for its first start.
const CREATING: &str = "ContainerCreating";

/// Where a container is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Not running; the reason is a word such as `CrashLoopBackOff`, the message a sentence.
    Waiting {
        /// One word.
        reason: String,
        /// A sentence, or nothing.
        message: String,
    },
    /// Running.
    Running {
        /// Since when.
        since: SystemTime,
    },
    /// Ended, and not to be started again.
    Terminated {
        /// The exit code, or 128 + the signal's number.
        code: i32,
        /// `Completed` or `Error`.
        reason: String,
        /// The last line of its output when it failed, or nothing.
        message: String,
    },
}

/// One container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerView {
    /// Its name.
    pub name: String,
    /// Its image, as written.
    pub image: String,
    /// Where it is.
    pub state: State,
    /// Whether its readiness probe holds (or it runs and has none).
    pub ready: bool,
    /// Whether it runs and its startup probe, if it has one, has succeeded.
    pub started: bool,
    /// How often it was started again.
    pub restarts: u32,
    /// An init container that runs beside the others (`restartPolicy: Always`, KEP-753).
    pub sidecar: bool,
    /// How the run before this one ended: exit code and last line of output.
    pub last_end: Option<(i32, String)>,
}

/// Whether the node agent has a pod's traffic redirected, in the words of the pod's annotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redirection {
    /// Rules are in place; the proxy does not serve it yet.
    Pending,
    /// Captured and served.
    Enabled,
}

/// A pod as its kubelet sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodView {
    /// Its containers, in the order of the specification.
    pub containers: Vec<ContainerView>,
    /// Its init containers, sidecars among them, in the order of the specification.
    pub init_containers: Vec<ContainerView>,
    /// Whether it takes part in the mesh.
    pub redirection: Option<Redirection>,
    /// When it was asked to stop.
    pub terminating: Option<SystemTime>,
    /// It has ended and its namespaces are gone or going.
    pub gone: bool,
    /// Why it could not be set up, when it could not.
    pub failure: Option<String>,
    /// Its init containers have succeeded (or it has none) and its containers may run.
    pub initialized: bool,
    /// When it was set up.
    pub started: SystemTime,
}

impl PodView {
    /// Whether it takes new traffic.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.terminating.is_none() && self.is_serving()
    }

    /// Whether its readiness probes succeed; a pod that terminates may serve until its containers end.
    fn is_serving(&self) -> bool {
        self.failure.is_none()
            && self.initialized
            && self.containers.iter().chain(self.sidecars()).all(|container| container.ready)
    }

    fn sidecars(&self) -> impl Iterator<Item = &ContainerView> {
        self.init_containers.iter().filter(|container| container.sidecar)
    }

    fn all_containers(&self) -> impl Iterator<Item = &ContainerView> {
        self.init_containers.iter().chain(&self.containers)
    }

    /// `Pending`, `Running`, `Succeeded` or `Failed`.
    #[must_use]
    pub fn phase(&self) -> &'static str {
        let codes: Vec<Option<i32>> = self
            .containers
            .iter()
            .map(|container| match container.state {
                State::Terminated { code, .. } => Some(code),
                _ => None,
            })
            .collect();
        let ended = !codes.is_empty() && codes.iter().all(Option::is_some);
        let started = |container: &ContainerView| {
            matches!(container.state, State::Running { .. }) || container.last_end.is_some()
        };
        if self.failure.is_some() || (ended && codes.iter().flatten().any(|code| *code != 0)) {
            "Failed"
        } else if ended {
            "Succeeded"
        } else if self.initialized && self.containers.iter().all(started) {
            "Running"
        } else {
            "Pending"
        }
    }

    /// What a person should read in a STATUS column: the worst that is to be said.
    #[must_use]
    pub fn summary(&self) -> String {
        if let Some(failure) = &self.failure {
            return format!("Failed: {failure}");
        }
        if self.terminating.is_some() {
            return "Terminating".to_owned();
        }
        let init = self.init_containers.iter().find_map(ContainerView::complaint);
        let waiting = match init {
            Some(complaint) => Some(format!("Init:{complaint}")),
            None => self.containers.iter().find_map(ContainerView::complaint),
        };
        waiting.unwrap_or_else(|| self.phase().to_owned())
    }

    /// Whether a container waits for something that will not happen by itself, such as a program for its image.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.all_containers().any(|container| match &container.state {
            State::Waiting { reason, .. } => reason != CREATING,
            State::Terminated { code, .. } => *code != 0 && self.terminating.is_none(),
            State::Running { .. } => false,
        })
    }

    /// How often containers were started again, all together.
    #[must_use]
    pub fn restarts(&self) -> u32 {
        self.all_containers().map(|container| container.restarts).sum()
    }

    /// The view as a Kubernetes status.
    pub(crate) fn to_status(&self, pod: Addresses, node: Addresses) -> PodStatus {
        // As a kubelet: the condition goes by the probes, and deletion shows in the metadata.
        let ready = self.is_serving();
        let conditions = [
            ("PodScheduled", true),
            ("Initialized", self.initialized),
            ("ContainersReady", ready),
            ("Ready", ready),
        ];
        PodStatus {
            phase: Some(self.phase().to_owned()),
            message: self.failure.clone(),
            pod_ip: Some(pod.v4.to_string()),
            pod_ips: Some(pod.all().iter().map(|ip| PodIP { ip: ip.to_string() }).collect()),
            host_ip: Some(node.v4.to_string()),
            host_ips: Some(node.all().iter().map(|ip| HostIP { ip: ip.to_string() }).collect()),
            start_time: Some(time(self.started)),
            conditions: Some(conditions.map(|(type_, status)| condition(type_, status)).to_vec()),
            container_statuses: Some(self.containers.iter().map(ContainerView::to_status).collect()),
            init_container_statuses: Some(
                self.init_containers.iter().map(ContainerView::to_status).collect(),
            ),
            ..PodStatus::default()
        }
    }
}

/// An exit code with the last line of output, if there is one.
pub(crate) fn explain(code: i32, last_line: &str) -> String {
    match last_line {
        "" => format!("exit code {code}"),
        line => format!("exit code {code}: {line}"),
    }
}

fn condition(type_: &str, status: bool) -> PodCondition {
    let status = if status { "True" } else { "False" };
    PodCondition { type_: type_.to_owned(), status: status.to_owned(), ..PodCondition::default() }
}

/// A moment as Kubernetes writes it.
pub(crate) fn time(at: SystemTime) -> Time {
    let seconds = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let seconds = i64::try_from(seconds).unwrap_or_default();
    Time(Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH))
}

impl ContainerView {
    /// A container that waits for its first start.
    pub(crate) fn waiting(name: &str, image: &str) -> Self {
        Self {
            name: name.to_owned(),
            image: image.to_owned(),
            state: State::Waiting { reason: CREATING.to_owned(), message: String::new() },
            ready: false,
            started: false,
            restarts: 0,
            sidecar: false,
            last_end: None,
        }
    }

    /// What is wrong with it, if something is.
    fn complaint(&self) -> Option<String> {
        match &self.state {
            State::Waiting { reason, message } if reason != CREATING && !reason.is_empty() => {
                Some(match message.as_str() {
                    "" => reason.clone(),
                    message => format!("{reason}: {message}"),
                })
            }
            State::Terminated { code, reason, message } if *code != 0 => {
                Some(format!("{reason} ({})", explain(*code, message)))
            }
            _ => None,
        }
    }

    fn to_status(&self) -> ContainerStatus {
        let state = match &self.state {
            State::Waiting { reason, message } => ContainerState {
                waiting: Some(ContainerStateWaiting {
                    reason: Some(reason.clone()),
                    message: Some(message.clone()).filter(|message| !message.is_empty()),
                }),
                ..ContainerState::default()
            },
            State::Running { since } => ContainerState {
                running: Some(ContainerStateRunning { started_at: Some(time(*since)) }),
                ..ContainerState::default()
            },
            State::Terminated { code, reason, message } => ContainerState {
                terminated: Some(ContainerStateTerminated {
                    exit_code: *code,
                    reason: Some(reason.clone()),
                    message: Some(message.clone()).filter(|message| !message.is_empty()),
                    ..ContainerStateTerminated::default()
                }),
                ..ContainerState::default()
            },
        };
        let last_state = self.last_end.as_ref().map(|(code, line)| ContainerState {
            terminated: Some(ContainerStateTerminated {
                exit_code: *code,
                message: Some(line.clone()).filter(|line| !line.is_empty()),
                ..ContainerStateTerminated::default()
            }),
            ..ContainerState::default()
        });
        ContainerStatus {
            name: self.name.clone(),
            image: self.image.clone(),
            ready: self.ready,
            restart_count: i32::try_from(self.restarts).unwrap_or(i32::MAX),
            started: Some(self.started),
            state: Some(state),
            last_state,
            ..ContainerStatus::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(state: State, ready: bool) -> PodView {
        let container = ContainerView { state, ready, ..ContainerView::waiting("c", "i") };
        PodView {
            containers: vec![container],
            init_containers: Vec::new(),
            redirection: None,
            terminating: None,
            gone: false,
            failure: None,
            initialized: true,
            started: SystemTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn a_terminating_pod_is_not_ready() {
        let mut view = view(State::Running { since: SystemTime::UNIX_EPOCH }, true);
        assert!(view.is_ready());
        view.terminating = Some(SystemTime::UNIX_EPOCH);
        assert!(!view.is_ready());
        assert_eq!(view.summary(), "Terminating");
        assert!(view.is_serving(), "until its container ends");
        view.containers.iter_mut().for_each(|container| container.ready = false);
        assert!(!view.is_serving());
    }

    #[test]
    fn a_crash_is_shown_and_not_hidden() {
        let waiting =
            State::Waiting { reason: "CrashLoopBackOff".to_owned(), message: "exit code 3".to_owned() };
        assert_eq!(view(waiting, false).summary(), "CrashLoopBackOff: exit code 3");
        let ended =
            State::Terminated { code: 1, reason: "Error".to_owned(), message: "no database".to_owned() };
        let view = view(ended, false);
        assert_eq!(view.phase(), "Failed");
        assert_eq!(view.summary(), "Error (exit code 1: no database)");
    }

    #[test]
    fn a_pod_whose_containers_all_ended_well_has_succeeded() {
        let ended = State::Terminated { code: 0, reason: "Completed".to_owned(), message: String::new() };
        assert_eq!(view(ended, false).phase(), "Succeeded");
    }
}
