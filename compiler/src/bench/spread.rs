//! What a handful of samples says: quantiles, how sure their median is, and which of them lie far out.

use serde::Serialize;

/// Samples around the median that its interval of 95 % spans, as a multiple of √n: the normal approximation of the
/// binomial of ranks (Conover, Practical Nonparametric Statistics, §3.2).
const HALF_WIDTH_OF_RANKS: f64 = 1.96 / 2.0;
/// Samples from which quarters of them are told apart.
const LEAST_FOR_QUARTERS: usize = 8;
/// Widths of the middle half beyond it from which a sample lies far out (Tukey, Exploratory Data Analysis).
const FAR: f64 = 3.0;

/// Quantiles of samples, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Milliseconds {
    /// Half of the samples took no longer.
    pub median: f64,
    /// Lower end of the median's interval of 95 %, which takes samples as independent.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
    /// A tenth took no longer.
    pub p10: f64,
    /// Nine tenths took no longer.
    pub p90: f64,
    /// 99 of 100 took no longer: the longest, of fewer samples than 100.
    pub p99: f64,
    /// Samples.
    pub n: usize,
    /// Samples that took longer than the middle half by three times its width.
    pub far_out: usize,
}

impl Milliseconds {
    /// Of samples in any order; NaN of none.
    pub(super) fn of(samples: &[f64]) -> Milliseconds {
        let sorted = sorted(samples);
        let at = |percent| of_sorted(&sorted, percent);
        let (n, middle) = (sorted.len(), sorted.len() as f64 / 2.0);
        let half_width = HALF_WIDTH_OF_RANKS * (n as f64).sqrt();
        let rank = |rank: f64| {
            let last = n.saturating_sub(1);
            sorted.get((rank.max(0.0) as usize).min(last)).copied().unwrap_or(f64::NAN)
        };
        let [low_quarter, high_quarter] = [25, 75].map(at);
        let limit = high_quarter + FAR * (high_quarter - low_quarter);
        Milliseconds {
            median: at(50),
            low: rank((middle - half_width).floor()).min(at(50)),
            high: rank((middle + half_width).ceil() - 1.0).max(at(50)),
            p10: at(10),
            p90: at(90),
            p99: sorted.get((n * 99).div_ceil(100).saturating_sub(1)).copied().unwrap_or(f64::NAN),
            n,
            far_out: match n >= LEAST_FOR_QUARTERS {
                true => sorted.iter().filter(|sample| **sample > limit).count(),
                false => 0,
            },
        }
    }

    /// The median, or another of these times, with the digits that the median's interval supports.
    pub fn text(&self, ms: f64) -> String {
        rounded(ms, (self.high - self.low) / 2.0)
    }
}

/// The sample that `percent` hundredths of all are no larger than.
pub(super) fn quantile(samples: &[f64], percent: usize) -> f64 {
    of_sorted(&sorted(samples), percent)
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn of_sorted(sorted: &[f64], percent: usize) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get(last * percent / 100).copied().unwrap_or(f64::NAN)
}

/// A value up to the place of the first digit that may be wrong: 57.634 ± 0.2 is `57.6`, ± 20 is `60`. At most three
/// digits after the point.
pub fn rounded(value: f64, half_width: f64) -> String {
    if !value.is_finite() {
        return "—".to_owned();
    }
    let place = half_width.max(1e-3).log10().floor().min(9.0) as i32;
    if place <= 0 {
        return format!("{value:.*}", usize::try_from(-place).unwrap_or(0));
    }
    let unit = 10f64.powi(place);
    let rounded = (value / unit).round() * unit;
    // Where all digits are doubtful they show the size at least.
    format!("{:.0}", if rounded > 0.0 { rounded } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let ms: Vec<f64> = (0..=10).rev().map(f64::from).collect();
        assert_eq!([10, 50, 90].map(|percent| quantile(&ms, percent)), [1.0, 5.0, 9.0]);
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(Milliseconds::of(&hundred).p99, 99.0);
        assert_eq!(Milliseconds::of(&hundred[..7]).p99, 7.0);
        assert!(Milliseconds::of(&[]).median.is_nan());
    }

    /// Of many sets of samples, the share whose interval has the true median in it.
    #[test]
    fn the_interval_covers_the_median() {
        use rand::{Rng, SeedableRng};
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for n in [10, 20, 40, 101] {
            let covers = (0..2000).filter(|_| {
                let samples: Vec<f64> = (0..n).map(|_| random.random_range(0.0..1.0f64)).collect();
                let of = Milliseconds::of(&samples);
                of.low <= 0.5 && 0.5 <= of.high
            });
            let share = covers.count() as f64 / 2000.0;
            assert!((0.93..=0.995).contains(&share), "{n} samples: {share}");
        }
    }

    #[test]
    fn a_sample_far_out_is_counted() {
        let mut ms: Vec<f64> = (0..20).map(|i| 10.0 + 0.1 * f64::from(i % 5)).collect();
        assert_eq!(Milliseconds::of(&ms).far_out, 0);
        ms[7] = 30.0;
        assert_eq!(Milliseconds::of(&ms).far_out, 1);
    }

    #[test]
    fn digits_end_where_they_may_be_wrong() {
        for (value, half_width, expected) in [
            (57.634, 0.2, "57.6"),
            (57.634, 0.02, "57.63"),
            (57.634, 2.0, "58"),
            (57.634, 20.0, "60"),
            (0.421_37, 0.000_1, "0.421"),
            (0.421_37, 0.0, "0.421"),
            (0.421_37, 0.03, "0.42"),
            (355.2, 14.0, "360"),
            (355.2, 3000.0, "355"),
            (f64::NAN, 1.0, "—"),
        ] {
            assert_eq!(rounded(value, half_width), expected, "{value} ± {half_width}");
        }
    }
}
