//! The program `ambit-cluster`: a real two-node Kubernetes on this machine.

use std::path::PathBuf;
use std::process::ExitCode;

use ambit_cluster::layout::{self, Layout};
use ambit_cluster::{Cluster, Options, cluster, conformance, mesh, node, supervisor};
use clap::Parser;

/// The name of the cluster that people use.
const DEFAULT: &str = "ambit";

/// A real two-node Kubernetes in network namespaces.
#[derive(Debug, Parser)]
#[command(name = "ambit-cluster")]
enum Command {
    /// Builds the programs and images that a cluster needs.
    Build,
    /// Starts a cluster that runs until `down`, and prints how to use it.
    Up {
        /// Its name.
        #[arg(default_value = DEFAULT)]
        name: String,
        /// Its number: clusters of different numbers share no address range.
        #[arg(long, default_value_t = 0)]
        number: u8,
        /// Installs Ambit and the Bookinfo application too.
        #[arg(long)]
        mesh: bool,
    },
    /// Ends a cluster and removes everything of it.
    Down {
        /// Its name.
        #[arg(default_value = DEFAULT)]
        name: String,
    },
    /// Runs profiles of Gateway API's conformance suite on a cluster of its own, and writes the report.
    Conformance {
        /// Which profiles.
        #[arg(long, value_enum, default_value_t = conformance::Suite::Mesh)]
        suite: conformance::Suite,
        /// Runs one test, by its short name, and writes no report.
        #[arg(long, value_name = "TEST")]
        only: Option<String>,
        /// Features to test beside those that the control plane announces.
        #[arg(long, value_delimiter = ',')]
        features: Vec<String>,
        /// A running cluster to use instead, which must have number `--number`.
        #[arg(long, value_name = "NAME")]
        on: Option<String>,
        /// The report, YAML.
        #[arg(long, default_value = "target/conformance.yaml")]
        report: PathBuf,
        /// Number of the cluster.
        #[arg(long, default_value_t = 3)]
        number: u8,
    },
    /// Imports image archives on the nodes of a running cluster.
    Load {
        /// The cluster.
        #[arg(long, default_value = DEFAULT)]
        name: String,
        /// Archives, as `docker save` and `buildah push docker-archive:` write them.
        archives: Vec<PathBuf>,
    },
    /// Runs a command in the namespaces of a node.
    On {
        /// The cluster.
        #[arg(long, default_value = DEFAULT)]
        name: String,
        /// The node: n1, n2.
        node: String,
        /// Program and arguments.
        #[arg(trailing_var_arg = true, required = true)]
        command: Vec<String>,
    },
    /// Ends a node as a power cut would.
    Crash {
        /// The cluster.
        #[arg(long, default_value = DEFAULT)]
        name: String,
        /// The node.
        node: String,
    },
    /// Boots a node that crashed.
    Boot {
        /// The cluster.
        #[arg(long, default_value = DEFAULT)]
        name: String,
        /// The node.
        node: String,
    },
    #[command(hide = true)]
    Supervise(supervisor::Options),
    #[command(hide = true)]
    Node { file: PathBuf },
    #[command(hide = true)]
    NodeFirst { file: PathBuf },
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("AMBIT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    // The stages make namespaces, which a process of one thread must do.
    let outcome = match Command::parse() {
        Command::Supervise(options) => supervisor::enter(&options).map_err(anyhow::Error::from),
        Command::Node { file } => node::enter(&file).map_err(anyhow::Error::from),
        Command::NodeFirst { file } => node::run_first(&file).map_err(anyhow::Error::from),
        command => tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(anyhow::Error::from)
            .and_then(|runtime| runtime.block_on(run(command))),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("ambit-cluster: {error:#}");
        ExitCode::FAILURE
    })
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Build => drop(cluster::prepare(&Layout::find())?),
        Command::Up { name, number, mesh: with_mesh } => {
            let own = std::env::current_exe()?;
            let mut options = Options { number, owned: false, ..Options::new(name, own) };
            if with_mesh {
                let layout = Layout::find();
                options.images = mesh::images(&layout)?;
                options.images.push(mesh::bookinfo_image(&layout)?);
            }
            let cluster = Cluster::start(options).await?;
            if with_mesh {
                eprintln!("installing Ambit and Bookinfo");
                mesh::install(&cluster, &mesh::SETTINGS).await?;
                mesh::install_bookinfo(&cluster).await?;
            }
            let (programs, ambit) = (cluster.layout().bin(), layout::built()?);
            println!("export KUBECONFIG={}", cluster.kubectl().kubeconfig().display());
            println!("export PATH={}:{}:$PATH", programs.display(), ambit.display());
        }
        Command::Down { name } => match Cluster::attach(&name) {
            Ok(cluster) => cluster.down().await?,
            Err(_) => cluster::clean_dead(&Layout::find())?,
        },
        Command::Conformance { suite, only, features, on, report, number } => {
            let program = std::env::current_exe()?;
            let options = conformance::Options { program, number, suite, only, features, on, report };
            conformance::run(options).await?;
        }
        Command::Load { name, archives } => Cluster::attach(name)?.load_archives(archives).await?,
        Command::On { name, node, command } => {
            let command: Vec<_> = command.iter().map(String::as_str).collect();
            let ran = Cluster::attach(name)?.run_on(&node, &command).await?;
            println!("{}", ran.output);
            return Ok(ExitCode::from(u8::try_from(ran.code).unwrap_or(1)));
        }
        Command::Crash { name, node } => Cluster::attach(name)?.crash(&node).await?,
        Command::Boot { name, node } => Cluster::attach(name)?.boot(&node).await?,
        Command::Supervise(_) | Command::Node { .. } | Command::NodeFirst { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}
