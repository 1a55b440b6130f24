//! One container's life: started, probed, started again with growing delays, stopped.
//!
//! A pod's task runs one of these a container. It publishes what it sees and touches nothing but its process.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Pod};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::kubelet::configuration::Configuration;
use crate::kubelet::plan::{PlanError, Programs};
use crate::kubelet::probe::{Probe, Prober};
use crate::kubelet::status::{ContainerView, PodView, State, explain};
use crate::process::{Command, Process};

/// Delay before the first restart.
const FIRST_DELAY: Duration = Duration::from_millis(500);
/// Longest delay between two starts.
const LONGEST_DELAY: Duration = Duration::from_secs(30);
/// A run of this length resets the delay.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// When an ended container is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Restart {
    /// However it ended.
    Always,
    /// Unless it ended with 0.
    OnFailure,
    /// Not at all.
    Never,
}

impl Restart {
    /// A pod's policy, `Always` when it names none.
    pub(crate) fn of(pod: &Pod) -> Self {
        match pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()) {
            Some("Never") => Self::Never,
            Some("OnFailure") => Self::OnFailure,
            _ => Self::Always,
        }
    }

    fn applies(self, code: i32) -> bool {
        match self {
            Self::Always => true,
            Self::OnFailure => code != 0,
            Self::Never => false,
        }
    }
}

/// What a container runs, ready to be started.
#[derive(Debug, Clone)]
pub(crate) struct Planned {
    /// Position among the pod's containers, with the init containers counted after the others.
    pub(crate) index: usize,
    name: String,
    command: Command,
    startup: Option<Probe>,
    liveness: Option<Probe>,
    readiness: Option<Probe>,
    pre_stop: Option<LifecycleHandler>,
    restart: Restart,
}

impl Planned {
    /// Translates a container.
    ///
    /// # Errors
    /// When its image, environment or a probe can't be honoured here.
    pub(crate) fn new(
        programs: &Programs,
        pod: &Pod,
        container: &Container,
        configuration: &Configuration,
        index: usize,
        restart: Restart,
    ) -> Result<Self, PlanError> {
        let probe = |probe: &Option<_>| probe.as_ref().map(|probe| Probe::read(container, probe)).transpose();
        let lifecycle = container.lifecycle.as_ref();
        Ok(Self {
            index,
            name: container.name.clone(),
            command: programs.command(pod, container, configuration)?,
            startup: probe(&container.startup_probe)?,
            liveness: probe(&container.liveness_probe)?,
            readiness: probe(&container.readiness_probe)?,
            pre_stop: lifecycle.and_then(|lifecycle| lifecycle.pre_stop.clone()),
            restart,
        })
    }
}

/// Reads a namespace's ConfigMaps and Secrets.
#[derive(Clone)]
pub(crate) struct ConfigurationReader(pub(crate) Arc<dyn Fn() -> Configuration + Send + Sync>);

impl std::fmt::Debug for ConfigurationReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConfigurationReader")
    }
}

/// What all containers of a pod share.
#[derive(Debug, Clone)]
pub(crate) struct PodContext {
    /// `namespace/name` of the pod, for messages.
    pub(crate) pod: Arc<str>,
    /// How probes are asked; holds the pod's sandbox.
    pub(crate) prober: Prober,
    /// Where views are published.
    pub(crate) view: Arc<watch::Sender<PodView>>,
    /// The ConfigMaps and Secrets of the pod's namespace as they are now.
    pub(crate) configuration: ConfigurationReader,
    /// The running processes by container, for their logs.
    pub(crate) processes: Arc<Mutex<Vec<Option<Process>>>>,
    /// Becomes `Some(grace)` when the pod is to stop.
    pub(crate) stop: watch::Receiver<Option<Duration>>,
}

impl PodContext {
    /// Changes what is known of the container at `index`, where init containers count after the others.
    pub(crate) fn update(&self, index: usize, change: impl FnOnce(&mut ContainerView)) {
        self.view.send_modify(|view| {
            let container = match index.checked_sub(view.containers.len()) {
                None => view.containers.get_mut(index),
                Some(init) => view.init_containers.get_mut(init),
            };
            if let Some(container) = container {
                change(container);
            }
        });
    }

    /// Resolves when the pod is to stop, with the time it has.
    pub(crate) async fn stopping(&self) -> Duration {
        let mut stop = self.stop.clone();
        let grace = stop.wait_for(Option::is_some).await.map(|grace| *grace);
        // The sender goes only with the cluster itself: then there is no time at all.
        grace.ok().flatten().unwrap_or_default()
    }
}

/// Runs a container until it has ended for good or the pod was stopped. Returns its last exit code.
pub(crate) async fn run(planned: Planned, around: PodContext) -> Option<i32> {
    let mut delay = FIRST_DELAY;
    loop {
        let began = Instant::now();
        let Outcome { code, why, stopped } = run_once(&planned, &around).await;
        let again = !stopped && planned.restart.applies(code);
        if !again {
            let reason = if code == 0 { "Completed" } else { "Error" };
            let message = if code == 0 { String::new() } else { why };
            around.update(planned.index, |container| {
                container.ready = false;
                container.started = false;
                container.state = State::Terminated { code, reason: reason.to_owned(), message };
            });
            return Some(code);
        }
        if began.elapsed() >= STABLE_AFTER {
            delay = FIRST_DELAY;
        }
        tracing::warn!(pod = &*around.pod, container = planned.name, code, why, "a container ended");
        around.update(planned.index, |container| {
            container.ready = false;
            container.started = false;
            container.last_end = Some((code, why.clone()));
            container.state =
                State::Waiting { reason: "CrashLoopBackOff".to_owned(), message: explain(code, &why) };
        });
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            _ = around.stopping() => return Some(code),
        }
        delay = (delay * 2).min(LONGEST_DELAY);
        around.update(planned.index, |container| container.restarts += 1);
    }
}

/// How one run ended.
struct Outcome {
    code: i32,
    why: String,
    /// The pod is stopping, so there is no next run.
    stopped: bool,
}

async fn run_once(planned: &Planned, around: &PodContext) -> Outcome {
    let name = format!("{}/{}", around.pod, planned.name);
    let started = Process::start(name, &around.prober.pod, planned.command.clone()).await;
    let process = match started {
        Ok(process) => process,
        // 127: what a shell answers for a program that can't be found.
        Err(error) => return Outcome { code: 127, why: error.to_string(), stopped: false },
    };
    if let Some(slot) = around.processes.lock().get_mut(planned.index) {
        *slot = Some(process.clone());
    }
    around.update(planned.index, |container| container.state = State::Running { since: SystemTime::now() });
    tokio::select! {
        status = process.wait() => {
            let code = status.map_or(-1, exit_code);
            Outcome { code, why: process.last_line().unwrap_or_default(), stopped: false }
        }
        why = probe(planned, around) => {
            let code = process.terminate(Duration::from_secs(2)).await.map_or(-1, exit_code);
            Outcome { code, why: format!("liveness probe failed: {why}"), stopped: false }
        }
        grace = around.stopping() => {
            let deadline = Instant::now() + grace;
            // It serves as before while the hook runs; probes are not asked any more.
            before_stop(planned, around, grace).await;
            around.update(planned.index, |container| container.ready = false);
            let left = deadline.saturating_duration_since(Instant::now());
            let code = process.terminate(left).await.map_or(-1, exit_code);
            Outcome { code, why: String::new(), stopped: true }
        }
    }
}

/// Asks the probes of a running container. Returns only when one says that it must be restarted.
async fn probe(planned: &Planned, around: &PodContext) -> String {
    let prober = &around.prober;
    if let Some(startup) = &planned.startup
        && let Err(why) = startup.decide(prober).await
    {
        return why;
    }
    around.update(planned.index, |container| container.started = true);
    let readiness = async {
        match &planned.readiness {
            None => around.update(planned.index, |container| container.ready = true),
            Some(readiness) => {
                let report = |holds, _| {
                    around.update(planned.index, |container| container.ready = holds);
                    true
                };
                readiness.watch(prober, false, report).await;
            }
        }
        std::future::pending::<()>().await;
    };
    let liveness = async {
        let mut failed = String::new();
        match &planned.liveness {
            None => std::future::pending().await,
            Some(liveness) => {
                let report = |_, why: Option<String>| {
                    failed = why.unwrap_or_default();
                    false
                };
                liveness.watch(prober, true, report).await;
            }
        }
        failed
    };
    tokio::select! {
        () = readiness => String::new(),
        why = liveness => why,
    }
}

async fn before_stop(planned: &Planned, around: &PodContext, grace: Duration) {
    let Some(handler) = &planned.pre_stop else { return };
    if let Some(sleep) = &handler.sleep {
        let wanted = Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0));
        tokio::time::sleep(wanted.min(grace)).await;
    }
    let command = handler.exec.as_ref().and_then(|exec| exec.command.as_ref());
    if let Some((program, args)) = command.and_then(|command| command.split_first()) {
        let name = format!("{}/{} preStop", around.pod, planned.name);
        let ended = async {
            let command = Command::new(program).args(args);
            Process::start(name, &around.prober.pod, command).await?.wait_within(grace).await
        };
        if let Err(error) = ended.await {
            tracing::warn!(pod = &*around.pod, container = planned.name, %error, "preStop failed");
        }
    }
}

/// The exit code as containers report it: a signal's number counts from 128.
#[must_use]
pub fn exit_code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_policy_looks_at_the_exit_code() {
        assert!(Restart::Always.applies(0));
        assert!(!Restart::OnFailure.applies(0));
        assert!(Restart::OnFailure.applies(137));
        assert!(!Restart::Never.applies(1));
    }

    #[test]
    fn a_signal_is_counted_from_128() {
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
    }
}
