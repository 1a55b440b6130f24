//! The program's long-lived tasks: each is held, named and watched.

use std::future::Future;

use tokio::task::{AbortHandle, JoinSet};

/// An essential task that ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum TaskEnded {
    /// It returned.
    #[error("the task `{0}` ended")]
    Returned(&'static str),
    /// It panicked.
    #[error("the task `{name}` panicked: {source}")]
    Panicked {
        /// Which.
        name: &'static str,
        /// With what.
        source: tokio::task::JoinError,
    },
}

/// Tasks that live as long as the program. Dropping this ends them.
#[derive(Debug, Default)]
pub struct Tasks {
    set: JoinSet<Option<&'static str>>,
    names: Vec<(AbortHandle, &'static str)>,
}

impl Tasks {
    /// Runs a task that must not end.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let handle = self.set.spawn(async move {
            task.await;
            Some(name)
        });
        self.names.push((handle, name));
    }

    /// Runs a task that ends when its work is done.
    pub fn spawn_once(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let handle = self.set.spawn(async move {
            task.await;
            None
        });
        self.names.push((handle, name));
    }

    /// Resolves when a task that must not end did, or one panicked.
    pub async fn ended(&mut self) -> TaskEnded {
        loop {
            match self.set.join_next_with_id().await {
                Some(Ok((_, Some(name)))) => return TaskEnded::Returned(name),
                Some(Ok((_, None))) => {}
                Some(Err(source)) => {
                    let named = self.names.iter().find(|(handle, _)| handle.id() == source.id());
                    let name = named.map_or("unnamed", |(_, name)| name);
                    return TaskEnded::Panicked { name, source };
                }
                None => std::future::pending().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_essential_task_that_ends_is_named() {
        let mut tasks = Tasks::default();
        tasks.spawn_once("done", async {});
        tasks.spawn("stays", std::future::pending());
        tasks.spawn("ends", async {});
        assert!(matches!(tasks.ended().await, TaskEnded::Returned("ends")));
        tasks.spawn("breaks", async { panic!("on purpose") });
        assert!(matches!(tasks.ended().await, TaskEnded::Panicked { name: "breaks", .. }));
    }
}
