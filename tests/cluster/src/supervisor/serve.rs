//! Answers requests on the supervisor's socket.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use ambit_net::seqpacket::{SeqPacket, SeqPacketListener};
use tokio::sync::Notify;

use super::{Progress, RunningCluster};
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::request::{Answer, LONGEST, Request};

/// Serves until somebody asks for the end.
pub(crate) async fn serve(supervisor: Arc<RunningCluster>, layout: &Layout) -> Result<()> {
    let path = layout.run(&supervisor.name).join("supervisor.sock");
    let attempt = format!("listen at {}", path.display());
    let listener = SeqPacketListener::bind(&path).map_err(Error::system(attempt.clone()))?;
    let end = Arc::new(Notify::new());
    loop {
        tokio::select! {
            client = listener.accept() => {
                let client = client.map_err(Error::system(attempt.clone()))?;
                tokio::spawn(converse(client, Arc::clone(&supervisor), Arc::clone(&end)));
            }
            () = end.notified() => return Ok(()),
        }
    }
}

/// Answers one client until it hangs up.
async fn converse(client: SeqPacket, supervisor: Arc<RunningCluster>, end: Arc<Notify>) {
    let mut buffer = vec![0; LONGEST];
    while let Ok(received) = client.recv(&mut buffer).await
        && received.len > 0
    {
        let packet = buffer.get(..received.len).unwrap_or_default();
        let (answer, descriptor) = match serde_json::from_slice::<Request>(packet) {
            Ok(Request::Down) => {
                end.notify_one();
                (Answer::Done, None)
            }
            Ok(request) => handle(&supervisor, request)
                .await
                .unwrap_or_else(|error| (Answer::Failed { message: error.to_string() }, None)),
            Err(error) => (Answer::Failed { message: error.to_string() }, None),
        };
        let Ok(text) = serde_json::to_vec(&answer) else { return };
        let descriptors: Vec<_> = descriptor.iter().map(AsFd::as_fd).collect();
        if client.send(&text, &descriptors).await.is_err() {
            return;
        }
    }
}

async fn handle(supervisor: &RunningCluster, request: Request) -> Result<(Answer, Option<OwnedFd>)> {
    let network = &supervisor.network;
    match request {
        Request::Ready => return Ok((progress(supervisor), None)),
        Request::Network { place } => {
            let namespace = network.sandbox(&place)?.network();
            let descriptor = namespace.try_clone_to_owned().map_err(Error::system("share a namespace"))?;
            return Ok((Answer::Done, Some(descriptor)));
        }
        Request::Link { place, up } => network.set_link(&place, up).await?,
        Request::Crash { node } => supervisor.nodes.crash(&node).await?,
        Request::Boot { node } => supervisor.nodes.boot(network, &node).await?,
        Request::Stop { program } => supervisor.control_plane.stop(&program).await?,
        Request::Start { program } => supervisor.control_plane.start(network, &program).await?,
        Request::Run { node, command } => {
            return Ok((supervisor.nodes.run(network, &node, &command).await?, None));
        }
        Request::Load { archives } => load(supervisor, &archives).await?,
        Request::Down => {}
    }
    Ok((Answer::Done, None))
}

async fn load(supervisor: &RunningCluster, archives: &[std::path::PathBuf]) -> Result<()> {
    for node in supervisor.nodes.names().await {
        for archive in archives {
            let archive = archive.display().to_string();
            let import = ["ctr", "--namespace", "k8s.io", "images", "import", &archive].map(str::to_owned);
            match supervisor.nodes.run(&supervisor.network, &node, &import).await? {
                Answer::Ran { code: 0, .. } => {}
                other => {
                    return Err(Error::program(format!("import {archive} on {node}"), format!("{other:?}")));
                }
            }
        }
    }
    Ok(())
}

fn progress(supervisor: &RunningCluster) -> Answer {
    match &*supervisor.progress.borrow() {
        Progress::Starting(step) => Answer::Starting { step: step.clone() },
        Progress::Ready => Answer::Done,
        Progress::Failed(message) => Answer::Failed { message: message.clone() },
    }
}
