//! An allocator that samples allocations while a heap profile is taken. At other times it only forwards to the inner one.
//!
//! A program declares it around its own allocator:
//!
//! ```ignore
//! #[global_allocator]
//! static ALLOCATOR: SamplingAllocator<MiMalloc> = SamplingAllocator::new(MiMalloc);
//! ```
//!
//! Without a recording, an allocation costs one more relaxed load. During a recording, the stack is captured once for every
//! 64 KiB that a thread allocates, and kept until the recording ends.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use backtrace::Backtrace;
use parking_lot::Mutex;

/// A sample is taken each time a thread has allocated so many bytes.
pub const SAMPLE_BYTES: usize = 64 << 10;
/// Maximum number of samples of a recording.
const MAX_SAMPLES: usize = 50_000;
/// Size of the filter. Most frees are not of sampled memory, and the filter saves them the lookup in the map.
const FILTER: usize = 1 << 14;

static INSTALLED: AtomicBool = AtomicBool::new(false);
static RECORDING: AtomicBool = AtomicBool::new(false);
/// Number of sampled addresses for each place of the filter.
static SAMPLED: [AtomicU16; FILTER] = [const { AtomicU16::new(0) }; FILTER];
/// Guards the samples of the running recording. Taken when a sample is made or freed, never while the
/// thread that holds it allocates through here: [`IN_SAMPLER`] passes such allocations on.
static SAMPLES: Mutex<Option<Samples>> = Mutex::new(None);

thread_local! {
    static UNTIL_SAMPLE: Cell<usize> = const { Cell::new(SAMPLE_BYTES) };
    static IN_SAMPLER: Cell<bool> = const { Cell::new(false) };
}

/// An allocation that was sampled.
#[derive(Debug)]
pub struct SampledAllocation {
    /// Its size, in bytes.
    pub size: usize,
    /// Whether it is still there.
    pub in_use: bool,
    /// The stack that made it; not resolved.
    pub trace: Backtrace,
}

#[derive(Default)]
struct Samples {
    all: Vec<SampledAllocation>,
    /// Address to index, of what is still there.
    live: HashMap<usize, usize>,
}

/// Why no recording was started.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StartError {
    /// A recording is running already.
    #[error("a heap profile is being taken already")]
    Running,
    /// The program uses another allocator.
    #[error("this program's allocator takes no samples")]
    NotInstalled,
}

/// A running recording; there is one at a time. Dropping it ends it.
#[derive(Debug)]
pub struct Recording(());

impl Recording {
    /// Starts to sample.
    pub fn start() -> Result<Self, StartError> {
        if !INSTALLED.load(Ordering::Relaxed) {
            return Err(StartError::NotInstalled);
        }
        unsampled(|| {
            let mut samples = SAMPLES.lock();
            if samples.is_some() {
                return Err(StartError::Running);
            }
            *samples = Some(Samples::default());
            RECORDING.store(true, Ordering::Release);
            Ok(Self(()))
        })
    }

    /// Ends the recording and returns its samples.
    pub fn finish(self) -> Vec<SampledAllocation> {
        let samples = stop().map(|samples| samples.all).unwrap_or_default();
        // This recording is stopped. Another one may be running by now, which dropping would end.
        std::mem::forget(self);
        samples
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // The samples of a dropped recording are discarded.
        unsampled(|| drop(stop()));
    }
}

fn stop() -> Option<Samples> {
    unsampled(|| {
        RECORDING.store(false, Ordering::Release);
        let samples = SAMPLES.lock().take();
        for place in &SAMPLED {
            place.store(0, Ordering::Relaxed);
        }
        samples
    })
}

/// Runs `work` without sampling this thread's allocations.
fn unsampled<T>(work: impl FnOnce() -> T) -> T {
    let before = IN_SAMPLER.try_with(|inside| inside.replace(true)).unwrap_or(true);
    let result = work();
    // A thread that is ending has no thread locals any more and is not sampled.
    IN_SAMPLER.try_with(|inside| inside.set(before)).ok();
    result
}

/// Passes everything on to `inner`, and samples while a [`Recording`] runs.
#[derive(Debug, Default)]
pub struct SamplingAllocator<A> {
    inner: A,
}

impl<A> SamplingAllocator<A> {
    /// Around another allocator.
    pub const fn new(inner: A) -> Self {
        Self { inner }
    }
}

#[allow(unsafe_code, reason = "an allocator is an unsafe trait; every call is passed on as it came")]
// SAFETY: memory comes from and goes to `inner` alone, with the caller's own layouts; what is done beside
// it neither touches the memory nor unwinds.
unsafe impl<A: GlobalAlloc> GlobalAlloc for SamplingAllocator<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's obligations are `inner`'s.
        let memory = unsafe { self.inner.alloc(layout) };
        note_allocation(memory, layout.size());
        memory
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        let memory = unsafe { self.inner.alloc_zeroed(layout) };
        note_allocation(memory, layout.size());
        memory
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Noted before the call, because another thread may get the address immediately after it.
        note_free(memory);
        // SAFETY: as above.
        let memory = unsafe { self.inner.realloc(memory, layout, size) };
        note_allocation(memory, size);
        memory
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        note_free(memory);
        // SAFETY: as above.
        unsafe { self.inner.dealloc(memory, layout) }
    }
}

#[inline]
fn note_allocation(memory: *mut u8, size: usize) {
    if RECORDING.load(Ordering::Relaxed) {
        sample(memory.addr(), size);
    } else if !INSTALLED.load(Ordering::Relaxed) {
        INSTALLED.store(true, Ordering::Relaxed);
    }
}

#[inline]
fn note_free(memory: *mut u8) {
    if RECORDING.load(Ordering::Relaxed) && place(memory.addr()).load(Ordering::Relaxed) > 0 {
        forget(memory.addr());
    }
}

fn place(address: usize) -> &'static AtomicU16 {
    // Allocations are aligned to 16, so the low bits say nothing.
    let index = (address >> 4) ^ (address >> 18);
    #[allow(clippy::indexing_slicing, reason = "the mask is the array's length less one")]
    &SAMPLED[index & (FILTER - 1)]
}

#[cold]
fn sample(address: usize, size: usize) {
    let due = UNTIL_SAMPLE.try_with(|until| match until.get().checked_sub(size) {
        Some(left) if left > 0 => {
            until.set(left);
            false
        }
        _ => {
            until.set(SAMPLE_BYTES);
            true
        }
    });
    let inside = IN_SAMPLER.try_with(Cell::get).unwrap_or(true);
    if address == 0 || inside || !due.unwrap_or(false) {
        return;
    }
    unsampled(|| {
        let trace = Backtrace::new_unresolved();
        let mut samples = SAMPLES.lock();
        let Some(samples) = samples.as_mut().filter(|samples| samples.all.len() < MAX_SAMPLES) else {
            return;
        };
        samples.live.insert(address, samples.all.len());
        samples.all.push(SampledAllocation { size, in_use: true, trace });
        place(address).fetch_add(1, Ordering::Relaxed);
    });
}

#[cold]
fn forget(address: usize) {
    if IN_SAMPLER.try_with(Cell::get).unwrap_or(true) {
        return;
    }
    unsampled(|| {
        let mut samples = SAMPLES.lock();
        let Some(samples) = samples.as_mut() else { return };
        if let Some(index) = samples.live.remove(&address) {
            if let Some(sample) = samples.all.get_mut(index) {
                sample.in_use = false;
            }
            place(address).fetch_sub(1, Ordering::Relaxed);
        }
    });
}
