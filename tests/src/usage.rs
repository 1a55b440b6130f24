//! What a node proxy's process uses at this moment.

use ambit_local::Ztunnel;
use ambit_scale::machine;

/// Resident memory, bytes.
///
/// # Panics
/// When the node proxy does not run.
pub fn resident(ztunnel: &Ztunnel) -> u64 {
    machine::resident(running(ztunnel)).unwrap()
}

/// Open descriptors.
///
/// # Panics
/// When the node proxy does not run.
pub fn descriptors(ztunnel: &Ztunnel) -> usize {
    machine::descriptors(running(ztunnel)).unwrap()
}

fn running(ztunnel: &Ztunnel) -> u32 {
    ztunnel.pid().expect("the node proxy runs")
}
