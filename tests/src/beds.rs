//! Many tests on one cluster. Each is reported separately; the first one starts the cluster, the last one ends it.

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Failed, Trial};
use tokio::runtime::Runtime;
use tokio::sync::OnceCell;

/// A cluster with what the tests of one file need in it.
pub trait Bed: Send + Sync + Sized + 'static {
    /// Starts it; the error says what is missing, as a privilege.
    fn start() -> impl Future<Output = Result<Self, Box<dyn std::error::Error>>>;
    /// Ends it.
    fn stop(self) -> impl Future<Output = ()>;
}

/// The tests of one bed.
#[derive(Debug)]
pub struct Trials<B> {
    shared: Arc<Shared<B>>,
    trials: Vec<Trial>,
}

#[derive(Debug)]
struct Shared<B> {
    runtime: Runtime,
    bed: OnceCell<Result<B, String>>,
}

impl<B: Bed> Trials<B> {
    /// No tests yet.
    ///
    /// # Panics
    /// When no threads can be started.
    pub fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
        Self { shared: Arc::new(Shared { runtime, bed: OnceCell::new() }), trials: Vec::new() }
    }

    /// One more test; its name is the sentence that it shows to hold.
    pub fn add<F>(&mut self, name: impl Into<String>, test: F)
    where
        F: AsyncFnOnce(&B) + Send + 'static,
    {
        let shared = Arc::clone(&self.shared);
        self.trials.push(Trial::test(name, move || {
            shared.runtime.block_on(async {
                let start = async || B::start().await.map_err(|error| error.to_string());
                let bed = shared.bed.get_or_init(start).await.as_ref();
                let bed = bed.map_err(|error| Failed::from(format!("the bed does not start: {error}")))?;
                test(bed).await;
                Ok(())
            })
        }));
    }

    /// Runs what the command line asks for.
    ///
    /// # Panics
    /// When a test holds on to the bed after it has ended.
    pub fn run(self) -> ExitCode {
        let Self { shared, trials } = self;
        let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
        let Shared { runtime, bed } = Arc::into_inner(shared).expect("every test has ended");
        if let Some(Ok(bed)) = bed.into_inner() {
            runtime.block_on(bed.stop());
        }
        conclusion.exit_code()
    }
}

/// Adds functions to [`Trials`], each as a test named `subject::function`.
#[macro_export]
macro_rules! add_trials {
    ($trials:expr, $subject:literal: $($test:ident),* $(,)?) => {
        $($trials.add(concat!($subject, "::", stringify!($test)), async |bed| $test(bed).await);)*
    };
}

impl<B: Bed> Default for Trials<B> {
    fn default() -> Self {
        Self::new()
    }
}
