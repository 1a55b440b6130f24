use super::*;

fn sample(bytes: u64, seconds: f64, cpu_seconds: f64) -> Sample {
    Sample { outcome: Outcome { bytes, seconds, ..Outcome::default() }, cpu_seconds }
}

#[test]
fn the_ratio_is_that_of_medians_to_the_raw_relay() {
    let mut paths = BTreeMap::new();
    paths.insert(Path::Raw, vec![sample(1_000_000_000, 1.0, 1.5); 3]);
    paths.insert(Path::Ambit, vec![sample(1_000_000_000, 1.0, 3.0); 3]);
    let samples = Samples::from([(Row::new(Work::Bulk, false, 1), paths)]);
    let page = Report::new("2026-01-01".into(), "a machine".into(), vec![], samples).markdown();
    let line = page.lines().find(|l| l.contains("| Ambit |")).unwrap();
    assert!(line.contains("3.00 (3.00–3.00)"), "{line}");
    let goal = page.lines().find(|l| l.contains("CPU / R")).unwrap();
    assert_eq!(goal, "| bulk, 1 connection, across nodes: CPU / R | 2.00 | ≤ 1.05 | no |");
    let goal = page.lines().find(|l| l.contains("rate / R")).unwrap();
    assert!(goal.ends_with("| 1.00 | ≥ 0.9 | yes |"), "{goal}");
}

#[test]
fn a_steady_load_is_compared_by_the_median_of_the_rounds() {
    let mut report = Report::new("2026-01-01".into(), "a machine".into(), vec![], Samples::new());
    let outcome = |p50_us| Outcome { p50_us, ..Outcome::default() };
    for (path, kept) in [(Path::NoMesh, [200.0, 900.0, 210.0]), (Path::Ambit, [500.0, 510.0, 2000.0])] {
        let runs = kept.map(|p50| Steady { path, kept: outcome(p50), new: outcome(2.0 * p50) });
        report.steady.extend(runs);
    }
    let page = report.markdown();
    let goal =
        |what: &str| page.lines().find(|line| line.contains(what) && line.contains("p50 above")).unwrap();
    assert!(goal("kept").ends_with("| 0.30 ms | ≤ 0.5 ms | yes |"), "{page}");
    assert!(goal("new").ends_with("| 0.60 ms | ≤ 0.5 ms | no |"), "{page}");
}
