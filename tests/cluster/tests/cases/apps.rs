//! Workloads of the cases: a server and a client, each on the node that a case chooses.

use std::time::Duration;

use ambit_cluster::{Cluster, Result, wait};

/// What every request asks for: found in a capture, it was sent in the clear.
pub(crate) const MARKER: &str = "seen-in-the-clear";
/// How long pods may take to come up on a busy machine.
pub(crate) const ROLLOUT: Duration = Duration::from_secs(120);

/// A namespace with a server on one node and a client on another.
pub(crate) struct Apps {
    pub(crate) namespace: &'static str,
}

impl Apps {
    /// Makes the namespace with its pods and waits until the client reaches the server.
    pub(crate) async fn start(
        cluster: &Cluster,
        namespace: &'static str,
        (client, server): (&str, &str),
    ) -> Result<Self> {
        let kubectl = cluster.kubectl();
        kubectl.apply(&manifests(namespace, client, server)).await?;
        for what in ["deployment/server", "deployment/client"] {
            kubectl.rolled_out(namespace, what, ROLLOUT).await?;
        }
        let this = Self { namespace };
        // A service refuses connections until kube-proxy has heard of its endpoints.
        wait::until("the service has endpoints", ROLLOUT, async || {
            this.request(cluster).await.map_err(|error| error.to_string())
        })
        .await?;
        Ok(this)
    }

    /// One request from the client to the server's service; the answer holds [`MARKER`] and the client's address.
    pub(crate) async fn request(&self, cluster: &Cluster) -> Result<String> {
        let url = format!("http://server/{MARKER}");
        let command = ["/app", "get", &url];
        cluster.kubectl().exec(self.namespace, "deployment/client", &command).await
    }

    /// Removes the namespace and waits until it is gone.
    pub(crate) async fn stop(self, cluster: &Cluster) -> Result<()> {
        let args = ["delete", "namespace", self.namespace, "--wait"];
        cluster.kubectl().run(&args).await.map(drop)
    }
}

fn manifests(namespace: &str, client: &str, server: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Namespace
metadata: {{name: {namespace}}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: client, namespace: {namespace}}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: server, namespace: {namespace}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: server, namespace: {namespace}}}
spec:
  selector: {{matchLabels: {{app: server}}}}
  template:
    metadata: {{labels: {{app: server}}}}
    spec:
      serviceAccountName: server
      nodeName: {server}
      terminationGracePeriodSeconds: 1
      containers:
      - name: server
        image: local/app:1
        imagePullPolicy: IfNotPresent
        args: [serve]
        readinessProbe: {{httpGet: {{path: /ready, port: 8080}}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {{name: server, namespace: {namespace}}}
spec: {{selector: {{app: server}}, ports: [{{port: 80, targetPort: 8080}}]}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: client, namespace: {namespace}}}
spec:
  selector: {{matchLabels: {{app: client}}}}
  template:
    metadata: {{labels: {{app: client}}}}
    spec:
      serviceAccountName: client
      nodeName: {client}
      terminationGracePeriodSeconds: 1
      containers:
      - {{name: client, image: "local/app:1", imagePullPolicy: IfNotPresent, args: [wait]}}
"#
    )
}
