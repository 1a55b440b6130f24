//! Builds the programs of Kubernetes, CoreDNS, Helm and h2spec from the Go modules in `go/`, once.
//!
//! The versions are those of `go/*/go.mod`, held by the checksums beside them. What was built is remembered by a
//! stamp with everything that it was built from, so that the second time costs nothing.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::layout::Layout;

/// The Go toolchain; any Go since 1.21 fetches it.
const TOOLCHAIN: &str = "go1.27.1";
/// Kubernetes' version, as in `go/kubernetes/go.mod`; its programs refuse to work without one.
const KUBERNETES: &str = "1.37.2";
/// Helm's version, as in `go/addons/go.mod`.
const HELM: &str = "4.3.1";
/// Debian's programs that a cluster runs, with their packages.
const DEBIAN: [(&str, &str); 8] = [
    ("/usr/bin/etcd", "etcd-server"),
    ("/usr/bin/containerd", "containerd"),
    ("/usr/sbin/runc", "runc"),
    ("/usr/lib/cni/ptp", "containernetworking-plugins"),
    ("/usr/sbin/nft", "nftables"),
    ("/usr/sbin/conntrack", "conntrack"),
    ("/usr/bin/buildah", "buildah"),
    ("/bin/busybox", "busybox-static"),
];

/// Programs that are built together.
#[derive(Debug)]
struct Module {
    /// The name of its stamp.
    name: &'static str,
    /// Folder below `go/`.
    folder: &'static str,
    /// What Go is to do with the packages: `build`, or `test -c` for a suite of tests.
    action: &'static [&'static str],
    packages: &'static [&'static str],
    /// Sources of our own in the module, beside `go.mod` and `go.sum`.
    sources: &'static [&'static str],
    link: String,
}

fn modules() -> [Module; 3] {
    let [major, minor] = ["1", "37"];
    let version = "k8s.io/component-base/version";
    let kubernetes = format!(
        "-s -w -X {version}.gitVersion=v{KUBERNETES} -X {version}.gitMajor={major} -X {version}.gitMinor={minor} \
         -X k8s.io/client-go/pkg/version.gitVersion=v{KUBERNETES}"
    );
    [
        Module {
            name: "kubernetes",
            folder: "kubernetes",
            action: &["build"],
            packages: &[
                "k8s.io/kubernetes/cmd/kubectl",
                "k8s.io/kubernetes/cmd/kubelet",
                "k8s.io/kubernetes/cmd/kube-apiserver",
                "k8s.io/kubernetes/cmd/kube-controller-manager",
                "k8s.io/kubernetes/cmd/kube-scheduler",
                "k8s.io/kubernetes/cmd/kube-proxy",
            ],
            sources: &[],
            link: kubernetes,
        },
        Module {
            name: "addons",
            folder: "addons",
            action: &["build"],
            packages: &["helm.sh/helm/v4/cmd/helm", "./coredns"],
            sources: &["coredns/main.go"],
            link: format!("-s -w -X helm.sh/helm/v4/internal/version.version=v{HELM}"),
        },
        Module {
            name: "h2spec",
            folder: "h2spec",
            action: &["build"],
            packages: &["github.com/summerwind/h2spec/cmd/h2spec"],
            sources: &[],
            link: "-s -w".to_owned(),
        },
    ]
}

/// Builds what is missing or older than its sources.
///
/// # Errors
/// [`Error::Missing`] names what is not installed; [`Error::Program`] holds the compiler's output.
pub fn build(layout: &Layout) -> Result<()> {
    require_installed()?;
    for module in modules() {
        build_module(layout, &module)?;
    }
    Ok(())
}

/// Builds the conformance suite of Gateway API and the servers that it talks to, if they are missing or older than their
/// sources: `conformance.test`, `echo-basic`, `client` and `server`.
///
/// # Errors
/// As for [`build`].
pub fn build_conformance(layout: &Layout) -> Result<()> {
    require_installed()?;
    let suite = Module {
        name: "conformance",
        folder: "conformance",
        action: &["test", "-c"],
        packages: &["sigs.k8s.io/gateway-api/conformance"],
        sources: &[],
        link: "-s -w".to_owned(),
    };
    let basic = Module {
        name: "echo-basic",
        folder: "conformance",
        action: &["build"],
        packages: &["sigs.k8s.io/gateway-api-conformance-images/echo-basic"],
        sources: &[],
        link: "-s -w".to_owned(),
    };
    let echo = Module {
        name: "echo",
        folder: "echo",
        action: &["build"],
        packages: &["istio.io/istio/pkg/test/echo/cmd/client", "istio.io/istio/pkg/test/echo/cmd/server"],
        sources: &[],
        link: "-s -w".to_owned(),
    };
    [suite, basic, echo].iter().try_for_each(|module| build_module(layout, module))
}

/// Fails when this process is not root's or a program that a cluster needs is missing.
fn require_installed() -> Result<()> {
    if !nix::unistd::Uid::effective().is_root() {
        return Err(Error::Missing("a cluster needs root: its nodes are namespaces".to_owned()));
    }
    let missing: Vec<_> =
        DEBIAN.iter().filter(|(file, _)| !Path::new(file).exists()).map(|(_, package)| *package).collect();
    if !missing.is_empty() {
        return Err(Error::Missing(format!(
            "a cluster needs the Debian packages {}: run `make packages`",
            missing.join(", ")
        )));
    }
    if go().arg("version").output().is_err() {
        return Err(Error::Missing("a cluster needs Go 1.21 or later on PATH".to_owned()));
    }
    Ok(())
}

fn go() -> Command {
    let mut command = Command::new("nice");
    command.args(["-n", "10", "go"]).env("GOTOOLCHAIN", TOOLCHAIN).env("CGO_ENABLED", "0");
    command.env("GOFLAGS", "-buildvcs=false -mod=readonly");
    command
}

fn build_module(layout: &Layout, module: &Module) -> Result<()> {
    let folder = layout.source("go").join(module.folder);
    let stamp = layout.bin().join(format!(".{}.stamp", module.name));
    let wanted = built_from(&folder, module)?;
    if fs::read_to_string(&stamp).is_ok_and(|built| built == wanted) {
        return Ok(());
    }
    let start = Instant::now();
    eprintln!("building {} (minutes, the first time)", module.packages.join(" "));
    let bin = layout.bin();
    fs::create_dir_all(&bin).map_err(Error::system(format!("make {}", bin.display())))?;
    let mut command = go();
    command.current_dir(&folder).args(module.action).args(["-ldflags", &module.link, "-o"]);
    // A directory, to Go, ends with a slash.
    command.arg(bin.join("")).args(module.packages);
    output_of(&mut command)?;
    eprintln!("built in {} s", start.elapsed().as_secs());
    fs::write(&stamp, wanted).map_err(Error::system(format!("write {}", stamp.display())))
}

/// Everything that decides what a module's programs are.
fn built_from(folder: &Path, module: &Module) -> Result<String> {
    let mut text = format!("{TOOLCHAIN}\n{}\n", module.link);
    for file in ["go.mod", "go.sum"].iter().chain(module.sources) {
        let path = folder.join(file);
        text += &fs::read_to_string(&path).map_err(Error::system(format!("read {}", path.display())))?;
    }
    Ok(text)
}

/// Runs a program to its end and returns what it printed.
///
/// # Errors
/// [`Error::Program`] with the end of its output when it fails.
pub fn output_of(command: &mut Command) -> Result<String> {
    let name = format!("{command:?}");
    let output = command.output().map_err(|error| Error::program(&name, error.to_string()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let from = said.len().saturating_sub(4096);
    let end: String = said.char_indices().filter(|(at, _)| *at >= from).map(|(_, c)| c).collect();
    Err(Error::program(name, format!("{}: {end}", output.status)))
}
