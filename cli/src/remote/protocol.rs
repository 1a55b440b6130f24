//! The messages between a command and the mesh: one JSON object a packet.

use serde::{Deserialize, Serialize};

/// Maximum length of a packet, bytes.
pub(super) const LONGEST_PACKET: usize = 64 * 1024;
/// Text is sent in pieces of at most this many bytes; JSON may escape each byte to six.
pub(super) const PIECE: usize = 8 * 1024;

/// A container of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Target {
    pub(super) namespace: String,
    /// Name of the pod or of its Deployment.
    pub(super) pod: String,
    pub(super) container: Option<String>,
}

/// A proxy to ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum AskedProxy {
    /// The proxies of nodes, one after the other until one answers with success.
    Nodes,
    /// The proxy of this node.
    Node { name: String },
    /// The waypoint that is this pod.
    Waypoint { namespace: String, pod: String },
}

/// A request of a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Request {
    /// Runs a command; standard input, output and error come as descriptors with this packet.
    Exec { target: Target, command: Vec<String> },
    /// Prints the output of a container.
    Logs { target: Target, follow: bool },
    /// Prints the configuration of a node's proxy.
    Dump { node: String },
    /// Asks the admin server of a proxy, which answers in pieces.
    Admin { proxy: AskedProxy, path: String },
    /// Lists the proxies, as JSON.
    Proxies,
    /// Asks the admin server of a proxy, whose answer goes on until the caller leaves; it is passed on in whole lines.
    Stream { proxy: AskedProxy, path: String },
    /// Prints the objects that the control plane reads, as manifests.
    Manifests,
    /// Passes a signal on to the command of [`Request::Exec`].
    Signal { number: i32 },
}

/// A reply of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Reply {
    /// A piece of text to print.
    Text(String),
    /// The end, with the exit code of the command.
    Done { code: u8 },
    /// The request cannot be fulfilled.
    Failed(String),
}

/// Cuts text into pieces that fit into a packet each.
pub(super) fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let end = rest.floor_char_boundary(PIECE.min(rest.len()));
        let (piece, tail) = rest.split_at(end);
        rest = tail;
        (!piece.is_empty()).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_whole_characters_and_lose_nothing() {
        let text = "ä".repeat(PIECE);
        let cut: Vec<&str> = pieces(&text).collect();
        assert!(cut.iter().all(|piece| piece.len() <= PIECE));
        assert_eq!(cut.concat(), text);
        assert_eq!(pieces("").count(), 0);
    }

    #[test]
    fn the_longest_piece_fits_into_a_packet_however_it_is_escaped() {
        let text = "\u{1}".repeat(PIECE);
        let reply = Reply::Text(pieces(&text).next().expect("a piece").to_owned());
        assert!(serde_json::to_vec(&reply).expect("it can be encoded").len() <= LONGEST_PACKET);
    }
}
