//! CPU and heap profiles in the format of `pprof`.

mod cpu;
mod heap;

use ::http::StatusCode;

use crate::heap::StartError;
use crate::http::{Query, Reply, reply, text};

const DEFAULT_SECONDS: u64 = 10;
const MAX_SECONDS: u64 = 300;

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// Another profile runs.
    #[error("a profile is being taken already")]
    Busy,
    /// `seconds` is not a number in the allowed range.
    #[error("{0:?} is not a number of seconds between 1 and {MAX_SECONDS}")]
    Seconds(String),
    /// The profiler failed.
    #[error("the profiler failed: {0}")]
    Profiler(#[from] pprof::Error),
    /// The program does not use the sampling allocator.
    #[error(transparent)]
    Heap(#[from] StartError),
    /// The profile could not be encoded.
    #[error("the profile could not be encoded: {0}")]
    Encode(Box<dyn std::error::Error + Send + Sync>),
    /// The task that builds the report panicked.
    #[error("the profile's report could not be made: {0}")]
    Report(tokio::task::JoinError),
}

impl ProfileError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Busy | Self::Heap(StartError::Running) => StatusCode::CONFLICT,
            Self::Seconds(_) => StatusCode::BAD_REQUEST,
            Self::Heap(StartError::NotInstalled) => StatusCode::NOT_IMPLEMENTED,
            Self::Profiler(_) | Self::Encode(_) | Self::Report(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// `GET /debug/pprof/profile?seconds=N`: CPU use of the next seconds.
pub(super) async fn cpu(query: &Query) -> Reply {
    let taken = async { cpu::take(seconds(query)?).await };
    answer(taken.await)
}

/// `GET /debug/pprof/heap?seconds=N`: allocations of the next seconds, and how much of them is not freed.
pub(super) async fn heap(query: &Query) -> Reply {
    let taken = async { heap::take(seconds(query)?).await };
    answer(taken.await)
}

fn answer(taken: Result<Vec<u8>, ProfileError>) -> Reply {
    match taken {
        Ok(profile) => reply(StatusCode::OK, "application/octet-stream", profile.into()),
        Err(error) => text(error.status(), format!("{error}\n")),
    }
}

fn seconds(query: &Query) -> Result<u64, ProfileError> {
    let Some(text) = query.get("seconds") else { return Ok(DEFAULT_SECONDS) };
    let parsed = text.parse().ok().filter(|seconds| (1..=MAX_SECONDS).contains(seconds));
    parsed.ok_or_else(|| ProfileError::Seconds(text.chars().take(32).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_out_of_range_are_refused() {
        for wrong in ["0", "-1", "301", "ten", ""] {
            let query = Query::parse(&format!("seconds={wrong}"));
            assert!(matches!(seconds(&query), Err(ProfileError::Seconds(_))), "{wrong:?}");
        }
        assert_eq!(seconds(&Query::parse("seconds=300")).unwrap(), 300);
        assert_eq!(seconds(&Query::default()).unwrap(), DEFAULT_SECONDS);
    }
}
