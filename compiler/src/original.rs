//! The model in f32 that rounded weights are fitted to and compared with, and that tells what f16 can hold: it lies in a
//! temporary folder beside the output while an artifact is made.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use flamingo_ir::onnx::Islands;
use flamingo_models::Source;
use flamingo_runtime::{LoadedGraphs, Model, OpenOptions};
use flamingo_scenes::Split;

use crate::calibrate::{Calibration, Example, bundled, calibrate, from_file};
use crate::compile::{CalibrateOn, CompileOptions, Progress, compile, optimise_stage};
use crate::emit::{WeightPlan, hash_file};
use crate::eval::{EvalOptions, Score, eval, tasks};
use crate::gate::{TaskScore, Verdict, judge};
use crate::observer::Observer;
use crate::passes::packed_names;
use crate::ranges::{HalfRanges, measure};
use crate::scheme::Scheme;
use crate::scratch::Scratch;
use crate::static_ranges::{StaticRanges, Subject};

/// Bundled prompts to calibrate on, and after them to judge by; fewer of a large model, whose prompts are rich.
const N_BUNDLED: (usize, usize) = (96, 32);
const N_BUNDLED_LARGE: (usize, usize) = (16, 8);
/// Prompts of each kind that show what f16 can hold; fewer of a large model.
const N_RANGES: usize = 8;
const N_RANGES_LARGE: usize = 2;
/// Prompts that ranges of activations are taken from, and as many that judge them.
const N_STATIC: usize = 24;
/// Bytes in f32 from which a model is large.
const LARGE: u64 = 1 << 30;
/// Examples of the tasks that are asked with some.
const SHOTS: [usize; 3] = [0, 2, 4];
/// Of a file's prompts every so manieth judges and is not calibrated on, if there are at least twice as many.
const HELD_OUT: usize = 4;

/// The original, and what was learned from it.
pub struct Original {
    model: Model,
    /// What met each weight, by the name that it has once it is packed; none without calibration.
    pub calibration: Option<Calibration>,
    /// What graphs of half precision keep in f16; none if there are no such graphs, or without calibration.
    pub ranges: Option<HalfRanges>,
    /// Prompts that ranges of activations are taken from.
    seen: Vec<Example>,
    held_out: Vec<Example>,
    /// What the tasks ask, and how often the original is right.
    tasks: Option<(EvalOptions, Vec<Score>)>,
    // Dropped after the model that lies in it.
    _folder: Scratch,
}

impl Original {
    /// Compiles the source in f32 and runs the prompts of `options` through it.
    ///
    /// # Errors
    /// Those of [`compile`]; prompts or a cache that cannot be used.
    pub fn prepare(
        source: &Source,
        options: &CompileOptions,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Original> {
        let parent = options.output.parent().filter(|parent| !parent.as_os_str().is_empty());
        let folder = Scratch::new(parent.unwrap_or(Path::new(".")))
            .context("cannot make a temporary folder beside the output")?;
        let f32 = CompileOptions {
            flavours: Vec::new(),
            output: folder.path().join("f32.flamingo"),
            scheme: Scheme::default(),
            calibrate: CalibrateOn::Nothing,
            gate: None,
            observer: None,
            dump: None,
            ..options.clone()
        };
        progress(Progress::Stage("compiling to f32, to compare with"));
        let (manifest, _) = compile(&f32, &mut |_| {})?;
        let model = Model::open(&f32.output, &OpenOptions::default())?;
        let is_large = manifest.files.iter().map(|file| file.bytes).sum::<u64>() > LARGE;
        let (n, n_held_out) = if is_large { N_BUNDLED_LARGE } else { N_BUNDLED };
        let (mut seen, held_out) = match &options.calibrate {
            CalibrateOn::File(path) => split(from_file(&model, path)?),
            _ => (bundled(&model, 0, n)?, bundled(&model, n, n_held_out)?),
        };
        let is_rounded = options.scheme.is_rounded();
        let calibration = match options.calibrate {
            CalibrateOn::Nothing => None,
            _ if !is_rounded => None,
            _ => Some(calibration(source, options, &f32, &model, &seen, progress)?),
        };
        let tasks = match options.gate.as_ref().and_then(|gate| gate.eval) {
            Some(n) if is_rounded => Some(ask(&model, n, progress)?),
            _ => None,
        };
        model.backend().release_weights();
        let ranges = match options.measures_ranges() {
            true => {
                let n = if is_large { N_RANGES_LARGE } else { N_RANGES };
                let examples = seen.iter().take(n).chain(held_out.iter().take(n)).cloned();
                Some(ranges(&f32.output, &examples.collect::<Vec<Example>>(), progress)?)
            }
            false => None,
        };
        seen.truncate(if is_large { N_RANGES_LARGE } else { N_STATIC });
        Ok(Original { model, calibration, ranges, seen, held_out, tasks, _folder: folder })
    }

    /// Ranges of the activations of an artifact's linears of bytes, for graphs with explicit quantisation.
    ///
    /// # Errors
    /// Prompts that do not fit the model.
    pub fn static_ranges(
        &self,
        graphs: &LoadedGraphs,
        islands: &[Islands; 2],
        (observer, max_kl): (Observer, f64),
        progress: &mut dyn FnMut(Progress),
    ) -> Result<StaticRanges> {
        progress(Progress::Stage("choosing ranges of activations"));
        let mut judged = Vec::new();
        for example in self.held_out.iter().take(self.seen.len()) {
            judged.push((example.clone(), example.run(&self.model)?.1));
        }
        self.model.backend().release_weights();
        let config = &self.model.manifest().config;
        let (seen, judged) = (&self.seen, &judged);
        let subject = Subject { config, graphs, islands, seen, judged, max_kl };
        subject.choose(observer, &mut |done| progress(Progress::Prompts(done, seen.len())))
    }

    /// How far an artifact is from the original, on prompts that it was not fitted to.
    ///
    /// # Errors
    /// An artifact that cannot be opened or run.
    pub fn judge(&self, artifact: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Verdict> {
        progress(Progress::Stage("comparing with f32"));
        let rounded = Model::open(artifact, &OpenOptions::default())?;
        let n = self.held_out.len();
        let mut verdict = judge(&rounded, &self.model, &self.held_out, &mut |done| {
            progress(Progress::Prompts(done, n));
        })?;
        if let Some((options, scores)) = &self.tasks {
            progress(Progress::Stage("asking the tasks"));
            let found = answers(&rounded, options, progress)?;
            let score = |(f32, rounded): (&Score, &Score)| TaskScore {
                task: f32.task.clone(),
                shots: f32.shots,
                n: f32.n,
                f32: f32.score,
                rounded: rounded.score,
            };
            verdict.tasks = scores.iter().zip(&found).map(score).collect();
        }
        Ok(verdict)
    }
}

/// What graphs of half precision keep in f16.
fn ranges(
    artifact: &Path,
    examples: &[Example],
    progress: &mut dyn FnMut(Progress),
) -> Result<HalfRanges> {
    progress(Progress::Stage("looking for what f16 cannot hold"));
    let n = examples.len();
    measure(artifact, examples, &mut |done| progress(Progress::Prompts(done, n)))
}

/// Prompts of every task that are asked, and how often the model is right.
fn ask(
    model: &Model,
    n: usize,
    progress: &mut dyn FnMut(Progress),
) -> Result<(EvalOptions, Vec<Score>)> {
    progress(Progress::Stage("asking the tasks in f32"));
    // Another seed than that of `eval`, which measures what is chosen here.
    let (tasks, split, seed) = (tasks(&[], &SHOTS)?, Split::Test, 1);
    let options = EvalOptions { tasks, split, n, seed, blind: false };
    let scores = answers(model, &options, progress)?;
    Ok((options, scores))
}

fn answers(
    model: &Model,
    options: &EvalOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<Score>> {
    let (mut done, n) = (0, options.n * options.tasks.len());
    eval(model, options, &mut |_, _| {
        done += 1;
        progress(Progress::Prompts(done, n));
        Ok(())
    })
}

/// Prompts to calibrate on and prompts to judge by; the same where there are few.
fn split(examples: Vec<Example>) -> (Vec<Example>, Vec<Example>) {
    if examples.len() < 2 * HELD_OUT {
        return (examples.clone(), examples);
    }
    let is_held_out = |index: &usize| index % HELD_OUT == HELD_OUT - 1;
    let (held_out, seen): (Vec<_>, Vec<_>) =
        examples.into_iter().enumerate().partition(|(index, _)| is_held_out(index));
    let only = |examples: Vec<(usize, Example)>| examples.into_iter().map(|(_, e)| e).collect();
    (only(seen), only(held_out))
}

fn calibration(
    source: &Source,
    options: &CompileOptions,
    f32: &CompileOptions,
    model: &Model,
    examples: &[Example],
    progress: &mut dyn FnMut(Progress),
) -> Result<Calibration> {
    let cache = match &options.calibration_cache {
        Some(path) => Some((path, key(source, options)?)),
        None => None,
    };
    if let Some((path, key)) = cache.as_ref().filter(|(path, _)| path.exists()) {
        return Calibration::load(path, key);
    }
    progress(Progress::Stage("calibrating"));
    let n = examples.len();
    let seen = calibrate(model, examples, &mut |done| progress(Progress::Prompts(done, n)))?;
    let seen = by_packed_name(source, f32, &seen)?;
    if let Some((path, key)) = cache {
        seen.save(path, &key)?;
    }
    Ok(seen)
}

/// What met each weight, by the name that it has once it is packed.
fn by_packed_name(
    source: &Source,
    f32: &CompileOptions,
    seen: &Calibration,
) -> Result<Calibration> {
    let graphs = source.graphs()?;
    let (media, _) = optimise_stage(graphs.media, source, &f32.scheme, None, None)?;
    let (decoder, _) = optimise_stage(graphs.decoder, source, &f32.scheme, None, None)?;
    let stages = [&media, &decoder];
    let plan = WeightPlan::new(&stages)?;
    let mut names = Vec::new();
    for (index, stage) in stages.iter().enumerate() {
        let entries = &plan.layout(index).entries;
        let stored = |(name, value)| Some((name, entries.get(&value)?.name.as_str()));
        names.extend(packed_names(stage).into_iter().filter_map(stored));
    }
    Ok(seen.renamed(names.into_iter()))
}

/// What a calibration is of: the source's files and the prompts.
fn key(source: &Source, options: &CompileOptions) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut add = |path: &PathBuf| -> Result<()> {
        hasher.update(hash_file(path)?.blake3.as_bytes());
        Ok(())
    };
    source.parts.files().iter().try_for_each(|path| add(&path.to_path_buf()))?;
    match &options.calibrate {
        CalibrateOn::File(path) => add(path)?,
        _ => drop(hasher.update(env!("CARGO_PKG_VERSION").as_bytes())),
    }
    Ok(hasher.finalize().to_hex().to_string())
}
