//! Answers requests on the keeper's socket.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use ambit_net::seqpacket::{SeqPacket, SeqPacketListener};
use tokio::sync::Notify;

use super::{Progress, RunningCluster};
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::request::{Answer, LONGEST, Request};

/// Serves until somebody asks for the end.
pub(crate) async fn serve(keeper: Arc<RunningCluster>, layout: &Layout) -> Result<()> {
    let path = layout.run(&keeper.name).join("keeper.sock");
    let attempt = format!("listen at {}", path.display());
    let listener = SeqPacketListener::bind(&path).map_err(Error::system(attempt.clone()))?;
    let end = Arc::new(Notify::new());
    loop {
        tokio::select! {
            client = listener.accept() => {
                let client = client.map_err(Error::system(attempt.clone()))?;
                tokio::spawn(converse(client, Arc::clone(&keeper), Arc::clone(&end)));
            }
            () = end.notified() => return Ok(()),
        }
    }
}

/// Answers one client until it hangs up.
async fn converse(client: SeqPacket, keeper: Arc<RunningCluster>, end: Arc<Notify>) {
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
            Ok(request) => handle(&keeper, request)
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

async fn handle(keeper: &RunningCluster, request: Request) -> Result<(Answer, Option<OwnedFd>)> {
    let network = &keeper.network;
    match request {
        Request::Ready => return Ok((progress(keeper), None)),
        Request::Network { place } => {
            let namespace = network.sandbox(&place)?.network();
            let descriptor = namespace.try_clone_to_owned().map_err(Error::system("share a namespace"))?;
            return Ok((Answer::Done, Some(descriptor)));
        }
        Request::Link { place, up } => network.set_link(&place, up).await?,
        Request::Crash { node } => keeper.nodes.crash(&node).await?,
        Request::Boot { node } => keeper.nodes.boot(network, &node).await?,
        Request::Stop { program } => keeper.control_plane.stop(&program).await?,
        Request::Start { program } => keeper.control_plane.start(network, &program).await?,
        Request::Run { node, command } => {
            return Ok((keeper.nodes.run(network, &node, &command).await?, None));
        }
        Request::Load { archives } => load(keeper, &archives).await?,
        Request::Down => {}
    }
    Ok((Answer::Done, None))
}

async fn load(keeper: &RunningCluster, archives: &[std::path::PathBuf]) -> Result<()> {
    for node in keeper.nodes.names().await {
        for archive in archives {
            let archive = archive.display().to_string();
            let import = ["ctr", "--namespace", "k8s.io", "images", "import", &archive].map(str::to_owned);
            match keeper.nodes.run(&keeper.network, &node, &import).await? {
                Answer::Ran { code: 0, .. } => {}
                other => {
                    return Err(Error::program(format!("import {archive} on {node}"), format!("{other:?}")));
                }
            }
        }
    }
    Ok(())
}

fn progress(keeper: &RunningCluster) -> Answer {
    match &*keeper.progress.borrow() {
        Progress::Starting(step) => Answer::Starting { step: step.clone() },
        Progress::Ready => Answer::Done,
        Progress::Failed(message) => Answer::Failed { message: message.clone() },
    }
}
