//! OpenSSH, whose server speaks first: keys, a command, `scp` and plain pipes both ways.

use std::fs;
use std::path::Path;

use ambit_local::{Command, Pod};

use crate::{Place, Programs, Talk, assert_same, run, shell, text};

const PORT: u16 = 2222;
/// Size of each file, bytes.
const SIZE: usize = 8 * 1024 * 1024 + 17;

pub(crate) async fn carries_files(bed: &Programs, place: Place) {
    let talk = Talk::new(bed, "sshd", place, PORT).await;
    for key in ["host", "user"] {
        let make = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]);
        run(&talk.server, &talk.directory, make.arg(talk.file(key))).await;
    }
    let host_key = fs::read_to_string(talk.file("host.pub")).unwrap();
    fs::write(talk.file("known"), format!("[{}]:{PORT} {host_key}", talk.host)).unwrap();
    fs::copy(talk.file("user.pub"), talk.file("authorized")).unwrap();
    fs::write(talk.file("sshd.conf"), server_configuration(&talk.directory)).unwrap();
    fs::write(talk.file("ssh.conf"), client_configuration(&talk)).unwrap();
    // sshd wants a directory in /run; that one is its own and goes with it.
    let script = "mount -t tmpfs tmpfs /run; mkdir -m 755 /run/sshd; exec /usr/sbin/sshd -D -e -f \"$1\"";
    let serve = Command::new("unshare").args(["--mount", "sh", "-ec", script, "sh"]);
    let server = talk.serve(serve.arg(talk.file("sshd.conf")), PORT).await;
    where_it_leads(&talk, server.pid()).await;
    copies(&talk).await;
    pipes(&talk).await;
    assert!(talk.assert_carried(5).await.is_empty());
    talk.end(server).await;
}

fn server_configuration(directory: &Path) -> String {
    let at = directory.display();
    format!(
        "Port {PORT}\nHostKey {at}/host\nAuthorizedKeysFile {at}/authorized\nPidFile none\nStrictModes no\n\
         UsePAM no\nUseDNS no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
         PermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\n"
    )
}

/// The host's key is known beforehand: another server than the right one would be refused.
fn client_configuration(talk: &Talk<'_>) -> String {
    let at = talk.directory.display();
    format!(
        "Host server\nHostName {}\nPort {PORT}\nUser root\nIdentityFile {at}/user\nIdentitiesOnly yes\n\
         UserKnownHostsFile {at}/known\nStrictHostKeyChecking yes\nBatchMode yes\nConnectTimeout 20\n",
        talk.host
    )
}

/// A command runs in the server's pod, and the server sees the client's own address.
async fn where_it_leads(talk: &Talk<'_>, server: u32) {
    let configuration = talk.file("ssh.conf");
    let command = Command::new("ssh").args(["-F", text(&configuration), "server"]);
    let said = talk.ask(command.arg("readlink /proc/self/ns/net; echo $SSH_CONNECTION")).await;
    let namespace = fs::read_link(format!("/proc/{server}/ns/net")).unwrap();
    let (seen, connection) = said.trim().split_once('\n').unwrap_or_else(|| panic!("{said}"));
    assert_eq!(Path::new(seen), namespace);
    let words: Vec<&str> = connection.split(' ').collect();
    let is = |word: &str, pod: &Pod| pod.ips().iter().any(|ip| ip.to_string() == word);
    assert!(is(words[0], &talk.client) && is(words[2], &talk.server), "{connection}");
    assert_eq!(words[3], PORT.to_string());
}

async fn copies(talk: &Talk<'_>) {
    let (sent, bytes) = talk.random_file("copied", SIZE);
    let (stored, got) = (talk.file("stored"), talk.file("got"));
    let configuration = talk.file("ssh.conf");
    for (from, to) in [
        (text(&sent), format!("server:{}", stored.display())),
        (&format!("server:{}", stored.display()), text(&got).to_owned()),
    ] {
        talk.ask(Command::new("scp").args(["-q", "-F", text(&configuration), from, &to])).await;
    }
    assert_same(&fs::read(stored).unwrap(), &bytes);
    assert_same(&fs::read(got).unwrap(), &bytes);
}

async fn pipes(talk: &Talk<'_>) {
    let (sent, bytes) = talk.random_file("piped", SIZE);
    let (stored, got) = (talk.file("piped-stored"), talk.file("piped-got"));
    let configuration = talk.file("ssh.conf");
    let paths = [text(&configuration), text(&sent), text(&stored)];
    talk.ask(shell("ssh -F $1 server \"cat > $3\" < $2", paths)).await;
    talk.ask(shell("ssh -F $1 server \"cat $2\" > $3", [text(&configuration), text(&stored), text(&got)]))
        .await;
    assert_same(&fs::read(stored).unwrap(), &bytes);
    assert_same(&fs::read(got).unwrap(), &bytes);
}
