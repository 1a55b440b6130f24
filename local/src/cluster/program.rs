//! The mesh's own programs as children: `ambit-control` and the `ztunnel`s, which tests kill, pause and restart.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ::http::{Method, StatusCode};
use nix::sys::signal::Signal;
use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::http::{self, Stream};
use crate::metrics::Metrics;
use crate::process::{Command, Process};
use crate::sandbox::Sandbox;

/// How often readiness is asked.
const POLL: Duration = Duration::from_millis(20);
/// How long a program gets to become ready, and to end after SIGTERM.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Where a program listens, inside its sandbox.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Listeners {
    /// `/healthz/ready`.
    pub(crate) readiness: SocketAddr,
    /// `/metrics`.
    pub(crate) metrics: SocketAddr,
    /// `/config_dump` and the rest.
    pub(crate) admin: Option<SocketAddr>,
}

/// A program that can be ended and started again. Cheap to clone; it ends when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Program {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    sandbox: Sandbox,
    command: Command,
    listeners: Listeners,
    current: Mutex<Option<Process>>,
    ends: Mutex<Ends>,
}

/// The ends after which it was started again.
#[derive(Debug, Clone, Default)]
struct Ends {
    count: u32,
    last: String,
}

impl Program {
    /// A program that is not started yet.
    pub(crate) fn new(name: String, sandbox: Sandbox, command: Command, listeners: Listeners) -> Self {
        Self {
            inner: Arc::new(Inner {
                name,
                sandbox,
                command,
                listeners,
                current: Mutex::new(None),
                ends: Mutex::default(),
            }),
        }
    }

    fn current(&self) -> Result<Process> {
        let current = self.inner.current.lock().clone();
        current.ok_or_else(|| Error::Unknown(format!("process of {}", self.inner.name)))
    }

    /// Starts it, if it does not run. Does not wait until it is ready.
    ///
    /// # Errors
    /// When it can't be executed.
    pub async fn start(&self) -> Result<()> {
        if self.is_running() {
            return Ok(());
        }
        let Inner { name, sandbox, command, .. } = &*self.inner;
        let process = Process::start(name.as_str(), sandbox, command.clone()).await?;
        *self.inner.current.lock() = Some(process);
        Ok(())
    }

    /// Starts it again after it ended by itself, and remembers how it ended.
    ///
    /// # Errors
    /// When it can't be executed.
    pub(crate) async fn start_again(&self) -> Result<()> {
        if let Some(end) = self.describe_end() {
            let mut ends = self.inner.ends.lock();
            *ends = Ends { count: ends.count + 1, last: end };
        }
        self.start().await
    }

    /// How the present process ended, with its last line.
    fn describe_end(&self) -> Option<String> {
        let current = self.inner.current.lock();
        let process = current.as_ref()?;
        let status = process.exit_status()?;
        let line = process.last_line().unwrap_or_default();
        Some(format!("{status}: {line}"))
    }

    /// That it has ended, or ended and was started again; `None` when it has run since it was first started.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        let name = &self.inner.name;
        if let Some(end) = self.describe_end() {
            return Some(format!("{name} has ended ({end})"));
        }
        let ends = self.inner.ends.lock();
        match ends.count {
            0 => None,
            1 => Some(format!("{name} ended and was restarted ({})", ends.last)),
            count => Some(format!("{name} ended and was restarted {count} times (last {})", ends.last)),
        }
    }

    /// Whether both handles lead to one program.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Whether it runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.inner.current.lock().as_ref().is_some_and(Process::is_running)
    }

    /// Its process id, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.inner.current.lock().as_ref().filter(|process| process.is_running()).map(Process::pid)
    }

    /// SIGKILL; returns when it is gone.
    ///
    /// # Errors
    /// When it was never started.
    pub async fn kill(&self) -> Result<()> {
        self.current()?.kill().await.map(drop)
    }

    /// SIGTERM, without waiting: a node proxy drains first.
    ///
    /// # Errors
    /// When it was never started.
    pub async fn terminate(&self) -> Result<()> {
        self.current()?.signal(Signal::SIGTERM).await;
        Ok(())
    }

    /// Waits until it has ended, and says with which exit code (a signal counts as `None`).
    ///
    /// # Errors
    /// [`Error::Deadline`] when it still runs after `limit`.
    pub async fn wait_ended(&self, limit: Duration) -> Result<Option<i32>> {
        Ok(self.current()?.wait_within(limit).await?.code())
    }

    /// SIGSTOP: it keeps everything and does nothing.
    ///
    /// # Errors
    /// When it was never started.
    pub async fn pause(&self) -> Result<()> {
        self.current()?.signal(Signal::SIGSTOP).await;
        Ok(())
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// When it was never started.
    pub async fn resume(&self) -> Result<()> {
        self.current()?.signal(Signal::SIGCONT).await;
        Ok(())
    }

    /// SIGTERM, at most 20 s for its end, then a new start and the wait until it is ready.
    ///
    /// # Errors
    /// When the new one can't be started or does not become ready.
    pub async fn restart(&self) -> Result<()> {
        self.current()?.terminate(PATIENCE).await?;
        self.start().await?;
        self.wait_ready().await
    }

    /// Waits until its readiness endpoint says 200.
    ///
    /// # Errors
    /// [`Error::Program`] when it ends instead, [`Error::Deadline`] after 20 s.
    pub async fn wait_ready(&self) -> Result<()> {
        let Inner { name, sandbox, listeners, .. } = &*self.inner;
        let process = self.current()?;
        let asking = async {
            loop {
                let answer = http::request(sandbox, listeners.readiness, Method::GET, "/healthz/ready").await;
                if answer.is_ok_and(|(status, _)| status == StatusCode::OK) {
                    return Ok(());
                }
                if let Some(status) = process.exit_status() {
                    let last = process.logs();
                    let tail = last.get(last.len().saturating_sub(8)..).unwrap_or_default().join(" | ");
                    return Err(Error::program(name.as_str(), format!("it ended ({status}): {tail}")));
                }
                tokio::time::sleep(POLL).await;
            }
        };
        tokio::time::timeout(PATIENCE, asking).await.map_err(|_| Error::Deadline {
            what: format!("readiness of {name}"),
            after: PATIENCE,
            detail: process.last_line(),
        })?
    }

    /// One scrape of its metrics.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn metrics(&self) -> Result<Metrics> {
        let (_, text) = self.ask(self.inner.listeners.metrics, Method::GET, "/metrics").await?;
        Ok(Metrics::parse(&String::from_utf8_lossy(&text)))
    }

    /// A request to its admin server, as in `admin("POST", "/drain_listeners")`; returns status and text.
    ///
    /// # Errors
    /// When it has no admin server or does not answer.
    pub async fn admin(&self, method: &str, path: &str) -> Result<(u16, String)> {
        let name = &self.inner.name;
        let admin =
            self.inner.listeners.admin.ok_or_else(|| Error::Unknown(format!("admin server of {name}")))?;
        let method = Method::from_bytes(method.as_bytes())
            .map_err(|_| Error::Unknown(format!("HTTP method {method}")))?;
        let (status, text) = self.ask(admin, method, path).await?;
        Ok((status.as_u16(), String::from_utf8_lossy(&text).into_owned()))
    }

    /// A `GET` of its admin server whose answer goes on; returns status and answer.
    ///
    /// # Errors
    /// When it has no admin server or does not answer.
    pub async fn admin_stream(&self, path: &str) -> Result<(u16, Stream)> {
        let name = &self.inner.name;
        let admin =
            self.inner.listeners.admin.ok_or_else(|| Error::Unknown(format!("admin server of {name}")))?;
        let (status, stream) = http::stream(&self.inner.sandbox, admin, path).await?;
        Ok((status.as_u16(), stream))
    }

    /// Its configuration dump.
    ///
    /// # Errors
    /// When it does not answer, or not with JSON.
    pub async fn config_dump(&self) -> Result<serde_json::Value> {
        let (_, text) = self.admin("GET", "/config_dump").await?;
        serde_json::from_str(&text).map_err(|error| {
            Error::program(self.inner.name.as_str(), format!("its configuration dump is no JSON: {error}"))
        })
    }

    async fn ask(&self, at: SocketAddr, method: Method, path: &str) -> Result<(StatusCode, bytes::Bytes)> {
        http::request(&self.inner.sandbox, at, method, path).await
    }

    /// The last lines of its output.
    #[must_use]
    pub fn logs(&self) -> Vec<String> {
        self.inner.current.lock().as_ref().map(Process::logs).unwrap_or_default()
    }

    /// How it ended, if it was started and has ended.
    #[must_use]
    pub fn end(&self) -> Option<std::process::ExitStatus> {
        self.inner.current.lock().as_ref().and_then(Process::exit_status)
    }
}
