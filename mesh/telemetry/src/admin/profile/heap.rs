//! Heap profiles for `/debug/pprof/heap`, from the samples of [`crate::heap`].

use std::collections::HashMap;
use std::time::Duration;

use pprof::protos::{Function, Line, Location, Message, Profile, Sample, ValueType};

use super::ProfileError;
use crate::heap::{Recording, SAMPLE_BYTES, SampledAllocation};

/// Names and units of a sample's values.
const VALUES: [(&str, &str); 4] = [
    ("alloc_objects", "count"),
    ("alloc_space", "bytes"),
    ("inuse_objects", "count"),
    ("inuse_space", "bytes"),
];

/// Records allocations for `seconds`.
pub(super) async fn take(seconds: u64) -> Result<Vec<u8>, ProfileError> {
    let recording = Recording::start()?;
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let encoded = tokio::task::spawn_blocking(move || profile(recording.finish(), seconds).write_to_bytes());
    encoded.await.map_err(ProfileError::Report)?.map_err(|error| ProfileError::Encode(error.into()))
}

fn profile(allocations: Vec<SampledAllocation>, seconds: u64) -> Profile {
    let mut tables = Tables::default();
    // profile.proto: the first string is empty.
    tables.string("");
    let sample_type = VALUES.iter().map(|(name, unit)| tables.value_type(name, unit)).collect();
    let period_type = tables.value_type("space", "bytes");
    let sample = allocations.into_iter().map(|allocation| tables.sample(allocation)).collect();
    let Tables { strings: _, locations: _, mut profile } = tables;
    profile.sample_type = sample_type;
    profile.sample = sample;
    profile.duration_nanos = i64::try_from(seconds * 1_000_000_000).unwrap_or(i64::MAX);
    profile.period_type = Some(period_type).into();
    profile.period = i64::try_from(SAMPLE_BYTES).unwrap_or(i64::MAX);
    profile
}

/// The tables of a profile under construction. Ids start at 1; each location has a function of its own id.
#[derive(Default)]
struct Tables {
    strings: HashMap<String, i64>,
    locations: HashMap<(String, String, u32), u64>,
    profile: Profile,
}

impl Tables {
    fn string(&mut self, text: &str) -> i64 {
        if let Some(index) = self.strings.get(text) {
            return *index;
        }
        let index = i64::try_from(self.profile.string_table.len()).unwrap_or(0);
        self.profile.string_table.push(text.to_owned());
        self.strings.insert(text.to_owned(), index);
        index
    }

    fn value_type(&mut self, name: &str, unit: &str) -> ValueType {
        ValueType { ty: self.string(name), unit: self.string(unit), ..ValueType::default() }
    }

    fn sample(&mut self, mut allocation: SampledAllocation) -> Sample {
        allocation.trace.resolve();
        let symbols = allocation.trace.frames().iter().flat_map(|frame| frame.symbols());
        let location_id = symbols
            .map(|symbol| {
                let name = symbol.name().map_or_else(|| "?".to_owned(), |name| format!("{name:#}"));
                let file = symbol.filename().map(|path| path.display().to_string()).unwrap_or_default();
                self.location(name, file, symbol.lineno().unwrap_or(0))
            })
            .collect();
        let (objects, bytes) = represented(allocation.size);
        let in_use = |value: i64| if allocation.in_use { value } else { 0 };
        Sample {
            location_id,
            value: vec![objects, bytes, in_use(objects), in_use(bytes)],
            ..Sample::default()
        }
    }

    fn location(&mut self, name: String, file: String, line: u32) -> u64 {
        let (name_index, file_index) = (self.string(&name), self.string(&file));
        let next = self.profile.location.len() as u64 + 1;
        let id = *self.locations.entry((name, file, line)).or_insert(next);
        if id == next {
            let (name, filename) = (name_index, file_index);
            let function = Function { id, name, system_name: name, filename, ..Function::default() };
            self.profile.function.push(function);
            let line = Line { function_id: id, line: line.into(), ..Line::default() };
            self.profile.location.push(Location { id, line: vec![line], ..Location::default() });
        }
        id
    }
}

/// Objects and bytes that one sample of this size represents: one is taken every [`SAMPLE_BYTES`].
fn represented(size: usize) -> (i64, i64) {
    let bytes = size.max(SAMPLE_BYTES);
    let objects = bytes / size.max(1);
    (i64::try_from(objects).unwrap_or(i64::MAX), i64::try_from(bytes).unwrap_or(i64::MAX))
}
