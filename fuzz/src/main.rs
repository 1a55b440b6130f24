//! One target under libFuzzer: `AMBIT_FUZZ_TARGET` names it. `make fuzz` builds and runs this.

#![no_main]

use std::sync::LazyLock;

use ambit_fuzz::Target;
use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("AMBIT_FUZZ_TARGET").unwrap_or_default();
    ambit_fuzz::target(&name).unwrap_or_else(|| panic!("AMBIT_FUZZ_TARGET={name:?} is no target"))
});

fuzz_target!(|data: &[u8]| TARGET(data));
