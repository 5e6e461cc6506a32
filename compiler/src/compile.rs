//! The compiler's pipeline: source → graphs → passes → weights and graphs of an artifact.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use flamingo_ir::onnx::Typing;
use flamingo_ir::op::{Flavour, Op, PanelFormat};
use flamingo_ir::{Graph, Verified};
use flamingo_models::manifest::{
    FileEntry, GraphEntry, Limits, Manifest, Provenance, SCHEMA_VERSION, WEIGHT_LAYOUT,
};
use flamingo_models::profile::Profiles;
use flamingo_models::{Source, tokenizer_json};
use flamingo_runtime::{Artifact, PREFILL_TOKENS};
use serde::{Deserialize, Serialize};

use crate::calibrate::Calibration;
use crate::coverage::report::{reports_page, stage_reports, targets_of};
use crate::emit::{
    Fits, Fitted, LayerStorage, Staging, WeightPlan, WrittenWeights, hash_file, outlier_ratio,
    write_file, write_graph,
};
use crate::gate::{Bounds, Refused, Verdict, worst_first};
use crate::observer::Observer;
use crate::original::Original;
use crate::page::report_page;
use crate::parity::kl_bound;
use crate::passes::{PassRecord, optimise, packed_weights};
use crate::ranges::HalfRanges;
use crate::scheme::{Choice, LayerGroup, Precision, Scheme};
use crate::static_ranges::StaticRanges;

/// What to compile, and how.
#[derive(Debug, Clone)]
pub struct CompileOptions {
    /// Recipe, folder with a recipe, or Hugging Face folder; for [`compile_source`] what the artifact's page calls it.
    pub source: PathBuf,
    /// The artifact's folder.
    pub output: PathBuf,
    /// Whether an artifact at `output` may be replaced.
    pub overwrite: bool,
    /// Most tokens of a sequence; default: what the language model was made for.
    pub max_context: Option<usize>,
    /// Most media of a prompt.
    pub max_images: usize,
    /// How weights are stored.
    pub scheme: Scheme,
    /// Flavours of graphs beside [`CPU_FLAVOURS`], which point to the same weights.
    pub flavours: Vec<Flavour>,
    /// What int8 and int4 are calibrated on; ignored for f32.
    pub calibrate: CalibrateOn,
    /// Where what calibration saw is kept, to be read the next time.
    pub calibration_cache: Option<PathBuf>,
    /// Rounds activations of int8 in graphs for TensorRT to levels of ranges that this chooses; none leaves them f16.
    /// Ignored without calibration.
    pub observer: Option<Observer>,
    /// What rounded weights must keep; none takes them as they are.
    pub gate: Option<Gate>,
    /// Where to write the graphs' text after which pass.
    pub dump: Option<(String, PathBuf)>,
}

impl CompileOptions {
    /// Whether it is to be found out what f16 can hold: for graphs of half precision, unless nothing is calibrated.
    pub(crate) fn measures_ranges(&self) -> bool {
        let is_half = |flavour: &Flavour| flavour.half().is_some();
        self.calibrate != CalibrateOn::Nothing && self.flavours.iter().any(is_half)
    }

    /// What chooses ranges of activations, if there are graphs that have them.
    fn static_observer(&self) -> Option<Observer> {
        let takes_it = |flavour: &Flavour| matches!(flavour, Flavour::Trt10_3 | Flavour::Trt10_15);
        self.observer.filter(|_| self.measures_ranges() && self.flavours.iter().any(takes_it))
    }
}

/// What the rounding of weights is fitted to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum CalibrateOn {
    /// Nothing: weights are rounded to nearest.
    #[default]
    Nothing,
    /// Prompts that the program makes.
    Bundled,
    /// A file of prompts, one in JSON a line.
    File(PathBuf),
}

/// The gate: how far next tokens may move from those of f32.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gate {
    /// Largest mean KL divergence in nats; none: [`kl_bound`] of what is stored.
    pub max_kl: Option<f64>,
    /// Stores the layers that lose most finer until the bound holds.
    pub auto_mixed: bool,
    /// Asks the demo's tasks, too, so many prompts of each; no task may lose more than the bound.
    pub eval: Option<usize>,
    /// Measures the KL of each layer alone, too: an artifact for each is made and run.
    pub each_layer: bool,
}

/// What the compiler did, `report.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// `pass` or `fail`.
    pub verdict: String,
    /// Runtime ops after each pass, by stage.
    pub passes: BTreeMap<String, Vec<PassRecord>>,
    /// Parity with the source: filled in by `flamingoc check`.
    pub parity: serde_json::Value,
    /// Bytes and scheme of the weights.
    pub quantisation: Quantisation,
    /// What graphs for GPUs keep in f16, and what of them is in f32; none without such graphs or without calibration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub f16: Option<HalfRanges>,
    /// Weights with values that are not finite, and how many.
    pub not_finite: BTreeMap<String, usize>,
    /// What a user should know.
    pub notes: Vec<String>,
}

/// How weights are stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Quantisation {
    /// Bytes of the weights in f32.
    pub bytes_f32: u64,
    /// Bytes of the weights as stored.
    pub bytes: u64,
    /// Mean KL divergence of next tokens from the source, in nats; 0 for f32, none before
    /// `flamingoc check`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_kl: Option<f64>,
    /// Share of equal next tokens; 1 for f32, none before `flamingoc check`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1_agreement: Option<f64>,
    /// Every weight matrix; empty for f32, where all are alike.
    pub layers: Vec<LayerStorage>,
    /// The comparison with f32 on prompts that the rounding was not fitted to; none without a gate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// Ranges of activations of graphs with explicit quantisation; none without such graphs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub static_ranges: Option<StaticRanges>,
    /// What the comparison had to keep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bounds: Option<Bounds>,
    /// Layers that were stored finer so that the bound holds, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub raised: Vec<Raised>,
}

/// A layer that was stored finer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Raised {
    /// Name of its op.
    pub layer: String,
    /// How it was stored.
    pub from: String,
    /// How it is stored.
    pub to: String,
    /// Mean KL before.
    pub mean_kl: f64,
}

/// How far a compilation is.
pub enum Progress<'a> {
    /// A stage begins.
    Stage(&'a str),
    /// Weight bytes written, of how many.
    Bytes(u64, u64),
    /// Prompts run, of how many.
    Prompts(usize, usize),
}

/// The flavours of every artifact: what the native engine reads, and what ONNX Runtime's CPU provider runs.
pub const CPU_FLAVOURS: [Flavour; 2] = [Flavour::Portable, Flavour::OrtCpu];

/// Compiles a source into an artifact. The same source and options give the same bytes.
///
/// # Errors
/// A source that cannot be compiled, an output that cannot be written; [`Refused`] by the gate.
pub fn compile(
    options: &CompileOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<(Manifest, Report)> {
    progress(Progress::Stage("reading the source"));
    compile_source(&Source::open(&options.source)?, options, progress)
}

/// As [`compile`], of a source that is open already.
///
/// # Errors
/// As [`compile`].
pub fn compile_source(
    source: &Source,
    options: &CompileOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<(Manifest, Report)> {
    let limits = limits(source, options.max_context, options.max_images)?;
    require_tokens_in_vocabulary(source)?;
    let is_compared = options.gate.is_some() || options.calibrate != CalibrateOn::Nothing;
    let is_compared = is_compared && options.scheme.is_rounded();
    let original = match is_compared || options.measures_ranges() {
        true => {
            // Before long work: the output must be free.
            drop(Staging::begin(&options.output, options.overwrite)?);
            Some(Original::prepare(source, options, progress)?)
        }
        false => None,
    };
    let calibration = original.as_ref().and_then(|original| original.calibration.as_ref());
    progress(Progress::Stage("hashing the source"));
    let hashed: Result<Vec<FileEntry>> =
        source.parts.files().iter().map(|path| hash_file(path)).collect();
    let original = original.as_ref();
    let inputs = StageInputs { source, options, limits, sources: hashed?, calibration, original };
    let judging = original.filter(|_| is_compared);
    let (mut scheme, mut raised, mut bounds) = (options.scheme.clone(), Vec::new(), None);
    loop {
        let mut staged = stage(&inputs, &scheme, progress)?;
        let (Some(original), Some(gate)) = (judging, &options.gate) else {
            return staged.finish();
        };
        let verdict = original.judge(staged.staging.path(), progress)?;
        let bounds = *bounds.get_or_insert_with(|| {
            let (precision, own) = (&staged.manifest.precision, options.scheme.precision);
            let max_kl = gate.max_kl.or_else(|| kl_bound(precision)).unwrap_or(0.0);
            Bounds { max_kl, max_lost: if own == Precision::Int4 { 1.5 } else { 0.5 } }
        });
        if verdict.keeps(&bounds) {
            let quantisation = &mut staged.report.quantisation;
            quantisation.mean_kl = Some(verdict.mean_kl);
            quantisation.top1_agreement = Some(verdict.top1_agreement);
            (quantisation.verdict, quantisation.bounds) = (Some(verdict), Some(bounds));
            quantisation.raised = raised;
            if gate.each_layer {
                let layers = &mut staged.report.quantisation.layers;
                each_layer(&inputs, &scheme, original, layers, progress)?;
            }
            return staged.finish();
        }
        let worst = worst_first(&staged.report.quantisation.layers);
        let before = raised.len();
        if gate.auto_mixed {
            raise(&mut scheme, &worst, verdict.mean_kl, &mut raised);
        }
        if raised.len() == before {
            return Err(Refused { verdict, bounds, worst }.into());
        }
    }
}

/// Measures the KL of each rounded layer while all others are f32.
fn each_layer(
    inputs: &StageInputs,
    scheme: &Scheme,
    original: &Original,
    layers: &mut [LayerStorage],
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    let rounded = layers.iter().filter(|layer| layer.scheme != "f32");
    let ops: BTreeSet<String> = rounded.map(|layer| layer.op().to_owned()).collect();
    for op in ops {
        progress(Progress::Stage(&format!("`{op}` alone")));
        let own = layers.iter().find(|layer| layer.op() == op);
        let format = own.and_then(|layer| PanelFormat::from_name(&layer.scheme));
        let reach = scheme.layers.get(&op).and_then(|choice| choice.reach);
        let alone = [(op.clone(), Choice { format, reach })].into();
        let alone = Scheme { layers: alone, ..Scheme::default() };
        let staged = stage(inputs, &alone, &mut |_| {})?;
        let kl = original.judge(staged.staging.path(), &mut |_| {})?.mean_kl;
        let own = layers.iter_mut().filter(|layer| layer.op() == op);
        own.for_each(|layer| layer.kl_alone = Some(kl));
    }
    Ok(())
}

/// Stores those layers finer that lose most of their products for the fewest bytes: one in sixteen.
fn raise(scheme: &mut Scheme, worst: &[LayerStorage], mean_kl: f64, raised: &mut Vec<Raised>) {
    let gain = |layer: &&LayerStorage| layer.noise() / (layer.bytes.max(1) as f64);
    let mut layers: Vec<&LayerStorage> = worst.iter().collect();
    layers.sort_by(|a, b| gain(b).total_cmp(&gain(a)));
    let mut left = worst.len().div_ceil(16);
    for layer in layers {
        let op = layer.op();
        let format = PanelFormat::from_name(&layer.scheme);
        let choice = scheme.layers.get(op).copied().unwrap_or(Choice { format, reach: None });
        // Both weights of an op are stored alike: the second comes to a choice that was raised already.
        let is_done = choice.format != format;
        if let Some(finer) = choice.raised().filter(|_| !is_done && left > 0) {
            left -= 1;
            raised.push(Raised {
                layer: op.to_owned(),
                from: choice.to_string(),
                to: finer.to_string(),
                mean_kl,
            });
            scheme.layers.insert(op.to_owned(), finer);
        }
    }
}

/// An artifact before it is put in place.
struct Staged {
    staging: Staging,
    manifest: Manifest,
    report: Report,
    /// Of the page: the source's name.
    title: String,
}

impl Staged {
    /// Writes report and manifest.
    fn write(&mut self) -> Result<()> {
        let mut reports = vec![("report.json", pretty_json(&self.report)?)];
        if !self.report.quantisation.layers.is_empty() || self.report.f16.is_some() {
            let title = &self.title;
            reports.push(("report.html", report_page(title, &self.manifest, &self.report)?));
        }
        for (path, bytes) in reports {
            let entry = write_file(self.staging.path(), path, &bytes)?;
            self.manifest.files.retain(|file| file.path != path);
            self.manifest.files.push(entry);
        }
        self.manifest.files.sort();
        write_file(self.staging.path(), "manifest.json", &pretty_json(&self.manifest)?)?;
        Ok(())
    }

    fn finish(mut self) -> Result<(Manifest, Report)> {
        self.write()?;
        self.staging.finish()?;
        Ok((self.manifest, self.report))
    }
}

/// What does not change when layers are stored finer.
struct StageInputs<'a> {
    source: &'a Source,
    options: &'a CompileOptions,
    limits: Limits,
    sources: Vec<FileEntry>,
    calibration: Option<&'a Calibration>,
    original: Option<&'a Original>,
}

/// Everything of an artifact, with weights stored as `scheme` says and rounded for what calibration saw.
fn stage(
    inputs: &StageInputs,
    scheme: &Scheme,
    progress: &mut dyn FnMut(Progress),
) -> Result<Staged> {
    let StageInputs { source, options, limits, sources, calibration, original } = inputs;
    let (calibration, original) = (*calibration, *original);
    let graphs = source.graphs()?;
    let staging = Staging::begin(&options.output, options.overwrite)?;
    progress(Progress::Stage("optimising the graphs"));
    let dump = options.dump.as_ref();
    let (media, media_passes) = optimise_stage(graphs.media, source, scheme, calibration, dump)?;
    let (decoder, decoder_passes) =
        optimise_stage(graphs.decoder, source, scheme, calibration, dump)?;
    let stages = [&media, &decoder];
    require_layers(scheme, &stages)?;
    let plan = WeightPlan::new(&stages)?;
    let fits = fits(scheme, &stages, calibration);
    progress(Progress::Stage("writing the weights"));
    let path = staging.path().join("graphs").join(crate::emit::WEIGHTS);
    let total = plan.total_bytes();
    let mut on_bytes = |done| progress(Progress::Bytes(done, total));
    let written = plan.write(&path, &stages, &source.parts, &fits, &mut on_bytes)?;
    refuse_not_finite(&written.not_finite)?;
    let passes = BTreeMap::from([
        ("media".to_owned(), media_passes),
        ("decoder".to_owned(), decoder_passes),
    ]);
    let quantisation = quantisation(scheme, &written, plan.total_bytes_f32());
    let f16 = original.and_then(|original| original.ranges.clone());
    let mut report = report(source, passes, written.not_finite, quantisation, f16);
    progress(Progress::Stage("writing the graphs"));
    let mut files = vec![written.file];
    let mut manifest = Manifest {
        schema_version: SCHEMA_VERSION,
        compiler_version: env!("CARGO_PKG_VERSION").to_owned(),
        config: source.config.clone(),
        image: source.image.clone(),
        limits: limits.clone(),
        precision: precision_of_groups(&stages),
        weight_layout: WEIGHT_LAYOUT.to_owned(),
        graphs: Vec::new(),
        files: Vec::new(),
        provenance: provenance(sources, options, scheme),
    };
    let mut write = |flavours: &[Flavour], typings: &[Typing; 2], graphs: &mut Vec<GraphEntry>| {
        for (index, stage) in stages.iter().enumerate() {
            for flavour in flavours.iter().copied() {
                let form = (flavour, &typings[index]);
                let (entry, file) =
                    write_graph(staging.path(), &stage.name, form, stage, plan.layout(index))?;
                graphs.push(entry);
                files.push(file);
            }
        }
        anyhow::Ok(())
    };
    write(&CPU_FLAVOURS, &Default::default(), &mut manifest.graphs)?;
    let typings = typings(inputs, (staging.path(), &manifest), &mut report, progress)?;
    write(&options.flavours, &typings, &mut manifest.graphs)?;
    manifest.graphs.sort_by(|a, b| b.stage.cmp(&a.stage));
    files.extend(device_files(staging.path(), &manifest.graphs, limits, &options.flavours)?);
    if let Some(tokenizer) = &source.tokenizer {
        let bytes = tokenizer_json(tokenizer, &source.config.tokens)?;
        files.push(write_file(staging.path(), "tokenizer.json", &bytes)?);
    }
    manifest.files = files;
    let path = options.source.canonicalize().ok();
    let name = match &path {
        Some(path) if path.is_dir() => path.file_name(),
        Some(path) => path.parent().and_then(Path::file_name),
        None => options.source.file_name(),
    };
    let title = name.unwrap_or_default().to_string_lossy().into_owned();
    let mut staged = Staged { staging, manifest, report, title };
    staged.write()?;
    Ok(staged)
}

/// How the graphs of half precision are typed: what stays in f32, and what of linears of bytes is rounded to levels.
fn typings(
    inputs: &StageInputs,
    (folder, manifest): (&Path, &Manifest),
    report: &mut Report,
    progress: &mut dyn FnMut(Progress),
) -> Result<[Typing; 2]> {
    let islands = ["media", "decoder"]
        .map(|stage| report.f16.as_ref().map(|ranges| ranges.islands(stage)).unwrap_or_default());
    let has_bytes = manifest.precision.values().any(|formats| formats.contains("int8"));
    let observer = inputs.options.static_observer().filter(|_| has_bytes);
    let (Some(original), Some(observer)) = (inputs.original, observer) else {
        return Ok(islands.map(Typing::from));
    };
    let staged = Artifact { path: folder.to_owned(), manifest: manifest.clone() };
    let own = inputs.options.gate.as_ref().and_then(|gate| gate.max_kl);
    let max_kl = own.or_else(|| kl_bound(&manifest.precision)).unwrap_or(0.0);
    let ranges = original.static_ranges(&staged.load()?, &islands, (observer, max_kl), progress)?;
    let x_scales = ["media", "decoder"].map(|stage| ranges.x_scales(stage));
    report.quantisation.static_ranges = Some(ranges);
    let [media, decoder] = islands;
    let [of_media, of_decoder] = x_scales;
    Ok([
        Typing { islands: media, x_scales: of_media },
        Typing { islands: decoder, x_scales: of_decoder },
    ])
}

/// What is known of devices before the copy: where each node would run, and the sizes that TensorRT builds engines for.
fn device_files(
    folder: &Path,
    graphs: &[GraphEntry],
    limits: &Limits,
    flavours: &[Flavour],
) -> Result<Vec<FileEntry>> {
    let mut reports = Vec::new();
    let mut files = Vec::new();
    for flavour in flavours.iter().copied() {
        for target in targets_of(flavour) {
            reports.extend(stage_reports(folder, graphs, limits, target, flavour)?);
        }
        if flavour != Flavour::Cuda {
            let of =
                |stage| graphs.iter().find(|g| g.stage == stage && g.flavour == flavour.name());
            let (media, decoder) = of("media").zip(of("decoder")).context("graphs of a flavour")?;
            let profiles = Profiles::new(media, decoder, limits, PREFILL_TOKENS);
            let profiles = pretty_json(&profiles.map_err(anyhow::Error::msg)?)?;
            let path = format!("device/{}.profiles.json", flavour.name());
            files.push(write_file(folder, &path, &profiles)?);
        }
    }
    if !reports.is_empty() {
        let page = reports_page("graphs for GPUs", &reports)?;
        files.push(write_file(folder, "device/coverage.html", &page)?);
        files.push(write_file(folder, "device/coverage.json", &pretty_json(&reports)?)?);
    }
    Ok(files)
}

/// Layers that were chosen by name must be there.
fn require_layers(scheme: &Scheme, stages: &[&Verified]) -> Result<()> {
    let ops: BTreeSet<&str> = stages
        .iter()
        .flat_map(|stage| stage.nodes().iter().map(move |node| (stage, node)))
        .filter(|(stage, node)| LayerGroup::of(&stage.name, &node.name).is_some())
        .filter(|(_, node)| has_weights(&node.op))
        .map(|(_, node)| node.name.as_str())
        .collect();
    match scheme.layers.keys().find(|name| !ops.contains(name.as_str())) {
        None => Ok(()),
        Some(unknown) => bail!(
            "`--layer {unknown}`: no such layer\n\nhint: the layers are {}",
            ops.into_iter().collect::<Vec<_>>().join(", ")
        ),
    }
}

/// What the rounding of each packed weight is fitted to: what met it, with the factors that outliers were migrated
/// with taken out.
fn fits<'a>(
    scheme: &Scheme,
    stages: &[&Verified],
    calibration: Option<&'a Calibration>,
) -> Fits<'a> {
    let fit = |(name, factors): (String, Option<Vec<f32>>)| {
        let seen = calibration.and_then(|calibration| calibration.inputs(&name));
        let inputs = seen.map(|inputs| match &factors {
            Some(factors) if factors.len() == inputs.k() => {
                let inverse: Vec<f32> = factors.iter().map(|factor| 1.0 / factor).collect();
                Cow::Owned(inputs.scaled(&inverse))
            }
            _ => Cow::Borrowed(inputs),
        });
        let op = name.rsplit_once('.').map_or(name.as_str(), |(op, _)| op);
        let reach = scheme.layers.get(op).and_then(|choice| choice.reach);
        (name, Fitted { inputs, reach, outlier_ratio: seen.map(outlier_ratio) })
    };
    stages.iter().flat_map(|stage| packed_weights(stage)).map(fit).collect()
}

/// The limits of an artifact, checked against what the language model was made for.
pub(crate) fn limits(
    source: &Source,
    max_context: Option<usize>,
    max_images: usize,
) -> Result<Limits> {
    let made_for = source.config.language.max_context;
    let max_context = max_context.unwrap_or(made_for);
    let learnt = matches!(
        source.config.language.position,
        flamingo_models::config::PositionConfig::Learnt { .. }
    );
    if max_context == 0 || (learnt && max_context > made_for) {
        bail!(
            "`--max-context {max_context}`: the language model has positions for 1 to {made_for} tokens\n\n\
             hint: leave the option out to take {made_for}"
        );
    }
    let n_places = source.config.n_places();
    let max_images = if n_places > 1 { max_images.min(n_places) } else { max_images };
    Ok(Limits { max_context, max_images })
}

/// Tokens that prompts hold must have a row in the embedding.
fn require_tokens_in_vocabulary(source: &Source) -> Result<()> {
    let (tokens, vocabulary) = (&source.config.tokens, source.config.language.vocabulary);
    let used = [
        ("image", Some(tokens.image)),
        ("end_of_chunk", tokens.end_of_chunk),
        ("around_image", tokens.around_image),
    ];
    let is_outside = |id: u32| usize::try_from(id).is_ok_and(|id| id >= vocabulary);
    for (name, id) in used {
        if let Some(id) = id.filter(|id| is_outside(*id)) {
            bail!(
                "`tokens.{name}`: expected an id below the vocabulary of {vocabulary}, got {id}\n\n\
                 hint: check `[tokens]` of the recipe, or the tokenizer, against the checkpoint's embedding"
            );
        }
    }
    Ok(())
}

/// Runs the passes over a stage's graph.
pub(crate) fn optimise_stage(
    graph: Graph,
    source: &Source,
    scheme: &Scheme,
    calibration: Option<&Calibration>,
    dump: Option<&(String, PathBuf)>,
) -> Result<(Verified, Vec<PassRecord>)> {
    let stage = graph.name.clone();
    let mut dumped = Ok(());
    let mut observe = |pass: &str, graph: &Graph| {
        if let Some((wanted, folder)) = dump
            && wanted == pass
        {
            let path = folder.join(format!("{stage}.{pass}.txt"));
            dumped = std::fs::create_dir_all(folder)
                .and_then(|()| std::fs::write(&path, graph.to_string()))
                .with_context(|| format!("cannot write `{}`", path.display()));
        }
    };
    let result = optimise(graph, &source.parts, scheme, calibration, &mut observe)?;
    dumped?;
    Ok(result)
}

/// NaN and infinite weights make every answer worthless.
fn refuse_not_finite(not_finite: &BTreeMap<String, usize>) -> Result<()> {
    if not_finite.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> =
        not_finite.iter().map(|(name, n)| format!("  `{name}`: {n} values")).collect();
    bail!(
        "{} weights have values that are NaN or infinite:\n{}\n\nhint: the checkpoint is damaged, or was saved \
         from a run that diverged",
        not_finite.len(),
        lines.join("\n")
    )
}

fn report(
    source: &Source,
    passes: BTreeMap<String, Vec<PassRecord>>,
    not_finite: BTreeMap<String, usize>,
    quantisation: Quantisation,
    f16: Option<HalfRanges>,
) -> Report {
    Report {
        verdict: "pass".to_owned(),
        passes,
        parity: serde_json::Value::Null,
        quantisation,
        f16,
        not_finite,
        notes: source.notes.clone(),
    }
}

fn quantisation(scheme: &Scheme, written: &WrittenWeights, bytes_f32: u64) -> Quantisation {
    let is_f32 = !scheme.is_rounded();
    Quantisation {
        bytes_f32,
        bytes: written.file.bytes,
        mean_kl: is_f32.then_some(0.0),
        top1_agreement: is_f32.then_some(1.0),
        layers: if is_f32 { Vec::new() } else { written.layers.clone() },
        verdict: None,
        static_ranges: None,
        bounds: None,
        raised: Vec::new(),
    }
}

/// Ops whose weights are stored as a scheme says.
fn has_weights(op: &Op) -> bool {
    matches!(op, Op::Linear(_) | Op::FeedForward(_) | Op::GatedCrossAttention(_) | Op::Gather(_))
}

/// How the weights of each layer group are stored: one format, or several joined by `+`.
pub(crate) fn precision_of_groups(stages: &[&Verified]) -> BTreeMap<String, String> {
    let mut found: BTreeMap<LayerGroup, BTreeSet<String>> = BTreeMap::new();
    for graph in stages {
        let (producers, known) = (graph.producers(), graph.build_time_values());
        for node in graph.nodes() {
            let group = LayerGroup::of(&graph.name, &node.name);
            let is_stored = has_weights(&node.op) || matches!(node.op, Op::Convolution(_));
            let Some(group) = group.filter(|_| is_stored) else { continue };
            for input in node.inputs.iter().filter(|input| graph.fact(**input).rank() == 2) {
                let format = match producers.get(input).map(|id| &graph.node(*id).op) {
                    Some(Op::UnpackPanels(op)) => op.format.to_string(),
                    _ if known.contains(input) => "f32".to_owned(),
                    _ => continue,
                };
                found.entry(group).or_default().insert(format);
            }
        }
    }
    let joined = |formats: BTreeSet<String>| formats.into_iter().collect::<Vec<_>>().join("+");
    found.into_iter().map(|(group, formats)| (group.name().to_owned(), joined(formats))).collect()
}

fn provenance(sources: &[FileEntry], options: &CompileOptions, scheme: &Scheme) -> Provenance {
    let mut recorded = BTreeMap::from([("max_images".to_owned(), options.max_images.to_string())]);
    if *scheme != Scheme::default() {
        recorded.insert("precision".to_owned(), scheme.to_string());
    }
    if let CalibrateOn::File(path) = &options.calibrate {
        recorded.insert("calibrate".to_owned(), path.display().to_string());
    }
    if let Some(max_context) = options.max_context {
        recorded.insert("max_context".to_owned(), max_context.to_string());
    }
    Provenance { sources: sources.to_vec(), options: recorded }
}

fn pretty_json(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value)?;
    bytes.push(b'\n');
    Ok(bytes)
}
