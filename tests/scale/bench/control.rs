//! The control plane over a directory of objects or a Kubernetes API server: start, the push to all subscribers, and what a
//! change costs.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ambit_identity::TlsSettings;
use ambit_scale::objects::{PODS, SERVICES, namespace_of, pod_name};
use anyhow::{Context, Result, bail, ensure};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use crate::api_server::ApiServer;
use crate::program::{Control, Keys};
use crate::report::{Row, Section};
use crate::subscriber::{Crowd, Target, subscribe};
use crate::world::{Directory, World};

/// Changes of each kind.
const CHANGES: u32 = 100;
/// Between two changes: longer than changes are batched, so that each is the first after quiet.
const PAUSE: Duration = Duration::from_millis(100);
/// After the program serves, until what only the first reading needed has been given back to the system.
const SETTLING: Duration = Duration::from_secs(1);
/// By then a push or a change must be everywhere.
const PATIENCE: Duration = Duration::from_secs(120);

const OF_DIRECTORY: &str = "`ambit-control --source dir:` over 1,000 nodes, 10,000 pods and 1,000 services, a file each, pods and nodes as JSON, the \
rest as YAML. Subscribers take everything over TLS connections of their own, from one other process on the same machine; its work is in the \
times, not in the CPU. A change is a pod's file that is put in place or removed; its time ends when the last stream has it.";

const OF_API_SERVER: &str = "`ambit-control --source kubernetes` over the same objects in a real API server (Kubernetes 1.37, etcd) on the same \
two cores, with the CRDs of the chart; neither kubelets nor controllers run. Subscribers are those of the table above, their tokens are verified by \
a key set. A pod is added by the write of the status that gives it an address, and removed by its deletion; the time begins when that request is sent, so \
that the API server's and etcd's own time is in it. The CPU is that of `ambit-control` alone.";

/// Takes every figure of the section on a directory.
pub(crate) async fn measure_directory(program: &Path) -> Result<Section> {
    let world = World::Directory(Directory::write()?);
    let mut section = Section::new("Control plane on a directory of objects", OF_DIRECTORY);
    measure(program, &world, &mut section).await?;
    Ok(section)
}

/// Takes every figure of the section on an API server, which `cluster` starts.
pub(crate) async fn measure_api_server(program: &Path, cluster: &Path) -> Result<Section> {
    let world = World::ApiServer(Box::new(ApiServer::start(cluster).await?));
    let mut section = Section::new("Control plane on a Kubernetes API server", OF_API_SERVER);
    measure(program, &world, &mut section).await?;
    if let World::ApiServer(server) = world {
        server.stop().await?;
    }
    Ok(section)
}

async fn measure(program: &Path, world: &World, section: &mut Section) -> Result<()> {
    let mut bed = Bed::start(program, world)?;
    section.push(Row::new("start to ready").time(bed.control.until_ready).at_most(Duration::from_secs(3)));
    section.push(Row::new("CPU of it").seconds(bed.control.cpu()?));
    tokio::time::sleep(SETTLING).await;
    section.push(Row::new("memory, no subscribers").bytes(bed.control.resident()?).at_most_bytes(80e6));
    bed.push(1_000, Some(section)).await?;
    bed.changes(section, 0.020).await?;
    drop(bed);
    let mut bed = Bed::start(program, world)?;
    bed.push(100, None).await?;
    bed.changes_of_few(section, 0.002).await
}

/// A control plane and its subscribers.
struct Bed<'a> {
    control: Control,
    keys: Keys,
    world: &'a World,
    crowd: Arc<Crowd>,
    subscribers: JoinSet<Result<()>>,
}

/// What changes of one kind took.
struct Changes {
    times: Vec<Duration>,
    cpu_each: f64,
}

impl<'a> Bed<'a> {
    fn start(program: &Path, world: &'a World) -> Result<Self> {
        let keys = Keys::new()?;
        let control = Control::start(program, &world.source(), &keys)?;
        Ok(Self { control, keys, world, crowd: Arc::default(), subscribers: JoinSet::new() })
    }

    /// Connects subscribers and waits until each has everything.
    async fn push(&mut self, count: u32, section: Option<&mut Section>) -> Result<()> {
        let target = Target {
            address: self.control.address,
            tls: connector(&self.keys.roots())?,
            resources: self.world.resources(),
        };
        let callers = (0..count).map(|number| self.keys.caller(number)).collect::<Result<Vec<_>>>()?;
        let (start, before) = (std::time::Instant::now(), self.control.cpu()?);
        for caller in callers {
            self.subscribers.spawn(subscribe(target.clone(), caller, Arc::clone(&self.crowd)));
        }
        let crowd = Arc::clone(&self.crowd);
        self.unless_one_ends(crowd.complete(count as usize)).await?;
        let (took, cpu) = (start.elapsed(), self.control.cpu()? - before);
        if let Some(section) = section {
            let what = format!("first full push to all {count}");
            section.push(Row::new(&what).time(took).at_most(Duration::from_secs(10)));
            section.push(Row::new("CPU of it").seconds(cpu).at_most(Duration::from_secs(7)));
            section.push(
                Row::new(format!("memory with {count} subscribers"))
                    .bytes(self.control.resident()?)
                    .at_most_bytes(200e6),
            );
        }
        Ok(())
    }

    /// Pods that come, then go.
    async fn changes(&mut self, section: &mut Section, goal: f64) -> Result<()> {
        let count = self.subscribers.len();
        let quiet = self.quiet().await?;
        let added = self.many(true).await?;
        let removed = self.many(false).await?;
        let limits = (Duration::from_millis(30), Duration::from_millis(60));
        let cpu = (added.cpu_each, removed.cpu_each);
        section.push(Row::of_times("a pod added, until it is in all streams", added.times).within(limits));
        section
            .push(Row::of_times("a pod removed, until it is in all streams", removed.times).within(limits));
        let goal = Duration::from_secs_f64(goal);
        for (what, cpu) in [("added", cpu.0), ("removed", cpu.1)] {
            let what = format!("CPU a pod {what}, {count} subscribers");
            section.push(Row::new(what).seconds(cpu).at_most(goal));
        }
        section.push(Row::new(format!("CPU a second of quiet, {count} subscribers")).seconds(quiet));
        let memory = self.control.resident()?;
        section.push(Row::new("memory after all changes").bytes(memory).at_most_bytes(200e6));
        Ok(())
    }

    async fn changes_of_few(&mut self, section: &mut Section, goal: f64) -> Result<()> {
        let count = self.subscribers.len();
        let added = self.many(true).await?;
        let removed = self.many(false).await?;
        for (what, cpu) in [("added", added.cpu_each), ("removed", removed.cpu_each)] {
            let row = Row::new(format!("CPU a pod {what}, {count} subscribers")).seconds(cpu);
            section.push(row.at_most(Duration::from_secs_f64(goal)));
        }
        Ok(())
    }

    /// CPU of a second in which nothing happens.
    async fn quiet(&self) -> Result<f64> {
        const TIME: Duration = Duration::from_secs(3);
        tokio::time::sleep(PAUSE).await;
        let before = self.control.cpu()?;
        tokio::time::sleep(TIME).await;
        Ok((self.control.cpu()? - before) / TIME.as_secs_f64())
    }

    async fn many(&mut self, add: bool) -> Result<Changes> {
        let mut times = Vec::new();
        let before = self.control.cpu()?;
        for number in PODS..PODS + CHANGES {
            tokio::time::sleep(PAUSE).await;
            let namespace = namespace_of(number % SERVICES);
            self.crowd.expect(&format!("Kubernetes//Pod/{namespace}/{}", pod_name(number)));
            let start = match add {
                true => self.world.put_pod(number).await?,
                false => self.world.take_pod(number).await?,
            };
            let (crowd, count) = (Arc::clone(&self.crowd), self.subscribers.len());
            let last = self.unless_one_ends(crowd.seen(count)).await?;
            times.push(last.duration_since(start));
        }
        tokio::time::sleep(PAUSE).await;
        Ok(Changes { times, cpu_each: (self.control.cpu()? - before) / f64::from(CHANGES) })
    }

    /// Waits, but not for streams that failed.
    async fn unless_one_ends<T>(&mut self, wait: impl Future<Output = T>) -> Result<T> {
        tokio::select! {
            outcome = tokio::time::timeout(PATIENCE, wait) => {
                outcome.map_err(|_| anyhow::anyhow!("not all subscribers had it after {PATIENCE:?}"))
            }
            Some(ended) = self.subscribers.join_next() => match ended? {
                Ok(()) => bail!("a subscriber ended"),
                Err(error) => Err(error.context("a subscriber failed")),
            },
        }
    }
}

fn connector(roots: &Path) -> Result<TlsConnector> {
    let pem = std::fs::read(roots).with_context(|| format!("reading {}", roots.display()))?;
    let mut store = rustls::RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(&pem) {
        store.add(root?)?;
    }
    ensure!(!store.is_empty(), "no root in {}", roots.display());
    let mut config = rustls::ClientConfig::builder_with_provider(TlsSettings::default().provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(store)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}
