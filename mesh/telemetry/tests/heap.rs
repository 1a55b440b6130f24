//! Heap profiles of a program that uses the sampling allocator.

#![allow(clippy::unwrap_used, reason = "a failed expectation fails the test")]

use std::alloc::System;
use std::hint::black_box;

use ambit_telemetry::heap::{Recording, SampledAllocation, SamplingAllocator, StartError};

#[global_allocator]
static ALLOCATOR: SamplingAllocator<System> = SamplingAllocator::new(System);

#[inline(never)]
fn keeps_memory() -> Vec<Vec<u8>> {
    (0..100).map(|_| black_box(vec![1; 100_000])).collect()
}

#[inline(never)]
fn frees_memory() {
    for _ in 0..100 {
        drop(black_box(vec![1u8; 100_000]));
    }
}

fn made_by(allocation: &mut SampledAllocation, function: &str) -> bool {
    allocation.trace.resolve();
    let mut symbols = allocation.trace.frames().iter().flat_map(|frame| frame.symbols());
    symbols.any(|symbol| symbol.name().is_some_and(|name| name.to_string().contains(function)))
}

#[test]
fn kept_and_freed_allocations_are_listed_with_their_functions() {
    let recording = Recording::start().unwrap();
    assert_eq!(Recording::start().unwrap_err(), StartError::Running);
    let kept = keeps_memory();
    frees_memory();
    let from_another_thread = std::thread::spawn(keeps_memory).join().unwrap();
    drop(from_another_thread);
    let mut samples = recording.finish();
    assert_eq!(kept.len(), 100);
    let mut large: Vec<_> = samples.iter_mut().filter(|sample| sample.size == 100_000).collect();
    let in_use = large
        .iter_mut()
        .filter(|sample| sample.in_use)
        .filter_map(|sample| made_by(sample, "keeps_memory").then_some(()))
        .count();
    assert_eq!(in_use, 100);
    let freed = large
        .iter_mut()
        .filter(|sample| !sample.in_use)
        .filter_map(|sample| made_by(sample, "frees_memory").then_some(()))
        .count();
    assert_eq!(freed, 100);
    // No recording runs now, and a new one starts empty.
    drop(kept);
    drop(Recording::start().unwrap());
    assert!(Recording::start().unwrap().finish().iter().all(|sample| sample.size != 100_000));
}
