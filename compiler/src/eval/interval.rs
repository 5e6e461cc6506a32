//! How sure a score is: intervals of 95 %, and of the difference of two models that answered the same questions.

use flamingo_scenes::random::stream;
use rand::Rng;

use super::metric::{Figure, score};

/// Quantile of the normal distribution for intervals of 95 %.
const Z: f64 = 1.959_964;
/// Times that questions are drawn again.
const N_RESAMPLES: usize = 1000;

/// A score's interval: Wilson's where every answer is right or wrong, since a bootstrap of answers that are all right
/// knows no doubt; else percentiles of a bootstrap over questions.
pub fn interval(figures: &[Figure]) -> (f64, f64) {
    let right = |figure: &Figure| match figure {
        Figure::Value(value) if *value == 1.0 => Some(true),
        Figure::Value(value) if *value == 0.0 => Some(false),
        Figure::Value(_) | Figure::Ranked { .. } | Figure::Counts(_) => None,
    };
    let shares: Option<Vec<bool>> = figures.iter().map(right).collect();
    match shares {
        Some(all) => wilson(all.iter().filter(|is_right| **is_right).count(), all.len()),
        None => {
            bootstrap(figures.len(), |places| score(places.iter().map(|place| &figures[*place])))
        }
    }
}

/// The interval of the difference of two scores over the same questions, drawn together.
pub fn paired_interval(before: &[Figure], after: &[Figure]) -> (f64, f64) {
    bootstrap(before.len().min(after.len()), |places| {
        let of = |figures: &[Figure]| score(places.iter().map(|place| &figures[*place]));
        of(after) - of(before)
    })
}

/// Percentiles of a statistic over questions that are drawn with replacement.
fn bootstrap(n: usize, statistic: impl Fn(&[usize]) -> f64) -> (f64, f64) {
    if n == 0 {
        return (0.0, 0.0);
    }
    let mut rng = stream(0, "in-context/bootstrap");
    let mut places = vec![0; n];
    let mut draw = || {
        places.iter_mut().for_each(|place| *place = rng.random_range(0..n));
        statistic(&places)
    };
    let mut values: Vec<f64> = (0..N_RESAMPLES).map(|_| draw()).collect();
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[(share * (N_RESAMPLES - 1) as f64).round() as usize];
    (at(0.025), at(0.975))
}

/// Wilson's interval of a share (E. B. Wilson, 1927), 95 %.
pub(super) fn wilson(right: usize, n: usize) -> (f64, f64) {
    let (n, share) = (n.max(1) as f64, right as f64 / n.max(1) as f64);
    let centre = share + Z * Z / (2.0 * n);
    let spread = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    (((centre - spread) / scale).max(0.0), ((centre + spread) / scale).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of R's `binom::binom.wilson`.
    #[test]
    fn intervals_are_wilsons() {
        for (right, n, low, high) in [
            (0, 10, 0.0, 0.277_533),
            (5, 10, 0.236_593, 0.763_407),
            (490, 500, 0.963_609, 0.989_093),
        ] {
            let found = wilson(right, n);
            assert!((found.0 - low).abs() < 2e-4 && (found.1 - high).abs() < 2e-4, "{found:?}");
        }
    }

    /// The mean of n values has the standard error s / √n, and the interval is 1.96 of it to each side.
    #[test]
    fn a_bootstrap_of_a_mean_is_the_normal_one() {
        let figures: Vec<Figure> =
            (0..400).map(|n| Figure::Value(f64::from(n % 20) / 19.0)).collect();
        let (low, high) = interval(&figures);
        let error = 1.96 * 0.303_5 / 20.0;
        assert!(
            (low - (0.5 - error)).abs() < 0.006 && (high - (0.5 + error)).abs() < 0.006,
            "{low} {high}"
        );
    }

    #[test]
    fn answers_to_the_same_questions_are_compared_in_pairs() {
        let before: Vec<Figure> = (0..200).map(|n| Figure::Value(f64::from(n % 2))).collect();
        let (low, high) = paired_interval(&before, &before);
        assert_eq!((low, high), (0.0, 0.0), "the same answers");
        let better: Vec<Figure> = (0..200)
            .map(|n| Figure::Value(f64::from(u8::from(n % 2 == 1 || n % 10 == 0))))
            .collect();
        let (low, high) = paired_interval(&before, &better);
        assert!(low > 0.0 && low < 0.1 && high > 0.1 && high < 0.2, "{low} {high}");
    }
}
