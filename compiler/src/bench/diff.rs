//! Whether one run of `bench` was slower than another: stage by stage, with an interval of the ratio of the medians.
//!
//! The interval is a percentile bootstrap (Efron & Tibshirani, An Introduction to the Bootstrap, ch. 13) over blocks of
//! consecutive samples, since neighbours share the machine's moment. It knows how the samples of one run spread, not what the
//! machine was like at another time: runs that are compared belong to one quiet hour of one machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::spread::quantile;

/// Resamples of each comparison.
const RESAMPLES: usize = 2000;
/// Share of the resamples that the interval leaves out on each side: 99 %, for a report has ten stages.
const TAIL: f64 = 0.005;
/// Ratios so near to 1 are the same, whatever the interval.
const SAME: f64 = 0.01;
/// Ceilings of two machines, or of two states of one, that differ by more.
const OTHER_MACHINE: f64 = 0.1;

/// Why two reports cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// A file that is no report.
    #[error("{path}: {reason}\n\nhint: write one with `flamingoc bench ARTIFACT --json > {path}`")]
    Report {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Reports that have no stage in common.
    #[error(
        "expected stages that both reports have, found none\n\nhint: give both runs the same `--images`, `--context` and \
         `--prompt-tokens`"
    )]
    NothingInCommon,
}

/// A report as far as it is compared.
#[derive(Deserialize)]
struct Run {
    machine: Ceilings,
    results: Vec<Stage>,
}

#[derive(Deserialize)]
struct Ceilings {
    cpu: String,
    isa: String,
    threads: usize,
    read_gb_per_s: f64,
}

#[derive(Deserialize)]
struct Stage {
    stage: String,
    images: usize,
    context: usize,
    precision: String,
    #[serde(default)]
    artifact: String,
    #[serde(default)]
    backend: String,
    #[serde(default)]
    threads: usize,
    #[serde(default = "one")]
    batch: usize,
    samples_ms: Vec<f64>,
}

/// A decode step of reports that do not tell has one sequence.
fn one() -> usize {
    1
}

impl Run {
    /// Whether stages are told apart by their artifact: one artifact may have another name in another run.
    fn has_artifacts(&self) -> bool {
        self.results.windows(2).any(|pair| pair[0].artifact != pair[1].artifact)
    }
}

/// What is said of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The interval has 1 in it, or the medians differ by less than 1 %.
    Same,
    /// The second run took less time.
    Faster,
    /// The second run took more time.
    Slower,
}

/// A stage of both reports.
#[derive(Clone, Debug, Serialize)]
pub struct Change {
    /// The stage.
    pub stage: String,
    /// Pictures.
    pub images: usize,
    /// Tokens.
    pub context: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// Artifact, engine and threads, where the report has several.
    pub variant: Option<String>,
    /// Median milliseconds of the first run.
    pub before_ms: f64,
    /// Of the second.
    pub after_ms: f64,
    /// After by before.
    pub ratio: f64,
    /// Lower end of the ratio's interval of 99 %.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// What that means.
    pub verdict: Verdict,
}

/// Two reports compared.
#[derive(Clone, Debug, Serialize)]
pub struct Diff {
    /// Stages that both have, in the order of the first.
    pub changes: Vec<Change>,
    /// What speaks against comparing them.
    pub notes: Vec<String>,
}

impl Diff {
    /// Stages that are slower, by more than `fail_over` (0.05: 5 %) if it is given.
    pub fn regressions(&self, fail_over: Option<f64>) -> impl Iterator<Item = &Change> {
        let limit = 1.0 + fail_over.unwrap_or(0.0);
        self.changes.iter().filter(move |c| c.verdict == Verdict::Slower && c.ratio > limit)
    }
}

/// Compares what `bench --json` wrote to two files.
///
/// # Errors
/// Files that are no reports, or have no stage in common.
pub fn diff(before: &Path, after: &Path) -> Result<Diff, DiffError> {
    let (before, after) = (read(before)?, read(after)?);
    let by_artifact = before.has_artifacts() || after.has_artifacts();
    let artifact = |s: &Stage| if by_artifact { s.artifact.clone() } else { String::new() };
    let sizes = |s: &Stage| (s.images, s.context, s.batch);
    let engine = |s: &Stage| (s.precision.clone(), s.backend.clone(), s.threads);
    let key = |s: &Stage| (s.stage.clone(), sizes(s), engine(s), artifact(s));
    let by_key: BTreeMap<_, &Stage> = after.results.iter().map(|s| (key(s), s)).collect();
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let pairs = before.results.iter().filter_map(|b| Some((b, *by_key.get(&key(b))?)));
    let mut changes: Vec<Change> = pairs.map(|(b, a)| change(b, a, &mut random)).collect();
    if changes.iter().all(|change| change.variant == changes[0].variant) {
        changes.iter_mut().for_each(|change| change.variant = None);
    }
    if changes.is_empty() {
        return Err(DiffError::NothingInCommon);
    }
    Ok(Diff { changes, notes: notes(&before.machine, &after.machine) })
}

fn read(path: &Path) -> Result<Run, DiffError> {
    let wrong = |reason: String| DiffError::Report { path: path.to_owned(), reason };
    let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let run: Run = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let is_time = |ms: &f64| ms.is_finite() && *ms > 0.0;
    match run.results.iter().find(|s| s.samples_ms.is_empty() || !s.samples_ms.iter().all(is_time))
    {
        None => Ok(run),
        Some(stage) => {
            let reason = "expected times above 0 in `samples_ms`, found none or others";
            Err(wrong(format!("stage `{}`: {reason}", stage.stage)))
        }
    }
}

fn notes(before: &Ceilings, after: &Ceilings) -> Vec<String> {
    let mut notes = Vec::new();
    let name = |m: &Ceilings| format!("{}, {}, {} threads", m.cpu, m.isa, m.threads);
    if name(before) != name(after) {
        notes.push(format!("the machines differ: {}; {}", name(before), name(after)));
    }
    let ratio = after.read_gb_per_s / before.read_gb_per_s;
    if (ratio - 1.0).abs() > OTHER_MACHINE {
        notes.push(format!(
            "the machine's read bandwidth was {:.1} GB/s, then {:.1}: times differ for that alone",
            before.read_gb_per_s, after.read_gb_per_s
        ));
    }
    notes
}

fn change(before: &Stage, after: &Stage, random: &mut ChaCha8Rng) -> Change {
    let [b, a] = [before, after].map(|stage| quantile(&stage.samples_ms, 50));
    let mut ratios: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let [b, a] = [before, after].map(|s| quantile(&resampled(&s.samples_ms, random), 50));
            a / b
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    let at = |share: f64| ratios[((RESAMPLES - 1) as f64 * share).round() as usize];
    let (ratio, low, high) = (a / b, at(TAIL), at(1.0 - TAIL));
    let verdict = match () {
        () if (ratio - 1.0).abs() < SAME => Verdict::Same,
        () if low > 1.0 => Verdict::Slower,
        () if high < 1.0 => Verdict::Faster,
        () => Verdict::Same,
    };
    let variant = format!("{} {} × {}", before.artifact, before.backend, before.threads);
    Change {
        stage: before.stage.clone(),
        images: before.images,
        context: before.context,
        batch: before.batch,
        variant: Some(variant),
        before_ms: b,
        after_ms: a,
        ratio,
        low,
        high,
        verdict,
    }
}

/// As many samples, drawn in blocks of neighbours.
fn resampled(samples: &[f64], random: &mut ChaCha8Rng) -> Vec<f64> {
    let n = samples.len();
    let block = n.isqrt().max(1);
    let mut drawn = Vec::with_capacity(n + block);
    while drawn.len() < n {
        let from = random.random_range(0..=n - block);
        drawn.extend_from_slice(&samples[from..from + block]);
    }
    drawn.truncate(n);
    drawn
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Times as a busy machine gives them: a spread of some percent, slow drift, now and then a long one.
    fn samples(seed: u64, factor: f64) -> Vec<f64> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let sample = |i: usize| {
            let noise: f64 = (0..4).map(|_| random.random_range(-0.01..0.01)).sum();
            let drift = 0.005 * (i as f64 / 7.0).sin();
            let pause = if random.random_bool(0.05) { 0.5 } else { 0.0 };
            10.0 * factor * (1.0 + noise + drift + pause)
        };
        (0..40).map(sample).collect()
    }

    fn stage(samples_ms: Vec<f64>) -> Stage {
        let stage = json!({
            "stage": "decode", "images": 1, "context": 128, "precision": "int8", "samples_ms": samples_ms,
        });
        serde_json::from_value(stage).unwrap()
    }

    #[test]
    fn the_same_is_called_the_same_and_five_percent_slower_is_called_slower() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut verdict = |pair: u64, factor: f64| {
            let before = stage(samples(2 * pair, 1.0));
            change(&before, &stage(samples(2 * pair + 1, factor)), &mut random).verdict
        };
        for pair in 0..20 {
            assert_eq!(verdict(pair, 1.0), Verdict::Same, "{pair}");
            assert_eq!(verdict(pair, 1.05), Verdict::Slower, "{pair}");
            assert_eq!(verdict(pair, 0.95), Verdict::Faster, "{pair}");
        }
    }

    #[test]
    fn few_and_scattered_samples_show_nothing() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let (before, after) = (stage(vec![8.0, 10.0, 14.0]), stage(vec![9.0, 10.6, 13.0]));
        assert_eq!(change(&before, &after, &mut random).verdict, Verdict::Same);
    }
}
