//! What waypoints report of requests, joined to one row for each client, service and workload.

use std::collections::BTreeMap;

use ambit_local::Sample;

/// Key of a row.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Exchanged {
    /// The client's workload.
    pub(crate) source: String,
    /// Its namespace.
    pub(crate) source_namespace: String,
    /// The service that answered: the one that the route chose.
    pub(crate) service: String,
    /// The workload that answered; empty if it was the waypoint.
    pub(crate) workload: String,
    /// The namespace of service and workload.
    pub(crate) namespace: String,
}

/// One row.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Requests {
    /// Requests by status.
    pub(crate) codes: BTreeMap<u16, f64>,
    /// How often they were sent again.
    pub(crate) retries: f64,
    /// How many took at most so long: by the upper bound in microseconds.
    buckets: BTreeMap<u64, f64>,
}

/// All rows.
pub(crate) type AllRequests = BTreeMap<Exchanged, Requests>;

impl Requests {
    /// All requests.
    pub(crate) fn count(&self) -> f64 {
        self.codes.values().sum()
    }

    /// How long the given share of the requests took at most, in milliseconds, estimated within the bucket; none without
    /// requests.
    pub(crate) fn quantile(&self, share: f64) -> Option<f64> {
        let all = self.buckets.values().copied().fold(0.0, f64::max);
        if all == 0.0 {
            return None;
        }
        let wanted = share * all;
        let (mut lower, mut below) = (0.0, 0.0);
        for (upper, count) in &self.buckets {
            let upper = *upper as f64 / 1e3;
            if *count >= wanted && *count > below {
                return Some(lower + (upper - lower) * (wanted - below) / (count - below));
            }
            (lower, below) = (upper, *count);
        }
        Some(lower)
    }
}

/// Adds a sample of a waypoint, if it is one of requests.
pub(crate) fn add(rows: &mut AllRequests, sample: &Sample) {
    let label = |name: &str| {
        let value = sample.labels.get(name).map(String::as_str).unwrap_or_default();
        if value == "unknown" { String::new() } else { value.to_owned() }
    };
    let key = || Exchanged {
        source: label("source_workload"),
        source_namespace: label("source_workload_namespace"),
        service: label("destination_service_name"),
        workload: label("destination_workload"),
        namespace: label("destination_service_namespace"),
    };
    match sample.name.as_str() {
        "istio_requests_total" => {
            let code = label("response_code").parse().unwrap_or_default();
            *rows.entry(key()).or_default().codes.entry(code).or_default() += sample.value;
        }
        "ambit_request_retries_total" => rows.entry(key()).or_default().retries += sample.value,
        "istio_request_duration_milliseconds_bucket" => {
            // The last bucket has no bound, and holds nothing that the one before does not.
            let Some(bound) = label("le").parse::<f64>().ok().filter(|bound| *bound < 1e9) else { return };
            let micros = (bound * 1e3) as u64;
            *rows.entry(key()).or_default().buckets.entry(micros).or_default() += sample.value;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_local::Metrics;

    #[test]
    fn codes_retries_and_times_of_all_series_are_joined() {
        let labels = "source_workload=\"a\",destination_service_name=\"b\",destination_workload=\"unknown\"";
        let text = format!(
            "istio_requests_total{{{labels},response_code=\"200\"}} 8\n\
             istio_requests_total{{{labels},response_code=\"504\"}} 2\n\
             ambit_request_retries_total{{{labels},response_code=\"200\"}} 3\n\
             istio_request_duration_milliseconds_bucket{{{labels},response_code=\"200\",le=\"1.0\"}} 8\n\
             istio_request_duration_milliseconds_bucket{{{labels},response_code=\"504\",le=\"1.0\"}} 0\n\
             istio_request_duration_milliseconds_bucket{{{labels},response_code=\"200\",le=\"500.0\"}} 8\n\
             istio_request_duration_milliseconds_bucket{{{labels},response_code=\"504\",le=\"500.0\"}} 2\n\
             istio_request_duration_milliseconds_bucket{{{labels},response_code=\"504\",le=\"+Inf\"}} 2\n"
        );
        let mut rows = AllRequests::new();
        for sample in &Metrics::parse(&text).samples {
            add(&mut rows, sample);
        }
        let (key, row) = rows.first_key_value().expect("one row");
        assert_eq!((rows.len(), key.source.as_str(), key.workload.as_str()), (1, "a", ""));
        assert_eq!((row.count(), row.codes[&504], row.retries), (10.0, 2.0, 3.0));
        assert_eq!(row.quantile(0.4), Some(0.5));
        let p99 = row.quantile(0.99).expect("there are requests");
        assert!(p99 > 400.0 && p99 <= 500.0, "{p99}");
        assert_eq!(Requests::default().quantile(0.5), None);
    }
}
