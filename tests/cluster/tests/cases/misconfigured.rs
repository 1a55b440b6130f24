//! Clusters and installations that lack something, and what `ambit check` says of each. Paths, platforms and firewalls are in
//! `nodes`, NetworkPolicies in `cli`.
//!
//! What a kernel lacks is taken from containers by seccomp: the call fails as it does on such a kernel.

use std::time::Duration;

use ambit_cluster::{Cluster, mesh, wait};
use serde_json::Value;

use super::apps::ROLLOUT;
use super::cli::json;
use super::{Cases, Outcome, Stage};

/// How soon a change has its effect on a busy machine.
const SOON: Duration = Duration::from_secs(240);
/// Of the pods of probes, in CEL.
const OF_PROBES: &str = "request.namespace.startsWith('ambit-check-')";
/// A namespace of that name.
const LIKE_PROBES: &str = "ambit-check-0";
/// Of the agents.
const OF_AGENTS: &str = "request.namespace == 'ambit-system'";
/// The file of the seccomp profile, below kubelet's directory for them.
const PROFILE: &str = "ambit-limited.json";

pub(crate) fn add_before_mesh(cases: &mut Cases) {
    cases.add_to(Stage::Cluster, "a_node_whose_clock_differs_is_named", clock);
    cases.add_to(Stage::Cluster, "what_kernel_and_privileges_lack_is_named_by_probes", probes);
}

pub(crate) fn add(cases: &mut Cases) {
    cases.add("an_agent_with_read_only_settings_is_explained", read_only);
}

/// A kubelet renews the lease of its node by its own clock.
async fn clock(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    kubectl.apply(BEHIND).await?;
    let (code, sections) = json(cluster, &["check"]).await?;
    kubectl.run(&["delete", "lease", "behind", "--namespace", "kube-node-lease"]).await?;
    let finding = finding(&sections, "node behind").ok_or_else(|| sections.to_string())?;
    assert_eq!((code, &finding["level"]), (1, &"error".into()), "{finding}");
    assert!(
        finding["problem"].as_str().is_some_and(|said| said.contains("s behind that of the API")),
        "{finding}"
    );
    assert!(finding["remedy"].as_str().is_some_and(|said| said.contains("synchronise")), "{finding}");
    let (_, sections) = json(cluster, &["check"]).await?;
    assert!(!sections.to_string().contains("its clock is"), "{sections}");
    Ok(())
}

async fn probes(cluster: &Cluster) -> Outcome {
    cluster.load(&mesh::images(cluster.layout())?).await?;
    for (limit, missing, remedy) in [
        (Limit::NoNftables, "pods can be enrolled", "the kernel modules nf_tables"),
        (Limit::NoSocketDiagnostics, "connections older than an enrolment", "inet_diag"),
        (Limit::ReadOnlySettings, "not guaranteed", "make its /proc/sys writable"),
        (Limit::NoSysAdmin, "pods can be enrolled", "CAP_SYS_ADMIN"),
    ] {
        limit.set(cluster, OF_PROBES, LIKE_PROBES).await?;
        let checked = json(cluster, &["check", "--probe"]).await;
        lift(cluster, LIKE_PROBES).await?;
        let (code, sections) = checked?;
        let said = sections.to_string();
        // Both nodes are named, together where the system said the same of them.
        assert!(
            ["node n1", "n2", missing, remedy].iter().all(|part| said.contains(part)),
            "{limit:?}: {said}"
        );
        assert_eq!(code, i32::from(missing == "pods can be enrolled"), "{limit:?}: {said}");
    }
    cluster.kubectl().run(&["delete", "namespace", LIKE_PROBES, "--wait"]).await?;
    Ok(())
}

/// The agent serves, and what it can't guarantee is said.
async fn read_only(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    let restart = ["rollout", "restart", "--namespace", mesh::NAMESPACE, "daemonset/ambit-node"];
    Limit::ReadOnlySettings.set(cluster, OF_AGENTS, mesh::NAMESPACE).await?;
    kubectl.run(&restart).await?;
    kubectl.rolled_out(mesh::NAMESPACE, "daemonset/ambit-node", ROLLOUT).await?;
    let named = wait::until("the command names it", SOON, async || {
        let (code, sections) = json(cluster, &["check"]).await?;
        let said = sections.to_string();
        let parts = ["n1", "n2", "tcp_fwmark_accept", "make its /proc/sys writable"];
        if code == 0 && parts.iter().all(|part| said.contains(part)) { Ok(()) } else { Err(said) }
    })
    .await;
    lift(cluster, mesh::NAMESPACE).await?;
    kubectl.run(&restart).await?;
    kubectl.rolled_out(mesh::NAMESPACE, "daemonset/ambit-node", ROLLOUT).await?;
    Ok(named?)
}

/// What containers are kept from.
#[derive(Clone, Copy, Debug)]
enum Limit {
    /// No nfnetlink, as without the module `nf_tables`.
    NoNftables,
    /// No sock_diag, as without the module `inet_diag`.
    NoSocketDiagnostics,
    /// `/proc/sys` stays as container runtimes mount it.
    ReadOnlySettings,
    /// Without the capability.
    NoSysAdmin,
}

impl Limit {
    /// Sets it for pods that are made from now on and for which `of` is true, as of those in `namespace`.
    async fn set(self, cluster: &Cluster, of: &str, namespace: &str) -> Outcome {
        let profile = self.profile();
        for node in ["n1", "n2"] {
            let write = format!(
                "mkdir -p /var/lib/kubelet/seccomp && echo '{profile}' > /var/lib/kubelet/seccomp/{PROFILE}"
            );
            let ran = cluster.run_on(node, &["sh", "-c", &write]).await?;
            assert_eq!(ran.code, 0, "{ran:?}");
        }
        let version = served_version(cluster).await?;
        cluster.kubectl().apply(&admission(&version, of, self.patch())).await?;
        // The API server learns of it a moment later: until then it changes nothing.
        wait::until("pods are limited", SOON, async || match is_limited(cluster, namespace).await {
            Ok(true) => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await?;
        Ok(())
    }

    /// The seccomp profile.
    fn profile(self) -> String {
        const AF_NETLINK: u32 = 16;
        const NETLINK_SOCK_DIAG: u32 = 4;
        const NETLINK_NETFILTER: u32 = 12;
        const EPROTONOSUPPORT: u32 = 93;
        const EPERM: u32 = 1;
        let netlink = |protocol: u32| {
            serde_json::json!([{
                "names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": EPROTONOSUPPORT,
                "args": [
                    { "index": 0, "value": AF_NETLINK, "op": "SCMP_CMP_EQ" },
                    { "index": 2, "value": protocol, "op": "SCMP_CMP_EQ" },
                ],
            }])
        };
        let calls = match self {
            Self::NoNftables => netlink(NETLINK_NETFILTER),
            Self::NoSocketDiagnostics => netlink(NETLINK_SOCK_DIAG),
            Self::ReadOnlySettings => serde_json::json!([{
                "names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": EPERM,
            }]),
            Self::NoSysAdmin => serde_json::json!([]),
        };
        serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": calls,
        })
        .to_string()
    }

    /// The JSON patch of a pod, in CEL.
    fn patch(self) -> &'static str {
        match self {
            Self::NoSysAdmin => {
                "[JSONPatch{op: 'replace', path: '/spec/containers/0/securityContext/capabilities/add', \
                 value: ['NET_ADMIN', 'SYS_PTRACE']}]"
            }
            _ => {
                "[JSONPatch{op: 'add', path: '/spec/containers/0/securityContext/seccompProfile', \
                 value: Object.spec.containers.securityContext.seccompProfile{type: 'Localhost', \
                 localhostProfile: 'ambit-limited.json'}}]"
            }
        }
    }
}

/// The version of MutatingAdmissionPolicies that the API server has.
async fn served_version(cluster: &Cluster) -> ambit_cluster::Result<String> {
    let served = cluster.kubectl().run(&["api-versions"]).await?;
    let newest = ["v1", "v1beta1"]
        .into_iter()
        .find(|version| served.lines().any(|line| line == format!("admissionregistration.k8s.io/{version}")));
    Ok(newest.unwrap_or("v1").to_owned())
}

/// Whether a pod that is made now would be limited.
async fn is_limited(cluster: &Cluster, namespace: &str) -> ambit_cluster::Result<bool> {
    const SPEC: &str = r#"{"spec": {"containers": [{"name": "agent", "image": "none",
        "securityContext": {"capabilities": {"add": ["SYS_ADMIN"]}}}]}}"#;
    let kubectl = cluster.kubectl();
    // It is there already, or is made now.
    kubectl.run(&["create", "namespace", namespace]).await.ok();
    let run = ["run", "limited", "--namespace", namespace, "--image=none", "--overrides", SPEC];
    let made = kubectl.run(&[&run[..], &["--dry-run=server", "--output=json"]].concat()).await?;
    Ok(made.contains(PROFILE) || !made.contains("SYS_ADMIN"))
}

/// Takes the limit of pods like those in `namespace` away.
async fn lift(cluster: &Cluster, namespace: &str) -> Outcome {
    for kind in ["mutatingadmissionpolicybinding", "mutatingadmissionpolicy"] {
        cluster.kubectl().run(&["delete", kind, "limited"]).await?;
    }
    wait::until("pods are not limited", SOON, async || match is_limited(cluster, namespace).await {
        Ok(false) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await?;
    Ok(())
}

/// The finding about a subject.
fn finding<'a>(sections: &'a Value, subject: &str) -> Option<&'a Value> {
    let sections = sections.as_array().into_iter().flatten();
    let mut findings = sections.flat_map(|section| section["findings"].as_array().into_iter().flatten());
    findings.find(|finding| finding["subject"] == subject)
}

fn admission(version: &str, of: &str, patch: &str) -> String {
    format!(
        r#"
apiVersion: admissionregistration.k8s.io/{version}
kind: MutatingAdmissionPolicy
metadata: {{name: limited}}
spec:
  failurePolicy: Fail
  reinvocationPolicy: Never
  matchConstraints:
    resourceRules: [{{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [pods]}}]
  matchConditions:
  - name: limited
    expression: "{of} && object.spec.containers[0].name in ['agent', 'probe']"
  mutations:
  - patchType: JSONPatch
    jsonPatch:
      expression: "{patch}"
---
apiVersion: admissionregistration.k8s.io/{version}
kind: MutatingAdmissionPolicyBinding
metadata: {{name: limited}}
spec: {{policyName: limited}}
"#
    )
}

/// The lease of a node whose clock is in the past, which the API server dates by its own.
const BEHIND: &str = r#"
apiVersion: coordination.k8s.io/v1
kind: Lease
metadata: {name: behind, namespace: kube-node-lease}
spec: {holderIdentity: behind, leaseDurationSeconds: 40, renewTime: "2026-01-01T00:00:00.000000Z"}
"#;
