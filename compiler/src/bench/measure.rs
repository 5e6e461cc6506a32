//! The method: every case warms up, then cases take turns in random order, so that a slow minute
//! of the machine falls on all of them.

use std::time::Duration;

use flamingo_runtime::RunError;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::process::Moment;

/// Samples that a case gets whatever its budget.
const LEAST_SAMPLES: usize = 3;

/// How often a case runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Most samples of a case.
    pub(super) reps: usize,
    /// Time after which a case gets no further sample.
    pub(super) budget: Duration,
    /// Seed of the order.
    pub(super) seed: u64,
}

/// Something that is timed: runs once and says how long that took.
pub(super) type Run<'a> = Box<dyn FnMut() -> Result<Duration, RunError> + 'a>;

/// Times of one case.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Samples {
    /// Each sample, in milliseconds.
    pub(super) ms: Vec<f64>,
    /// Seconds that the case's turns took.
    wall_seconds: f64,
    /// Processor seconds of other processes meanwhile.
    others_seconds: Option<f64>,
}

impl Samples {
    /// Cores that other processes kept busy.
    pub(super) fn others(&self) -> Option<f64> {
        Some((self.others_seconds? / self.wall_seconds.max(1e-9)).max(0.0))
    }

    fn is_done(&self, limits: &Limits) -> bool {
        let is_spent = self.wall_seconds >= limits.budget.as_secs_f64();
        let n = self.ms.len();
        n >= limits.reps || (is_spent && n >= LEAST_SAMPLES)
    }
}

/// Times the cases; `on_sample` is told the share of the samples that may still come.
pub(super) fn measure(
    cases: &mut [Run<'_>],
    limits: &Limits,
    on_sample: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Samples>, RunError> {
    for run in cases.iter_mut() {
        run()?;
    }
    let mut samples =
        vec![Samples { others_seconds: Some(0.0), ..Samples::default() }; cases.len()];
    let mut random = ChaCha8Rng::seed_from_u64(limits.seed);
    loop {
        let mut turn: Vec<usize> =
            (0..cases.len()).filter(|case| !samples[*case].is_done(limits)).collect();
        if turn.is_empty() {
            return Ok(samples);
        }
        turn.shuffle(&mut random);
        for case in turn {
            let moment = Moment::now();
            let duration = cases[case]()?;
            let (wall, others) = moment.elapsed();
            let own = &mut samples[case];
            own.ms.push(duration.as_secs_f64() * 1e3);
            own.wall_seconds += wall;
            own.others_seconds = own.others_seconds.zip(others).map(|(sum, more)| sum + more);
            let done = |own: &Samples| if own.is_done(limits) { limits.reps } else { own.ms.len() };
            on_sample(samples.iter().map(done).sum(), samples.len() * limits.reps);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn limits(reps: usize, budget_s: u64) -> Limits {
        Limits { reps, budget: Duration::from_secs(budget_s), seed: 1 }
    }

    #[test]
    fn cases_take_turns_and_stop_at_their_limits() {
        let order = RefCell::new(Vec::new());
        let case = |name: char| -> Run<'_> {
            let order = &order;
            Box::new(move || {
                order.borrow_mut().push(name);
                Ok(Duration::from_millis(2))
            })
        };
        let mut told = Vec::new();
        let mut cases = [case('a'), case('b'), case('c')];
        let on_sample = &mut |done, all| told.push((done, all));
        let samples = measure(&mut cases, &limits(20, 60), on_sample).unwrap();
        assert!(samples.iter().all(|samples| samples.ms == [2.0; 20]));
        assert_eq!((told.len(), told.last()), (60, Some(&(60, 60))));
        let order = order.take();
        assert_eq!(order[..3], ['a', 'b', 'c'], "the warm-up");
        let turns: Vec<&[char]> = order[3..].chunks(3).collect();
        for turn in &turns {
            let mut sorted = turn.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, ['a', 'b', 'c']);
        }
        assert!(turns.iter().any(|turn| *turn != turns[0]), "a random order");
        let spent = measure(&mut [case('d')], &limits(20, 0), &mut |_, _| {}).unwrap();
        assert_eq!(spent[0].ms.len(), LEAST_SAMPLES);
    }
}
