//! Observers: which range of a value's magnitudes 255 levels are spread over. Larger magnitudes are cut off at its end.
//!
//! Values come in any order and number into a [`Histogram`] of 2048 bins, whose width doubles when a magnitude does not fit
//! any more; what an observer takes is the end of one of its bins, so a 1024th of the largest magnitude at the worst.

use clap::ValueEnum;

/// Bins of a histogram.
const N_BINS: usize = 2048;
/// Largest level of a signed byte.
const LEVELS: f64 = 127.0;
/// Share of the values that the percentile leaves within the range.
const PERCENTILE: f64 = 0.9999;
/// Levels that the entropy compares a histogram with: the magnitudes of 8 bits.
const N_ENTROPY: usize = 128;

/// How a range is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Observer {
    /// The largest magnitude: nothing is cut off.
    Minmax,
    /// The magnitude that 99.99 % of the values do not exceed.
    Percentile,
    /// The range whose levels tell most of the distribution: least KL divergence of 128 levels from it.
    Entropy,
    /// The range with the least mean square error.
    Mse,
}

/// What each observer takes of a histogram.
type Choice = fn(&Histogram) -> f32;

const OBSERVERS: [(Observer, Choice); 4] = [
    (Observer::Minmax, |seen| seen.largest),
    (Observer::Percentile, percentile),
    (Observer::Entropy, entropy),
    (Observer::Mse, mse),
];

impl Observer {
    /// Name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Observer::Minmax => "minmax",
            Observer::Percentile => "percentile",
            Observer::Entropy => "entropy",
            Observer::Mse => "mse",
        }
    }

    /// The range that it takes; 0 where nothing but zeros was seen.
    pub fn range(self, seen: &Histogram) -> f32 {
        let choice = OBSERVERS.iter().find(|(observer, _)| *observer == self);
        choice.map_or(seen.largest, |(_, choose)| choose(seen)).min(seen.largest)
    }
}

/// Magnitudes of values, counted.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    /// How many magnitudes lie in [i w, (i + 1) w), at the end of the last bin too.
    bins: Vec<u64>,
    /// w; 0 as long as there were only zeros.
    width: f64,
    largest: f32,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { bins: vec![0; N_BINS], width: 0.0, largest: 0.0 }
    }
}

impl Histogram {
    /// Counts values; those that are not finite are left out.
    pub fn add(&mut self, values: &[f32]) {
        let finite = || values.iter().map(|value| value.abs()).filter(|value| value.is_finite());
        let largest = finite().fold(0.0, f32::max);
        self.largest = self.largest.max(largest);
        if self.width == 0.0 {
            self.width = f64::from(largest) / N_BINS as f64;
        }
        while f64::from(largest) > self.width * N_BINS as f64 {
            self.widen();
        }
        for value in finite() {
            let bin = if value > 0.0 { (f64::from(value) / self.width) as usize } else { 0 };
            self.bins[bin.min(N_BINS - 1)] += 1;
        }
    }

    /// Bins of twice the width.
    fn widen(&mut self) {
        self.width *= 2.0;
        for bin in 0..N_BINS {
            let pair = self.bins.get(2 * bin..2 * bin + 2);
            self.bins[bin] = pair.map_or(0, |pair| pair.iter().sum());
        }
    }

    /// The largest magnitude.
    pub fn largest(&self) -> f32 {
        self.largest
    }

    /// Bins up to the last that is not empty.
    fn used(&self) -> &[u64] {
        let n = self.bins.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        &self.bins[..n]
    }

    /// The end of a bin.
    fn end(&self, bin: usize) -> f32 {
        ((bin + 1) as f64 * self.width) as f32
    }

    /// Signal over noise of 255 levels within ±`range`, in dB, with each value in the middle of its bin; infinite for zeros.
    pub fn sqnr_db(&self, range: f32) -> f64 {
        let squares = |(bin, count): (usize, &u64)| *count as f64 * self.middle(bin).powi(2);
        let signal: f64 = self.bins.iter().enumerate().map(squares).sum();
        match self.noise(f64::from(range)) {
            noise if noise > 0.0 => 10.0 * (signal / noise).log10(),
            _ => f64::INFINITY,
        }
    }

    fn middle(&self, bin: usize) -> f64 {
        (bin as f64 + 0.5) * self.width
    }

    /// Σ (x − x')² with x' the nearest of 255 levels within ±`range`.
    fn noise(&self, range: f64) -> f64 {
        let step = range / LEVELS;
        let error = |x: f64| match step > 0.0 {
            true => x - step * (x / step).round_ties_even().min(LEVELS),
            false => x,
        };
        let of = |(bin, count): (usize, &u64)| *count as f64 * error(self.middle(bin)).powi(2);
        self.used().iter().enumerate().map(of).sum()
    }
}

fn percentile(seen: &Histogram) -> f32 {
    let total: u64 = seen.bins.iter().sum();
    let wanted = PERCENTILE * total as f64;
    let mut within = 0;
    for (bin, count) in seen.bins.iter().enumerate() {
        within += count;
        if within as f64 >= wanted {
            return seen.end(bin);
        }
    }
    seen.largest
}

fn mse(seen: &Histogram) -> f32 {
    let ranges = (0..seen.used().len()).map(|bin| seen.end(bin));
    let noise = |range: f32| seen.noise(f64::from(range));
    let best = ranges.map(|range| (noise(range), range)).min_by(|a, b| a.0.total_cmp(&b.0));
    best.map_or(0.0, |(_, range)| range)
}

/// TensorRT's entropy calibration (S. Migacz, 8-bit inference with TensorRT, GTC 2017): of each number of bins from 128 on
/// the distribution P, with what lies beyond in the last bin, is compared with Q: the bins merged to 128 levels and spread
/// over those that are not empty. Where Q has nothing and P has, Q tells nothing: such a range is not taken.
fn entropy(seen: &Histogram) -> f32 {
    let used = seen.used();
    let first = N_ENTROPY.min(used.len());
    let best = (first..=used.len())
        .filter_map(|n| Some((divergence(used, n)?, n)))
        .min_by(|a, b| a.0.total_cmp(&b.0));
    best.map_or(seen.largest, |(_, n)| n.checked_sub(1).map_or(0.0, |last| seen.end(last)))
}

/// KL(P ‖ Q) of the first `n` bins; none where it is infinite.
fn divergence(bins: &[u64], n: usize) -> Option<f64> {
    let (within, beyond) = bins.split_at_checked(n)?;
    let outliers: u64 = beyond.iter().sum();
    let total: u64 = bins.iter().sum();
    let kept: u64 = within.iter().sum();
    let level = |bin: usize| bin * N_ENTROPY / n.max(1);
    let mut levels = [(0u64, 0u64); N_ENTROPY];
    for (bin, count) in within.iter().enumerate().filter(|(_, count)| **count > 0) {
        let (sum, n_bins) = &mut levels[level(bin)];
        (*sum, *n_bins) = (*sum + count, *n_bins + 1);
    }
    let mut sum = 0.0;
    for (bin, count) in within.iter().enumerate() {
        let p = count + if bin + 1 == n { outliers } else { 0 };
        if p == 0 {
            continue;
        }
        if *count == 0 {
            return None;
        }
        let (merged, n_bins) = levels[level(bin)];
        let p = p as f64 / total as f64;
        let q = merged as f64 / n_bins as f64 / kept as f64;
        sum += p * (p / q).ln();
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values with a heavy tail: most within ±2, one in a hundred up to 40 times as far.
    fn values(n: usize, seed: usize) -> Vec<f32> {
        let noise = |i: usize| ((i * 7919 + seed * 104_729 + 13) % 10_007) as f32 / 5003.5 - 1.0;
        let value = |i: usize| {
            let bell = noise(3 * i) + noise(3 * i + 1) + 0.3 * noise(3 * i + 2);
            if i.is_multiple_of(97) { bell * (1.0 + 20.0 * noise(i).abs()) } else { bell }
        };
        (0..n).map(value).collect()
    }

    fn histogram(values: &[f32]) -> Histogram {
        let mut seen = Histogram::default();
        seen.add(values);
        seen
    }

    fn magnitudes(values: &[f32]) -> Vec<f32> {
        let mut sorted: Vec<f32> = values.iter().map(|value| value.abs()).collect();
        sorted.sort_by(f32::total_cmp);
        sorted
    }

    fn squares(values: &[f32], range: f64) -> f64 {
        let step = range / 127.0;
        let level = |x: f64| (x / step).round_ties_even().clamp(-127.0, 127.0);
        values.iter().map(|x| (f64::from(*x) - step * level(f64::from(*x))).powi(2)).sum()
    }

    #[test]
    fn minmax_is_the_largest_and_percentile_that_of_sorted_values() {
        for (n, seed) in [(1, 0), (100, 1), (30_000, 2), (123_457, 3)] {
            let values = values(n, seed);
            let (seen, sorted) = (histogram(&values), magnitudes(&values));
            let largest = *sorted.last().unwrap();
            assert_eq!(Observer::Minmax.range(&seen), largest);
            let expected = sorted[((n as f64 * PERCENTILE).ceil() as usize).clamp(1, n) - 1];
            let found = Observer::Percentile.range(&seen);
            assert!((found - expected).abs() <= largest / 1024.0, "{n}: {found} {expected}");
        }
    }

    #[test]
    fn mse_is_as_good_as_the_best_of_a_fine_grid() {
        for seed in 0..4 {
            let values = values(20_000, seed);
            let seen = histogram(&values);
            let found = squares(&values, f64::from(Observer::Mse.range(&seen)));
            let largest = f64::from(seen.largest());
            let grid = (1..=4000).map(|i| largest * f64::from(i) / 4000.0);
            let best = grid.map(|range| squares(&values, range)).fold(f64::INFINITY, f64::min);
            assert!(found <= 1.05 * best, "{found} {best}");
        }
    }

    /// The published algorithm in plain words, over counts of values between the ends of 2048 bins.
    fn entropy_by_definition(values: &[f32]) -> f64 {
        let largest = f64::from(*magnitudes(values).last().unwrap());
        let width = largest / 2048.0;
        let mut h = vec![0.0f64; 2048];
        for value in values {
            let bin = (f64::from(value.abs()) / width).floor() as usize;
            h[bin.min(2047)] += 1.0;
        }
        let mut best = (f64::INFINITY, 0);
        for n in 128..=2048 {
            let mut p = h[..n].to_vec();
            p[n - 1] += h[n..].iter().sum::<f64>();
            let mut q = vec![0.0f64; n];
            for level in 0..128 {
                let of_level: Vec<usize> = (0..n).filter(|bin| bin * 128 / n == level).collect();
                let total: f64 = of_level.iter().map(|bin| h[*bin]).sum();
                let full: Vec<usize> = of_level.into_iter().filter(|bin| h[*bin] > 0.0).collect();
                for bin in &full {
                    q[*bin] = total / full.len() as f64;
                }
            }
            let (p_sum, q_sum): (f64, f64) = (p.iter().sum(), q.iter().sum());
            let term = |(p, q): (&f64, &f64)| match (*p > 0.0, *q > 0.0) {
                (false, _) => 0.0,
                (true, false) => f64::INFINITY,
                (true, true) => p / p_sum * (p / p_sum / (q / q_sum)).ln(),
            };
            let kl: f64 = p.iter().zip(&q).map(term).sum();
            if kl < best.0 {
                best = (kl, n);
            }
        }
        best.1 as f64 * width
    }

    #[test]
    fn entropy_is_tensorrts() {
        for (n, seed) in [(3000, 1), (50_000, 2)] {
            let values = values(n, seed);
            let found = f64::from(Observer::Entropy.range(&histogram(&values)));
            let expected = entropy_by_definition(&values);
            assert!((found - expected).abs() < 1e-5 * expected, "{found} {expected}");
            assert!(found < 0.9 * f64::from(*magnitudes(&values).last().unwrap()), "{found}");
        }
    }

    #[test]
    fn a_stream_is_counted_as_all_at_once_but_for_the_width_of_bins() {
        let values = values(40_000, 5);
        let mut stream = Histogram::default();
        for part in values.chunks(317) {
            stream.add(part);
        }
        let whole = histogram(&values);
        assert_eq!(stream.bins.iter().sum::<u64>(), 40_000);
        assert_eq!(stream.largest(), whole.largest());
        let slack = whole.largest() / 512.0;
        for observer in [Observer::Minmax, Observer::Percentile] {
            let (a, b) = (observer.range(&stream), observer.range(&whole));
            assert!((a - b).abs() <= slack, "{}: {a} {b}", observer.name());
        }
        let noise = |seen: &Histogram| squares(&values, f64::from(Observer::Mse.range(seen)));
        assert!((noise(&stream) / noise(&whole) - 1.0).abs() < 0.05);
    }

    #[test]
    fn odd_values_have_a_range() {
        for observer in [Observer::Minmax, Observer::Percentile, Observer::Entropy, Observer::Mse] {
            let range = |values: &[f32]| observer.range(&histogram(values));
            assert_eq!(range(&[]), 0.0, "{observer:?}");
            assert_eq!(range(&[0.0; 9]), 0.0, "{observer:?}");
            assert_eq!(range(&[f32::NAN, f32::INFINITY, 0.0]), 0.0, "{observer:?}");
            let one = range(&[-3.0]);
            assert!(one > 2.9 && one <= 3.0, "{observer:?}: {one}");
            let mut late = Histogram::default();
            late.add(&[0.0; 5]);
            late.add(&[1e-30, 1e30]);
            assert!(observer.range(&late).is_finite(), "{observer:?}");
        }
        let exact = histogram(&[1.0; 100]);
        assert!(exact.sqnr_db(1.0) > 40.0);
        assert_eq!(histogram(&[0.0]).sqnr_db(0.0), f64::INFINITY);
    }
}
