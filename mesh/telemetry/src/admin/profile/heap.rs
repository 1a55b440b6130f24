//! Heap profiles for `/debug/pprof/heap`, from the samples of [`crate::heap`].

use std::time::Duration;

use prost::Message;

use super::ProfileError;
use super::encoding::{Profile, Sample, Tables};
use crate::heap::{Recording, SAMPLE_BYTES, SampledAllocation};

/// Watches the allocator for so many seconds.
pub(super) async fn take(seconds: u64) -> Result<Vec<u8>, ProfileError> {
    let recording = Recording::start()?;
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let made = tokio::task::spawn_blocking(move || render(recording.finish(), seconds).encode_to_vec()).await;
    made.map_err(ProfileError::Report)
}

fn render(allocations: Vec<SampledAllocation>, seconds: u64) -> Profile {
    let mut tables = Tables::default();
    let kinds = [
        ("alloc_objects", "count"),
        ("alloc_space", "bytes"),
        ("inuse_objects", "count"),
        ("inuse_space", "bytes"),
    ];
    let sample_type: Vec<_> = kinds.iter().map(|(kind, unit)| tables.value_type(kind, unit)).collect();
    let mut sample = Vec::with_capacity(allocations.len());
    for mut allocation in allocations {
        let (objects, bytes) = stands_for(allocation.size);
        let in_use = |value: i64| if allocation.in_use { value } else { 0 };
        let value = vec![objects, bytes, in_use(objects), in_use(bytes)];
        sample.push(Sample { location_id: locations(&mut allocation, &mut tables), value });
    }
    let period_type = tables.value_type("space", "bytes");
    Profile {
        sample_type,
        sample,
        duration_nanos: i64::try_from(seconds * 1_000_000_000).unwrap_or(i64::MAX),
        period_type: Some(period_type),
        period: i64::try_from(SAMPLE_BYTES).unwrap_or(i64::MAX),
        ..tables.into_profile()
    }
}

/// Objects and bytes that one sample of this size stands for: one is taken every [`SAMPLE_BYTES`].
fn stands_for(size: usize) -> (i64, i64) {
    let bytes = size.max(SAMPLE_BYTES);
    let objects = bytes / size.max(1);
    (i64::try_from(objects).unwrap_or(i64::MAX), i64::try_from(bytes).unwrap_or(i64::MAX))
}

fn locations(allocation: &mut SampledAllocation, tables: &mut Tables) -> Vec<u64> {
    allocation.trace.resolve();
    let mut ids = Vec::new();
    for symbol in allocation.trace.frames().iter().flat_map(|frame| frame.symbols()) {
        let name = symbol.name().map_or_else(|| "?".to_owned(), |name| format!("{name:#}"));
        let file = symbol.filename().map(|path| path.display().to_string()).unwrap_or_default();
        ids.push(tables.location(&name, &file, i64::from(symbol.lineno().unwrap_or(0))));
    }
    ids
}
