//! A running cluster, seen by its owner or by anybody else on this machine: requests to its supervisor.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use ambit_local::{Capture, DEFAULT_LIMIT, Sandbox, link};
use ambit_net::seqpacket::SeqPacket;
use tokio::process::{Child, Command};

use crate::error::{Error, Result};
use crate::image::{self, Image};
use crate::kubectl::Kubectl;
use crate::layout::Layout;
use crate::programs;
use crate::request::{Answer, LONGEST, Request};
use crate::supervisor;
use crate::wait;

/// How long a start may take on a machine that does other things too.
const START: Duration = Duration::from_secs(600);
/// How long the end may take.
const END: Duration = Duration::from_secs(60);

/// What a cluster is started with.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its name, up to 20 letters, digits and dashes.
    pub name: String,
    /// Its number; see [`crate::plan::Plan`].
    pub number: u8,
    /// How many nodes it has; without any, only etcd and the API server run.
    pub nodes: u8,
    /// Images that its nodes have from the start, beside the test bed's own.
    pub images: Vec<Image>,
    /// The program `ambit-cluster`.
    pub program: PathBuf,
    /// Whether the cluster ends with this process. Otherwise it runs until somebody ends it.
    pub owned: bool,
}

impl Options {
    /// Two nodes, no more images, ended with this process.
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>) -> Self {
        let (name, program) = (name.into(), program.into());
        Self { name, number: 0, nodes: 2, images: Vec::new(), program, owned: true }
    }
}

/// A cluster.
#[derive(Debug)]
pub struct Cluster {
    name: String,
    layout: Layout,
    kubectl: Kubectl,
    /// The supervisor, whose standard input is the lifeline of an owned cluster.
    owned: Option<Child>,
}

/// What a command on a node printed, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// Exit code.
    pub code: i32,
    /// The end of output and errors.
    pub output: String,
}

impl Cluster {
    /// Builds what is missing, removes what dead clusters left, and starts a cluster.
    ///
    /// # Errors
    /// [`Error::Missing`] when the machine lacks something; [`Error::Refused`] when a cluster of this name runs;
    /// otherwise what failed, with the directory of the logs.
    pub async fn start(options: Options) -> Result<Self> {
        let layout = Layout::find();
        let mut images = prepare(&layout)?;
        for image in &options.images {
            images.push(image::build(&layout, image)?);
        }
        clean_dead(&layout)?;
        let run = layout.run(&options.name);
        if run.exists() {
            let message = "it runs already".to_owned();
            return Err(Error::Refused { cluster: options.name, message });
        }
        let log = run.join("log");
        fs::create_dir_all(&log).map_err(Error::system(format!("make {}", log.display())))?;
        let mut child = start_supervisor(&options, &images, &log.join("supervisor"))?;
        let kubectl = Kubectl::new(&layout, &options.name);
        let mut this = Self { name: options.name, layout, kubectl, owned: None };
        let started = this.wait_until_ready(&mut child).await;
        if options.owned || started.is_err() {
            this.owned = Some(child);
        }
        match started {
            Ok(()) => Ok(this),
            Err(error) => {
                let message = format!("{error}\nlogs: {}", log.display());
                this.end_supervisor().await?;
                Err(Error::Refused { cluster: this.name, message })
            }
        }
    }

    /// A cluster that somebody else started.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn attach(name: impl Into<String>) -> Result<Self> {
        let (name, layout) = (name.into(), Layout::find());
        if !layout.run(&name).join("supervisor.sock").exists() {
            return Err(Error::Refused { cluster: name, message: "it does not run".to_owned() });
        }
        let kubectl = Kubectl::new(&layout, &name);
        Ok(Self { name, layout, kubectl, owned: None })
    }

    /// `kubectl` and `helm` of this cluster.
    #[must_use]
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// Where its files lie.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The directory of its programs' logs.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.layout.run(&self.name).join("log")
    }

    /// Ends it and removes everything of it.
    ///
    /// # Errors
    /// [`Error::Deadline`] when something of it stays.
    pub async fn down(mut self) -> Result<()> {
        self.end_supervisor().await?;
        let layout = self.layout.clone();
        wait::until("the supervisor has ended", END, async || match supervisor::clean(&layout, &self.name) {
            Ok(true) => Ok(()),
            Ok(false) => Err("it still runs".to_owned()),
            Err(error) => Err(error.to_string()),
        })
        .await
    }

    /// A place's network namespace: `fabric`, `control` or a node.
    ///
    /// # Errors
    /// When there is no such place.
    pub async fn network(&self, place: &str) -> Result<Sandbox> {
        let (_, descriptors) = self.ask(&Request::Network { place: place.to_owned() }).await?;
        let descriptor = descriptors.into_iter().next().ok_or_else(|| self.refused("no descriptor came"))?;
        Ok(Sandbox::adopt(place, descriptor).await?)
    }

    /// Listens on what the given nodes send to the wire.
    ///
    /// # Errors
    /// When there is no such node, or the kernel refuses.
    pub async fn capture(&self, nodes: &[&str]) -> Result<Capture> {
        let fabric = self.network("fabric").await?;
        let mut links = Vec::new();
        for node in nodes {
            links.push(link::index(&fabric, node).await?);
        }
        Ok(Capture::start(&fabric, &links, DEFAULT_LIMIT).await?)
    }

    /// Cuts or mends the link of a node or of `control`.
    ///
    /// # Errors
    /// When there is no such place.
    pub async fn set_link(&self, place: &str, up: bool) -> Result<()> {
        self.ask(&Request::Link { place: place.to_owned(), up }).await.map(drop)
    }

    /// Ends a node as a power cut would.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn crash(&self, node: &str) -> Result<()> {
        self.ask(&Request::Crash { node: node.to_owned() }).await.map(drop)
    }

    /// Boots a node that crashed.
    ///
    /// # Errors
    /// When there is no such node.
    pub async fn boot(&self, node: &str) -> Result<()> {
        self.ask(&Request::Boot { node: node.to_owned() }).await.map(drop)
    }

    /// Ends a program of the control plane.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn stop_program(&self, program: &str) -> Result<()> {
        self.ask(&Request::Stop { program: program.to_owned() }).await.map(drop)
    }

    /// Starts a program of the control plane again.
    ///
    /// # Errors
    /// When there is no such program.
    pub async fn start_program(&self, program: &str) -> Result<()> {
        self.ask(&Request::Start { program: program.to_owned() }).await.map(drop)
    }

    /// Runs a command in a node's namespaces.
    ///
    /// # Errors
    /// When the node is down or the program can't be started; an exit code other than 0 is none.
    pub async fn run_on(&self, node: &str, command: &[&str]) -> Result<Ran> {
        let command = command.iter().map(|part| (*part).to_owned()).collect();
        match self.ask(&Request::Run { node: node.to_owned(), command }).await? {
            (Answer::Ran { code, output }, _) => Ok(Ran { code, output }),
            (other, _) => Err(self.refused(&format!("{other:?}"))),
        }
    }

    /// Builds images and imports them on every node.
    ///
    /// # Errors
    /// When buildah or an import fails.
    pub async fn load(&self, images: &[Image]) -> Result<()> {
        let archives = images.iter().map(|image| image::build(&self.layout, image)).collect::<Result<_>>()?;
        self.load_archives(archives).await
    }

    /// Imports image archives on every node.
    ///
    /// # Errors
    /// When an import fails.
    pub async fn load_archives(&self, archives: Vec<PathBuf>) -> Result<()> {
        self.ask(&Request::Load { archives }).await.map(drop)
    }

    /// Kills the supervisor of an owned cluster without any warning, as the kernel might.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn kill_supervisor(mut self) -> Result<()> {
        match self.owned.take() {
            Some(mut child) => child.kill().await.map_err(Error::system("kill the supervisor")),
            None => Err(self.refused("it is not this process's")),
        }
    }

    async fn wait_until_ready(&self, child: &mut Child) -> Result<()> {
        let (mut last, mut fatal) = (String::new(), None);
        let waited = wait::until("the cluster is up", START, async || {
            if let Ok(Some(status)) = child.try_wait() {
                fatal = Some(format!("the supervisor ended: {status}"));
                return Ok(());
            }
            match self.exchange(&Request::Ready).await {
                Ok((Answer::Done, _)) => Ok(()),
                Ok((Answer::Failed { message }, _)) => {
                    fatal = Some(message);
                    Ok(())
                }
                Ok((Answer::Starting { step }, _)) => {
                    if step != last {
                        eprintln!("{step}");
                        last.clone_from(&step);
                    }
                    Err(step)
                }
                Ok((other, _)) => Err(format!("{other:?}")),
                Err(error) => Err(error.to_string()),
            }
        })
        .await;
        waited?;
        fatal.map_or(Ok(()), |message| Err(self.refused(&message)))
    }

    /// Asks the supervisor to end, and closes the lifeline.
    async fn end_supervisor(&mut self) -> Result<()> {
        // Fails when the supervisor never listened; then the lifeline or the kill ends it.
        let asked = self.exchange(&Request::Down).await.is_ok();
        if let Some(mut child) = self.owned.take() {
            drop(child.stdin.take());
            if !asked {
                child.start_kill().ok();
            }
            let ended = tokio::time::timeout(END, child.wait()).await;
            ended
                .map_err(|_| self.refused("the supervisor does not end"))?
                .map_err(Error::system("end the supervisor"))?;
        }
        Ok(())
    }

    async fn ask(&self, request: &Request) -> Result<(Answer, Vec<std::os::fd::OwnedFd>)> {
        match self.exchange(request).await? {
            (Answer::Failed { message }, _) => Err(self.refused(&message)),
            answer => Ok(answer),
        }
    }

    async fn exchange(&self, request: &Request) -> Result<(Answer, Vec<std::os::fd::OwnedFd>)> {
        let path = self.layout.run(&self.name).join("supervisor.sock");
        let fault = || Error::system(format!("ask the supervisor at {}", path.display()));
        let socket = SeqPacket::connect(&path).map_err(fault())?;
        let packet = serde_json::to_vec(request).map_err(|error| self.refused(&error.to_string()))?;
        socket.send(&packet, &[]).await.map_err(fault())?;
        let mut buffer = vec![0; LONGEST];
        let received = socket.recv(&mut buffer).await.map_err(fault())?;
        let answer = serde_json::from_slice(buffer.get(..received.len).unwrap_or_default());
        let answer = answer.map_err(|error| self.refused(&format!("answer not understood: {error}")))?;
        Ok((answer, received.descriptors))
    }

    fn refused(&self, message: &str) -> Error {
        Error::Refused { cluster: self.name.clone(), message: message.to_owned() }
    }
}

/// Builds the programs and the test bed's own images. Returns their archives.
///
/// # Errors
/// When something is missing or a build fails.
pub fn prepare(layout: &Layout) -> Result<Vec<PathBuf>> {
    let _building = layout.build_lock()?;
    programs::build(layout)?;
    image::own(layout)?.iter().map(|image| image::build(layout, image)).collect()
}

/// Removes what clusters left whose supervisor is dead.
///
/// # Errors
/// When something can't be removed.
pub fn clean_dead(layout: &Layout) -> Result<()> {
    for name in layout.clusters() {
        supervisor::clean(layout, &name)?;
    }
    Ok(())
}

fn start_supervisor(options: &Options, images: &[PathBuf], log: &Path) -> Result<Child> {
    let attempt = format!("start {}", options.program.display());
    let file = File::create(log).map_err(Error::system(format!("make {}", log.display())))?;
    let mut command = Command::new(&options.program);
    command.args(["supervise", "--name", &options.name]);
    command.args(["--number", &options.number.to_string(), "--nodes", &options.nodes.to_string()]);
    for image in images {
        command.arg("--image").arg(image);
    }
    if options.owned {
        command.arg("--owned").stdin(Stdio::piped());
    } else {
        command.stdin(Stdio::null());
    }
    command.stderr(file.try_clone().map_err(Error::system(attempt.clone()))?).stdout(file);
    command.spawn().map_err(Error::system(attempt))
}
