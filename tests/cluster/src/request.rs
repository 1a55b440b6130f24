//! What a cluster's supervisor is asked over its socket, and what it answers: one JSON packet each, with descriptors.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The longest packet, bytes.
pub const LONGEST: usize = 128 * 1024;
/// How much of a program's output an answer holds, bytes.
pub const OUTPUT: usize = 48 * 1024;

/// A request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "camelCase")]
pub enum Request {
    /// Whether the cluster is up; answers at once.
    Ready,
    /// The network namespace of a place: `fabric`, `control` or a node. The answer has one descriptor.
    Network {
        /// Which.
        place: String,
    },
    /// Cuts or mends the link of a place.
    Link {
        /// `control` or a node.
        place: String,
        /// Whether it carries packets.
        up: bool,
    },
    /// Kills a node's first process, and with it all others: a power cut.
    Crash {
        /// The node.
        node: String,
    },
    /// Boots a node that crashed.
    Boot {
        /// The node.
        node: String,
    },
    /// Ends a program of the control plane: `etcd`, `kube-apiserver`, `kube-controller-manager`, `kube-scheduler`.
    Stop {
        /// Which.
        program: String,
    },
    /// Starts it again.
    Start {
        /// Which.
        program: String,
    },
    /// Runs a command in a node's namespaces.
    Run {
        /// The node.
        node: String,
        /// Program and arguments.
        command: Vec<String>,
    },
    /// Imports image archives on every node that is up.
    Load {
        /// The archives.
        archives: Vec<PathBuf>,
    },
    /// Ends the cluster.
    Down,
}

/// An answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "camelCase")]
pub enum Answer {
    /// Done.
    Done,
    /// The cluster is still starting; what it does now.
    Starting {
        /// The step.
        step: String,
    },
    /// A command has ended.
    Ran {
        /// Its exit code, 128 and the signal's number for a killed one.
        code: i32,
        /// The end of its output and errors.
        output: String,
    },
    /// Not done.
    Failed {
        /// Why.
        message: String,
    },
}
