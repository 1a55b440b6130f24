//! The suite h2spec against the HTTP/2 that a waypoint speaks inside its tunnels.

use ambit_tests::beds::Trials;
use ambit_tests::h2spec;

use crate::bed::Waypoints;

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("HTTP/2 inside a tunnel is as RFC 9113 asks", async |bed| conforms(bed).await);
}

async fn conforms(bed: &Waypoints) {
    let to = bed.service("h2spec").await;
    h2spec::assert_passed(&h2spec::run(&bed.cli, to, false).await, &[h2spec::INVALID_PREFACE]);
}
