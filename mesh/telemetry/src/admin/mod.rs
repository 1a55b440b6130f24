//! The admin server's routes (port 15000, loopback): dumps, levels, profiles, drain and quit.
//!
//! The program passes in the sections to dump and the actions for draining and quitting.

mod profile;

use std::sync::Arc;

use ::http::StatusCode;
use serde_json::{Map, Value};
use tracing::warn;

use crate::LevelHandle;
use crate::access::{Filter, Taps};
use crate::http::{Query, Reply, Router, reply, stream, text};

pub use profile::ProfileError;

type Dump = Arc<dyn Fn() -> Result<Value, serde_json::Error> + Send + Sync>;

/// Collects the routes.
#[derive(Default)]
pub struct Admin {
    sections: Vec<(String, Dump)>,
    router: Router,
}

impl Admin {
    /// Profiles only; everything else is added.
    pub fn new() -> Self {
        let router = Router::new()
            .get("/debug/pprof/profile", |query| async move { profile::cpu(&query).await })
            .get("/debug/pprof/heap", |query| async move { profile::heap(&query).await });
        Self { sections: Vec::new(), router }
    }

    /// Adds a section of `/config_dump`, in the order of these calls. Called on a blocking thread.
    #[must_use]
    pub fn section<F>(mut self, name: &str, dump: F) -> Self
    where
        F: Fn() -> Result<Value, serde_json::Error> + Send + Sync + 'static,
    {
        self.sections.push((name.to_owned(), Arc::new(dump)));
        self
    }

    /// `GET` or `POST /logging` shows the filter in force. `POST` with `?level=FILTER` changes it, and with `?reset` restores
    /// the one from program start.
    #[must_use]
    pub fn logging(mut self, level: LevelHandle) -> Self {
        let shown = level.clone();
        self.router = self
            .router
            .get("/logging", move |_| {
                let reply = show_level(&shown);
                async move { reply }
            })
            .post("/logging", move |query| {
                let reply = set_level(&level, &query);
                async move { reply }
            });
        self
    }

    /// `POST /quitquitquit`: `quit` starts the end of the program.
    #[must_use]
    pub fn on_quit(mut self, quit: impl Fn() + Send + Sync + 'static) -> Self {
        self.router = self.router.post("/quitquitquit", move |_| {
            quit();
            async { text(StatusCode::OK, "shutting down\n") }
        });
        self
    }

    /// `POST /drain_listeners`: `drain` stops accepting.
    #[must_use]
    pub fn on_drain(mut self, drain: impl Fn() + Send + Sync + 'static) -> Self {
        self.router = self.router.post("/drain_listeners", move |_| {
            drain();
            async { text(StatusCode::OK, "draining\n") }
        });
        self
    }

    /// `GET /tap`: the records of the access log from now on, one JSON object a line, those that the parameters choose
    /// ([`Filter::parse`]). 429 while there are too many.
    #[must_use]
    pub fn taps(mut self, taps: Taps) -> Self {
        self.router = self.router.get("/tap", move |query| {
            let reply = match Filter::parse(&query).map(|filter| taps.open(filter)) {
                Ok(Ok(tap)) => stream("application/x-ndjson", tap.into_lines()),
                Ok(Err(error)) => text(StatusCode::TOO_MANY_REQUESTS, format!("{error}\n")),
                Err(error) => text(StatusCode::BAD_REQUEST, format!("{error}\n")),
            };
            async move { reply }
        });
        self
    }

    /// Further `GET` routes of the program.
    #[must_use]
    pub fn get<F, Replying>(mut self, path: &str, handler: F) -> Self
    where
        F: Fn(Query) -> Replying + Send + Sync + 'static,
        Replying: Future<Output = Reply> + Send + 'static,
    {
        self.router = self.router.get(path, handler);
        self
    }

    /// The finished routes, for [`crate::http::serve`].
    pub fn into_router(self) -> Router {
        let Self { sections, router } = self;
        let sections = Arc::new(sections);
        router.get("/config_dump", move |query| {
            let sections = Arc::clone(&sections);
            async move { config_dump(sections, query).await }
        })
    }
}

/// The same text as Istio's node proxy sends, because `istioctl` prints it.
fn show_level(level: &LevelHandle) -> Reply {
    text(StatusCode::OK, format!("current log level is {}\n", level.get()))
}

fn set_level(level: &LevelHandle, query: &Query) -> Reply {
    let filter = query.get("level").or_else(|| query.get("reset").map(|_| "reset"));
    match filter.map_or(Ok(()), |filter| level.set(filter)) {
        Ok(()) => show_level(level),
        Err(error) => text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    }
}

/// All sections, or with `?section=NAME` one of them.
async fn config_dump(sections: Arc<Vec<(String, Dump)>>, query: Query) -> Reply {
    let dumped = tokio::task::spawn_blocking(move || dump(&sections, query.get("section"))).await;
    match dumped {
        Ok(Ok(body)) => reply(StatusCode::OK, "application/json", body.into()),
        Ok(Err(error)) => {
            warn!(%error, "the configuration could not be dumped");
            text(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("the configuration could not be dumped: {error}\n"),
            )
        }
        Err(error) => {
            warn!(%error, "a section of the configuration dump panicked");
            text(StatusCode::INTERNAL_SERVER_ERROR, "a section of the configuration dump panicked\n")
        }
    }
}

fn dump(sections: &[(String, Dump)], only: Option<&str>) -> Result<Vec<u8>, serde_json::Error> {
    let mut all = Map::new();
    for (name, dump) in sections {
        if only.is_none_or(|only| only == name) {
            all.insert(name.clone(), dump()?);
        }
    }
    serde_json::to_vec_pretty(&Value::Object(all))
}
