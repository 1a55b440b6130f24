//! CPU time and memory of other processes.

use anyhow::{Context, Result};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// CPU seconds (user and system) that `pid` has used so far, ended threads included.
///
/// Read from the process's CPU clock (clock_getcpuclockid(3)), which counts nanoseconds where
/// `/proc/PID/stat` counts ticks.
pub(crate) fn of_process(pid: u32) -> Result<f64> {
    let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?))
        .with_context(|| format!("the CPU clock of process {pid}"))?;
    let used = clock_gettime(clock).with_context(|| format!("reading the CPU clock of process {pid}"))?;
    Ok(used.tv_sec() as f64 + used.tv_nsec() as f64 / 1e9)
}

/// CPU seconds of several processes together.
pub(crate) fn of_processes(pids: &[u32]) -> Result<f64> {
    pids.iter().map(|&pid| of_process(pid)).sum()
}

/// Resident memory of `pid` in bytes.
pub(crate) fn resident(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let kilobytes = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .with_context(|| format!("no VmRSS in {path}"))?;
    Ok(kilobytes * 1024)
}
