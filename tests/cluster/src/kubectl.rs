//! `kubectl` and `helm` against a cluster, for tests: objects as JSON, waiting with a deadline.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::wait;

/// How long one call may take.
const CALL: Duration = Duration::from_secs(300);

/// The programs with a cluster's kubeconfig.
#[derive(Debug, Clone)]
pub struct Kubectl {
    bin: PathBuf,
    kubeconfig: PathBuf,
}

impl Kubectl {
    /// Programs of `layout` with the kubeconfig of a cluster.
    #[must_use]
    pub fn new(layout: &Layout, cluster: &str) -> Self {
        Self { bin: layout.bin(), kubeconfig: layout.run(cluster).join("kubeconfig") }
    }

    /// The kubeconfig, which holds everything it needs.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Runs `kubectl` and returns its output.
    ///
    /// # Errors
    /// [`Error::Program`] with its errors when it fails.
    pub async fn run(&self, args: &[&str]) -> Result<String> {
        self.call("kubectl", args, None).await
    }

    /// Runs `helm` and returns its output.
    ///
    /// # Errors
    /// [`Error::Program`] with its errors when it fails.
    pub async fn helm(&self, args: &[&str]) -> Result<String> {
        self.call("helm", args, None).await
    }

    /// Applies manifests, server side.
    ///
    /// # Errors
    /// As for [`Kubectl::run`].
    pub async fn apply(&self, manifests: &str) -> Result<String> {
        let args = ["apply", "--server-side", "--force-conflicts", "--filename", "-"];
        self.call("kubectl", &args, Some(manifests)).await
    }

    /// An object, or a list of them, as JSON. `what` are the arguments after `get`.
    ///
    /// # Errors
    /// As for [`Kubectl::run`]; an absent object is one.
    pub async fn get(&self, what: &[&str]) -> Result<Value> {
        let args = [&["get", "--output", "json"], what].concat();
        let text = self.run(&args).await?;
        serde_json::from_str(&text)
            .map_err(|error| Error::program(format!("kubectl {args:?}"), error.to_string()))
    }

    /// The objects of a list.
    ///
    /// # Errors
    /// As for [`Kubectl::get`].
    pub async fn list(&self, what: &[&str]) -> Result<Vec<Value>> {
        let mut list = self.get(what).await?;
        match list["items"].take() {
            Value::Array(items) => Ok(items),
            _ => Ok(vec![list]),
        }
    }

    /// Waits until `met` accepts an object, and returns it.
    ///
    /// # Errors
    /// [`Error::Deadline`] with what the object was last.
    pub async fn wait_for(
        &self,
        limit: Duration,
        what: &[&str],
        met: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        wait::until(&format!("get {}", what.join(" ")), limit, async || match self.get(what).await {
            Ok(object) if met(&object) => Ok(object),
            Ok(object) => Err(object["status"].to_string()),
            Err(error) => Err(error.to_string()),
        })
        .await
    }

    /// Waits until a Deployment or DaemonSet (`deployment/NAME`) has rolled out.
    ///
    /// # Errors
    /// [`Error::Deadline`] or [`Error::Program`] when it does not.
    pub async fn rolled_out(&self, namespace: &str, what: &str, limit: Duration) -> Result<()> {
        let timeout = format!("--timeout={}s", limit.as_secs());
        self.run(&["rollout", "status", "--namespace", namespace, what, &timeout]).await.map(drop)
    }

    /// Runs a command in a pod, `POD` or `deployment/NAME`, and returns its output.
    ///
    /// # Errors
    /// As for [`Kubectl::run`].
    pub async fn exec(&self, namespace: &str, pod: &str, command: &[&str]) -> Result<String> {
        let args = [&["exec", "--namespace", namespace, pod, "--"], command].concat();
        self.run(&args).await
    }

    /// A program with arguments, to be started by the caller; it ends with its handle.
    #[must_use]
    pub fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.args(args).env("KUBECONFIG", &self.kubeconfig).kill_on_drop(true);
        command
    }

    async fn call(&self, program: &str, args: &[&str], input: Option<&str>) -> Result<String> {
        let name = format!("{program} {}", args.join(" "));
        let fault = |message: String| Error::program(name.clone(), message);
        let mut command = self.command(program, args);
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| fault(error.to_string()))?;
        if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
            stdin.write_all(text.as_bytes()).await.map_err(|error| fault(error.to_string()))?;
        }
        let ended = tokio::time::timeout(CALL, child.wait_with_output()).await;
        let output = ended.map_err(|_| fault(format!("still runs after {CALL:?}")))?;
        let output = output.map_err(|error| fault(error.to_string()))?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            let said = [output.stdout, output.stderr].concat();
            Err(fault(format!("{}: {}", output.status, String::from_utf8_lossy(&said).trim())))
        }
    }
}
