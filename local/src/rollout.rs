//! What a Deployment controller would do next: a pure function from a Deployment and its pods to a step.
//!
//! The cluster calls it whenever a Deployment or one of its pods changed, and carries the step out.

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// Letters of generated names: no vowels and nothing that reads as another, as Kubernetes has it.
pub(crate) const SAFE_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// One pod of a Deployment as the controller sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Replica {
    /// The pod's name.
    pub(crate) name: String,
    /// Hash of the template that it was made from.
    pub(crate) hash: String,
    /// Whether it is ready.
    pub(crate) ready: bool,
}

/// How many pods a Deployment wants, and how far a rollout may go off that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// Wanted pods.
    pub(crate) replicas: usize,
    /// Pods above that during a rollout.
    pub(crate) surge: usize,
    /// Pods that may be missing or unready during a rollout.
    pub(crate) unavailable: usize,
    /// Strategy `Recreate`: all old pods go before a new one comes.
    pub(crate) recreate: bool,
}

/// What to do now.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Step {
    /// So many pods of the current template are to be made.
    pub(crate) create: usize,
    /// These pods are to be deleted.
    pub(crate) delete: Vec<String>,
}

impl Bounds {
    /// Reads the bounds of a Deployment, with the defaults of Kubernetes.
    pub(crate) fn of(deployment: &Deployment) -> Self {
        let default = DeploymentSpec::default();
        let spec = deployment.spec.as_ref().unwrap_or(&default);
        let replicas = usize::try_from(spec.replicas.unwrap_or(1)).unwrap_or(0);
        let strategy = spec.strategy.as_ref();
        let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
        let surge = rolling.and_then(|rolling| rolling.max_surge.as_ref());
        let unavailable = rolling.and_then(|rolling| rolling.max_unavailable.as_ref());
        // Kubernetes: both default to 25 %; surge is rounded up, unavailable down; both zero is corrected.
        let surge = surge.map_or(replicas.div_ceil(4), |share| part(share, replicas, true));
        let unavailable = unavailable.map_or(replicas / 4, |share| part(share, replicas, false));
        Self {
            replicas,
            surge: if surge == 0 && unavailable == 0 { 1 } else { surge },
            unavailable,
            recreate: strategy.and_then(|strategy| strategy.type_.as_deref()) == Some("Recreate"),
        }
    }
}

fn part(share: &IntOrString, of: usize, up: bool) -> usize {
    match share {
        IntOrString::Int(number) => usize::try_from(*number).unwrap_or(0),
        IntOrString::String(text) => {
            let percent: usize = text.trim_end_matches('%').parse().unwrap_or(25);
            let hundredfold = of.saturating_mul(percent);
            if up { hundredfold.div_ceil(100) } else { hundredfold / 100 }
        }
    }
}

/// Hash of a pod template, as in the names of ReplicaSets.
pub(crate) fn template_hash(template: &PodTemplateSpec) -> String {
    let text = serde_json::to_vec(template).unwrap_or_default();
    // FNV-1a: stable over runs and machines, and nothing hostile chooses the template.
    let mut hash = text.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut name = String::new();
    for _ in 0..10 {
        let letters = SAFE_LETTERS.len() as u64;
        let letter = usize::try_from(hash % letters).unwrap_or(0);
        name.extend(SAFE_LETTERS.get(letter).map(|letter| char::from(*letter)));
        hash /= letters;
    }
    name
}

/// Decides the next step. `pods` are those that are not terminating; `terminating` counts the others.
pub(crate) fn step(bounds: Bounds, hash: &str, pods: &[Replica], terminating: usize) -> Step {
    let (new, old): (Vec<_>, Vec<_>) = pods.iter().partition(|pod| pod.hash == hash);
    if new.len() > bounds.replicas {
        let mut surplus: Vec<_> = new.clone();
        surplus.sort_by_key(|pod| pod.ready);
        let delete = surplus.iter().take(new.len() - bounds.replicas).map(|pod| pod.name.clone());
        return Step { create: 0, delete: delete.chain(unready(&old)).collect() };
    }
    let missing = bounds.replicas - new.len();
    if bounds.recreate {
        let create = if old.is_empty() && terminating == 0 { missing } else { 0 };
        return Step { create, delete: old.iter().map(|pod| pod.name.clone()).collect() };
    }
    let room = (bounds.replicas + bounds.surge).saturating_sub(pods.len());
    // A pod that serves nobody can go without making anything worse.
    let mut delete: Vec<String> = unready(&old).collect();
    let available = pods.iter().filter(|pod| pod.ready).count();
    let spare = available.saturating_sub(bounds.replicas.saturating_sub(bounds.unavailable));
    delete.extend(old.iter().filter(|pod| pod.ready).take(spare).map(|pod| pod.name.clone()));
    Step { create: missing.min(room), delete }
}

fn unready(pods: &[&Replica]) -> impl Iterator<Item = String> {
    pods.iter().filter(|pod| !pod.ready).map(|pod| pod.name.clone()).collect::<Vec<_>>().into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    const THREE: Bounds = Bounds { replicas: 3, surge: 1, unavailable: 0, recreate: false };

    fn replica(name: &str, hash: &str, ready: bool) -> Replica {
        Replica { name: name.to_owned(), hash: hash.to_owned(), ready }
    }

    #[test]
    fn missing_pods_are_made() {
        assert_eq!(step(THREE, "h", &[replica("a", "h", true)], 0), Step { create: 2, delete: vec![] });
    }

    #[test]
    fn surplus_pods_go_the_unready_first() {
        let pods = [replica("a", "h", true), replica("b", "h", false)];
        let bounds = Bounds { replicas: 1, ..THREE };
        assert_eq!(step(bounds, "h", &pods, 0).delete, ["b"]);
    }

    #[test]
    fn a_rollout_never_goes_below_the_wanted_number_of_ready_pods() {
        let mut pods: Vec<_> = (0..3).map(|n| replica(&format!("old{n}"), "old", true)).collect();
        let mut made = 0;
        for _ in 0..20 {
            let Step { create, delete } = step(THREE, "new", &pods, 0);
            pods.retain(|pod| !delete.contains(&pod.name));
            assert!(pods.iter().filter(|pod| pod.ready).count() >= 3);
            // Those made in the last round have become ready by now.
            pods.iter_mut().for_each(|pod| pod.ready = true);
            for _ in 0..create {
                made += 1;
                pods.push(replica(&format!("new{made}"), "new", false));
            }
            assert!(pods.len() <= 4);
        }
        assert_eq!(pods.len(), 3);
        assert!(pods.iter().all(|pod| pod.hash == "new"));
    }

    #[test]
    fn recreate_waits_until_the_last_old_pod_is_gone() {
        let bounds = Bounds { replicas: 1, recreate: true, ..THREE };
        let old = [replica("a", "old", true)];
        assert_eq!(step(bounds, "new", &old, 0), Step { create: 0, delete: vec!["a".to_owned()] });
        assert_eq!(step(bounds, "new", &[], 1), Step::default());
        assert_eq!(step(bounds, "new", &[], 0).create, 1);
    }

    #[test]
    fn percentages_round_as_kubernetes_does() {
        assert_eq!(part(&IntOrString::String("25%".to_owned()), 3, true), 1);
        assert_eq!(part(&IntOrString::String("25%".to_owned()), 3, false), 0);
        assert_eq!(part(&IntOrString::Int(2), 3, false), 2);
    }

    #[test]
    fn a_template_keeps_its_hash_and_another_has_another() {
        let template = PodTemplateSpec::default();
        let mut other = template.clone();
        other.metadata = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta::default());
        assert_eq!(template_hash(&template), template_hash(&template));
        assert_ne!(template_hash(&template), template_hash(&other));
        assert_eq!(template_hash(&template).len(), 10);
    }
}
