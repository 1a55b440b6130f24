//! The command's side: finds the mesh, sends the request and prints the replies.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::process::ExitCode;

use ambit_net::seqpacket::SeqPacket;
use anyhow::{Context, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::directory;
use super::lines::Lines;
use super::protocol::{LONGEST_PACKET, Reply, Request};

/// Sends a request to the mesh of `ambit up` with process id `mesh`, or to the only one, and follows it to its end.
pub(super) fn ask(mesh: Option<u32>, request: &Request) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { follow(&connect(mesh)?, request).await })
}

/// Sends a request to such a mesh; returns the whole text of its answer.
pub(super) async fn fetch(mesh: Option<u32>, request: &Request) -> anyhow::Result<String> {
    let socket = connect(mesh)?;
    send(&socket, request, &[]).await?;
    let mut buffer = vec![0; LONGEST_PACKET];
    let mut whole = String::new();
    loop {
        match receive(&socket, &mut buffer).await? {
            Reply::Text(text) => whole.push_str(&text),
            Reply::Done { .. } => return Ok(whole),
            Reply::Failed(message) => bail!(message),
        }
    }
}

/// Sends a request whose answer goes on, and passes on its lines for as long as somebody takes them.
pub(super) async fn stream(
    mesh: Option<u32>,
    request: &Request,
    taken: &mpsc::Sender<String>,
) -> anyhow::Result<()> {
    let socket = connect(mesh)?;
    send(&socket, request, &[]).await?;
    let mut buffer = vec![0; LONGEST_PACKET];
    let mut lines = Lines::default();
    loop {
        match receive(&socket, &mut buffer).await? {
            Reply::Text(text) => {
                for line in lines.feed(text.as_bytes()) {
                    if taken.send(line).await.is_err() {
                        return Ok(());
                    }
                }
            }
            Reply::Done { .. } => return Ok(()),
            Reply::Failed(message) => bail!(message),
        }
    }
}

fn connect(mesh: Option<u32>) -> anyhow::Result<SeqPacket> {
    let path = choose(mesh, directory::meshes()?)?;
    SeqPacket::connect(&path).with_context(|| format!("connect to the mesh at {}", path.display()))
}

async fn receive(socket: &SeqPacket, buffer: &mut [u8]) -> anyhow::Result<Reply> {
    let length = socket.recv(buffer).await.context("read the answer of the mesh")?.len;
    let packet = buffer.get(..length).unwrap_or_default();
    if packet.is_empty() {
        bail!("the mesh has ended");
    }
    serde_json::from_slice(packet).context("read the answer of the mesh")
}

fn choose(wanted: Option<u32>, meshes: Vec<(u32, PathBuf)>) -> anyhow::Result<PathBuf> {
    let pids: Vec<String> = meshes.iter().map(|(pid, _)| pid.to_string()).collect();
    let mut fitting = meshes.into_iter().filter(|(pid, _)| wanted.is_none_or(|wanted| wanted == *pid));
    match (fitting.next(), fitting.next(), wanted) {
        (Some((_, path)), None, _) => Ok(path),
        (None, _, Some(pid)) => bail!("no `ambit up` of this user has process id {pid}"),
        (None, _, None) => bail!("no mesh of this user runs; `ambit up DIR` starts one"),
        (Some(_), Some(_), _) => {
            bail!("several meshes run; choose one with --mesh PID, one of {}", pids.join(", "))
        }
    }
}

async fn follow(socket: &SeqPacket, request: &Request) -> anyhow::Result<ExitCode> {
    let (input, output, error) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let own: [BorrowedFd<'_>; 3] = [input.as_fd(), output.as_fd(), error.as_fd()];
    let descriptors = if matches!(request, Request::Exec { .. }) { &own[..] } else { &[] };
    send(socket, request, descriptors).await?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut buffer = vec![0; LONGEST_PACKET];
    loop {
        tokio::select! {
            reply = receive(socket, &mut buffer) => {
                match reply? {
                    Reply::Text(text) => {
                        if !print(&text) {
                            return Ok(ExitCode::SUCCESS);
                        }
                    }
                    Reply::Done { code } => return Ok(ExitCode::from(code)),
                    Reply::Failed(message) => bail!(message),
                }
            }
            number = either(&mut interrupt, &mut terminate) => {
                if !matches!(request, Request::Exec { .. }) {
                    return Ok(ExitCode::SUCCESS);
                }
                send(socket, &Request::Signal { number }, &[]).await?;
            }
        }
    }
}

async fn either(interrupt: &mut Signal, terminate: &mut Signal) -> i32 {
    tokio::select! {
        _ = interrupt.recv() => SignalKind::interrupt().as_raw_value(),
        _ = terminate.recv() => SignalKind::terminate().as_raw_value(),
    }
}

async fn send(socket: &SeqPacket, request: &Request, descriptors: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
    let packet = serde_json::to_vec(request)?;
    if packet.len() > LONGEST_PACKET {
        bail!("the command has {} bytes, which are more than {LONGEST_PACKET}", packet.len());
    }
    socket.send(&packet, descriptors).await.context("send the request to the mesh")
}

/// Returns false when the reader of the output is gone, which is not an error.
fn print(text: &str) -> bool {
    let mut output = std::io::stdout().lock();
    output.write_all(text.as_bytes()).and_then(|()| output.flush()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_only_mesh_is_used_and_several_need_a_choice() {
        let mesh = |pid: u32| (pid, PathBuf::from(format!("/{pid}.sock")));
        assert_eq!(choose(None, vec![mesh(1)]).expect("the only one"), PathBuf::from("/1.sock"));
        assert_eq!(choose(Some(2), vec![mesh(1), mesh(2)]).expect("named"), PathBuf::from("/2.sock"));
        let several = choose(None, vec![mesh(1), mesh(2)]).expect_err("which one?").to_string();
        assert!(several.contains("one of 1, 2"), "{several}");
        assert!(choose(None, vec![]).is_err());
        assert!(choose(Some(3), vec![mesh(1)]).is_err());
    }
}
