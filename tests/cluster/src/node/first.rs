//! A node's first process: starts `containerd`, kubelet and kube-proxy, starts each again when it ends, and reaps.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use super::{Config, files, mounts};
use crate::error::{Error, Result};
use crate::programs::output_of;

/// How long `containerd` may take to answer.
const START: Duration = Duration::from_secs(60);
/// How often ended processes are reaped.
const TICK: Duration = Duration::from_millis(50);
/// Pause before a program is started again.
const AGAIN: Duration = Duration::from_secs(1);

/// Runs the node until it is killed.
pub(super) fn run(config: &Config) -> Result<ExitCode> {
    mounts::prepare(config)?;
    std::fs::write("/proc/sys/kernel/hostname", &config.name)
        .map_err(Error::system("set a node's host name"))?;
    files::write(config)?;
    let mut services = Services::default();
    services.start(config, "containerd")?;
    import_images(config)?;
    services.start(config, "kubelet")?;
    services.start(config, "kube-proxy")?;
    loop {
        services.reap_and_restart(config)?;
        thread::sleep(TICK);
    }
}

/// The programs that are to run.
#[derive(Debug, Default)]
struct Services {
    running: BTreeMap<i32, &'static str>,
    ended: BTreeMap<&'static str, Instant>,
}

impl Services {
    fn start(&mut self, config: &Config, name: &'static str) -> Result<()> {
        let log = config.log.join(format!("{}.{name}", config.name));
        let attempt = format!("start {name} of node {}", config.name);
        let file = OpenOptions::new().create(true).append(true).open(log);
        let file = file.map_err(Error::system(attempt.clone()))?;
        let (program, args) = command(config, name);
        let mut command = Command::new(program);
        command.args(args).stdin(std::process::Stdio::null());
        command.stderr(file.try_clone().map_err(Error::system(attempt.clone()))?).stdout(file);
        let child = command.spawn().map_err(Error::system(attempt))?;
        if let Ok(pid) = i32::try_from(child.id()) {
            self.running.insert(pid, name);
        }
        Ok(())
    }

    /// Containers whose parents ended are children of this process.
    fn reap_and_restart(&mut self, config: &Config) -> Result<()> {
        loop {
            match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Ok(status) => match status.pid() {
                    Some(pid) => {
                        if let Some(name) = self.running.remove(&pid.as_raw()) {
                            self.ended.insert(name, Instant::now());
                        }
                    }
                    None => break,
                },
                Err(Errno::EINTR) => {}
                Err(_) => break,
            }
        }
        let due: Vec<_> =
            self.ended.iter().filter(|(_, at)| at.elapsed() >= AGAIN).map(|(name, _)| *name).collect();
        for name in due {
            self.ended.remove(name);
            self.start(config, name)?;
        }
        Ok(())
    }
}

fn command(config: &Config, name: &str) -> (PathBuf, Vec<String>) {
    let file = |name: &str| config.directory.join(name).display().to_string();
    match name {
        "containerd" => {
            (PathBuf::from("/usr/bin/containerd"), vec!["--config".to_owned(), file("containerd.toml")])
        }
        "kubelet" => {
            let args = [
                format!("--config={}", file("kubelet.yaml")),
                format!("--kubeconfig={}", file("kubelet.kubeconfig")),
                format!("--node-ip={}", config.address),
                format!("--hostname-override={}", config.name),
                format!("--node-labels={}", config.labels),
            ];
            (config.bin.join(name), args.to_vec())
        }
        _ => (config.bin.join(name), vec![format!("--config={}", file("proxy.yaml"))]),
    }
}

/// Imports the images that the node's disk has not got yet.
fn import_images(config: &Config) -> Result<()> {
    let start = Instant::now();
    while let Err(error) = output_of(Command::new("ctr").arg("version")) {
        if start.elapsed() > START {
            return Err(error);
        }
        thread::sleep(TICK);
    }
    let imported = config.directory.join("imported");
    if imported.exists() {
        return Ok(());
    }
    for archive in &config.images {
        output_of(Command::new("ctr").args(["--namespace", "k8s.io", "images", "import"]).arg(archive))?;
    }
    std::fs::write(&imported, "").map_err(Error::system(format!("write {}", imported.display())))
}
