//! Levels of endpoints: the nearest first, the next ones as far as those before have too few healthy endpoints.

/// What of a level counts for the choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level {
    /// Its endpoints.
    pub total: u32,
    /// Those of them that can be chosen.
    pub usable: u32,
}

/// A level that has this share of its endpoints takes all requests: 100 / 1.4 per cent, as in Envoy.
const OVERPROVISIONING: u64 = 140;

/// The level that `draw`, a number below 100, stands for; `None`: no endpoint can be chosen.
///
/// Each level takes as many hundredths of the requests as 1.4 times its usable share, up to what the ones before have left. If all together
/// take less than all, each gets in proportion.
pub fn choose_level(levels: &[Level], draw: u32) -> Option<usize> {
    let health = |level: &Level| match level.total {
        0 => 0,
        total => (OVERPROVISIONING * u64::from(level.usable) / u64::from(total)).min(100),
    };
    let all: u64 = levels.iter().map(health).sum::<u64>().min(100);
    let last = levels.iter().rposition(|level| level.usable > 0)?;
    if all == 0 {
        return Some(last);
    }
    let mut below = 0;
    for (at, level) in levels.iter().enumerate() {
        below += health(level).min(all - below);
        if u64::from(draw) * all < below * 100 {
            return Some(at);
        }
    }
    Some(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(levels: &[(u32, u32)]) -> Vec<usize> {
        let levels: Vec<Level> =
            levels.iter().map(|(usable, total)| Level { total: *total, usable: *usable }).collect();
        let mut shares = vec![0; levels.len()];
        for draw in 0..100 {
            if let Some(at) = choose_level(&levels, draw) {
                shares[at] += 1;
            }
        }
        shares
    }

    #[test]
    fn the_nearest_level_takes_all_while_enough_of_it_is_healthy() {
        assert_eq!(shares(&[(10, 10), (10, 10)]), [100, 0]);
        assert_eq!(shares(&[(8, 10), (10, 10)]), [100, 0]);
        assert_eq!(shares(&[(5, 10), (10, 10)]), [70, 30]);
        assert_eq!(shares(&[(0, 10), (10, 10)]), [0, 100]);
        assert_eq!(shares(&[(0, 0), (0, 5), (1, 1)]), [0, 0, 100]);
        assert_eq!(shares(&[(1, 10), (0, 10)]), [100, 0]);
        assert_eq!(shares(&[(1, 10), (1, 10)]), [50, 50]);
        assert_eq!(shares(&[(0, 10), (0, 10)]), [0, 0]);
        assert_eq!(shares(&[(1, 1000)]), [100]);
    }
}
