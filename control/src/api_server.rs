//! The client of a Kubernetes API server: how it is found, how long a call may take, what its errors mean.
//!
//! Used by the Kubernetes source, by what writes, by token reviews and by the certificate authority's Secrets.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::config::{InferConfigError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};

/// Name under which this program's writes are recorded (`metadata.managedFields`).
pub const FIELD_MANAGER: &str = "ambit-control";
/// How long one call may take; a watch has limits of its own.
const CALL: Duration = Duration::from_secs(10);
/// How long a connection may take to come up.
const CONNECT: Duration = Duration::from_secs(5);

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The program runs in no pod, and no kubeconfig is to be found.
    #[error("no API server is known: neither the service account of a pod nor a kubeconfig can be used")]
    Unknown(#[from] InferConfigError),
    /// The kubeconfig cannot be used.
    #[error("kubeconfig {path}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: KubeconfigError,
    },
    /// The client cannot be made of its configuration.
    #[error("the client of the API server cannot be made")]
    Client(#[source] kube::Error),
}

/// Makes the client for a kubeconfig, or for the service account of the pod that this program runs in. Nothing is sent yet.
///
/// # Errors
/// [`ConnectError`] when the configuration cannot be used.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client, ConnectError> {
    let mut config = match kubeconfig {
        None => Config::infer().await?,
        Some(path) => {
            let unusable = |source| ConnectError::Kubeconfig { path: path.to_owned(), source };
            let file = Kubeconfig::read_from(path).map_err(unusable)?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(unusable)?
        }
    };
    config.connect_timeout = Some(CONNECT);
    Client::try_from(config).map_err(ConnectError::Client)
}

/// Why a call to the API server failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The server or the connection to it said so.
    #[error("{}", describe(.0))]
    Failed(#[from] kube::Error),
    /// No answer came in time.
    #[error("no answer within {CALL:?}")]
    TimedOut,
}

impl CallError {
    /// The HTTP status that the server answered with.
    pub fn code(&self) -> Option<u16> {
        match self {
            CallError::Failed(error) => code(error),
            CallError::TimedOut => None,
        }
    }

    /// Whether the server did not decide: it is away, starting, or overloaded.
    pub fn is_unavailable(&self) -> bool {
        self.code().is_none_or(|code| code == 429 || code >= 500)
    }

    /// Whether the object is not there.
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }

    /// Whether somebody else wrote first.
    pub fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }
}

/// Waits for a call as long as one may take.
///
/// # Errors
/// [`CallError`], also when the call takes too long.
pub async fn call<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, CallError> {
    match tokio::time::timeout(CALL, call).await {
        Ok(outcome) => Ok(outcome?),
        Err(_) => Err(CallError::TimedOut),
    }
}

/// The HTTP status that the server answered with.
pub fn code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// The error with its causes, which the connection's errors keep to themselves; the server's own word where it has one.
pub fn describe(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error {
        return format!("{} ({})", status.message, status.code);
    }
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        cause = error.source();
    }
    text
}

/// Pauses between attempts: twice as long each time, up to a limit, and different in each replica.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(10);

    /// The next pause; it grows with every call.
    pub fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(Self::LONGEST);
        pause.mul_f64(rand::random_range(0.7..1.3))
    }

    /// After a success the next pause is a short one again.
    pub fn reset(&mut self) {
        self.next = Self::FIRST;
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: Self::FIRST }
    }
}
