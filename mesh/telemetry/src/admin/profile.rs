//! CPU profiles for `/debug/pprof/profile`, in the format of pprof.
//!
//! Samples are taken by a timer signal while a profile runs and cost nothing otherwise; one profile runs
//! at a time.

use std::collections::HashMap;
use std::time::Duration;

use ::http::StatusCode;
use pprof::{ProfilerGuard, ProfilerGuardBuilder, Report};
use prost::Message;
use tokio::sync::Mutex;

use crate::http::{Query, Reply, reply, text};

/// Samples a second.
const FREQUENCY: i32 = 99;
const DEFAULT_SECONDS: u64 = 10;
const MAX_SECONDS: u64 = 300;

/// Held while a profile runs: the signal handler and its buffer are the process's. Waited for by nobody;
/// a second request is refused.
static RUNNING: Mutex<()> = Mutex::const_new(());

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// Another profile runs.
    #[error("a profile is being taken already")]
    Busy,
    /// `seconds` is no number in range.
    #[error("{0:?} is not a number of seconds between 1 and {MAX_SECONDS}")]
    Seconds(String),
    /// The profiler failed.
    #[error("the profiler failed: {0}")]
    Profiler(#[from] pprof::Error),
    /// The task that makes the report died.
    #[error("the profile's report could not be made: {0}")]
    Report(tokio::task::JoinError),
}

impl ProfileError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Busy => StatusCode::CONFLICT,
            Self::Seconds(_) => StatusCode::BAD_REQUEST,
            Self::Profiler(_) | Self::Report(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// `GET /debug/pprof/profile?seconds=N`.
pub(super) async fn cpu(query: &Query) -> Reply {
    match take(query.get("seconds")).await {
        Ok(profile) => reply(StatusCode::OK, "application/octet-stream", profile.into()),
        Err(error) => text(error.status(), format!("{error}\n")),
    }
}

async fn take(seconds: Option<&str>) -> Result<Vec<u8>, ProfileError> {
    let seconds = match seconds {
        None => DEFAULT_SECONDS,
        Some(text) => text
            .parse()
            .ok()
            .filter(|seconds| (1..=MAX_SECONDS).contains(seconds))
            .ok_or_else(|| ProfileError::Seconds(text.chars().take(32).collect()))?,
    };
    let _running = RUNNING.try_lock().map_err(|_busy| ProfileError::Busy)?;
    let profiler = ProfilerGuardBuilder::default()
        .frequency(FREQUENCY)
        // Unwinding out of these may deadlock on locks that the interrupted code holds.
        .blocklist(&["libc", "libgcc", "pthread", "vdso"])
        .build()?;
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let made = tokio::task::spawn_blocking(move || report(&profiler, seconds)).await;
    made.map_err(ProfileError::Report)?
}

fn report(profiler: &ProfilerGuard<'_>, seconds: u64) -> Result<Vec<u8>, ProfileError> {
    Ok(render(&profiler.report().build()?, seconds).encode_to_vec())
}

fn render(report: &Report, seconds: u64) -> Profile {
    let mut tables = Tables::default();
    let period = 1_000_000_000 / i64::from(FREQUENCY);
    let kinds = [("samples", "count"), ("cpu", "nanoseconds")];
    let sample_type: Vec<_> = kinds.iter().map(|(kind, unit)| tables.value_type(kind, unit)).collect();
    let mut samples = Vec::with_capacity(report.data.len());
    for (frames, count) in &report.data {
        let mut location_id = Vec::new();
        for symbol in frames.frames.iter().flatten() {
            let line = i64::from(symbol.lineno.unwrap_or(0));
            location_id.push(tables.location(&symbol.name(), &symbol.filename(), line));
        }
        let count = i64::try_from(*count).unwrap_or(i64::MAX);
        samples.push(Sample { location_id, value: vec![count, count.saturating_mul(period)] });
    }
    let period_type = tables.value_type("cpu", "nanoseconds");
    let Tables { strings: _, string_table, functions, locations, .. } = tables;
    Profile {
        sample_type,
        sample: samples,
        location: locations,
        function: functions,
        string_table,
        duration_nanos: i64::try_from(seconds * 1_000_000_000).unwrap_or(i64::MAX),
        period_type: Some(period_type),
        period,
    }
}

/// The profile's tables while it is put together; ids start at 1.
struct Tables {
    strings: HashMap<String, i64>,
    string_table: Vec<String>,
    functions: Vec<Function>,
    function_ids: HashMap<(i64, i64), u64>,
    locations: Vec<Location>,
    location_ids: HashMap<(u64, i64), u64>,
}

impl Default for Tables {
    fn default() -> Self {
        let mut tables = Self {
            strings: HashMap::new(),
            string_table: Vec::new(),
            functions: Vec::new(),
            function_ids: HashMap::new(),
            locations: Vec::new(),
            location_ids: HashMap::new(),
        };
        // profile.proto: the first string is empty.
        tables.string("");
        tables
    }
}

impl Tables {
    fn string(&mut self, text: &str) -> i64 {
        if let Some(id) = self.strings.get(text) {
            return *id;
        }
        let id = i64::try_from(self.string_table.len()).unwrap_or(0);
        self.string_table.push(text.to_owned());
        self.strings.insert(text.to_owned(), id);
        id
    }

    fn value_type(&mut self, kind: &str, unit: &str) -> ValueType {
        ValueType { r#type: self.string(kind), unit: self.string(unit) }
    }

    fn location(&mut self, name: &str, file: &str, line: i64) -> u64 {
        let (name, file) = (self.string(name), self.string(file));
        let next = self.functions.len() as u64 + 1;
        let function_id = *self.function_ids.entry((name, file)).or_insert(next);
        if function_id == next {
            self.functions.push(Function { id: next, name, system_name: name, filename: file });
        }
        let next = self.locations.len() as u64 + 1;
        let id = *self.location_ids.entry((function_id, line)).or_insert(next);
        if id == next {
            self.locations.push(Location { id, line: vec![Line { function_id, line }] });
        }
        id
    }
}

/// `perftools.profiles.Profile` of profile.proto, as far as it is filled.
#[derive(Clone, PartialEq, Message)]
struct Profile {
    #[prost(message, repeated, tag = "1")]
    sample_type: Vec<ValueType>,
    #[prost(message, repeated, tag = "2")]
    sample: Vec<Sample>,
    #[prost(message, repeated, tag = "4")]
    location: Vec<Location>,
    #[prost(message, repeated, tag = "5")]
    function: Vec<Function>,
    #[prost(string, repeated, tag = "6")]
    string_table: Vec<String>,
    #[prost(int64, tag = "10")]
    duration_nanos: i64,
    #[prost(message, optional, tag = "11")]
    period_type: Option<ValueType>,
    #[prost(int64, tag = "12")]
    period: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ValueType {
    #[prost(int64, tag = "1")]
    r#type: i64,
    #[prost(int64, tag = "2")]
    unit: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Sample {
    #[prost(uint64, repeated, tag = "1")]
    location_id: Vec<u64>,
    #[prost(int64, repeated, tag = "2")]
    value: Vec<i64>,
}

#[derive(Clone, PartialEq, Message)]
struct Location {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(message, repeated, tag = "4")]
    line: Vec<Line>,
}

#[derive(Clone, PartialEq, Message)]
struct Line {
    #[prost(uint64, tag = "1")]
    function_id: u64,
    #[prost(int64, tag = "2")]
    line: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Function {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(int64, tag = "2")]
    name: i64,
    #[prost(int64, tag = "3")]
    system_name: i64,
    #[prost(int64, tag = "4")]
    filename: i64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::hint::black_box;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[tokio::test(flavor = "multi_thread")]
    async fn a_profile_names_the_function_that_burns_time_and_a_second_one_is_refused() {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let burner = std::thread::spawn(move || {
            let mut number = 1u64;
            while !stopped.load(Ordering::Relaxed) {
                number = black_box(number.wrapping_mul(31).wrapping_add(7));
            }
        });
        let (first, second) = tokio::join!(biased; take(Some("2")), take(Some("1")));
        assert!(matches!(second, Err(ProfileError::Busy)));
        let bytes = first.unwrap();
        stop.store(true, Ordering::Relaxed);
        burner.join().unwrap();
        let profile = Profile::decode(bytes.as_slice()).unwrap();
        assert_eq!(profile.string_table.first().map(String::as_str), Some(""));
        assert!(!profile.sample.is_empty());
        let functions = profile.function.iter().map(|function| &profile.string_table[function.name as usize]);
        assert!(functions.into_iter().any(|name| name.contains("a_profile_names_the_function")));
    }

    #[tokio::test]
    async fn seconds_out_of_range_are_refused() {
        for wrong in ["0", "-1", "301", "ten", ""] {
            assert!(matches!(take(Some(wrong)).await, Err(ProfileError::Seconds(_))), "{wrong:?}");
        }
    }
}
