//! What this node's kernel and the agent's privileges allow, tried out in a network namespace made for it.
//!
//! The agent logs the outcome at start and goes on; `ambit check` shows the same.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use ambit_net::conntrack::Conntrack;
use ambit_net::sockdiag::{self, Kind};
use ambit_net::{Netns, NetnsError};
use nix::mount::{MsFlags, mount};

use crate::redirect::{self, Options, SettingError, Stage};

/// Bit of CAP_SYS_PTRACE in a capability set (capabilities(7)).
const CAP_SYS_PTRACE: u64 = 1 << 19;

/// What knowing and tracking the connections of a pod gives.
const OLDER_CONNECTIONS: &str = "connections older than an enrolment live on, and outgoing ones that connection tracking has \
     lost do not leave in the clear";

/// A guarantee that does not hold on this node.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Weakness {
    /// What was refused, with the system's answer.
    pub missing: String,
    /// What is not guaranteed without it.
    pub guarantee: &'static str,
    /// The privilege or kernel module that gives it.
    pub remedy: &'static str,
}

impl fmt::Display for Weakness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { missing, guarantee, remedy } = self;
        write!(f, "not guaranteed: {guarantee}; missing: {missing}; needed: {remedy}")
    }
}

/// Tries everything that an enrolment does and returns what does not work.
pub async fn probe() -> Vec<Weakness> {
    let inside = match Netns::create() {
        Ok(inside) => inside,
        Err(error) => return vec![no_enrolment(error.to_string(), "CAP_SYS_ADMIN")],
    };
    let mut found = Vec::new();
    let plan = redirect::plan(&Options::default(), Stage::In);
    if let Err(error) = redirect::apply(&inside, &plan).await {
        found.push(no_enrolment(
            error.to_string(),
            "CAP_NET_ADMIN and the kernel modules nf_tables, nft_nat, nft_redir, nft_ct and nf_conntrack",
        ));
    }
    match redirect::unwritable_settings(&inside).await {
        Ok(refused) => found.extend(refused.iter().map(of_setting)),
        Err(error) => found.push(no_enrolment(error.to_string(), "CAP_SYS_ADMIN")),
    }
    found.extend(tracks_older_connections(&inside).await.err());
    found.extend(lists_connections(&inside).await.err());
    found.extend(takes_listeners_back().err());
    found
}

/// Makes `/proc/sys` writable in this process's mount namespace, if it is a read-only mount of its own as container
/// runtimes make one. Kernel settings of pods are written there. Needs CAP_SYS_ADMIN; the host's mounts stay as they are.
///
/// # Errors
/// `EINVAL` when it is no mount, which is as good: then it is as writable as `/proc`.
pub fn make_settings_writable() -> io::Result<()> {
    const PROC_SYS: &str = "/proc/sys";
    let flags =
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    Ok(mount(None::<&str>, PROC_SYS, None::<&str>, flags, None::<&str>)?)
}

/// The host's network namespace is not known.
pub(crate) fn host_unknown(error: &NetnsError) -> Weakness {
    Weakness {
        missing: error.to_string(),
        guarantee: "probes of kubelet pass policies, and no pod is enrolled in the host's network namespace",
        remedy: "CAP_SYS_PTRACE and the host's process namespace",
    }
}

fn no_enrolment(missing: String, remedy: &'static str) -> Weakness {
    Weakness { missing, guarantee: "pods can be enrolled", remedy }
}

fn of_setting(error: &SettingError) -> Weakness {
    let remedy = match error.source.kind() {
        io::ErrorKind::NotFound => "the kernel module nf_conntrack, or a newer kernel",
        _ => "CAP_SYS_ADMIN and no AppArmor profile, so that the agent can make its /proc/sys writable",
    };
    Weakness { missing: error.to_string(), guarantee: error.setting.guarantee, remedy }
}

async fn tracks_older_connections(inside: &Netns) -> Result<(), Weakness> {
    let weakness = |missing: String| Weakness {
        missing: format!("enter a connection into tracking: {missing}"),
        guarantee: OLDER_CONNECTIONS,
        remedy: "the kernel module nf_conntrack_netlink",
    };
    let mut conntrack = Conntrack::open(inside).await.map_err(|e| weakness(e.to_string()))?;
    let end = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    conntrack.enter_tcp(end(1), end(2)).await.map_err(|e| weakness(e.to_string()))?;
    Ok(())
}

async fn lists_connections(inside: &Netns) -> Result<(), Weakness> {
    let weakness = |error: NetnsError| Weakness {
        missing: error.to_string(),
        guarantee: OLDER_CONNECTIONS,
        remedy: "the kernel modules inet_diag and tcp_diag",
    };
    sockdiag::list(inside, Kind::TcpConnections).await.map_err(weakness)?;
    Ok(())
}

/// pidfd_getfd(2) needs the right to trace the node proxy.
fn takes_listeners_back() -> Result<(), Weakness> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or_default();
    if set & CAP_SYS_PTRACE != 0 {
        return Ok(());
    }
    Err(Weakness {
        missing: "CAP_SYS_PTRACE".into(),
        guarantee: "after a restart of the agent, connections wait while the node proxy restarts",
        remedy: "CAP_SYS_PTRACE and the host's process namespace",
    })
}
