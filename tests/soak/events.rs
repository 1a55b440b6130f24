//! What happens to the mesh while it is under load: restarts, hand-overs, rotations, churn, in turn.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ambit_local::{DATAPLANE_MODE, Pod, PodOptions, Ztunnel};
use ambit_tests::apps;
use anyhow::{Context, Result, bail};
use futures_util::future::join_all;
use parking_lot::Mutex;

use crate::bed::{Bed, DRAIN, HTTP, MESH, MOVING};
use crate::flow_log::{FlowLog, Kill};
use crate::flows::Flows;
use crate::roots::Rotation;

/// How long an event may take.
const LIMIT: Duration = Duration::from_secs(120);
/// How long the control plane, or an agent, stays away.
const AWAY: Duration = Duration::from_secs(3);
/// Policies of one churn.
const POLICIES: usize = 30;
/// Pods that come and go at once.
const PASSING: usize = 6;

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    ControlRestart,
    ControlKill,
    AgentRestart(usize),
    BothRoots,
    NewRootSigns,
    OldRootGoes,
    HandOver,
    ProxyKill,
    RollOut,
    Label,
    Unlabel,
    PolicyChurn,
    PodChurn,
}

/// The order in which they happen, over and over. A rotation of the root is spread so that nobody waits.
pub(crate) const CYCLE: [Event; 14] = [
    Event::BothRoots,
    Event::ControlRestart,
    Event::HandOver,
    Event::NewRootSigns,
    Event::AgentRestart(0),
    Event::RollOut,
    Event::Label,
    Event::ProxyKill,
    Event::PolicyChurn,
    Event::PodChurn,
    Event::OldRootGoes,
    Event::AgentRestart(1),
    Event::ControlKill,
    Event::Unlabel,
];

impl Event {
    /// Its name in the report.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::ControlRestart => "control plane restarted",
            Self::ControlKill => "control plane killed, gone for 3 s",
            Self::AgentRestart(_) => "node agent stopped for 3 s",
            Self::BothRoots => "root rotation: both published",
            Self::NewRootSigns => "root rotation: the new one signs",
            Self::OldRootGoes => "root rotation: the old one goes",
            Self::HandOver => "node proxy handed over",
            Self::ProxyKill => "node proxy killed and started",
            Self::RollOut => "application rolled out",
            Self::Label => "namespace labelled",
            Self::Unlabel => "namespace unlabelled",
            Self::PolicyChurn => "30 policies added and removed",
            Self::PodChurn => "6 pods added and removed",
        }
    }
}

/// A node proxy that drains.
#[derive(Debug)]
struct Draining {
    ztunnel: Ztunnel,
    node: usize,
    since: Instant,
}

/// Makes events happen.
#[derive(Debug)]
pub(crate) struct Stage {
    bed: Arc<Bed>,
    flows: Arc<Flows>,
    flow_log: Arc<FlowLog>,
    rotation: Rotation,
    /// Proxies that were handed over from and have not ended.
    draining: Arc<Mutex<Vec<Draining>>>,
    generation: u64,
}

impl Stage {
    /// Nothing has happened yet.
    pub(crate) fn new(bed: &Arc<Bed>, flows: &Arc<Flows>, flow_log: &Arc<FlowLog>) -> Self {
        let (bed, flows, flow_log) = (Arc::clone(bed), Arc::clone(flows), Arc::clone(flow_log));
        Self { bed, flows, flow_log, rotation: Rotation::default(), draining: Arc::default(), generation: 0 }
    }

    /// Runs the `nth` event. Those of node proxies hit the first node in the first round and the second
    /// node later, so that a proxy lives long enough to show what it loses.
    ///
    /// # Errors
    /// When it does not come to its end.
    pub(crate) async fn play(&mut self, nth: usize) -> (Event, Result<()>) {
        let event = CYCLE.get(nth % CYCLE.len()).copied().unwrap_or(Event::ControlRestart);
        let node = usize::from(nth >= CYCLE.len());
        let outcome = tokio::time::timeout(LIMIT, Box::pin(self.happen(event, node))).await;
        let outcome = outcome.unwrap_or_else(|_| bail!("no end within {LIMIT:?}"));
        (event, outcome.with_context(|| event.title()))
    }

    /// Brings the mesh back to where it was before the first event, however far the cycle got.
    ///
    /// # Errors
    /// When it does not come to its end.
    pub(crate) async fn restore(&mut self) -> Result<()> {
        if self.bed.moving.client.is_wanted_in_mesh() {
            self.happen(Event::Unlabel, 0).await?;
        }
        Ok(())
    }

    async fn happen(&mut self, event: Event, node: usize) -> Result<()> {
        let cluster = &self.bed.cluster;
        let authority = cluster.ca_dir();
        match event {
            Event::ControlRestart => Ok(cluster.control()?.restart().await?),
            Event::ControlKill => {
                let control = cluster.control()?;
                control.kill().await?;
                tokio::time::sleep(AWAY).await;
                control.start().await?;
                Ok(control.wait_ready().await?)
            }
            Event::AgentRestart(node) => self.restart_agent(node).await,
            Event::BothRoots => self.rotation.publish_both(&authority),
            Event::NewRootSigns => self.rotation.sign_with_new(&authority),
            Event::OldRootGoes => self.rotation.drop_old(&authority).await,
            Event::HandOver => self.hand_over(node).await,
            Event::ProxyKill => self.kill_proxy(node).await,
            Event::RollOut => {
                self.generation += 1;
                self.bed.roll_out(self.generation).await
            }
            Event::Label => {
                cluster.label_namespace(MOVING, DATAPLANE_MODE, Some("ambient")).await?;
                let moving = &self.bed.moving;
                for pod in [&moving.client, &moving.server] {
                    cluster.wait_enrolled(pod).await?;
                }
                Ok(())
            }
            Event::Unlabel => {
                cluster.label_namespace(MOVING, DATAPLANE_MODE, None).await?;
                let moving = &self.bed.moving;
                for pod in [&moving.client, &moving.server] {
                    cluster.wait_unenrolled(pod).await?;
                }
                Ok(())
            }
            Event::PolicyChurn => self.churn_policies().await,
            Event::PodChurn => self.churn_pods().await,
        }
    }

    async fn restart_agent(&self, node: usize) -> Result<()> {
        let cluster = &self.bed.cluster;
        cluster.stop_agent(node).await?;
        tokio::time::sleep(AWAY).await;
        cluster.start_agent(node).await?;
        let wanted = cluster.pods().into_iter().filter(|pod| pod.node() == node && pod.is_wanted_in_mesh());
        for pod in wanted {
            cluster.wait_enrolled(&pod).await?;
        }
        Ok(())
    }

    /// A second proxy beside the first, which then drains.
    async fn hand_over(&self, node: usize) -> Result<()> {
        let ztunnel = self.bed.ztunnel(node)?;
        self.bed.cluster.start_another_ztunnel(node).await?;
        ztunnel.terminate().await?;
        self.flows.handed_over(node);
        self.draining.lock().push(Draining { ztunnel, node, since: Instant::now() });
        Ok(())
    }

    async fn kill_proxy(&self, node: usize) -> Result<()> {
        let ztunnel = self.bed.ztunnel(node)?;
        let before = Instant::now();
        ztunnel.kill().await?;
        self.flow_log.killed(Kill { node, before, gone: Instant::now() });
        ztunnel.start().await?;
        Ok(ztunnel.wait_ready().await?)
    }

    /// Policies that touch every live connection and change no verdict: they deny a port that nobody uses.
    async fn churn_policies(&self) -> Result<()> {
        let name = |nth: usize| format!("churn-{nth}");
        for nth in 0..POLICIES {
            let text = format!(
                "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {}, namespace: {MESH}}}
spec: {{action: DENY, rules: [{{to: [{{operation: {{ports: [\"{}\"]}}}}]}}]}}
",
                name(nth),
                20_000 + nth
            );
            self.bed.cluster.apply(&text).await?;
        }
        for nth in 0..POLICIES {
            self.bed.cluster.delete("AuthorizationPolicy", MESH, &name(nth)).await?;
        }
        Ok(())
    }

    /// Pods that come, are served at once, and go.
    async fn churn_pods(&self) -> Result<()> {
        let cluster = &self.bed.cluster;
        let target = self.bed.vip(MESH, "web", HTTP, false)?;
        let passing = (0..PASSING).map(async |nth| {
            let options = PodOptions::new(MESH, format!("passing-{nth}")).node(nth % cluster.nodes());
            let pod = cluster.pod(options.service_account(format!("passing-{nth}"))).await?;
            let talked = talk(&pod, target).await;
            cluster.delete_pod(&pod).await?;
            talked.with_context(|| format!("a request from pod {pod}"))
        });
        // All to their ends, so that none is left behind when another fails.
        join_all(passing).await.into_iter().collect()
    }

    /// Proxies that drain now, with their nodes.
    pub(crate) fn draining(&self) -> Vec<(usize, u32)> {
        let draining = self.draining.lock();
        draining.iter().filter_map(|draining| Some((draining.node, draining.ztunnel.pid()?))).collect()
    }

    /// Clears away proxies that have drained; says how long each took, or what was wrong with its end.
    ///
    /// # Errors
    /// When one ended badly, was cut by its drain time although its connections had been renewed, or did not end.
    pub(crate) async fn reap(&self) -> Result<Vec<Duration>> {
        let (ended, running): (Vec<Draining>, Vec<Draining>) =
            self.draining.lock().drain(..).partition(|draining| !draining.ztunnel.is_running());
        let late = running.iter().any(|draining| draining.since.elapsed() > DRAIN * 2);
        self.draining.lock().extend(running);
        let mut took = Vec::new();
        for Draining { ztunnel, since, node } in ended {
            let lasted = since.elapsed();
            let end = ztunnel.end();
            self.bed.cluster.remove_ztunnel(&ztunnel).await?;
            if end.and_then(|end| end.code()) != Some(0) {
                bail!("the proxy of node {node} that was handed over from ended badly: {end:?}");
            }
            if lasted >= DRAIN {
                bail!(
                    "the proxy of node {node} that was handed over from had connections left after {lasted:?}"
                );
            }
            took.push(lasted);
        }
        if late {
            bail!("a proxy that was handed over from does not end");
        }
        Ok(took)
    }
}

async fn talk(pod: &Pod, target: SocketAddr) -> Result<()> {
    let mut stream = pod.connect_within(target, Duration::from_secs(10)).await?;
    apps::get(&mut stream).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotation_of_the_root_comes_in_order_within_a_cycle() {
        let at = |event| CYCLE.iter().position(|other| *other == event).unwrap();
        assert!(at(Event::BothRoots) < at(Event::NewRootSigns));
        assert!(at(Event::NewRootSigns) < at(Event::OldRootGoes));
    }
}
