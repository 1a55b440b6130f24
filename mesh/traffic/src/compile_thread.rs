//! The thread that expressions are compiled on. It has a large stack, so there is one for all of them, and only while there is work: a
//! change of thousands of policies starts one thread, and what its stack took is given back after it.

use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use cel::common::ast::IdedExpr;
use parking_lot::Mutex;

use crate::expression::{ExpressionError, Names, parse};

/// The parser recurses for each level of its grammar, several times a byte at worst. Memory is used only as far as it goes.
const STACK: usize = 64 << 20;
/// How long it waits for work before it ends.
const IDLE: Duration = Duration::from_secs(1);

type Compiled = Result<IdedExpr, ExpressionError>;

struct Job {
    text: String,
    names: &'static Names,
    answer: SyncSender<Compiled>,
}

/// Where work is handed in; `None` before the first, and after a thread has ended. The lock is held while a job is handed over and while a
/// thread is started.
static THREAD: Mutex<Option<SyncSender<Job>>> = Mutex::new(None);

/// Compiles an expression, after those that came before it.
pub(crate) fn run(text: &str, names: &'static Names) -> Compiled {
    let (answer, compiled) = sync_channel(1);
    hand_in(Job { text: text.to_owned(), names, answer })?;
    // Nothing comes if the parser panicked: the next job starts another thread.
    compiled.recv().unwrap_or_else(|_| Err(ExpressionError::Parser("the parser failed".to_owned())))
}

fn hand_in(job: Job) -> Result<(), ExpressionError> {
    let mut thread = THREAD.lock();
    let unsent = match thread.as_ref() {
        // A job is handed over from hand to hand: one that the thread does not take any more comes back.
        Some(thread) => match thread.send(job) {
            Ok(()) => return Ok(()),
            Err(unsent) => unsent.0,
        },
        None => job,
    };
    let failed = |reason: String| ExpressionError::Parser(reason);
    let new = start().map_err(|error| failed(error.to_string()))?;
    new.send(unsent).map_err(|_| failed("the thread has ended".to_owned()))?;
    *thread = Some(new);
    Ok(())
}

fn start() -> std::io::Result<SyncSender<Job>> {
    let (jobs, work) = sync_channel::<Job>(0);
    let compiling = thread::Builder::new().name("cel".to_owned()).stack_size(STACK);
    compiling.spawn(move || {
        loop {
            match work.recv_timeout(IDLE) {
                // Who asked may have given up.
                Ok(Job { text, names, answer }) => drop(answer.send(parse(&text, names))),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
            }
        }
    })?;
    Ok(jobs)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::facts::OF_REQUESTS;

    fn threads() -> usize {
        let names = std::fs::read_dir("/proc/self/task").unwrap();
        let is_it = |task: std::fs::DirEntry| {
            std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "cel")
        };
        names.filter_map(Result::ok).map(is_it).filter(|it| *it).count()
    }

    #[test]
    fn thousands_of_expressions_share_one_thread_which_ends() {
        let most = thread::scope(|scope| {
            let compiling: Vec<_> = (0..4)
                .map(|part| {
                    scope.spawn(move || {
                        let text = |at: usize| {
                            format!("request.path == '/{part}/{at}' && source.namespace == 'shop'")
                        };
                        (0..500)
                            .map(|at| run(&text(at), &OF_REQUESTS).map(|_| threads()).unwrap())
                            .max()
                            .unwrap_or_default()
                    })
                })
                .collect();
            compiling.into_iter().map(|it| it.join().unwrap()).max().unwrap()
        });
        // One that has ended may still be there beside its successor.
        assert!(most <= 2, "{most} threads");
        assert!(matches!(run("a b", &OF_REQUESTS), Err(ExpressionError::Syntax(_))));
        let deadline = std::time::Instant::now() + 30 * IDLE;
        while threads() > 0 {
            assert!(std::time::Instant::now() < deadline, "the thread stays");
            thread::sleep(IDLE / 10);
        }
        // The next one finds another thread.
        run("request.path == '/'", &OF_REQUESTS).unwrap();
    }
}
