//! The program `ambit-cni`: one call of a container runtime, from its environment and standard input to its answer.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ambit_net::Netns;
use ambit_net::seqpacket::SeqPacket;
use serde_json::{Value, json};

use super::message::{Answer, MAX_PACKET, PodRef, Request, Sandbox};
use super::spec::{self, CniError, ErrorCode, PluginConfig, argument};

/// How long an agent that is not there is waited for, as while it is replaced by another version.
const AGENT_BACK: Duration = Duration::from_secs(5);
/// Pause between two attempts to reach it.
const RECONNECT: Duration = Duration::from_millis(100);
/// How long the agent may take for an answer. It gives up sooner by itself.
const ANSWER: Duration = Duration::from_secs(60);
/// How long DEL waits for the agent. The agent learns of ended pods from the API server too.
const DEL_ANSWER: Duration = Duration::from_secs(5);
/// Bytes of a configuration at most.
const MAX_CONFIG: u64 = 4 << 20;

/// What the runtime asks for, by environment variables (CNI specification, section 2).
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `CNI_COMMAND`.
    pub command: Option<String>,
    /// `CNI_CONTAINERID`.
    pub container: Option<String>,
    /// `CNI_NETNS`.
    pub netns: Option<PathBuf>,
    /// `CNI_ARGS`.
    pub arguments: Option<String>,
}

impl Environment {
    /// That of this process.
    pub fn of_process() -> Self {
        let read = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            command: read("CNI_COMMAND"),
            container: read("CNI_CONTAINERID"),
            netns: read("CNI_NETNS").map(PathBuf::from),
            arguments: read("CNI_ARGS"),
        }
    }

    fn pod(&self) -> Option<PodRef> {
        let arguments = self.arguments.as_deref()?;
        Some(PodRef {
            namespace: argument(arguments, "K8S_POD_NAMESPACE")?.into(),
            name: argument(arguments, "K8S_POD_NAME")?.into(),
            uid: argument(arguments, "K8S_POD_UID").unwrap_or_default().into(),
        })
    }
}

/// Carries out one call and writes its answer. Returns whether it succeeded.
pub async fn run(environment: Environment, input: impl Read, mut output: impl Write) -> bool {
    let mut text = String::new();
    let read = input.take(MAX_CONFIG).read_to_string(&mut text);
    let outcome = match read {
        Ok(_) => carry_out(&environment, &text).await,
        Err(error) => Err(CniError::new(ErrorCode::Io, "the network configuration cannot be read", error)),
    };
    let succeeded = outcome.is_ok();
    let answer = outcome.unwrap_or_else(|error| {
        eprintln!("{}: {error}", super::PLUGIN);
        Some(error.to_json(&version_of(&text)))
    });
    let written = answer.map_or(Ok(()), |answer| writeln!(output, "{answer}"));
    succeeded && written.is_ok()
}

/// The version that the configuration names, for answers that must carry the same.
fn version_of(text: &str) -> String {
    let config: Option<Value> = serde_json::from_str(text).ok();
    let version = config.and_then(|config| Some(config.get(spec::VERSION)?.as_str()?.to_owned()));
    version.unwrap_or_else(|| spec::NEWEST.into())
}

async fn carry_out(environment: &Environment, text: &str) -> Result<Option<Value>, CniError> {
    match environment.command.as_deref() {
        Some("VERSION") => {
            Ok(Some(json!({ spec::VERSION: version_of(text), "supportedVersions": spec::VERSIONS })))
        }
        Some("ADD") => {
            let config = PluginConfig::parse(text)?;
            add(environment, &config).await?;
            Ok(Some(config.result()))
        }
        Some("CHECK") => check(environment, &PluginConfig::parse(text)?).await.map(|()| None),
        Some("DEL") => {
            del(environment, &PluginConfig::parse(text)?).await;
            Ok(None)
        }
        Some("GC") => {
            gc(&PluginConfig::parse(text)?).await;
            Ok(None)
        }
        // A runtime starts no pod while a plugin's STATUS fails, and the agent is one of those pods: its absence is no
        // reason to fail here. ADD fails for the pods that need it, and so it does for a version that is not supported.
        Some("STATUS") => PluginConfig::parse(text).map(|_| None),
        other => Err(CniError::new(
            ErrorCode::InvalidEnvironment,
            "CNI_COMMAND is missing or not known",
            other.unwrap_or("missing"),
        )),
    }
}

/// The sandbox, if its pod may be one of the mesh: `None` for containers that are no pods, and for excluded namespaces.
fn sandbox(environment: &Environment, config: &PluginConfig) -> Result<Option<Sandbox>, CniError> {
    let Some(pod) = environment.pod() else { return Ok(None) };
    if config.excluded_namespaces.contains(&pod.namespace) {
        return Ok(None);
    }
    let missing = || CniError::new(ErrorCode::InvalidEnvironment, "CNI_CONTAINERID is missing", "");
    Ok(Some(Sandbox {
        id: environment.container.clone().ok_or_else(missing)?,
        pod,
        netns_path: environment.netns.clone(),
        ips: config.addresses(),
    }))
}

fn netns(environment: &Environment) -> Result<Netns, CniError> {
    let missing = || CniError::new(ErrorCode::InvalidEnvironment, "CNI_NETNS is missing", "");
    let path = environment.netns.as_ref().ok_or_else(missing)?;
    Netns::open(path)
        .map_err(|e| CniError::new(ErrorCode::InvalidNetns, "CNI_NETNS is no network namespace", e))
}

async fn add(environment: &Environment, config: &PluginConfig) -> Result<(), CniError> {
    let Some(sandbox) = sandbox(environment, config)? else { return Ok(()) };
    // After the exclusion: the pods of excluded namespaces, the agent's own among them, start with any version.
    config.check_version()?;
    let netns = netns(environment)?;
    ask(config, &Request::Add(sandbox), Some(&netns), AGENT_BACK, ANSWER).await
}

async fn check(environment: &Environment, config: &PluginConfig) -> Result<(), CniError> {
    if config.prev_result.is_none() {
        return Err(CniError::new(ErrorCode::InvalidConfig, "CHECK needs prevResult", "it is missing"));
    }
    let Some(sandbox) = sandbox(environment, config)? else { return Ok(()) };
    config.check_version()?;
    let netns = netns(environment)?;
    ask(config, &Request::Check(sandbox), Some(&netns), AGENT_BACK, ANSWER).await
}

/// A pod must be able to end without the agent, which notices by itself: no failure is reported to the runtime.
async fn del(environment: &Environment, config: &PluginConfig) {
    let Ok(Some(sandbox)) = sandbox(environment, config) else { return };
    if let Err(error) = ask(config, &Request::Del(sandbox), None, Duration::ZERO, DEL_ANSWER).await {
        eprintln!("{}: the agent is not informed: {error}", super::PLUGIN);
    }
}

async fn gc(config: &PluginConfig) {
    let Some(valid) = &config.valid_attachments else { return };
    let valid = valid.iter().map(|attachment| attachment.container_id.clone()).collect();
    if let Err(error) = ask(config, &Request::Gc { valid }, None, Duration::ZERO, DEL_ANSWER).await {
        eprintln!("{}: the agent is not informed: {error}", super::PLUGIN);
    }
}

async fn ask(
    config: &PluginConfig,
    request: &Request,
    netns: Option<&Netns>,
    agent_back: Duration,
    limit: Duration,
) -> Result<(), CniError> {
    let try_again =
        |details: String| CniError::new(ErrorCode::TryAgain, "the node agent does not answer", details);
    let socket = connect(&config.socket, agent_back).await.map_err(|e| {
        CniError::new(ErrorCode::TryAgain, "the node agent is not there", format!("{}: {e}", config.socket))
    })?;
    let answer = tokio::time::timeout(limit, converse(&socket, request, netns)).await;
    match answer
        .map_err(|_| try_again(format!("not within {limit:?}")))?
        .map_err(|e| try_again(e.to_string()))?
    {
        Answer::Done => Ok(()),
        Answer::TryAgain { reason } => {
            Err(CniError::new(ErrorCode::TryAgain, "the pod cannot be enrolled in the mesh yet", reason))
        }
        Answer::NotAsPlanned { reason } => {
            Err(CniError::new(ErrorCode::NotAsPlanned, "the pod's redirection is not as planned", reason))
        }
    }
}

async fn connect(path: &str, agent_back: Duration) -> std::io::Result<SeqPacket> {
    let deadline = Instant::now() + agent_back;
    loop {
        match SeqPacket::connect(path) {
            Ok(socket) => return Ok(socket),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => tokio::time::sleep(RECONNECT).await,
        }
    }
}

async fn converse(socket: &SeqPacket, request: &Request, netns: Option<&Netns>) -> std::io::Result<Answer> {
    let packet = serde_json::to_vec(request)?;
    let descriptors: Vec<_> = netns.iter().map(|netns| netns.as_fd()).collect();
    socket.send(&packet, &descriptors).await?;
    let mut buffer = vec![0; MAX_PACKET];
    let received = socket.recv(&mut buffer).await?;
    match buffer.get(..received.len) {
        Some(packet) if !packet.is_empty() => Ok(serde_json::from_slice(packet)?),
        _ => Err(std::io::ErrorKind::UnexpectedEof.into()),
    }
}
