//! The machine that figures are of, and what processes use of it.

use anyhow::{Context, Result};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// Today, UTC, as `YYYY-MM-DD`.
pub fn today() -> String {
    let now = time::OffsetDateTime::now_utc();
    format!("{:04}-{:02}-{:02}", now.year(), u8::from(now.month()), now.day())
}

/// Processor, cores and kernel, as a reader needs them to compare.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn description() -> Result<String> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").context("reading /proc/cpuinfo")?;
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim()))
        .unwrap_or("unknown processor");
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let kernel =
        std::fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's release")?;
    Ok(format!("{model}, {cores} cores, Linux {}", kernel.trim()))
}

/// CPU seconds (user and system) that a process has used so far, ended threads included; nanoseconds are counted, not ticks
/// (clock_getcpuclockid(3)).
///
/// # Errors
/// When the process is not there.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?))
        .with_context(|| format!("the CPU clock of process {pid}"))?;
    let used = clock_gettime(clock).with_context(|| format!("reading the CPU clock of process {pid}"))?;
    Ok(used.tv_sec() as f64 + used.tv_nsec() as f64 / 1e9)
}

/// Open descriptors of a process.
///
/// # Errors
/// When the process is not there.
pub fn descriptors(pid: u32) -> Result<usize> {
    let path = format!("/proc/{pid}/fd");
    Ok(std::fs::read_dir(&path).with_context(|| format!("reading {path}"))?.count())
}

/// Resident memory of a process in bytes.
///
/// # Errors
/// When the process is not there.
pub fn resident(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let kilobytes = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .with_context(|| format!("no VmRSS in {path}"))?;
    Ok(kilobytes * 1024)
}
