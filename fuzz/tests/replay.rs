//! What the fuzzer found, and what it reached, again: every input of `corpus/` through its target.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What one input may take, in a build that is not optimised and beside other tests.
const EACH: Duration = Duration::from_secs(5);
/// What the inputs may weigh together, bytes.
const WEIGHT: u64 = 1 << 20;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

/// The inputs of a target, in order.
fn inputs(target: &str) -> Vec<PathBuf> {
    let files = std::fs::read_dir(corpus().join(target)).unwrap_or_else(|error| panic!("{target}: {error}"));
    let mut files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn every_input_holds_what_its_target_promises() {
    for (name, target) in ambit_fuzz::targets() {
        for input in inputs(name) {
            let bytes = std::fs::read(&input).unwrap();
            let begun = Instant::now();
            let held = std::panic::catch_unwind(|| target(&bytes));
            assert!(held.is_ok(), "{} fails its target", input.display());
            assert!(begun.elapsed() < EACH, "{} took {:?}", input.display(), begun.elapsed());
        }
    }
}

#[test]
fn every_target_has_inputs_and_every_input_a_target() {
    let known: BTreeSet<String> = ambit_fuzz::targets().iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(known.len(), ambit_fuzz::targets().len(), "two targets have one name");
    let kept = std::fs::read_dir(corpus()).unwrap();
    let kept: BTreeSet<String> = kept.map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(kept, known);
    let all: Vec<PathBuf> = known.iter().flat_map(|name| inputs(name)).collect();
    let weight: u64 = all.iter().map(|input| input.metadata().unwrap().len()).sum();
    assert!(weight < WEIGHT, "{} inputs weigh {weight} bytes", all.len());
}

/// The text with its middle third over and over, so that what it lists gets long.
fn stretched(bytes: &[u8], length: usize) -> Vec<u8> {
    let third = bytes.len() / 3;
    let (head, rest) = bytes.split_at(third);
    let (middle, tail) = rest.split_at(rest.len() - third);
    let repeated = middle.iter().copied().cycle().take(length.saturating_sub(2 * third));
    head.iter().copied().chain(repeated).chain(tail.iter().copied()).collect()
}

/// The square of eight is sixty-four: in between, there is room for the noise of a busy machine.
#[test]
fn no_target_takes_time_with_the_square_of_its_input() {
    const SHORT: usize = 4 << 10;
    const LONG: usize = 32 << 10;
    const TOLERATED: u32 = 32;
    /// Less than this is noise.
    const NOTICED: Duration = Duration::from_millis(200);
    for (name, target) in ambit_fuzz::targets() {
        let seeds = inputs(name).into_iter().filter(|input| {
            input.file_name().is_some_and(|name| name.to_string_lossy().starts_with("seed-"))
        });
        for input in seeds {
            let bytes = std::fs::read(&input).unwrap();
            let whole = |length: usize| bytes.iter().copied().cycle().take(length).collect::<Vec<u8>>();
            let took = |bytes: &[u8]| {
                let begun = Instant::now();
                target(bytes);
                begun.elapsed()
            };
            for [short, long] in
                [[SHORT, LONG].map(whole), [SHORT, LONG].map(|length| stretched(&bytes, length))]
            {
                let (short, long) = (took(&short), took(&long).min(took(&long)));
                assert!(
                    long < NOTICED + short * TOLERATED,
                    "{}: {LONG} bytes take {long:?}, {SHORT} take {short:?}",
                    input.display()
                );
            }
        }
    }
}
