//! The node agent and the CNI plugin under real kubelets. There is no control plane: node proxies hold pods without
//! certificates, so probes pass and everything else is refused.
//!
//! The cases run in their order: each begins where the one before ended.

use std::path::PathBuf;
use std::time::Duration;

use ambit_cluster::image::{self, Image};
use ambit_cluster::{Cluster, layout};
use serde_json::Value;

use super::apps::ROLLOUT;
use super::{Cases, Outcome, Stage};

/// The namespace of these cases.
pub(crate) const NAMESPACE: &str = "enrolled";
const SYSTEM: &str = "ambit-system";
/// How long a change of labels may take to reach every pod of a busy machine.
const SOON: Duration = Duration::from_secs(240);
/// Pods that start at once, on two nodes.
const MANY: usize = 100;

const APP: &str = r#"
apiVersion: v1
kind: Namespace
metadata: { name: enrolled }
---
apiVersion: apps/v1
kind: Deployment
metadata: { name: app, namespace: enrolled }
spec:
  replicas: 4
  selector: { matchLabels: { app: app } }
  template:
    metadata: { labels: { app: app } }
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: app
          image: local/app:1
          imagePullPolicy: IfNotPresent
          args: [serve]
          readinessProbe: { httpGet: { path: /, port: 8080 }, periodSeconds: 1, timeoutSeconds: 5 }
"#;

pub(crate) fn add(cases: &mut Cases) {
    cases.add_to(Stage::Agent, "running_pods_are_enrolled_by_a_label", label);
    cases.add_to(Stage::Agent, "pods_that_lose_the_label_have_no_rules", unlabel);
    cases.add_to(Stage::Agent, "without_an_agent_new_pods_of_the_mesh_wait", no_agent);
    cases.add_to(Stage::Agent, "a_hundred_pods_that_start_at_once_are_enrolled", many);
    cases.add_to(Stage::Agent, "pods_of_a_booted_node_are_enrolled", boot);
    cases.add_to(Stage::Agent, "the_taint_goes_once_a_node_can_enrol_pods", taint);
    cases.add_to(Stage::Agent, "uninstalling_leaves_nothing_on_a_node", uninstall);
}

async fn install(cluster: &Cluster) -> Outcome {
    let archives = [("node", &["ambit-node", "ambit-cni"][..]), ("ztunnel", &["ztunnel"])]
        .into_iter()
        .map(|(name, programs)| build(cluster, name, programs))
        .collect::<Result<Vec<_>, _>>()?;
    cluster.load_archives(archives).await?;
    let chart = cluster.layout().repository().join("charts/ambit").display().to_string();
    let values = [
        "control.autoscaling.enabled=false",
        "control.replicas=1",
        "ztunnel.terminationGracePeriodSeconds=6",
    ];
    let mut args = vec!["upgrade", "--install", "ambit", &chart, "--namespace", SYSTEM, "--create-namespace"];
    args.extend(values.iter().flat_map(|value| ["--set", value]));
    let kubectl = cluster.kubectl();
    kubectl.helm(&args).await?;
    kubectl.run(&["scale", "--namespace", SYSTEM, "deployment/ambit-control", "--replicas=0"]).await?;
    // The control plane would write it.
    let authority = rcgen::generate_simple_self_signed(["nobody".to_owned()])?.cert.pem();
    let indented = authority.lines().map(|line| format!("    {line}\n")).collect::<String>();
    let roots = format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{ name: istio-ca-root-cert, namespace: {SYSTEM} }}\n\
         data:\n  root-cert.pem: |\n{indented}"
    );
    kubectl.apply(&roots).await?;
    kubectl.rolled_out(SYSTEM, "daemonset/ambit-node", ROLLOUT).await?;
    Ok(())
}

fn build(cluster: &Cluster, name: &str, programs: &[&str]) -> Result<PathBuf, Box<dyn std::error::Error>> {
    let layout = cluster.layout();
    let context = layout.images().join(format!("context-{name}"));
    std::fs::create_dir_all(&context)?;
    let mut files = Vec::new();
    for program in programs {
        let built = layout::built()?.join(program);
        std::fs::copy(&built, context.join(program))?;
        files.push(built);
    }
    let image = Image {
        name: format!("ambit/{name}:0.1.0"),
        dockerfile: layout.repository().join(format!("images/{name}.Dockerfile")),
        context,
        files,
    };
    Ok(image::build(layout, &image)?)
}

/// Waits until there are `count` pods, all ready and annotated with `redirection`.
async fn settle(cluster: &Cluster, count: usize, redirection: Option<&str>) -> Outcome {
    let pods = ["pods", "--namespace", NAMESPACE, "--selector", "app=app"];
    let is_settled = |pod: &Value| {
        let annotation = pod["metadata"]["annotations"]["ambient.istio.io/redirection"].as_str();
        let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let is_ready = conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True");
        is_ready && annotation == redirection && pod["metadata"]["deletionTimestamp"].is_null()
    };
    let all = |list: &Value| {
        list["items"].as_array().is_some_and(|pods| pods.len() == count && pods.iter().all(is_settled))
    };
    cluster.kubectl().wait_for(ROLLOUT, &pods, all).await?;
    Ok(())
}

async fn set_label(cluster: &Cluster, label: &str) -> Outcome {
    cluster.kubectl().run(&["label", "--overwrite", "namespace", NAMESPACE, label]).await?;
    Ok(())
}

async fn scale(cluster: &Cluster, count: usize) -> Outcome {
    let replicas = format!("--replicas={count}");
    cluster.kubectl().run(&["scale", "--namespace", NAMESPACE, "deployment/app", &replicas]).await?;
    Ok(())
}

/// The number of pods' network namespaces with our rules.
async fn namespaces_with_rules(cluster: &Cluster) -> Result<usize, Box<dyn std::error::Error>> {
    const COUNT: &str = "for netns in /run/netns/cni-*; do nsenter --net=$netns nft list tables; done";
    let mut count = 0;
    for node in ["n1", "n2"] {
        let listed = cluster.run_on(node, &["sh", "-c", COUNT]).await?;
        count += listed.output.lines().filter(|line| *line == "table inet ambit").count();
    }
    Ok(count)
}

async fn label(cluster: &Cluster) -> Outcome {
    install(cluster).await?;
    cluster.kubectl().apply(APP).await?;
    settle(cluster, 4, None).await?;
    assert_eq!(namespaces_with_rules(cluster).await?, 0);
    set_label(cluster, "istio.io/dataplane-mode=ambient").await?;
    settle(cluster, 4, Some("enabled")).await?;
    assert_eq!(namespaces_with_rules(cluster).await?, 4);
    Ok(())
}

async fn unlabel(cluster: &Cluster) -> Outcome {
    set_label(cluster, "istio.io/dataplane-mode-").await?;
    settle(cluster, 4, None).await?;
    ambit_cluster::wait::until("no pod has rules", SOON, async || {
        match namespaces_with_rules(cluster).await {
            Ok(0) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await?;
    set_label(cluster, "istio.io/dataplane-mode=ambient").await?;
    settle(cluster, 4, Some("enabled")).await
}

async fn no_agent(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    let select = |selector: &str| {
        format!(r#"{{"spec":{{"template":{{"spec":{{"nodeSelector":{{"ambit.dev/none":{selector}}}}}}}}}}}"#)
    };
    let patch = async |selector: &str| {
        let patch = select(selector);
        kubectl.run(&["patch", "--namespace", SYSTEM, "daemonset/ambit-node", "--patch", &patch]).await
    };
    patch("\"x\"").await?;
    let agents = ["pods", "--namespace", SYSTEM, "--selector", "app.kubernetes.io/name=ambit-node"];
    kubectl.wait_for(SOON, &agents, |list| list["items"].as_array().is_some_and(Vec::is_empty)).await?;
    scale(cluster, 6).await?;
    let refused = ["events", "--namespace", NAMESPACE, "--field-selector", "reason=FailedCreatePodSandBox"];
    let by_plugin = |list: &Value| list.to_string().contains("the node agent is not there");
    kubectl.wait_for(SOON, &refused, by_plugin).await?;
    // A pod of an excluded namespace starts meanwhile, as those of Ambit must.
    let run = ["run", "waiter", "--namespace", "kube-system", "--image", "local/app:1"];
    kubectl.run(&[&run[..], &["--image-pull-policy=IfNotPresent", "--", "wait"]].concat()).await?;
    let waiter = ["pod", "waiter", "--namespace", "kube-system"];
    kubectl.wait_for(SOON, &waiter, |pod| pod["status"]["phase"] == "Running").await?;
    kubectl.run(&["delete", "pod", "waiter", "--namespace", "kube-system", "--now"]).await?;
    patch("null").await?;
    settle(cluster, 6, Some("enabled")).await
}

async fn many(cluster: &Cluster) -> Outcome {
    scale(cluster, MANY).await?;
    settle(cluster, MANY, Some("enabled")).await?;
    scale(cluster, 4).await?;
    settle(cluster, 4, Some("enabled")).await
}

async fn boot(cluster: &Cluster) -> Outcome {
    cluster.crash("n2").await?;
    cluster.boot("n2").await?;
    let agents = ["pods", "--namespace", SYSTEM, "--field-selector", "spec.nodeName=n2"];
    let restarted = |list: &Value| {
        let pods = list["items"].as_array().cloned().unwrap_or_default();
        let restarts = |pod: &Value| pod["status"]["containerStatuses"][0]["restartCount"].as_u64();
        !pods.is_empty() && pods.iter().all(|pod| restarts(pod) >= Some(1))
    };
    cluster.kubectl().wait_for(ROLLOUT, &agents, restarted).await?;
    let apps = ["pods", "--namespace", NAMESPACE, "--field-selector", "spec.nodeName=n2"];
    cluster.kubectl().wait_for(ROLLOUT, &apps, restarted).await?;
    settle(cluster, 4, Some("enabled")).await?;
    assert_eq!(namespaces_with_rules(cluster).await?, 4);
    Ok(())
}

async fn taint(cluster: &Cluster) -> Outcome {
    const TAINT: &str = "ambit.dev/not-ready";
    let kubectl = cluster.kubectl();
    kubectl.run(&["taint", "node", "n1", &format!("{TAINT}=:NoSchedule"), "other=:PreferNoSchedule"]).await?;
    kubectl.run(&["rollout", "restart", "--namespace", SYSTEM, "daemonset/ambit-node"]).await?;
    let only_other = |node: &Value| {
        let taints = node["spec"]["taints"].to_string();
        taints.contains("other") && !taints.contains(TAINT)
    };
    kubectl.wait_for(ROLLOUT, &["node", "n1"], only_other).await?;
    kubectl.run(&["taint", "node", "n1", "other-"]).await?;
    kubectl.rolled_out(SYSTEM, "daemonset/ambit-node", ROLLOUT).await?;
    settle(cluster, 4, Some("enabled")).await
}

async fn uninstall(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    let chart = cluster.layout().repository().join("charts/ambit").display().to_string();
    let upgrade = ["upgrade", "ambit", &chart, "--namespace", SYSTEM, "--reuse-values"];
    kubectl.helm(&[&upgrade[..], &["--set", "node.uninstall=true"]].concat()).await?;
    kubectl.rolled_out(SYSTEM, "daemonset/ambit-node", ROLLOUT).await?;
    settle(cluster, 4, None).await?;
    assert_eq!(namespaces_with_rules(cluster).await?, 0);
    const LEFT: &str = "nft list tables | grep ambit; grep -l ambit-cni /etc/cni/net.d/*; \
                        find /opt/cni/bin/ambit-cni /var/run/ambit /var/run/ztunnel -type f -o -type s 2>/dev/null";
    for node in ["n1", "n2"] {
        let left = cluster.run_on(node, &["sh", "-c", LEFT]).await?;
        assert_eq!(left.output, "", "left on {node}");
    }
    kubectl.helm(&["uninstall", "ambit", "--namespace", SYSTEM, "--wait"]).await?;
    kubectl.run(&["delete", "namespace", NAMESPACE, SYSTEM, "--wait"]).await?;
    Ok(())
}
