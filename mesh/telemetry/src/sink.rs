//! Writes lines to a file or stdout from a separate thread. The queue is bounded and never blocks the sender: when the disk is
//! full or the reader is stuck, lines are dropped and counted.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes collected before a write, at most (a single longer line goes alone).
const WRITE_SIZE: usize = 64 << 10;
/// How long the end of the program waits for lines that are still queued.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);
/// How long lines are gathered before the next write.
const GATHER: Duration = Duration::from_millis(5);
/// How often the writer checks whether log rotation has moved the file.
const ROTATION_CHECK: Duration = Duration::from_secs(1);

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A file, appended to, and opened again when it was moved away.
    File(PathBuf),
}

/// Something that becomes a line on the writer's thread.
pub(crate) trait Render: Send + 'static {
    /// Appends the line, newline included.
    fn render(&self, line: &mut Vec<u8>);
}

impl Render for Vec<u8> {
    fn render(&self, line: &mut Vec<u8>) {
        line.extend_from_slice(self);
    }
}

/// Counts of a sink.
#[derive(Debug, Default)]
pub(crate) struct SinkMetrics {
    pub(crate) dropped: AtomicU64,
    pub(crate) failed_writes: AtomicU64,
}

/// The sending end. Cheap to clone.
#[derive(Debug)]
pub(crate) struct Sink<T> {
    queue: SyncSender<T>,
    metrics: Arc<SinkMetrics>,
}

impl<T> Clone for Sink<T> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), metrics: Arc::clone(&self.metrics) }
    }
}

impl<T: Render> Sink<T> {
    /// Starts the writer. `capacity` lines may wait.
    pub(crate) fn spawn(name: &str, target: Target, capacity: usize) -> io::Result<(Self, LogWriter)> {
        let (queue, lines) = sync_channel(capacity);
        let metrics = Arc::new(SinkMetrics::default());
        let mut output = Output::open(target)?;
        let counters = Arc::clone(&metrics);
        let (closed, closing) = sync_channel(0);
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            write_lines(&lines, &mut output, &counters, &stopped);
            // Fails if nobody waits for the end, which is fine.
            closed.send(()).ok();
        })?;
        Ok((Self { queue, metrics }, LogWriter { thread: Some(thread), closing, stop }))
    }

    /// Queues a line, or drops and counts it.
    pub(crate) fn send(&self, line: T) {
        match self.queue.try_send(line) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.metrics.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    pub(crate) fn metrics(&self) -> &Arc<SinkMetrics> {
        &self.metrics
    }
}

/// Owns the writer's thread. Dropping it writes what is queued, for at most two seconds, and ends the
/// thread; lines sent later are dropped and counted.
#[derive(Debug)]
pub struct LogWriter {
    thread: Option<JoinHandle<()>>,
    closing: Receiver<()>,
    stop: Arc<std::sync::atomic::AtomicBool>,
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let ended = match self.closing.recv_timeout(CLOSE_PATIENCE) {
            Ok(()) | Err(RecvTimeoutError::Disconnected) => true,
            Err(RecvTimeoutError::Timeout) => false,
        };
        if let Some(thread) = self.thread.take().filter(|_| ended) {
            // A writer that panicked has said so on stderr.
            thread.join().ok();
        }
    }
}

fn write_lines<T: Render>(
    lines: &Receiver<T>,
    output: &mut Output,
    metrics: &SinkMetrics,
    stop: &std::sync::atomic::AtomicBool,
) {
    const POLL: Duration = Duration::from_millis(100);
    let mut buffer = Vec::with_capacity(4096);
    loop {
        let first = match lines.recv_timeout(POLL) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) if stop.load(Ordering::Acquire) => return,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        buffer.clear();
        first.render(&mut buffer);
        while buffer.len() < WRITE_SIZE {
            let Ok(line) = lines.try_recv() else { break };
            line.render(&mut buffer);
        }
        if let Err(Lost { lines }) = output.write(&buffer) {
            metrics.failed_writes.fetch_add(1, Ordering::Relaxed);
            metrics.dropped.fetch_add(lines, Ordering::Relaxed);
        }
        buffer.shrink_to(WRITE_SIZE);
        // The writer sleeps instead of waiting on the queue, so that a busy sender need not wake it for each line.
        if !stop.load(Ordering::Acquire) {
            std::thread::sleep(GATHER);
        }
    }
}

/// Lines that could not be written whole.
struct Lost {
    lines: u64,
}

/// The open target, and whether it ends in the middle of a line.
struct Output {
    open: Open,
    torn: bool,
}

enum Open {
    Stdout,
    Stderr,
    File { path: PathBuf, file: File, checked: Instant },
}

impl Output {
    fn open(target: Target) -> io::Result<Self> {
        let open = match target {
            Target::Stdout => Open::Stdout,
            Target::Stderr => Open::Stderr,
            Target::File(path) => Open::File { file: append(&path)?, path, checked: Instant::now() },
        };
        Ok(Self { open, torn: false })
    }

    /// Writes whole lines. A line that was cut by a full disk is terminated first, so that it does not corrupt the next one.
    fn write(&mut self, bytes: &[u8]) -> Result<(), Lost> {
        let lines = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == b'\n').count() as u64;
        if self.torn && self.open.write(b"\n") == 0 {
            return Err(Lost { lines: lines(bytes) });
        }
        let written = self.open.write(bytes);
        let (written, left) = bytes.split_at(written);
        self.torn = written.last().is_some_and(|last| *last != b'\n');
        if left.is_empty() { Ok(()) } else { Err(Lost { lines: lines(left) }) }
    }
}

impl Open {
    /// How many of the bytes could be written.
    fn write(&mut self, bytes: &[u8]) -> usize {
        match self {
            Self::Stdout => {
                let mut stdout = io::stdout().lock();
                let written = write_most(&mut stdout, bytes);
                if stdout.flush().is_ok() { written } else { 0 }
            }
            Self::Stderr => write_most(&mut io::stderr().lock(), bytes),
            Self::File { path, file, checked } => {
                if checked.elapsed() >= ROTATION_CHECK {
                    *checked = Instant::now();
                    // If the path can't be opened again, writing to the moved file continues.
                    if let Some(fresh) = moved(path, file).then(|| append(path).ok()).flatten() {
                        *file = fresh;
                    }
                }
                write_most(file, bytes)
            }
        }
    }
}

/// Writes until an error. Returns the number of written bytes.
fn write_most(output: &mut impl Write, bytes: &[u8]) -> usize {
    let mut written = 0;
    while let Some(left) = bytes.get(written..).filter(|left| !left.is_empty()) {
        match output.write(left) {
            Ok(0) => break,
            Ok(more) => written += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    written
}

fn append(path: &PathBuf) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

fn moved(path: &PathBuf, file: &File) -> bool {
    match (std::fs::metadata(path), file.metadata()) {
        (Ok(there), Ok(here)) => (there.dev(), there.ino()) != (here.dev(), here.ino()),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_reach_the_file_before_the_writer_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let (sink, writer) = Sink::<Vec<u8>>::spawn("test", Target::File(path.clone()), 10_000).unwrap();
        for number in 0..5_000 {
            sink.send(format!("line {number}\n").into_bytes());
        }
        drop(writer);
        let text = std::fs::read_to_string(path).unwrap();
        assert_eq!(text.lines().count(), 5_000);
        assert!(text.ends_with("line 4999\n"));
    }

    #[test]
    fn a_stuck_reader_never_blocks_the_sender() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        let status = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(status.success());
        // A reader that never reads: the pipe fills and the writer's thread blocks.
        let _reader = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let (sink, _writer) = Sink::<Vec<u8>>::spawn("test", Target::File(path), 16).unwrap();
        let start = Instant::now();
        for _ in 0..10_000 {
            sink.send(vec![b'x'; 1024]);
        }
        assert!(start.elapsed() < Duration::from_secs(2));
        assert!(sink.metrics().dropped.load(Ordering::Relaxed) > 0);
    }

    #[test]
    fn a_full_disk_is_counted_and_the_next_line_is_tried_again() {
        let (sink, _writer) =
            Sink::<Vec<u8>>::spawn("test", Target::File(PathBuf::from("/dev/full")), 16).unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while sink.metrics().failed_writes.load(Ordering::Relaxed) < 2 {
            assert!(Instant::now() < deadline, "failed writes must be counted");
            sink.send(b"line\n".to_vec());
            std::thread::yield_now();
        }
        assert!(sink.metrics().dropped.load(Ordering::Relaxed) >= 2, "so must the lines");
    }

    #[test]
    fn a_line_cut_by_a_full_disk_is_dropped_and_corrupts_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut output = Output::open(Target::File(path.clone())).unwrap();
        // As a disk that fills up in the middle of a write leaves it.
        std::fs::write(&path, "whole\nto").unwrap();
        output.torn = true;
        assert!(output.write(b"next\n").is_ok());
        assert!(!output.torn);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "whole\nto\nnext\n");
        let mut full = Output::open(Target::File(PathBuf::from("/dev/full"))).unwrap();
        assert!(matches!(full.write(b"one\ntwo\n"), Err(Lost { lines: 2 })));
    }
}
