//! What a run of a stage reads and computes, as the native plan counts it, also where another engine is timed.

use std::time::Duration;

use flamingo_runtime::profile::{Arithmetic, Record};
use flamingo_runtime::{Model, OpenOptions, RunError};

use super::stages::{Case, Stage, cases, encoded, is_resampler, recorded};
use super::subject::Subject;
use super::{BenchError, BenchOptions};
use crate::profile::main_arithmetic;

/// Profiled runs of a stage, of which the fastest is shown.
const PROFILED_RUNS: usize = 5;

/// The instructions of a run of a stage.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Number of the variant.
    pub(super) subject: usize,
    /// The stage.
    pub stage: Stage,
    /// Pictures.
    pub images: usize,
    /// Tokens.
    pub context: usize,
    /// Sequences.
    pub(super) batch: usize,
    /// The instructions.
    pub records: Vec<Record>,
}

impl Profile {
    fn is_of(&self, case: &Case<'_>) -> bool {
        (self.subject, self.images, self.context, self.batch)
            == (case.subject, case.images, case.context, case.batch)
    }
}

/// What a run reads and computes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    pub(super) weight_bytes: usize,
    pub(super) operations: u64,
    pub(super) arithmetic: Arithmetic,
}

impl Counts {
    fn new<'r>(records: impl Iterator<Item = &'r Record>) -> Counts {
        let records: Vec<Record> = records.cloned().collect();
        Counts {
            weight_bytes: records.iter().map(|record| record.work.weight_bytes).sum(),
            operations: records.iter().map(|record| record.work.operations).sum(),
            arithmetic: main_arithmetic(&records),
        }
    }
}

/// Counts of a case; those of `first_token` are its encodes and its prefill.
pub(super) fn counts(profiles: &[Profile], case: &Case<'_>) -> Option<Counts> {
    let own = |stage| profiles.iter().find(|p| p.stage == stage && p.is_of(case));
    let encode = || {
        let encode = |p: &&Profile| p.stage == Stage::Encode && p.subject == case.subject;
        profiles.iter().find(encode).map(|profile| &profile.records)
    };
    match case.stage {
        Stage::Encode => Some(Counts::new(encode()?.iter())),
        Stage::Resample => {
            Some(Counts::new(encode()?.iter().filter(|record| is_resampler(record))))
        }
        stage @ (Stage::MediaKv | Stage::Prefill | Stage::Decode) => {
            Some(Counts::new(own(stage)?.records.iter()))
        }
        Stage::FirstToken => {
            let prompt = own(Stage::Prefill)?.records.iter();
            let pictures = std::iter::repeat_n(encode()?, case.images).flatten();
            Some(Counts::new(prompt.chain(pictures)))
        }
        Stage::Load
        | Stage::Preprocess
        | Stage::DecodeReprojected
        | Stage::FirstTokenWarm
        | Stage::FirstTokenHot
        | Stage::FewShot
        | Stage::FewShotBank => None,
    }
}

/// The instructions of a run of each stage that has some, of all subjects; none where there is no native plan.
pub(super) fn profiles(
    subjects: &[Subject],
    own: &mut [Case<'_>],
    options: &BenchOptions,
) -> Result<Vec<Profile>, BenchError> {
    let mut profiles = Vec::new();
    for (index, subject) in subjects.iter().enumerate() {
        if subject.model.backend().set_profiling(false) {
            let n_runs = if options.profile { PROFILED_RUNS } else { 1 };
            let own = own.iter_mut().filter(|case| case.subject == index);
            profiles.extend(record_all(&subject.model, own, n_runs)?);
            continue;
        }
        if options.profile {
            return Err(BenchError::NoProfile(subject.label.backend.clone()));
        }
        profiles.extend(native_profiles(index, subject, options)?);
    }
    Ok(profiles)
}

/// The same through the native engine, for a subject of another.
fn native_profiles(
    index: usize,
    subject: &Subject,
    options: &BenchOptions,
) -> Result<Vec<Profile>, RunError> {
    let opening = OpenOptions {
        n_threads: subject.opening.n_threads,
        kv_format: subject.opening.kv_format,
        ..OpenOptions::default()
    };
    let Ok(native) = Model::open(&subject.path, &opening) else { return Ok(Vec::new()) };
    let media = encoded(&native, &subject.inputs, subject.media.len())?;
    let plain = BenchOptions { reproject: false, ..options.clone() };
    let mut cases = cases(&native, &subject.inputs, &media, &plain)?;
    cases.iter_mut().for_each(|case| case.subject = index);
    record_all(&native, cases.iter_mut(), 1)
}

fn record_all<'c, 'm: 'c>(
    model: &Model,
    cases: impl Iterator<Item = &'c mut Case<'m>>,
    n_runs: usize,
) -> Result<Vec<Profile>, RunError> {
    let has_some = [Stage::Encode, Stage::MediaKv, Stage::Prefill, Stage::Decode];
    let mut profiles = Vec::new();
    for case in cases.filter(|case| has_some.contains(&case.stage)) {
        let mut runs = Vec::new();
        for _ in 0..n_runs {
            runs.extend(recorded(model, &mut case.run)?);
        }
        let total = |records: &Vec<Record>| records.iter().map(|r| r.duration).sum::<Duration>();
        let records = runs.into_iter().min_by_key(total).unwrap_or_default();
        let Case { subject, stage, images, context, batch, .. } = *case;
        profiles.push(Profile { subject, stage, images, context, batch, records });
    }
    Ok(profiles)
}
