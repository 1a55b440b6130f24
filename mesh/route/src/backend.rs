//! Where the requests of a rule go, by weight.

use std::sync::Arc;

use crate::Filter;

/// A service that gets a share of the requests.
#[derive(Debug, Clone)]
pub struct Backend {
    /// The service's namespace.
    pub namespace: Arc<str>,
    /// The service's host, lower case.
    pub hostname: Arc<str>,
    /// The service's port.
    pub port: u16,
    /// The part of its endpoints that gets requests; `None`: all of them.
    pub subset: Option<Arc<str>>,
    /// Filters for its share only, in order.
    pub filters: Box<[Filter]>,
    /// Why requests can't go there. Its share is answered with 500.
    pub invalid: Option<Arc<str>>,
}

/// The backends of a rule, with their weights.
#[derive(Debug, Clone, Default)]
pub struct Backends {
    /// With the sum of the weights up to and including each. Those without weight are left out.
    cumulative: Box<[(u64, Backend)]>,
    /// Those without weight, which sessions that began before go on with.
    weightless: Box<[Backend]>,
}

impl Backends {
    /// Of backends with their weights. One without weight gets no request but those of sessions.
    pub fn new(weighted: impl IntoIterator<Item = (u32, Backend)>) -> Self {
        let mut sum = 0_u64;
        let (mut cumulative, mut weightless) = (Vec::new(), Vec::new());
        for (weight, backend) in weighted {
            if weight == 0 {
                weightless.push(backend);
                continue;
            }
            sum += u64::from(weight);
            cumulative.push((sum, backend));
        }
        Self { cumulative: cumulative.into(), weightless: weightless.into() }
    }

    /// The sum of all weights; 0 if no backend gets requests.
    pub fn total(&self) -> u64 {
        self.cumulative.last().map_or(0, |(sum, _)| *sum)
    }

    /// The backend that `draw`, a number below [`total`](Self::total), stands for: each gets as many numbers as its weight.
    pub fn choose(&self, draw: u64) -> Option<&Backend> {
        let at = self.cumulative.partition_point(|(sum, _)| *sum <= draw);
        self.cumulative.get(at).map(|(_, backend)| backend)
    }

    /// Those that get requests, with their weights, in order.
    pub fn weighted(&self) -> impl Iterator<Item = (u64, &Backend)> {
        let before = std::iter::once(0).chain(self.cumulative.iter().map(|(sum, _)| *sum));
        self.cumulative.iter().zip(before).map(|((sum, backend), before)| (sum - before, backend))
    }

    /// All of them, those without weight last: a session keeps its backend whatever the weights are (GEP-1619, "Traffic Splitting").
    pub fn of_sessions(&self) -> impl Iterator<Item = &Backend> {
        self.iter().chain(&self.weightless)
    }

    /// Those that get requests, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Backend> {
        self.cumulative.iter().map(|(_, backend)| backend)
    }
}
