//! What a local cluster honours of a pod's specification: volumes, environments, init containers and sidecars.
//!
//! These tests make network and mount namespaces, so they need root.

#![allow(clippy::expect_used, reason = "a test says what it needs and fails without it")]

use std::time::Duration;

use ambit_local::{Cluster, Pod};

const LIMIT: Duration = Duration::from_secs(15);

async fn run(manifests: &str) -> (Cluster, Pod) {
    let cluster = Cluster::builder().mesh(false).start().await.expect("a cluster needs root and starts");
    cluster.apply(manifests).await.expect("sound manifests");
    let pod = cluster.find_pod("shop", "app").expect("the pod is made");
    (cluster, pod)
}

async fn wait(cluster: &Cluster, pod: &Pod, what: &str, holds: impl Fn(&Pod) -> bool) {
    let waited = cluster.wait_until(what, LIMIT, async || holds(pod)).await;
    if let Err(error) = waited {
        panic!("{error}; it is {}; logs: {:?}", pod.view().summary(), pod.logs());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_are_mounted_where_the_machine_has_no_directory() {
    let (cluster, pod) = run(r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: shop}
data: {greeting: hello}
---
apiVersion: v1
kind: Secret
metadata: {name: key, namespace: shop}
stringData: {token: s3cret}
---
apiVersion: v1
kind: Pod
metadata: {name: app, namespace: shop}
spec:
  volumes:
  - {name: shared, emptyDir: {}}
  - {name: settings, configMap: {name: settings}}
  initContainers:
  - name: fill
    command: [/bin/sh, -c, "cat /ambit-test-settings/greeting > /ambit-test-data/out"]
    volumeMounts:
    - {name: shared, mountPath: /ambit-test-data}
    - {name: settings, mountPath: /ambit-test-settings, readOnly: true}
  containers:
  - name: main
    command: [/bin/sh, -c, "echo read $(cat /ambit-test-data/out) $TOKEN $CM_greeting; touch /ambit-test-settings/x || echo read-only; exec sleep 1000"]
    env: [{name: TOKEN, valueFrom: {secretKeyRef: {name: key, key: token}}}]
    envFrom: [{prefix: CM_, configMapRef: {name: settings}}]
    volumeMounts:
    - {name: shared, mountPath: /ambit-test-data}
"#)
    .await;
    wait(&cluster, &pod, "its output", |pod| pod.logs().contains(&"read-only".to_owned())).await;
    assert!(pod.logs().contains(&"read hello s3cret hello".to_owned()), "{:?}", pod.logs());
    assert!(!std::path::Path::new("/ambit-test-data").exists(), "the machine's own root is untouched");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_waits_for_the_object_that_it_refers_to() {
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: app, namespace: shop}\nspec: {containers: [{name: c, command: [/bin/sh, -c, 'echo have $V; exec sleep 1000'], env: [{name: V, valueFrom: {configMapKeyRef: {name: late, key: k}}}]}]}\n";
    let (cluster, pod) = run(pod).await;
    wait(&cluster, &pod, "the reason", |pod| pod.view().summary().contains("no key k in ConfigMap late"))
        .await;
    let late = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: late, namespace: shop}\ndata: {k: it}\n";
    cluster.apply(late).await.expect("a sound manifest");
    wait(&cluster, &pod, "readiness", Pod::is_ready).await;
    assert!(pod.logs().contains(&"have it".to_owned()), "{:?}", pod.logs());
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_starts_before_the_containers_and_ends_after_them() {
    let (cluster, pod) = run(r#"
apiVersion: v1
kind: Pod
metadata: {name: app, namespace: shop}
spec:
  terminationGracePeriodSeconds: 5
  volumes: [{name: log, emptyDir: {}}]
  initContainers:
  - name: side
    restartPolicy: Always
    command: [/bin/sh, -c, "trap 'echo side ends; cat /ambit-test-log/order; exit 0' TERM; touch /ambit-test-log/up; while :; do sleep 0.05; done"]
    startupProbe: {exec: {command: [/bin/sh, -c, "test -e /ambit-test-log/up"]}, periodSeconds: 1}
    volumeMounts: [{name: log, mountPath: /ambit-test-log}]
  containers:
  - name: main
    command: [/bin/sh, -c, "trap 'echo main ended > /ambit-test-log/order; exit 0' TERM; test -e /ambit-test-log/up && echo side is up; while :; do sleep 0.05; done"]
    volumeMounts: [{name: log, mountPath: /ambit-test-log}]
"#)
    .await;
    wait(&cluster, &pod, "readiness", Pod::is_ready).await;
    wait(&cluster, &pod, "its output", |pod| pod.logs().contains(&"side is up".to_owned())).await;
    let side = pod.process(1).expect("the sidecar counts after the containers");
    cluster.delete("Pod", "shop", "app").await.expect("the pod is known");
    let line = side.wait_for_line(LIMIT, |line| line == "main ended").await;
    line.expect("the sidecar ends after the main container");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_init_container_says_why() {
    let spec = |restart: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: app, namespace: shop}}\nspec: {{restartPolicy: {restart}, initContainers: [{{name: migrate, command: [/bin/sh, -c, 'echo no database; exit 3']}}], containers: [{{name: c, command: [/bin/true]}}]}}\n"
        )
    };
    let (cluster, pod) = run(&spec("Always")).await;
    wait(&cluster, &pod, "the reason", |pod| {
        pod.view().summary() == "Init:CrashLoopBackOff: exit code 3: no database"
    })
    .await;
    cluster.shutdown().await;
    let (cluster, pod) = run(&spec("Never")).await;
    wait(&cluster, &pod, "the reason", |pod| {
        pod.view().summary() == "Failed: init container migrate failed (exit code 3: no database)"
    })
    .await;
    cluster.shutdown().await;
}
