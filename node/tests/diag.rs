//! The agent on a kernel that lists no sockets, as without the module `inet_diag`. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::io;
use std::net::SocketAddr;

use ambit_net::sockdiag::{self, Kind};
use ambit_net::{SocketStock, connect};
use ambit_node::{Agent, AgentConfig, PodState};
use common::traffic::SOON;
use common::{pair, spec};

/// Has socket(2) refuse sockets of sock_diag(7) to this thread and those that it starts.
#[allow(unsafe_code, reason = "no library of ours installs seccomp filters")]
fn without_sock_diag() {
    /// Where `struct seccomp_data` has the system call and the lower halves of its arguments.
    const CALL: u32 = 0;
    const FAMILY: u32 = 16;
    const PROTOCOL: u32 = 32;
    const NETLINK_SOCK_DIAG: u32 = 4;
    let load = |k| libc::sock_filter { code: 0x20, jt: 0, jf: 0, k };
    // Else to the last instruction.
    let is = |k, jf| libc::sock_filter { code: 0x15, jt: 0, jf, k };
    let end = |k| libc::sock_filter { code: 0x06, jt: 0, jf: 0, k };
    let mut filter = [
        load(CALL),
        is(u32::try_from(libc::SYS_socket).unwrap(), 5),
        load(FAMILY),
        is(u32::try_from(libc::AF_NETLINK).unwrap(), 3),
        load(PROTOCOL),
        is(NETLINK_SOCK_DIAG, 1),
        end(libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EPROTONOSUPPORT).unwrap()),
        end(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: u16::try_from(filter.len()).unwrap(), filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which is alive, during the call.
    let outcome =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, std::ptr::from_ref(&program)) };
    assert_eq!(outcome, 0, "these tests need root: {}", io::Error::last_os_error());
}

#[test]
fn a_pod_is_captured_where_the_kernel_lists_no_sockets() {
    without_sock_diag();
    tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(async {
        let (outside, pod) = pair().await;
        sockdiag::list(&pod.netns, Kind::TcpConnections).await.expect_err("sockets are listed");
        let directory = tempfile::tempdir().unwrap();
        let config =
            AgentConfig::new(directory.path().join("ztunnel.sock"), directory.path().join("registry"));
        let (agent, driver) = Agent::start(config).await.unwrap();
        let driver = tokio::spawn(driver);
        let weaknesses = agent.health().weaknesses;
        assert!(weaknesses.iter().any(|weak| weak.remedy.contains("inet_diag")), "{weaknesses:?}");
        agent.enrol(spec("a", &pod)).await.expect("enrolled without listing sockets");
        assert_eq!(agent.status("a").unwrap().state, PodState::Pending);
        // Nothing listens on that port: the connection is captured.
        let to = SocketAddr::new(outside.v4.into(), 9080);
        connect(&SocketStock::new(pod.netns.clone(), None), to, SOON).await.expect("held for the proxy");
        agent.unenrol("a").await.expect("removed without listing sockets");
        driver.abort();
    });
}
